"""The encoder of Whisper, Radford et al. 2022 (arXiv:2212.04356): log-mel frames of 30 seconds in, 20 ms tokens out.

The model was trained on windows padded to 30 seconds and sees that padding, so the window is always filled here as
well; a clip's tokens are then the same whatever else is in the batch. Longer recordings are cut into such windows,
for transcripts by `mmhub.speech`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmhub.batch import Features
from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Encoder, Policy, Processor, decode_config, describe_raw, encode_config
from mmhub.interfaces.roles import Window
from mmhub_audio.files import Channel
from mmhub_audio.library import (
    Value,
    build,
    configure,
    load_exactly,
    model_config,
    read_json,
    read_tensors,
    sampling_rate,
)
from mmhub_audio.processor import AudioProcessor, check_channel
from mmhub_audio.scratch import finish

_RATE, _WINDOW, _HOP = 16000, 400, 160  # Hz, samples, samples: the same for every Whisper model
# Hyper-parameters that shape the encoder. Nothing else is handed on to transformers.
_KEYS = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layerdrop",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "activation_function",
    "init_std",
    "scale_embedding",
    "max_source_positions",
)


class WhisperProcessor(Processor):
    """Turn audio into log-mel frames over a window of fixed length: data (N, M, W), mask (N, W) over real frames."""

    modality = "audio"

    class Config(ComponentConfig, frozen=True):
        n_mels: int = 80
        frames: int = 3000  # of 10 ms
        channel: Channel = "mix"  # of several: their mean, the "first", or the one of that number, from 0

        def __post_init__(self) -> None:
            if not 1 <= self.n_mels <= 512 or not 1 <= self.frames <= 360_000:
                raise ValueError("n_mels must lie in 1 to 512 and frames in 1 to 360000")
            check_channel(self.channel)

    def __init__(self, config: Config) -> None:
        self.config = config
        self._audio = AudioProcessor(AudioProcessor.Config(sample_rate=_RATE, channel=config.channel))
        filters = mel_filter_bank(
            _WINDOW // 2 + 1, config.n_mels, 0.0, 8000.0, _RATE, norm="slaney", mel_scale="slaney"
        )
        self._filters = torch.from_numpy(filters).to(torch.float32)

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        samples = self._audio.read(raw, policy)
        limit = self.config.frames * _HOP
        if len(samples) > limit:
            have, most = len(samples) / _RATE, limit / _RATE
            raise InputError(
                f"{describe_raw(raw)} lasts {have:.1f} s, but Whisper takes at most {most:g} s",
                "cut it into shorter clips; `mmhub predict` takes recordings of any length",
            )
        return samples

    def is_item(self, raw: Sequence[Any]) -> bool:
        return self._audio.is_item(raw)

    def windows(self, raw: Any, policy: Policy, seconds: float, overlap: float) -> Iterator[Window]:
        """Cut a recording as `AudioProcessor.windows` does."""
        return self._audio.windows(raw, policy, seconds, overlap)

    def length(self, raw: Any, policy: Policy) -> int:
        """Return the number of real frames without decoding."""
        return -(-self._audio.length(raw, policy) // _HOP)

    def pack(self, items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        data = torch.stack([self.log_mel(samples) for samples in items])
        lengths = torch.tensor([-(-len(samples) // _HOP) for samples in items])
        return data, torch.arange(self.config.frames)[None] < lengths[:, None]

    @property
    def window_seconds(self) -> float:
        """What the model hears at once, in seconds."""
        return self.config.frames * _HOP / _RATE

    def rest(self, data: Tensor, seconds: Tensor) -> Tensor:
        """Return frames (N, M, W) from so many seconds on, (N,) each, filled up with zeros as Whisper's authors do."""
        starts = (seconds * _RATE / _HOP).round().long().tolist()
        left = [F.pad(frames[:, start:], (0, start)) for frames, start in zip(data, starts, strict=True)]
        return torch.stack(left)

    def log_mel(self, samples: Tensor) -> Tensor:
        """Log-mel frames of (S,) samples padded with silence, (M, W); equals transformers' WhisperFeatureExtractor.

        Frames of pure silence are filled in, not computed.
        """
        frames = min(self.config.frames, -(-(len(samples) + _WINDOW) // _HOP))
        padded = F.pad(samples, (0, frames * _HOP - len(samples)))
        spectrum = torch.stft(padded, _WINDOW, _HOP, window=torch.hann_window(_WINDOW), return_complex=True)
        mel = self._filters.T @ spectrum[:, :-1].abs().square()
        mel = F.pad(mel, (0, self.config.frames - frames))
        log = mel.clamp(min=1e-10).log10()
        return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0

    def state(self) -> dict[str, Any]:
        return encode_config(self.config)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Config, state, "whisper processor"))


class Whisper(Encoder):
    """Whisper's encoder. Tokens beyond a clip's end are cut off, so that only what was said travels on; but not for its
    own decoder, which was trained on whole windows."""

    modality = "audio"
    token_seconds = 2 * _HOP / _RATE
    padding_invariant = True

    class Config(ComponentConfig, frozen=True):
        """`config` holds transformers' hyper-parameters by its names; the default is the size of whisper-tiny.

        With `whole_window` silence after a clip's end counts as part of it. Whisper's decoder sets this itself.
        """

        sample_rate: int = _RATE  # Hz; Whisper has no other
        channel: Channel = "mix"  # of several: their mean, the "first", or the one of that number, from 0
        whole_window: bool = False
        config: dict[str, Value] = msgspec.field(default_factory=dict)

        def __post_init__(self) -> None:
            if self.sample_rate != _RATE:
                raise ValueError(f"whisper works at {_RATE} Hz, not {self.sample_rate}: leave sample_rate out")
            check_channel(self.channel)

    def __init__(self, config: Any, processor: Any) -> None:
        hyper = _library_config(config.config)
        table = {key: getattr(hyper, key) for key in _KEYS}
        super().__init__(msgspec.structs.replace(config, config=table), processor)
        self.model = build(WhisperEncoder, hyper, "whisper")
        self.dim = hyper.d_model

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> WhisperProcessor:
        hyper = _library_config(config.config)
        return WhisperProcessor(
            WhisperProcessor.Config(
                n_mels=hyper.num_mel_bins, frames=2 * hyper.max_source_positions, channel=config.channel
            )
        )

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> WhisperProcessor:
        return WhisperProcessor.from_state(state, files)

    @classmethod
    def from_library(cls, config: Any, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        stored = model_config(path, "whisper", "whisper")
        sampling_rate(read_json(path, "preprocessor_config.json"), _RATE, path)
        table = {k: stored[k] for k in _KEYS if k in stored} | dict(config.config)
        with torch.device("meta"):
            encoder = cls(msgspec.structs.replace(config, config=table), None)
        encoder.processor = cls.make_processor(encoder.config)
        load_exactly(encoder.model, read_tensors(path, ("model.encoder.", "encoder.")), path)
        return encoder

    def fill_window(self) -> None:
        """Pass on the tokens of whole windows from now on."""
        self.config = msgspec.structs.replace(self.config, whole_window=True)

    def token_count(self, positions: int) -> int:
        return self.model.config.max_source_positions if self.config.whole_window else -(-positions // 2)

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        tokens = self.model(data).last_hidden_state
        if self.config.whole_window:
            return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
        real = mask[:, ::2]  # the second convolution halves the frames
        if torch.compiler.is_exporting():  # sizes may not depend on values
            return finish(tokens, real)
        longest = int(real.sum(1).max())
        return finish(tokens[:, :longest], real[:, :longest])


def _library_config(table: Mapping[str, Value]) -> Any:
    """Build transformers' configuration from a table of allowed keys."""
    return configure(transformers.WhisperConfig, table, _KEYS, "whisper")
