"""Transcribe with transformers' pipeline and with mmhub, the same Whisper folder, the same audio and batches.

    MMHUB_REAL_MODELS=... MMHUB_SHARED=... python benchmarks/whisper.py [--minutes 10] [--rounds 3] [--batch 8]
        [--beams 1] [--out benchmarks/results/whisper.md]

The folder of models holds whisper-tiny.en, the other data/fsdd/valid.parquet. The audio is made of spoken digits with
short pauses: clips of about 6 seconds, `--batch` of them at a time, and one long file, which both cut into windows of
30 seconds that overlap as the pipeline's default has it. The pipeline is given arrays, mmhub a file. Rounds are
interleaved; the texts must be the same. Times are medians: by the clock, and of the processor, which other processes on
the machine disturb less. Peak memory is that of a fresh process each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from benchmarks.train_text import _facts

RATE, PAUSE = 16000, 0.15  # Hz, seconds
Texts = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the long file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="clips or windows at a time")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--only", nargs=2, metavar=("WAY", "FILE"), help="measure the memory of one way alone")
    options = parser.parse_args()
    options.model = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models"), "whisper-tiny.en")
    options.data = Path(os.environ.get("MMHUB_SHARED", "../shared"), "data", "fsdd", "valid.parquet")
    if options.only:
        print(json.dumps(_alone(options)))
        return
    options.epochs = 1
    report = _facts(options)
    report[0] = "# Transcribing with Whisper"
    with tempfile.TemporaryDirectory() as temporary:
        report += ["", *_measure(Path(temporary), options)]
    text = "\n".join(report).replace("benchmarks/train_text.py", "benchmarks/whisper.py") + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _speech(data: Path, seconds: float, seed: int) -> np.ndarray:
    """Spoken digits, one after the other, for at least so long."""
    import pyarrow.parquet as pq
    import torchaudio

    rows = pq.read_table(data, columns=["audio"]).column("audio").to_pylist()
    draw, parts, length, rate = np.random.default_rng(seed), [], 0.0, RATE
    while length < seconds:
        samples, rate = soundfile.read(io.BytesIO(rows[draw.integers(len(rows))]["bytes"]), dtype="float32")
        parts += [samples, np.zeros(int(PAUSE * rate), np.float32)]
        length += len(samples) / rate + PAUSE
    whole = torch.from_numpy(np.concatenate(parts))
    found: np.ndarray = torchaudio.functional.resample(whole, rate, RATE).numpy()
    return found


def _peer(options: argparse.Namespace) -> Callable[[list[Path]], Texts]:
    from transformers import pipeline

    peer = pipeline("automatic-speech-recognition", model=str(options.model), device="cpu")

    def run(files: list[Path]) -> Texts:
        arrays = [{"raw": soundfile.read(file, dtype="float32")[0], "sampling_rate": RATE} for file in files]
        settings = {"generate_kwargs": {"num_beams": options.beams}, "ignore_warning": True}
        found = peer(arrays, chunk_length_s=30, batch_size=options.batch, **settings)
        return [one["text"] for one in found]

    return run


def _ours(options: argparse.Namespace) -> Callable[[list[Path]], Texts]:
    from msgspec.structs import replace

    import mmhub
    from mmhub.speech import transcribe

    model = mmhub.load(str(options.model), device="cpu")
    decoder: Any = model.decoder
    settings = replace(decoder.generation, beams=options.beams)

    def run(files: list[Path]) -> Texts:
        samples = [{"audio": str(file)} for file in files]
        return [one["text"] for one in transcribe(model, samples, batch_size=options.batch, settings=settings)]

    return run


WAYS: dict[str, Callable[[argparse.Namespace], Callable[[list[Path]], Texts]]] = {"transformers": _peer, "mmhub": _ours}


def _alone(options: argparse.Namespace) -> dict[str, float]:
    way, file = options.only
    WAYS[way](options)([Path(file)])
    return {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _peak(way: str, file: Path, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.whisper"]
    command += ["--batch", str(options.batch), "--beams", str(options.beams), "--only", way, str(file)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(found.stdout.splitlines()[-1])["megabytes"])


def _measure(folder: Path, options: argparse.Namespace) -> list[str]:
    clips = [folder / f"{number}.wav" for number in range(options.batch)]
    for number, clip in enumerate(clips):
        soundfile.write(clip, _speech(options.data, 6.0, number), RATE, subtype="FLOAT")
    long = folder / "long.wav"
    soundfile.write(long, _speech(options.data, 60 * options.minutes, 99), RATE, subtype="FLOAT")
    work = {f"{len(clips)} clips of 6 s": clips, f"one file of {options.minutes:g} min": [long]}
    runs = {name: build(options) for name, build in WAYS.items()}
    lines = [
        f"{options.beams} beam(s), {options.batch} windows at a time, {torch.get_num_threads()} thread(s), fp32.",
        "",
        "| audio | | seconds, median | CPU seconds, median | as fast (CPU) | peak memory | all rounds, seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for audio, files in work.items():
        clock: dict[str, list[float]] = {name: [] for name in runs}
        worked: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(options.rounds):
            texts = {}
            for name, run in runs.items():
                began, used = time.perf_counter(), time.process_time()
                texts[name] = run(files)
                clock[name].append(time.perf_counter() - began)
                worked[name].append(time.process_time() - used)
                print(f"round {turn + 1}, {audio}, {name}: {clock[name][-1]:.1f} s", file=sys.stderr)
            if len({tuple(text) for text in texts.values()}) != 1:
                raise SystemExit(f"{audio}: mmhub and transformers write different texts")
        base = statistics.median(worked["transformers"])
        for name in runs:
            by_clock, by_cpu = statistics.median(clock[name]), statistics.median(worked[name])
            each = " ".join(f"{one:.1f}" for one in clock[name])
            peak = f"{_peak(name, files[0], options):.0f} MB" if len(files) == 1 else ""
            lines.append(
                f"| {audio} | {name} | {by_clock:.1f} | {by_cpu:.1f} | {base / by_cpu:.2f}x | {peak} | {each} |"
            )
    return lines


if __name__ == "__main__":
    main()
