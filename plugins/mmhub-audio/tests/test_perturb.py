"""Noise in training: its level, its colour, and that it comes from the sample's generator alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy
from mmhub_audio.perturb import NO_AUGMENT, Augment
from mmhub_audio.processor import AudioProcessor

RATE = 8000  # Hz
TONE = {"array": 0.3 * np.sin(np.arange(RATE) * 0.7).astype(np.float32), "sampling_rate": RATE}
STILL = {"speed": 0.0, "shift": 0.0, "gain_db": 0.0}


def reader(**augment: Any) -> AudioProcessor:
    return AudioProcessor(AudioProcessor.Config(sample_rate=RATE, augment=Augment(**STILL | augment)))


def noise_of(processor: AudioProcessor, raw: Any = TONE, seed: int = 0) -> torch.Tensor:
    changed = processor.read(raw, Policy(), torch.Generator().manual_seed(seed))
    return changed - processor.read(raw, Policy())


def slope(noise: torch.Tensor) -> float:
    """How many decibels the power changes with an octave."""
    power = torch.fft.rfft(noise).abs().square()
    low, high = (10 * power[a : 2 * a].mean().log10() for a in (64, 1024))
    return float(high - low) / 4


@pytest.mark.parametrize("kind", ["white", "pink"])
def test_noise_lies_the_stated_decibels_under_the_clip(kind: str) -> None:
    power = float(np.mean(TONE["array"] ** 2))  # type: ignore[operator]
    for level in (0.0, 10.0, 30.0):
        noise = noise_of(reader(noise_db=(level, level), noise=kind))
        assert 10 * np.log10(power / float(noise.square().mean())) == pytest.approx(level, abs=0.01)


def test_levels_are_drawn_from_the_whole_range() -> None:
    processor, power = reader(noise_db=(5.0, 25.0)), float(np.mean(TONE["array"] ** 2))  # type: ignore[operator]
    levels = [10 * np.log10(power / float(noise_of(processor, seed=s).square().mean())) for s in range(40)]
    assert 5 <= min(levels) < 8
    assert 22 < max(levels) <= 25


def test_white_noise_is_flat_and_pink_noise_falls_three_decibels_an_octave() -> None:
    assert slope(noise_of(reader(noise_db=(10.0, 10.0)))) == pytest.approx(0, abs=0.5)
    assert slope(noise_of(reader(noise_db=(10.0, 10.0), noise="pink"))) == pytest.approx(-3, abs=0.5)


def test_noise_depends_on_the_seed_alone_and_leaves_other_draws_as_they_were() -> None:
    noisy = AudioProcessor(AudioProcessor.Config(sample_rate=RATE, augment=Augment(noise_db=(20.0, 20.0))))
    plain = AudioProcessor(AudioProcessor.Config(sample_rate=RATE, augment=Augment()))
    rows = [
        [processor.read(TONE, Policy(), torch.Generator().manual_seed(s)) for s in range(6)]
        for processor in (noisy, noisy, plain)
    ]
    torch.rand(1)  # the global generator plays no part
    assert all(torch.equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))
    assert [len(a) for a in rows[0]] == [len(a) for a in rows[2]]
    assert not any(torch.equal(a, b) for a, b in zip(rows[0], rows[2], strict=True))
    close = [float((a - b).square().mean() / b.square().mean()) for a, b in zip(rows[0], rows[2], strict=True)]
    assert max(close) < 0.02


def test_silence_stays_silent_and_nothing_is_added_outside_training() -> None:
    silence = {"array": np.zeros(800, np.float32), "sampling_rate": RATE}
    processor = reader(noise_db=(0.0, 0.0))
    assert processor.augments
    assert not noise_of(processor, silence).any()
    assert torch.equal(processor.read(TONE, Policy()), torch.from_numpy(np.asarray(TONE["array"])))
    assert not NO_AUGMENT.active


def test_noise_comes_from_the_files_of_a_folder(tmp_path: Path) -> None:
    for number, rate in enumerate((8000, 16000)):  # of constant sign, to tell them apart
        (tmp_path / "deep").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "deep" / f"{number}.wav", np.full(rate // 4, 0.5 - number), rate)
    (tmp_path / "notes.txt").write_text("no sound")
    processor = reader(noise_db=(20.0, 20.0), noise="recorded")
    policy = Policy(noise=str(tmp_path))
    changed = [processor.read(TONE, policy, torch.Generator().manual_seed(seed)) for seed in range(20)]
    added = [float((one - processor.read(TONE, policy)).median().sign()) for one in changed]
    assert set(added) == {1.0, -1.0}
    again = processor.read(TONE, policy, torch.Generator().manual_seed(3))
    assert torch.equal(again, changed[3])


def test_a_folder_without_sounds_or_with_a_broken_one_is_an_error(tmp_path: Path) -> None:
    processor, rng = reader(noise_db=(20.0, 20.0), noise="recorded"), torch.Generator()
    with pytest.raises(UsageError, match=r"has no recordings; name a folder of them in data\.noise"):
        processor.read(TONE, Policy(), rng)
    with pytest.raises(UsageError, match="holds no audio files"):
        processor.read(TONE, Policy(noise=str(tmp_path)), rng)
    (tmp_path / "broken.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"broken\.wav"):
        processor.read(TONE, Policy(noise=str(tmp_path)), rng)
