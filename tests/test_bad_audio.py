"""Every kind of sound that people have: read right, or refused in one line that names the file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmhub.cli.main import main
from mmhub.errors import InputError
from mmhub.interfaces import Policy
from tests.conftest import flac, png

RATE = 16000  # Hz
FORMATS: dict[str, dict[str, Any]] = {
    "wav": {"format": "WAV"},
    "flac": {"format": "FLAC"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
    "aiff": {"format": "AIFF"},
    "au": {"format": "AU"},
    "w64": {"format": "W64"},
    "rf64": {"format": "RF64"},
}
DEPTHS = {  # of samples in a wav file, and how far they may be from those written
    "PCM_U8": 1 / 127,
    "PCM_16": 1e-4,
    "PCM_24": 1e-6,
    "PCM_32": 1e-7,
    "FLOAT": 1e-7,
    "DOUBLE": 1e-7,
    "ALAW": 0.03,
    "ULAW": 0.03,
}


def tone(rate: int = RATE, seconds: float = 0.5, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, **options: Any) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | options))
    return file.getvalue()


def distance(read: Any, samples: np.ndarray, edge: int = 800) -> float:
    """The largest difference, up to `edge` samples from the ends, where filters and codecs settle."""
    return float(np.abs(read.numpy() - samples)[edge : len(samples) - edge].max())


def processor(**config: Any) -> Any:
    from mmhub_audio.processor import AudioProcessor

    return AudioProcessor(AudioProcessor.Config(**config))


def raws(content: bytes, file: Path) -> Iterator[Any]:
    """The same content in all ways that a user may hand it over."""
    file.write_bytes(content)
    yield from (file, str(file), content, bytearray(content), {"bytes": content, "path": file.name})
    yield {"bytes": None, "path": str(file)}


def refused(raw: Any, policy: Policy | None = None, **config: Any) -> str:
    """The one line in which `read`, and as good as the same in which `windows`, refuses an input."""
    reader, policy = processor(**config), policy or Policy()
    with pytest.raises(InputError) as caught:
        reader.read(raw, policy)
    with pytest.raises(InputError) as also:
        list(reader.windows(raw, policy, 30.0, 5.0))
    assert also.value.message == caught.value.message
    with suppress(InputError):  # damage further on goes unnoticed here; nothing else may be raised
        assert reader.length(raw, policy) >= 0
    line = str(caught.value)
    assert "\n" not in line
    assert "object at 0x" not in line
    return line


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_from_path_bytes_and_struct(name: str, tmp_path: Path) -> None:
    reader = processor()
    found = [reader.read(raw, Policy()) for raw in raws(encoded(tone(), **FORMATS[name]), tmp_path / f"a.{name}")]
    assert all((one == found[0]).all() for one in found)
    assert found[0].shape == (RATE // 2,)
    assert distance(found[0], tone()) < (0.1 if name in ("ogg", "opus", "mp3") else 1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_anywhere_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    whole = encoded(tone(seconds=1.0), **FORMATS[name])
    file = tmp_path / f"cut.{name}"
    for size in (4, 40, len(whole) // 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert f"cut.{name}'" in refused(file), size
        assert refused(whole[:size])
    file.write_bytes(b"")
    assert refused(file) == f"'{file}' is empty"


@pytest.mark.parametrize("subtype", DEPTHS)
def test_each_depth_of_samples_is_read(subtype: str) -> None:
    read = processor().read(encoded(tone(), subtype=subtype), Policy())
    assert distance(read, tone(), 0) <= DEPTHS[subtype]


@pytest.mark.parametrize("rate", [8000, 44100, 192000])
def test_slow_and_fast_recordings_are_resampled(rate: int) -> None:
    read = processor().read(encoded(tone(rate), rate), Policy())
    assert len(read) == RATE // 2
    assert distance(read, tone()) < 5e-3


def test_a_channel_is_taken_as_the_configuration_says(tmp_path: Path) -> None:
    left, right = tone(), tone(level=-0.25)
    stereo = np.stack((left, right))
    file = tmp_path / "stereo.wav"
    file.write_bytes(encoded(stereo.T, subtype="FLOAT"))
    expected = {"mix": (left + right) / 2, "first": left, 0: left, 1: right}
    for raw in (file, {"array": stereo, "sampling_rate": RATE}, (stereo, RATE), (RATE, stereo)):
        for channel, samples in expected.items():
            np.testing.assert_allclose(processor(channel=channel).read(raw, Policy()), samples, atol=1e-7)
    line = refused(file, channel=2)
    assert line == f"'{file}' has 2 channels, and no channel 2 (counted from 0); set channel = \"mix\""
    assert "1 channel, and no channel 1" in refused({"array": left, "sampling_rate": RATE}, channel=1)


def test_microphone_arrays_of_any_layout_are_read() -> None:
    wave = tone()
    pcm = (wave * 32767).astype(np.int16)
    same: list[Any] = [
        {"array": pcm, "sampling_rate": RATE},
        {"array": pcm.reshape(-1, 1), "sampling_rate": np.int32(RATE)},
        {"array": pcm.astype(">i2"), "sampling_rate": float(RATE)},
        {"array": np.frombuffer(pcm.tobytes(), np.int16), "sampling_rate": RATE},
        {"array": np.concatenate(np.split(pcm, 8)), "sampling_rate": RATE},
        {"array": np.repeat(pcm, 2)[::2], "sampling_rate": RATE},
        {"array": pcm.astype(np.float64) / 32768, "sampling_rate": RATE},
        (pcm, RATE),
        (RATE, pcm),
    ]
    reader = processor()
    for raw in same:
        np.testing.assert_allclose(reader.read(raw, Policy()), wave, atol=1e-4)
        assert reader.length(raw, Policy()) == len(wave)
    assert len(reader([same[-1], [same[0], same[1]]], Policy())) == 3  # a pair is one clip, a list several
    assert float(reader.read({"array": 3 * wave, "sampling_rate": RATE}, Policy()).max()) > 1  # loud, and not clipped


NAN = tone()
NAN[77] = np.nan
PAIR = np.zeros((2, 100), np.float32)
BAD_ARRAYS: dict[str, tuple[Any, Any, str]] = {
    "not finite": (NAN, RATE, "not finite"),
    "too large for a float": (np.array([1e300]), RATE, "not finite"),
    "no rate": (tone(), None, "does not say its sampling rate; add `sampling_rate`, in Hz"),
    "rate of zero": (tone(), 0, "a sampling rate of 0 Hz"),
    "negative rate": (tone(), -16000, "a sampling rate of -16000 Hz"),
    "rate as text": (tone(), "16000", "the sampling rate '16000', expected a whole number of Hz"),
    "rate between": (tone(), 16000.5, "the sampling rate 16000.5"),
    "rate of nothing": (tone(), float("nan"), "the sampling rate nan"),
    "a yes for a rate": (tone(), True, "the sampling rate True"),
    "no samples": (np.zeros(0, np.float32), RATE, "holds no samples"),
    "samples first": (PAIR.T, RATE, "(100, 2), expected (samples,) or (channels, samples); its first axis is longer"),
    "as long as wide": (np.zeros((4, 4)), RATE, "has shape (4, 4), expected"),
    "too many channels": (np.zeros((33, 100)), RATE, "has 33 channels, more than the limit of 32"),
    "three axes": (np.zeros((2, 3, 9)), RATE, "has shape (2, 3, 9)"),
    "one number": (np.float32(1), RATE, "has shape ()"),
    "a list of chunks": ([PAIR[0], PAIR[1]], RATE, "join chunks with numpy.concatenate"),
    "whole numbers of no width": ([0, 1, 2], RATE, "has type int64, which does not say how loud a sample is"),
    "unsigned": (np.zeros(9, np.uint16), RATE, "has type uint16"),
    "yes and no": (np.zeros(9, bool), RATE, "has type bool"),
    "complex": (np.zeros(9, np.complex64), RATE, "has type complex64"),
    "objects": (np.array([1, None]), RATE, "is not a numeric array"),
    "ragged": ([[1.0], [1.0, 2.0]], RATE, "is not a numeric array"),
    "text": ("hello", RATE, "is not a numeric array"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_a_bad_array_is_refused(name: str) -> None:
    array, rate, message = BAD_ARRAYS[name]
    line = refused({"array": array, "sampling_rate": rate})
    assert line.startswith("the array ")
    assert message in line
    assert line == refused({"array": array, "sampling_rate": rate, "path": "mic.wav"}).replace("'mic.wav'", "the array")


def long_wav(file: Path, hours: float) -> Path:
    """Hours of silence that take no room on the disk."""
    header = encoded(np.zeros(0, np.float32), 8000)
    size = int(hours * 3600 * 8000) * 2
    at = header.index(b"data") + 4
    with file.open("wb") as out:
        out.write(header[:at] + size.to_bytes(4, "little"))
        out.truncate(at + 4 + size)
    return file


def test_three_hours_are_refused_at_once_and_allowed_on_demand(tmp_path: Path) -> None:
    file = long_wav(tmp_path / "meeting.wav", 3)
    limit = "lasts 10800.0 s, more than the limit of 600 s; cut it into shorter clips"
    assert refused(file) == f"'{file}' {limit}"
    assert processor(sample_rate=8000).length(file, Policy(max_seconds=20_000)) == 3 * 3600 * 8000
    first = next(processor(sample_rate=8000).windows(file, Policy(max_seconds=20_000), 30.0, 5.0))
    assert (first.start, first.end, first.right) == (0, 30, 5)


BAD_FILES: dict[str, bytes] = {
    "notes.wav": b"these are my notes",
    "blank.mp3": bytes(5000),
    "picture.wav": png(1, 64),
    "page.ogg": b"<!doctype html><p>not found",
    "header.wav": encoded(tone())[:44],
    "silent.wav": encoded(np.zeros(0, np.float32)),
    "nan.wav": encoded(NAN, subtype="FLOAT"),
    "slow.wav": encoded(tone(), 500),
    "wide.wav": encoded(np.zeros((10, 40), np.float32)),
    "old.voc": encoded(tone(), format="VOC", subtype="PCM_16"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_good_sound_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    for raw in raws(BAD_FILES[name], tmp_path / name):
        line = refused(raw)
        assert name in line or not isinstance(raw, (str, Path, dict))


def test_a_picture_text_or_array_in_the_audio_column_is_one_line_that_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmhub.build import compose

    monkeypatch.chdir(tmp_path)
    audio = {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}
    head = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    compose(encoders={"audio": audio}, decoder=head).save(tmp_path / "model")
    (tmp_path / "good.flac").write_bytes(flac(1))
    (tmp_path / "picture.wav").write_bytes(png(1))
    run = _runner(capsys)
    for value in ("picture.wav", "just words", "gone.flac", 3.5, [0.5, 0.25]):
        table = [{"audio": "good.flac", "label": "no"}, {"audio": value, "label": "yes"}]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, table)))
        words = ["eval", "./model", "--data", "data.jsonl", "--target-column", "label", "--inputs", "audio=audio"]
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (1, "", 1 + ("hint:" in err)), err
        assert "data.jsonl" in err
        assert "column 'audio'" in err
        code, out, err = run(*words, "--on-error", "skip", "--json")
        assert code == 0, err
        assert (json.loads(out)["rows"], json.loads(out)["skipped"]) == (1, 1)


def _runner(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(args)
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run
