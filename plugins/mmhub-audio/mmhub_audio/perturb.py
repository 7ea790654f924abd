"""Changes made to a clip in training: speed, level, silence around it, noise. All drawn from the sample's generator."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Policy
from mmhub_audio.decode import decode
from mmhub_audio.resample import resample

_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif"}


class Augment(ComponentConfig, frozen=True):
    """Changes made to a clip in training. Zero switches one off; noise is off unless `noise_db` is given.

    `speed` picks one of (1 - speed, 1, 1 + speed) times the original, as in Ko et al. 2015 "Audio augmentation for
    speech recognition"; `shift` adds up to so many seconds of silence at either end; `gain_db` changes the level by
    up to so many decibels either way. `noise_db` = [low, high] adds noise that lies so many decibels under the clip's
    own mean power: white, pink (power falling with frequency, 3 dB an octave), or recorded: a stretch of one of the
    audio files in the folder that `Policy.noise` names, which is `data.noise` of a recipe.
    """

    speed: float = 0.1
    shift: float = 0.05  # seconds
    gain_db: float = 6.0
    noise_db: tuple[float, float] | None = None
    noise: Literal["white", "pink", "recorded"] = "white"

    def __post_init__(self) -> None:
        if not 0 <= self.speed <= 0.5:
            raise ValueError(f"speed must lie in 0 to 0.5, not {self.speed}")
        if not 0 <= self.shift <= 5 or not 0 <= self.gain_db <= 60:
            raise ValueError("shift must lie in 0 to 5 seconds and gain_db in 0 to 60")
        if self.noise_db is not None and not -40 <= self.noise_db[0] <= self.noise_db[1] <= 120:
            raise ValueError("noise_db must be [low, high] within -40 to 120 decibels")
        if self.noise != "white" and self.noise_db is None:
            raise ValueError(f"noise = {self.noise!r} needs noise_db = [low, high], in decibels")

    @property
    def active(self) -> bool:
        return bool(self.speed or self.shift or self.gain_db or self.noise_db)


NO_AUGMENT = Augment(speed=0.0, shift=0.0, gain_db=0.0)


@dataclass(frozen=True)
class Draw:
    """What was drawn for one clip: factors of speed and amplitude, and the silence before and after, in seconds."""

    speed: Fraction = Fraction(1)
    gain: float = 1.0
    left: float = 0.0
    right: float = 0.0


def draw(augment: Augment, rng: torch.Generator) -> Draw:
    """Draw what happens to one clip. Always four numbers, so that what follows does not depend on the settings."""
    step, gain, left, right = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
    speed = 1 + (int(step * 3) - 1) * Fraction(augment.speed).limit_denominator(100)
    return Draw(speed, 10 ** ((2 * gain - 1) * augment.gain_db / 20), left * augment.shift, right * augment.shift)


def pad(samples: Tensor, drawn: Draw, rate: int) -> Tensor:
    """Put the silence that was drawn around (S,) samples at `rate` Hz."""
    pads = int(drawn.left * rate), int(drawn.right * rate)
    return F.pad(samples, pads) if any(pads) else samples


def add_noise(
    samples: Tensor, power: float, rate: int, augment: Augment, policy: Policy, rng: torch.Generator
) -> Tensor:
    """Add noise to (S,) samples of a clip whose mean square is `power`; silence stays silent.

    Raises:
        UsageError: there is no folder, or it holds no audio. InputError: the file drawn from it cannot be read.
    """
    if augment.noise_db is None:
        return samples
    low, high = augment.noise_db
    level = low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))
    if augment.noise == "recorded":
        noise = _from_folder(len(samples), rate, policy, rng)
    else:
        noise = torch.randn(len(samples), generator=rng)
        noise = _pink(noise) if augment.noise == "pink" else noise
    own = float(noise.square().mean())
    return samples + noise * (power / own * 10 ** (-level / 10)) ** 0.5 if own else samples


def _pink(white: Tensor) -> Tensor:
    """Weigh the spectrum of (S,) white noise by 1 / sqrt(frequency), without a mean."""
    spectrum = torch.fft.rfft(white)
    weights = torch.arange(len(spectrum), dtype=torch.float32).clamp(min=1).rsqrt()
    weights[0] = 0
    return torch.fft.irfft(spectrum * weights, n=len(white))


def _from_folder(length: int, rate: int, policy: Policy, rng: torch.Generator) -> Tensor:
    """A stretch of a file that begins anywhere, repeated where the file is too short."""
    if not policy.noise:
        raise UsageError('noise = "recorded" has no recordings', "name a folder of them in data.noise")
    files = _files(policy.noise)
    file, place = torch.rand(2, generator=rng, dtype=torch.float64).tolist()
    clip = decode(files[int(file * len(files))], policy)
    noise = resample(clip.samples, Fraction(rate, clip.rate))
    start = int(place * max(1, len(noise) - length + 1))
    return noise[start:].repeat(-(-length // len(noise[start:])))[:length]


@lru_cache(maxsize=16)
def _files(folder: str) -> tuple[str, ...]:
    found = sorted(str(file.absolute()) for file in Path(folder).rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not found:
        what = f"the noise folder '{folder}' holds no audio files"
        raise UsageError(what, f"expected {', '.join(sorted(_SUFFIXES))}")
    return tuple(found)
