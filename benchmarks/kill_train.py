"""Kill -9 a training run at random moments and resume it each time: does it end in the same bytes?

    python benchmarks/kill_train.py [--kills 20] [--seed 0] [--out benchmarks/results/kill_train.md]

A small text classifier with dropout and shuffling is trained once undisturbed. Then it is started, killed at a random
moment and resumed, until all kills are spent and the runs are through. Each must end in the same weights, optimizer
state, position and metrics as the first (but for what a clock says).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Says when the imports are done: a kill before that would try nothing.
START = """
import sys, torch, mmhub.engine
from mmhub.cli.main import main
print("ready", flush=True)
main(sys.argv[1:])
"""
CLOCK = ("seconds", "speed")  # keys of metrics.jsonl that are no result
STEPS = 60
COLUMNS = (
    "workers",
    "checkpoint every",
    "runs",
    "kills",
    "of them before the first checkpoint",
    "unfinished folders left by kills",
    "left at the end",
    "damaged checkpoints met",
    "weights, optimizer, position, metrics",
)


@dataclass
class Chain:
    """What happened to the runs with one setting."""

    workers: int
    every: int
    runs: int = 0
    kills: int = 0
    early: int = 0  # kills before there was a checkpoint to go on from
    leftovers: int = 0  # folders that were about to be written when a kill came
    damaged: int = 0  # checkpoints that a resume had to pass over
    different: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    lines = [
        "# Killing a training run",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_revision()}",
        f"- command: `python benchmarks/kill_train.py --kills {options.kills} --seed {options.seed}`",
        f"- machine: {_machine()}",
        f"- work: a text classifier, {STEPS} optimizer steps; `kill -9`, then `--resume`",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for workers, every in ((0, 1), (2, 2)):
            chain, left = _measure(Path(folder) / str(workers), workers, every, options.kills, options.seed)
            result = "identical" if not chain.different else "DIFFERENT: " + ", ".join(chain.different)
            cells = (workers, every, chain.runs, chain.kills, chain.early, chain.leftovers, left, chain.damaged, result)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], file=sys.stderr)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    if "DIFFERENT" in text:
        raise SystemExit(1)


def _measure(folder: Path, workers: int, every: int, kills: int, seed: int) -> tuple[Chain, int]:
    folder.mkdir()
    _write_recipe(folder, workers, every)
    whole = folder / "whole"
    setup, training = _time_whole(folder, whole)
    print(f"workers {workers}: {setup:.1f} s until the first step, {training:.1f} s after it", file=sys.stderr)
    expected, chain, left = _results(whole), Chain(workers, every), 0
    draw = random.Random(f"{seed} {workers}")
    while chain.kills < kills:
        run = folder / f"run-{chain.runs}"
        chain.runs += 1
        while _attempt(folder, run, chain, draw.uniform(0, setup + 4 * training / kills) if kills else None):
            if chain.kills == kills:
                _attempt(folder, run, chain, None)
                break
        found = _results(run)
        chain.different += [f"run {chain.runs}: {what}" for what in expected if expected[what] != found[what]]
        left += len(list((run / "checkpoints").glob(".*")))
    return chain, left


def _attempt(folder: Path, run: Path, chain: Chain, seconds: float | None) -> bool:
    """Start or resume the run and kill it after so many seconds; say whether that came before its end."""
    with _started(folder, run, resume=run.exists()) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
    chain.damaged += said.count("is damaged")
    if process.returncode not in (0, -9):
        raise SystemExit(f"the run failed: {said}")
    if process.returncode == 0:
        return False
    chain.kills += 1
    places = Counter(path.name[0] == "." for path in (run / "checkpoints").glob("*step-*"))
    chain.leftovers += places[True]
    chain.early += not places[False]
    return True


def _started(folder: Path, run: Path, *, resume: bool) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, "train", str(folder / "recipe.toml"), "--out", str(run)]
    pipe = subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--resume"] * resume
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"the run did not start: {process.communicate()[1]}")
    return process


def _time_whole(folder: Path, out: Path) -> tuple[float, float]:
    """Let the run go through; return the seconds until its first step and from there on."""
    with _started(folder, out, resume=False) as process:
        begin = time.perf_counter()
        while not (out / "checkpoints").exists() and process.poll() is None:
            time.sleep(0.01)
        first = time.perf_counter()
        _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed: {said}")
    return first - begin, time.perf_counter() - first


def _results(run: Path) -> dict[str, Any]:
    """All that must not depend on whether the run was killed."""
    last = max((run / "checkpoints").glob("step-*"))
    position = json.loads((last / "state.json").read_bytes())["position"]
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {
        "weights": _sha256(run / "model" / "model.safetensors"),
        "last weights": _sha256(last / "model" / "model.safetensors"),
        "optimizer": _sha256(last / "state.safetensors"),
        "position": {key: value for key, value in position.items() if key != "seconds"},
        "metrics": [{key: value for key, value in line.items() if key not in CLOCK} for line in lines],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


RECIPE = """
task = "classification"
[model.encoders.text]
use = "lstm"
config = {{ dim = 32, embedding_dim = 16 }}
[model.fusion]
use = "attention"
config = {{ dim = 32, depth = 1, heads = 2, dropout = 0.2 }}
[model.decoder]
use = "classification"
config = {{ dropout = 0.2 }}
[data]
train = "rows.jsonl"
valid_fraction = 0.2
inputs = {{ text = "text" }}
target = "label"
workers = {workers}
[train]
epochs = 99
max_steps = {steps}
batch_size = 16
learning_rate = 3e-3
checkpoint_every = {every}
eval_every = 7
log_every = 1
device = "cpu"
"""


def _write_recipe(folder: Path, workers: int, every: int) -> None:
    (folder / "recipe.toml").write_text(RECIPE.format(workers=workers, every=every, steps=STEPS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()))


def _rows() -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    words = [f"word{i}" for i in range(200)]
    for _ in range(200):
        text = draw.choices(words, k=draw.randint(3, 30))
        yield {"text": " ".join(text), "label": f"c{sum(map(len, text)) % 3}"}


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    return f"{os.cpu_count()} cores, {versions}; load {os.getloadavg()[0]:.1f} at the start"


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
