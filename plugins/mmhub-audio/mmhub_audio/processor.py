"""The waveform processor all encoders here share: decode, resample, optionally normalise, optionally augment."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, Self

import torch
import torchaudio
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import ComponentConfig, Policy, Processor, decode_config, describe_raw, encode_config
from mmhub_audio.decode import MAX_RATE, MIN_RATE, decode, measure

_MAX_TERM = 1000  # bounds the resampling kernel; a rate is then off by less than one part in a million


class Augment(ComponentConfig, frozen=True):
    """Changes made to a clip in training. Zero switches one off.

    `speed` picks one of (1 - speed, 1, 1 + speed) times the original, as in Ko et al. 2015 "Audio augmentation for
    speech recognition"; `shift` adds up to so many seconds of silence at either end; `gain_db` changes the level by
    up to so many decibels either way.
    """

    speed: float = 0.1
    shift: float = 0.05  # seconds
    gain_db: float = 6.0

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= 0.5:
            raise ValueError(f"speed must lie in 0 to 0.5, not {self.speed}")
        if not 0 <= self.shift <= 5 or not 0 <= self.gain_db <= 60:
            raise ValueError("shift must lie in 0 to 5 seconds and gain_db in 0 to 60")

    @property
    def active(self) -> bool:
        return bool(self.speed or self.shift or self.gain_db)


NO_AUGMENT = Augment(speed=0.0, shift=0.0, gain_db=0.0)


class AudioProcessor(Processor):
    """Turn audio files and arrays into mono waveforms, (S,) float32, at one sampling rate."""

    modality = "audio"

    class Config(ComponentConfig, frozen=True):
        """The whole state. `do_normalize`: zero mean and unit variance per clip; `min_samples` at `sample_rate`."""

        sample_rate: int = 16000  # Hz
        do_normalize: bool = False
        min_samples: int = 1
        augment: Augment = NO_AUGMENT

        def __post_init__(self) -> None:
            check_rate(self.sample_rate)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.augments = config.augment.active

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        waveform = decode(raw, policy)
        augment = self.config.augment
        speed, gain, left, right = _draw(augment, rng) if rng is not None else (Fraction(1), 1.0, 0.0, 0.0)
        ratio = Fraction(self.config.sample_rate, waveform.rate) / speed
        samples = resample(waveform.samples, ratio) * gain
        if len(samples) < self.config.min_samples:
            rate = self.config.sample_rate
            have, need = len(samples) / rate, self.config.min_samples / rate
            raise InputError(f"{describe_raw(raw)} lasts {have:.4f} s, but this encoder needs at least {need:.4f} s")
        pads = int(left * self.config.sample_rate), int(right * self.config.sample_rate)
        samples = torch.nn.functional.pad(samples, pads) if any(pads) else samples
        return _normalize(samples) if self.config.do_normalize else samples

    def length(self, raw: Any, policy: Policy) -> int:
        """Return the number of samples without decoding them."""
        frames, rate = measure(raw, policy)
        return resampled_length(frames, Fraction(self.config.sample_rate, rate))

    def state(self) -> dict[str, Any]:
        return encode_config(self.config)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(decode_config(cls.Config, state, "audio processor"))


def check_rate(sample_rate: int) -> None:
    """Raise ValueError unless `sample_rate`, in Hz, is one that audio can have."""
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise ValueError(f"sample_rate must lie in {MIN_RATE} to {MAX_RATE} Hz, not {sample_rate}")


def resample(samples: Tensor, ratio: Fraction) -> Tensor:
    """Change the rate of (S,) samples by `ratio` = new / old, with torchaudio's windowed-sinc filter.

    A ratio of large terms (44,101 Hz to 16 kHz would need a kernel of 700 million weights) is rounded to the nearest
    one of small terms.
    """
    ratio = _simple(ratio)
    if ratio == 1:
        return samples
    changed: Tensor = _resampler(ratio.denominator, ratio.numerator)(samples)
    return changed


def resampled_length(frames: int, ratio: Fraction) -> int:
    """Return how many samples `resample` makes of so many; torchaudio rounds in single precision."""
    ratio = _simple(ratio)
    return int(torch.as_tensor(ratio.numerator * frames / ratio.denominator).ceil()) if ratio != 1 else frames


def _simple(ratio: Fraction) -> Fraction:
    if max(ratio.numerator, ratio.denominator) <= _MAX_TERM:
        return ratio
    # limit_denominator bounds the denominator alone, so it is given the smaller side of the ratio
    rounded = ratio.limit_denominator(_MAX_TERM) if ratio < 1 else 1 / (1 / ratio).limit_denominator(_MAX_TERM)
    return rounded if rounded > 0 else ratio


@lru_cache(maxsize=32)
def _resampler(old: int, new: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(old, new)


def _draw(augment: Augment, rng: torch.Generator) -> tuple[Fraction, float, float, float]:
    """Speed factor, amplitude factor, and the silence before and after in seconds. Always four draws."""
    step, gain, left, right = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
    speed = 1 + (int(step * 3) - 1) * Fraction(augment.speed).limit_denominator(100)
    return speed, 10 ** ((2 * gain - 1) * augment.gain_db / 20), left * augment.shift, right * augment.shift


def _normalize(samples: Tensor) -> Tensor:
    """Zero mean and unit variance, with the epsilon of transformers' Wav2Vec2FeatureExtractor."""
    return (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
