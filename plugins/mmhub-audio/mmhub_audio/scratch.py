"""What the encoders trained from scratch share: the log-mel front end, its settings, and convolutional subsampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub_audio.files import Channel
from mmhub_audio.logmel import LogMel, spec_augment
from mmhub_audio.mfcc import MFCC
from mmhub_audio.perturb import Augment
from mmhub_audio.processor import AudioProcessor, check_channel, check_rate


class ScratchConfig(ComponentConfig, frozen=True):
    """Settings of the front end; `mask_bands` and `mask_time` are SpecAugment's, 0 = off."""

    sample_rate: int = 16000  # Hz; input of any other rate is resampled
    channel: Channel = "mix"  # of several: their mean, the "first", or the one of that number, from 0
    features: Literal["log-mel", "mfcc"] = "log-mel"
    n_mels: int = 64
    n_mfcc: int = 40  # coefficients of the `n_mels` bands
    window_ms: float = 25.0
    hop_ms: float = 10.0
    mask_bands: int = 12
    mask_time: float = 0.1  # of the clip, each of two spans
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        check_rate(self.sample_rate)
        check_channel(self.channel)
        if not 1 <= self.hop_ms <= self.window_ms <= 1000:
            raise ValueError("hop_ms and window_ms must satisfy 1 <= hop_ms <= window_ms <= 1000 milliseconds")
        if self.n_mels < 4 or self.mask_bands < 0 or not 0 <= self.mask_time < 1:
            raise ValueError("n_mels must be at least 4, mask_bands at least 0, and mask_time in [0, 1)")
        if self.features == "mfcc" and not 4 <= self.n_mfcc <= self.n_mels:
            raise ValueError(f"n_mfcc must lie in 4 to n_mels = {self.n_mels}, not {self.n_mfcc}")

    @property
    def bands(self) -> int:
        """Width of a frame."""
        return self.n_mfcc if self.features == "mfcc" else self.n_mels


class ScratchEncoder(Encoder):
    """Waveform -> log-mel frames, masked in training -> MFCC if asked for -> `encode`, which a subclass fills in.

    Padding changes nothing in evaluation mode.
    """

    modality = "audio"
    padding_invariant = True
    stride = 4  # frames for each token

    def __init__(self, config: Any, processor: Any) -> None:
        super().__init__(config, processor)
        self.dim = config.dim
        self.frontend = LogMel(config.sample_rate, config.n_mels, config.window_ms, config.hop_ms)
        self.cepstrum = MFCC(config.n_mfcc, config.n_mels) if config.features == "mfcc" else None
        self.token_seconds = self.stride * self.frontend.hop / config.sample_rate

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> AudioProcessor:
        return AudioProcessor(
            AudioProcessor.Config(sample_rate=config.sample_rate, channel=config.channel, augment=config.augment)
        )

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> AudioProcessor:
        return AudioProcessor.from_state(state, files)

    def token_count(self, positions: int) -> int:
        return -(-(1 + positions // self.frontend.hop) // self.stride)

    @abstractmethod
    def encode(self, frames: Tensor, mask: Tensor) -> Features:
        """Turn normalised frames (N, T, config.bands), zero where masked, into features."""

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        frames, mask = self.frontend(data, mask)
        if self.training and (self.config.mask_bands or self.config.mask_time):
            frames = spec_augment(frames, mask, self.config.mask_bands, self.config.mask_time)
        if self.cepstrum is not None:
            frames = self.cepstrum(frames, mask)
        return self.encode(frames.to(next(self.parameters()).dtype), mask)


class Subsample(nn.Module):
    """Two strided 3x3 convolutions over (time, band), then a projection: (N, T, M) -> (N, ceil(T / 4), D).

    As in Dong et al. 2018 (Speech-Transformer). A convolution reads zeros beyond the last real frame, as it would at
    the end of the tensor, because its input is masked each time.
    """

    def __init__(self, bands: int, channels: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(channels * -(-bands // 4), dim)

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.first(frames.unsqueeze(1)))
        mask = mask[:, ::2]
        x = F.gelu(self.second(x * mask[:, None, :, None].to(x.dtype)))
        mask = mask[:, ::2]
        x = self.out(x.transpose(1, 2).flatten(2))
        return x * mask.unsqueeze(-1).to(x.dtype), mask


def finish(tokens: Tensor, mask: Tensor) -> Features:
    """Zero the padded positions of (N, T, D) tokens and wrap them."""
    return Features(tokens=torch.where(mask.unsqueeze(-1), tokens, tokens.new_zeros(())), mask=mask)
