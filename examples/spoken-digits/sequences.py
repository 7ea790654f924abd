"""Join single spoken digits to sequences, for speech recognition: `python sequences.py IN OUT`.

IN holds train.parquet and valid.parquet with the columns audio {bytes, path}, word and speaker. OUT gets tables of the
same names with audio (FLAC), text ("seven three nine"), speaker, and words [{word, start, end}] (seconds).

A sequence has 3 to 7 recordings of one speaker with pauses of 50 to 200 ms of faint noise between them. The silence at
both ends of a recording is cut down to 20 ms, so that a word begins and ends where its times say.
Validation sequences are made of validation recordings alone.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

ROWS = {"train": 3000, "valid": 300}
DIGITS = (3, 7)  # recordings in a sequence
PAUSE = (0.05, 0.2)  # seconds between them
FRAME = 0.01  # seconds over which loudness is measured
QUIET = 0.05  # of the loudest frame: below it, an end is silence
MARGIN = 0.02  # seconds of silence that are left at either end
NOISE = 1e-3  # standard deviation of the noise in pauses

Clip = tuple[str, np.ndarray]  # word, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, (split, rows) in enumerate(ROWS.items()):
        clips, rate = read_clips(args.source / f"{split}.parquet")
        rng = np.random.default_rng(seed)
        table = pa.Table.from_pylist([sequence(clips, rate, rng) for _ in range(rows)])
        pq.write_table(table, args.out / f"{split}.parquet")
        print(f"{args.out / split}.parquet: {rows} sequences of {sum(map(len, clips.values()))} recordings")


def read_clips(path: Path) -> tuple[dict[str, list[Clip]], int]:
    """Return the recordings of each speaker without the silence at their ends, and their rate in Hz."""
    clips: dict[str, list[Clip]] = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        clips[row["speaker"]].append((row["word"], trim(samples, rate)))
    return dict(clips), rate


def trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Cut the silence at both ends of a recording down to a margin."""
    size = int(FRAME * rate)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    loud = np.flatnonzero(np.sqrt((frames**2).mean(1)) > QUIET * np.sqrt((frames**2).mean(1)).max())
    margin = int(MARGIN * rate)
    return samples[max(loud[0] * size - margin, 0) : (loud[-1] + 1) * size + margin]


def sequence(clips: dict[str, list[Clip]], rate: int, rng: np.random.Generator) -> dict[str, Any]:
    """Draw one sequence: a row of the table."""
    speaker = sorted(clips)[rng.integers(len(clips))]
    parts, words, place = [], [], 0
    for number in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
        if number:
            pause = int(rng.uniform(*PAUSE) * rate)
            parts.append(rng.normal(0, NOISE, pause).astype(np.float32))
            place += pause
        word, samples = clips[speaker][rng.integers(len(clips[speaker]))]
        words.append({"word": word, "start": place / rate, "end": (place + len(samples)) / rate})
        parts.append(samples)
        place += len(samples)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts), rate, format="FLAC")
    return {
        "audio": {"bytes": file.getvalue(), "path": None},
        "text": " ".join(word["word"] for word in words),
        "speaker": speaker,
        "words": words,
    }


if __name__ == "__main__":
    main()
