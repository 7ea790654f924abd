"""The waveform processor all encoders here share: decode, resample, optionally normalise, optionally augment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Policy, Processor, decode_config, describe_raw, encode_config
from mmhub.interfaces.roles import Window
from mmhub_audio.decode import decode, is_pair, measure, open_sound
from mmhub_audio.files import MAX_CHANNELS, MAX_RATE, MIN_RATE, Channel
from mmhub_audio.perturb import NO_AUGMENT, Augment, Draw, add_noise, draw, pad
from mmhub_audio.resample import resample, resample_blocks, resampled_length
from mmhub_audio.windows import cut


class AudioProcessor(Processor):
    """Turn audio files and arrays into mono waveforms, (S,) float32, at one sampling rate."""

    modality = "audio"

    class Config(ComponentConfig, frozen=True):
        """The whole state. `do_normalize`: zero mean and unit variance per clip; `min_samples` at `sample_rate`."""

        sample_rate: int = 16000  # Hz
        channel: Channel = "mix"  # of several: their mean, the "first", or the one of that number, from 0
        do_normalize: bool = False
        min_samples: int = 1
        augment: Augment = NO_AUGMENT

        def __post_init__(self) -> None:
            check_rate(self.sample_rate)
            check_channel(self.channel)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.augments = config.augment.active

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        waveform = decode(raw, policy, self.config.channel)
        augment, rate = self.config.augment, self.config.sample_rate
        drawn = draw(augment, rng) if rng is not None else Draw()
        samples = resample(waveform.samples, Fraction(rate, waveform.rate) / drawn.speed) * drawn.gain
        if len(samples) < self.config.min_samples:
            have, need = len(samples) / rate, self.config.min_samples / rate
            raise InputError(f"{describe_raw(raw)} lasts {have:.4f} s, but this encoder needs at least {need:.4f} s")
        power = float(samples.square().mean())
        samples = pad(samples, drawn, rate)
        if rng is not None:
            samples = add_noise(samples, power, rate, augment, policy, rng)
        return _normalize(samples) if self.config.do_normalize else samples

    def length(self, raw: Any, policy: Policy) -> int:
        """Return the number of samples without decoding them."""
        frames, rate = measure(raw, policy)
        return resampled_length(frames, Fraction(self.config.sample_rate, rate))

    def is_item(self, raw: Sequence[Any]) -> bool:
        return is_pair(raw)

    def windows(self, raw: Any, policy: Policy, seconds: float, overlap: float) -> Iterator[Window]:
        """Cut a recording into windows of raw samples at `sample_rate`, joined equal to the whole one resampled.

        A file is decoded block by block. One that is cut off or not finite further on is an InputError when that place
        is reached.
        """
        sound = open_sound(raw, policy, self.config.channel)
        rate = self.config.sample_rate
        blocks = resample_blocks(sound.blocks, Fraction(rate, sound.rate))
        return cut(blocks, rate, seconds, overlap, self.config.min_samples)

    def state(self) -> dict[str, Any]:
        return encode_config(self.config)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Config, state, "audio processor"))


def check_rate(sample_rate: int) -> None:
    """Raise ValueError unless `sample_rate`, in Hz, is one that audio can have."""
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise ValueError(f"sample_rate must lie in {MIN_RATE} to {MAX_RATE} Hz, not {sample_rate}")


def check_channel(channel: Channel) -> None:
    """Raise ValueError unless `channel` may name one."""
    if isinstance(channel, int) and not 0 <= channel < MAX_CHANNELS:
        raise ValueError(f'channel must be "mix", "first" or a number from 0 to {MAX_CHANNELS - 1}, not {channel}')


def _normalize(samples: Tensor) -> Tensor:
    """Zero mean and unit variance, with the epsilon of transformers' Wav2Vec2FeatureExtractor."""
    return (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
