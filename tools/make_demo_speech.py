"""Make the spoken-digit half of the `mmhub demo` data set with espeak-ng.

The words zero to nine are synthesised in a fixed list of voices, each several times at different speeds and
pitches, brought to 8 kHz mono, trimmed, given a seeded gain and a little noise, and written as 16-bit FLAC bytes
into one parquet file. The lowest 4 of the 16 bits are left zero: FLAC stores such bits for free, which takes a
third off the file, and what they would hold lies below the added noise.

Every random choice is seeded by the clip it belongs to, so with the same espeak-ng, numpy, scipy, libsndfile and
pyarrow the file comes out byte for byte the same.

No voice variant (the `+m1`, `+f2` part, which sets the timbre) of the test split occurs in the training split.

Needs espeak-ng on PATH, and numpy, scipy, soundfile and pyarrow.

    python tools/make_demo_speech.py --out mmhub/demo/spoken_digits.parquet
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from scipy.signal import resample_poly

Samples = npt.NDArray[np.float64]

RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES: dict[str, tuple[str, ...]] = {
    "train": (
        "en-us",
        "en-gb",
        "en-us+m1",
        "en-gb-scotland+m1",
        "en-gb+m3",
        "en-us-nyc+m3",
        "en-gb-x-rp+m4",
        "en-us+m6",
        "en-gb-x-gbclan+m7",
        "en-us+f1",
        "en-gb-x-rp+f2",
        "en-us+f2",
        "en-gb-scotland+f4",
        "en-us-nyc+f4",
    ),
    "test": ("en-us+m2", "en-029+m2", "en-gb-x-rp+m5", "en-gb-scotland+m8", "en-029+f3", "en-gb-scotland+f5"),
}
# One take is drawn from each band, so that the takes of a voice are spread and never alike: words a minute, pitch 0-99.
SPEEDS = ((130, 150), (151, 170), (171, 200))
PITCH = (25, 75)
KEPT_SECONDS = 0.03  # silence left at each end
PEAK_DB = (-22.0, -12.0)  # of full scale
NOISE_DB = (-42.0, -30.0)  # root mean square, relative to the peak
STEP = 16  # of the 16-bit samples: 12 bits carry sound


def synthesise(word: str, voice: str, speed: int, pitch: int, folder: Path) -> Samples:
    """Speak one word; one espeak-ng process a clip, so that no clip depends on those before it."""
    wav = folder / "clip.wav"
    subprocess.run(
        ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-z", "-w", str(wav), word],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    samples, rate = sf.read(wav, dtype="float64")
    if samples.ndim != 1 or not samples.size:
        raise RuntimeError(f"espeak-ng gave no mono sound for {word!r} in voice {voice}")
    resampled: Samples = resample_poly(samples, RATE, rate)
    return resampled


def trim(samples: Samples, floor_db: float = -40.0) -> Samples:
    """Cut the silence at both ends down to KEPT_SECONDS."""
    loud = np.flatnonzero(np.abs(samples) > np.abs(samples).max() * 10 ** (floor_db / 20))
    kept = int(KEPT_SECONDS * RATE)
    padded = np.pad(samples, kept)
    return padded[loud[0] : loud[-1] + 1 + 2 * kept]


def vary(samples: Samples, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Set the peak to a drawn level and add white noise at a drawn distance below it; the peak is far from clipping."""
    peak = 10 ** (rng.uniform(*PEAK_DB) / 20)
    noise = rng.standard_normal(samples.size) * peak * 10 ** (rng.uniform(*NOISE_DB) / 20)
    mixed = samples / np.abs(samples).max() * peak + noise
    steps: npt.NDArray[np.int16] = np.rint(mixed * (32768 // STEP)).astype(np.int16)
    return steps * np.int16(STEP)


def flac(samples: npt.NDArray[np.int16]) -> bytes:
    """Encode as FLAC in memory."""
    buffer = io.BytesIO()
    sf.write(buffer, samples, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return buffer.getvalue()


def make_rows(folder: Path) -> list[dict[str, Any]]:
    """All clips, in a fixed order: split, digit, voice, take."""
    rows: list[dict[str, Any]] = []
    for split, voices in VOICES.items():
        for digit, word in enumerate(WORDS):
            for voice in voices:
                for take, band in enumerate(SPEEDS):
                    rng = np.random.default_rng(zlib.crc32(f"{word}-{voice}-{take}".encode()))
                    speed = int(rng.integers(*band, endpoint=True))
                    pitch = int(rng.integers(*PITCH, endpoint=True))
                    samples = vary(trim(synthesise(word, voice, speed, pitch, folder)), rng)
                    audio = {"bytes": flac(samples), "path": f"{word}-{voice}-{speed}-{pitch}.flac"}
                    rows.append({"audio": audio, "digit": digit, "word": word, "voice": voice, "split": split})
    return rows


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Synthesise the spoken digits of the mmhub demo with espeak-ng.")
    parser.add_argument("--out", type=Path, default=Path("mmhub/demo/spoken_digits.parquet"), help="file to write")
    args = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder))
    schema = pa.schema(
        [
            ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("digit", pa.int8()),
            ("word", pa.string()),
            ("voice", pa.string()),
            ("split", pa.string()),
        ],
        metadata={"licence": "CC0-1.0", "made_by": "tools/make_demo_speech.py"},
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    # FLAC does not compress further, so the file is left uncompressed; statistics of whole clips would be no use.
    plain = ["digit", "word", "voice", "split"]
    pq.write_table(table, args.out, compression="none", use_dictionary=plain[1:], write_statistics=plain)
    print(f"{args.out}: {len(rows)} clips, {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
