"""Long recordings cut into windows: what they hold, where they stand, and how little memory that takes."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy, Window
from mmhub_audio.processor import AudioProcessor
from mmhub_audio.whisper import WhisperProcessor
from mmhub_audio.windows import cut

LONG = Policy(max_seconds=float("inf"))


def noise(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Noise of a fixed seed, (S, channels) float32."""
    return np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), channels)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV", "subtype": "FLOAT"} | options))
    return file.getvalue()


def joined(windows: list[Window], rate: int) -> torch.Tensor:
    """What the windows hold, each sample once: the first of two that share it."""
    parts = [torch.from_numpy(w.raw["array"])[round(w.left * rate) :] for w in windows]
    return torch.cat(parts)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 44101])
def test_joined_windows_are_the_whole_recording_resampled(rate: int) -> None:
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=16000))
    content = encoded(noise(3.1, rate, channels=2), rate)
    windows = list(processor.windows(content, LONG, 1.0, 0.25))
    whole = processor.read(content, LONG)
    assert len(windows) == 4
    torch.testing.assert_close(joined(windows, 16000), whole, atol=1e-6, rtol=0)
    for window in windows:
        at = round(window.start * 16000)
        assert window.raw["array"].dtype == np.float32
        part = whole[at : round(window.end * 16000)]
        torch.testing.assert_close(processor.read(window.raw, LONG), part, atol=1e-6, rtol=0)


def test_a_window_says_where_it_stands_and_what_it_shares() -> None:
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=8000))
    windows = list(processor.windows({"array": noise(2.5, 8000)[:, 0], "sampling_rate": 8000}, LONG, 1.0, 0.5))
    places = [(w.start, w.end, w.left, w.right) for w in windows]
    assert places == [(0, 1, 0, 0.5), (0.5, 1.5, 0.5, 0.5), (1, 2, 0.5, 0.5), (1.5, 2.5, 0.5, 0)]


@pytest.mark.parametrize("seconds", [0.01, 0.5, 1.0])
def test_a_clip_no_longer_than_a_window_is_one(seconds: float) -> None:
    content = encoded(noise(seconds, 8000), 8000)
    (window,) = WhisperProcessor(WhisperProcessor.Config()).windows(content, LONG, 1.0, 0.2)
    assert (window.start, window.end, window.left, window.right) == (0, seconds, 0, 0)
    assert len(window.raw["array"]) == 16000 * seconds


def test_the_last_window_is_never_too_short_for_the_encoder() -> None:
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=8000, min_samples=400))
    samples = noise(1, 8000)[:, 0]
    for length in (2000, 2001, 2399, 2400, 4001):
        clip = {"array": samples[:length], "sampling_rate": 8000}
        windows = list(processor.windows(clip, LONG, 0.25, 0.0))
        assert min(len(w.raw["array"]) for w in windows) >= 400
        assert torch.equal(joined(windows, 8000), torch.from_numpy(samples[:length]))
        for before, after in pairwise(windows):
            assert before.right == after.left == pytest.approx(before.end - after.start)


@pytest.mark.parametrize("options", [{"format": "FLAC", "subtype": "PCM_16"}, {"format": "OGG", "subtype": "VORBIS"}])
def test_path_and_bytes_of_any_format_give_the_same_windows(options: dict[str, str], tmp_path: Path) -> None:
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=16000))
    content = encoded(noise(3, 22050), 22050, **options)
    file = tmp_path / "clip.raw"  # a name from which libsndfile would expect samples without a header
    file.write_bytes(content)
    for raw in (content, file, str(file), {"bytes": None, "path": str(file)}):
        found = joined(list(processor.windows(raw, LONG, 1.0, 0.1)), 16000)
        torch.testing.assert_close(found, processor.read(content, LONG), atol=1e-6, rtol=0)


def test_a_file_of_half_a_gigabyte_is_cut_without_holding_it(tmp_path: Path) -> None:
    file = tmp_path / "long.wav"
    header = encoded(np.zeros((1, 2), np.float32), 16000)[:-8]
    size = 3600 * 16000 * 8
    with file.open("wb") as out:  # sparse: silence takes no room on the disk
        out.write(header.replace((8).to_bytes(4, "little"), size.to_bytes(4, "little")))
        out.truncate(len(header) + size)
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=16000))
    windows = processor.windows(file, LONG, 30.0, 5.0)
    tracemalloc.start()
    try:
        starts = [window.start for window, _ in zip(windows, range(3), strict=False)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert starts == [25.0 * i for i in range(3)]
    assert peak < 20e6  # bytes, by numpy; what torch holds is counted below
    with pytest.raises(InputError, match=r"long\.wav' lasts 3600\.0 s, more than the limit of 600 s"):
        processor.windows(file, Policy(), 30.0, 5.0)


def test_no_more_is_read_than_the_window_needs() -> None:
    read = 0

    def blocks() -> Iterator[torch.Tensor]:
        nonlocal read
        for _ in range(10_000):
            read += 100
            yield torch.zeros(100)

    windows = cut(blocks(), 100, 10.0, 2.0)
    assert read == 0
    for number in range(5):
        next(windows)
        assert read <= 1000 + 800 * number + 200


def test_damage_is_an_error_when_it_is_reached(tmp_path: Path) -> None:
    processor = AudioProcessor(AudioProcessor.Config())
    file = tmp_path / "cut.flac"
    content = encoded(noise(20, 16000), 16000, format="FLAC", subtype="PCM_16")
    file.write_bytes(content[: len(content) // 2])
    windows = processor.windows(file, LONG, 2.0, 0.0)
    assert next(windows).end == 2.0
    with pytest.raises(InputError, match=r"cut\.flac"):
        list(windows)
    spoilt = noise(20, 16000)
    spoilt[-1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        list(processor.windows(encoded(spoilt, 16000), LONG, 2.0, 0.0))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("no/such.wav", "no file 'no/such.wav'"),
        (b"", "is empty"),
        (b"text and no more", "cannot decode 16 bytes as audio"),
        (np.zeros(9), "does not say its sampling rate"),
    ],
)
def test_a_bad_input_is_refused_before_the_first_window(raw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AudioProcessor(AudioProcessor.Config()).windows(raw, LONG, 1.0, 0.0)


def test_an_impossible_cut_is_refused() -> None:
    processor = AudioProcessor(AudioProcessor.Config(min_samples=400))
    clip = {"array": np.zeros(9000), "sampling_rate": 16000}
    for seconds, overlap in ((1.0, 1.0), (0.0, 0.0), (1.0, -0.5), (1.0, 2.0)):
        with pytest.raises(UsageError, match="expected an overlap from 0 to less than a window"):
            processor.windows(clip, LONG, seconds, overlap)
    with pytest.raises(UsageError, match=r"windows of at least 0\.025 s"):
        processor.windows(clip, LONG, 0.01, 0.0)
