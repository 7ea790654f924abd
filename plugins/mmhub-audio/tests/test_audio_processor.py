"""Reading audio: files, arrays, rates, bad inputs, augmentation."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy
from mmhub_audio.processor import AudioProcessor, Augment, resample

POLICY = Policy()


def tone(seconds: float = 0.5, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """A 440 Hz tone with a little noise, (S,) or (S, channels) float32."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal((len(time), channels))
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)[:, None] + 0.01 * noise
    return (wave[:, 0] if channels == 1 else wave).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **({"format": "WAV"} | options))
    return file.getvalue()


def reader(**config: Any) -> AudioProcessor:
    return AudioProcessor(AudioProcessor.Config(**config))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"format": "WAV"}, 1e-4),
        ({"format": "WAV", "subtype": "FLOAT"}, 1e-7),
        ({"format": "FLAC"}, 1e-4),
        ({"format": "OGG", "subtype": "VORBIS"}, 0.1),
        ({"format": "OGG", "subtype": "OPUS"}, 0.1),
        ({"format": "MP3"}, 0.1),
    ],
)
def test_each_file_format_decodes_to_the_samples_written(options: dict[str, str], tolerance: float) -> None:
    read = reader().read(encoded(tone(), **options), POLICY)
    assert read.shape == (8000,)
    assert read.dtype == torch.float32
    assert float((read - torch.from_numpy(tone())).abs().max()) < tolerance


def test_path_bytes_struct_and_array_give_the_same_clip(tmp_path: Path) -> None:
    content = encoded(tone(), subtype="FLOAT")
    file = tmp_path / "clip.wav"
    file.write_bytes(content)
    raws: list[Any] = [
        file,
        str(file),
        content,
        {"bytes": content, "path": "clip.wav"},
        {"bytes": None, "path": str(file)},
        {"array": tone(), "sampling_rate": 16000},
        {"array": torch.from_numpy(tone())[None], "sampling_rate": 16000.0},
        {"array": tone().tolist(), "sampling_rate": np.int64(16000), "path": None},
    ]
    clips = [reader().read(raw, POLICY) for raw in raws]
    assert all(torch.equal(clip, clips[0]) for clip in clips)


def test_integer_samples_are_scaled_to_one() -> None:
    for kind, scale in ((np.int16, 2**15), (np.int32, 2**31)):
        read = reader().read({"array": np.array([-scale, 0, scale // 2], dtype=kind), "sampling_rate": 16000}, POLICY)
        torch.testing.assert_close(read, torch.tensor([-1.0, 0.0, 0.5]))
    read = reader().read({"array": np.array([0, 128, 192], dtype=np.uint8), "sampling_rate": 16000}, POLICY)
    torch.testing.assert_close(read, torch.tensor([-1.0, 0.0, 0.5]))


def test_channels_are_averaged() -> None:
    stereo = tone(channels=2)
    read = reader().read(encoded(stereo, subtype="FLOAT"), POLICY)
    torch.testing.assert_close(read, torch.from_numpy(stereo.mean(1)))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_equals_torchaudio(rate: int) -> None:
    clip = torch.from_numpy(tone(rate=rate))
    read = reader().read({"array": clip, "sampling_rate": rate}, POLICY)
    torch.testing.assert_close(read, torchaudio.functional.resample(clip, rate, 16000), atol=1e-4, rtol=0)


def test_a_rate_with_no_common_factor_is_resampled_with_a_small_kernel() -> None:
    clip = torch.from_numpy(tone(1.0, rate=44101))
    read = resample(clip, Fraction(16000, 44101))
    assert abs(len(read) - 16000) <= 1
    direct = torch.from_numpy(tone(1.0))
    torch.testing.assert_close(read[100:15900], direct[100:15900], atol=0.06, rtol=0)


def test_normalised_clips_have_zero_mean_and_unit_variance() -> None:
    read = reader(do_normalize=True).read({"array": tone() * 0.1 + 0.3, "sampling_rate": 16000}, POLICY)
    assert abs(float(read.mean())) < 1e-5
    assert abs(float(read.var(correction=0)) - 1) < 1e-3


BAD = {
    "text": (b"this is no audio file, only text", "cannot decode 32 bytes as audio"),
    "empty": (b"", "is empty"),
    "truncated wav": (encoded(tone())[:5000], "is cut off"),
    "truncated float wav": (encoded(tone(), subtype="FLOAT")[:5000], "is cut off"),
    "truncated flac": (encoded(tone(), format="FLAC")[:5000], "cannot decode 5000 bytes"),
    "truncated ogg": (encoded(tone(2.0), format="OGG")[:-2000], "is cut off"),
    "truncated mp3": (encoded(tone(2.0), format="MP3")[:-2000], "is cut off"),
    "header alone": (encoded(tone())[:44], "holds no samples"),
    "no samples": (encoded(np.zeros(0, np.float32)), "holds no samples"),
    "nan": ({"array": np.array([0.0, np.nan]), "sampling_rate": 16000}, "the array holds samples that are not finite"),
    "infinite": (encoded(np.array([0, np.inf], np.float32), subtype="FLOAT"), "not finite"),
    "slow rate": (encoded(tone(), 100), "sampling rate of 100 Hz, outside 1000 to 768000 Hz"),
    "fast rate": ({"array": tone(), "sampling_rate": 10**6}, "sampling rate of 1000000 Hz"),
    "no rate": ({"array": tone()}, "add `sampling_rate`, in Hz"),
    "odd rate": ({"array": tone(), "sampling_rate": "16k"}, "expected a whole number of Hz"),
    "bare array": (tone(), 'pass {"array": samples, "sampling_rate": Hz}'),
    "bare tensor": (torch.zeros(10), "does not say its sampling rate"),
    "two channels": ({"array": tone(channels=2), "sampling_rate": 16000}, "samples come first: transpose it"),
    "complex": ({"array": np.zeros(9, np.complex64), "sampling_rate": 16000}, "has type complex64, which"),
    "words": ({"array": ["a"], "sampling_rate": 16000}, "is not a numeric array"),
    "empty array": ({"array": np.zeros(0), "sampling_rate": 16000}, "holds no samples"),
    "number": (3.5, "a float is not audio"),
    "empty struct": ({"bytes": None, "path": None}, "holds neither bytes nor a path"),
    "missing file": ("no/such/clip.wav", "no file 'no/such/clip.wav'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_refused_with_its_reason(name: str) -> None:
    raw, message = BAD[name]
    with pytest.raises(InputError) as caught:
        reader().read(raw, POLICY)
    assert message in str(caught.value)


def test_the_file_is_named_and_the_row_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "cut.flac"
    file.write_bytes(encoded(tone(), format="FLAC")[:3000])
    with pytest.raises(InputError, match=r"cut\.flac") as caught:
        reader()([None, encoded(tone()), file], POLICY)
    assert (caught.value.row, caught.value.modality) == (2, "audio")


def test_long_clips_are_refused_by_their_header() -> None:
    policy = Policy(max_seconds=0.25)
    for raw in (encoded(tone()), {"array": tone(), "sampling_rate": 16000}):
        with pytest.raises(InputError, match=r"lasts 0\.5 s, more than the limit of 0\.25 s; cut it"):
            reader().read(raw, policy)
    with pytest.raises(InputError, match="40 channels"):
        reader().read(encoded(np.zeros((10, 40), np.float32)), POLICY)


def test_a_wav_written_to_a_pipe_does_not_state_its_size_and_is_read() -> None:
    content = bytearray(encoded(tone()))
    at = content.index(b"data") + 4
    content[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(reader().read(bytes(content), POLICY)) == 8000


def test_a_flac_written_to_a_pipe_does_not_state_its_length_and_is_read_to_its_end(tmp_path: Path) -> None:
    whole = encoded(tone(5.0), format="FLAC")
    content = whole[:21] + bytes([whole[21] & 0xF0, 0, 0, 0, 0]) + whole[26:]  # 0 samples in STREAMINFO: not known
    (tmp_path / "clip.flac").write_bytes(content)
    for raw in (content, tmp_path / "clip.flac"):
        assert torch.equal(reader().read(raw, POLICY), reader().read(whole, POLICY))
        assert reader().length(raw, POLICY) == 80000
        windows = list(reader().windows(raw, POLICY, 2.0, 0.0))
        assert [round(window.end, 3) for window in windows] == [2.0, 4.0, 5.0]
    short = Policy(max_seconds=4.9)
    for use in (reader().read, reader().length, lambda raw, policy: list(reader().windows(raw, policy, 2.0, 0.0))):
        with pytest.raises(InputError, match=r"^108620 bytes lasts more than the limit of 4\.9 s; cut it into shorter"):
            use(content, short)
    with pytest.raises(InputError, match=r"cannot decode .* as audio"):
        reader().read(content[:-9], POLICY)


def test_a_clip_shorter_than_the_encoder_can_use_is_refused() -> None:
    with pytest.raises(InputError, match=r"lasts 0\.0006 s, but this encoder needs at least 0\.0250 s"):
        reader(min_samples=400).read({"array": np.ones(10), "sampling_rate": 16000}, POLICY)


def test_missing_and_repeated_items_are_packed() -> None:
    short, long = encoded(tone(0.1)), encoded(tone(0.2))
    items = reader()([None, [long, short], short], POLICY)
    assert items.data.shape == (3, 3200)
    assert items.lengths.tolist() == [3200, 1600, 1600]
    assert items.rows.tolist() == [1, 1, 2]


def test_augmentation_depends_on_the_seed_alone() -> None:
    processor, clip = reader(augment=Augment()), encoded(tone())
    assert processor.augments
    first, again = (processor([clip] * 8, POLICY, seeds=range(8)) for _ in range(2))
    assert torch.equal(first.data, again.data)
    assert torch.equal(first.mask, again.mask)
    assert len(set(first.lengths.tolist())) > 2
    torch.rand(1)  # the global generator plays no part
    alone = processor([clip], POLICY, seeds=[5])
    assert torch.equal(alone.data[0], first.data[5, : first.lengths[5]])


def test_without_seeds_nothing_is_augmented() -> None:
    clip = encoded(tone())
    assert torch.equal(reader(augment=Augment()).read(clip, POLICY), reader().read(clip, POLICY))
    assert not reader().augments


def test_state_survives_json() -> None:
    processor = reader(sample_rate=8000, do_normalize=True, min_samples=7, augment=Augment(speed=0.2))
    state = json.loads(json.dumps(processor.state()))
    again = AudioProcessor.from_state(state, processor.files())
    assert again.config == processor.config
    with pytest.raises(UsageError, match="unknown key 'sample_rat'; did you mean 'sample_rate'"):
        AudioProcessor.from_state({"sample_rat": 1}, {})
    with pytest.raises(UsageError, match="sample_rate must lie in 1000 to 768000 Hz, not 10"):
        AudioProcessor.from_state({"sample_rate": 10}, {})
