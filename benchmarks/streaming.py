"""Stream shards that are larger than the memory allowed, beside the `datasets` library on the same files.

    python benchmarks/streaming.py [--megabytes 2048] [--shuffle-rows 10000] [--folder DIR] [--out table.md]

Makes `--megabytes` of samples of 20 kB (random bytes and a number) as 16 parquet and 16 webdataset tar shards, then:

1. one process without workers: mmhub, and `datasets` with `streaming=True` and a shuffle buffer of as many rows;
2. mmhub on 2 ranks at once with 1, 2 and 3 worker processes each, through the loader that training uses;
3. mmhub on 2 ranks with 2 workers, stopped half-way, and gone on with 2 ranks and with 1.

Every rank notes which samples it got: each must come exactly once. Memory is that of a rank's process above what it has
with all libraries imported: its own peak, and the peak of its share and its workers' together (proportional set size).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from array import array
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SAMPLE = 20_000  # bytes
SHARDS = 16
BATCH = 32
LIMIT = 600  # MB above the base process that the largest peak of a rank must stay under, its workers included


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--shuffle-rows", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="make the shards here and keep them")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # the work of one process, as JSON
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(_PARTS[json.loads(options.rank)["part"]](json.loads(options.rank))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = options.megabytes * 10**6 // SAMPLE
        make_shards(folder, rows)
        lines = [line for ending in ("parquet", "tar") for line in measure(folder, ending, rows, options)]
    text = "\n".join([*facts(options, rows), *lines]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def make_shards(folder: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(SHARDS):
        numbers = range(shard * rows // SHARDS, (shard + 1) * rows // SHARDS)
        if (folder / f"s{shard:02}.tar").exists():
            continue
        with tarfile.open(folder / f"s{shard:02}.tar", "w") as archive:
            for number in numbers:
                for name, content in ((f"{number}.bin", os.urandom(SAMPLE)), (f"{number}.cls", str(number).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        schema = pa.schema([("bin", pa.binary()), ("cls", pa.int64())])
        with pq.ParquetWriter(folder / f"s{shard:02}.parquet", schema, compression="none") as writer:
            for start in range(numbers.start, numbers.stop, 1000):
                part = range(start, min(start + 1000, numbers.stop))
                columns = {"bin": [os.urandom(SAMPLE) for _ in part], "cls": list(part)}
                writer.write_table(pa.table(columns, schema))


def measure(folder: Path, ending: str, rows: int, options: argparse.Namespace) -> list[str]:
    given = {"source": str(folder / f"s*.{ending}"), "window": options.shuffle_rows, "out": str(folder / "seen")}
    lines = ["", f"## {ending}", "", "| what | samples/s | MB/s | peak MB, own | with workers | each sample once |"]
    lines.append("|---|---|---|---|---|---|")

    def row(what: str, *rounds: list[dict[str, Any]]) -> None:
        seen = Counter(number for parts in rounds for part in parts for number in part["seen"])
        once = len(seen) == rows and set(seen.values()) == {1}
        rate = sum(seen.values()) / sum(max(part["seconds"] for part in parts) for parts in rounds)
        own, shared = (max(part[key] for parts in rounds for part in parts) for key in ("own", "shared"))
        good = "yes" if once else f"NO: {len(seen)} of {rows}, at most {max(seen.values())} times"
        lines.append(f"| {what} | {rate:,.0f} | {rate * SAMPLE / 1e6:.0f} | {own:.0f} | {shared:.0f} | {good} |")
        if not once or (max(own, shared) > LIMIT and "datasets" not in what):
            raise SystemExit("\n".join([*lines, "this is not what was promised"]))

    row("mmhub, 1 rank, no workers", together([given | {"part": "mmhub", "rank": 0, "world": 1, "workers": 0}]))
    row("datasets, 1 process, no workers", together([given | {"part": "datasets", "ending": ending}]))
    for workers in (1, 2, 3):
        ranks = [given | {"part": "mmhub", "rank": rank, "world": 2, "workers": workers} for rank in range(2)]
        row(f"mmhub, 2 ranks x {workers} workers", together(ranks))
    half = rows // 2 // (2 * BATCH)
    ranks = [given | {"part": "mmhub", "rank": r, "world": 2, "workers": 2, "stop": half + 7 * r} for r in range(2)]
    first = together(ranks)
    for world in (2, 1):
        states = [part["state"] for part in first]
        rest = [
            given | {"part": "mmhub", "rank": r, "world": world, "workers": 2, "states": states} for r in range(world)
        ]
        row(f"mmhub, 2 ranks, stopped half-way, gone on with {world}", first, together(rest))
    return lines


def together(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run one process for each rank, all at once, and return what they report."""
    started = []
    for number, rank in enumerate(ranks):
        rank = rank | {"out": f"{rank['out']}-{number}"}
        command = [sys.executable, __file__, "--rank", json.dumps(rank)]
        quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # torch warns of more workers than cores
        started.append((rank["out"], subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet)))
    reports = []
    for out, process in started:
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a rank failed with exit {process.returncode}")
        numbers = Path(out).read_text().split()
        reports.append(json.loads(text) | {"seen": list(map(int, numbers))})
        Path(out).unlink()
    return reports


# The work of one process.


class Collate:
    """What stands for decoding: notes the samples' numbers and reads every byte."""

    rows, columns = None, ()

    def __call__(self, samples: list[tuple[int, dict[str, Any]]]) -> tuple[list[int], int]:
        contents = (row["bin"] for _, row in samples)
        whole = [value["bytes"] if isinstance(value, dict) else value for value in contents]
        return [row["cls"] for _, row in samples], sum(sum(content[::64]) for content in whole)


def run_mmhub(given: dict[str, Any]) -> dict[str, Any]:
    import pyarrow.parquet
    import torch.utils.data

    from mmhub.config import DataRecipe
    from mmhub.data.loader import load_batches
    from mmhub.data.stream import join_states, open_stream

    pyarrow.parquet.ParquetFile, torch.utils.data.DataLoader  # noqa: B018
    states: list[Any] = []
    with Watch(given["out"]) as watch:
        stream = open_stream(DataRecipe(train=given["source"], stream=True, shuffle_rows=given["window"]), None).only(
            ["bin", "cls"]
        )
        batches = stream.batches(
            0,
            seed=0,
            rank=given["rank"],
            world=given["world"],
            cut=lambda rows, seed: [list(range(i, min(i + BATCH, len(rows)))) for i in range(0, len(rows), BATCH)],
            state=join_states(given.get("states", [])),
        )

        def handed() -> Any:
            for rows, state in batches:
                states.append(state)
                yield rows

        loaded: Any = load_batches(Collate(), handed(), given["workers"])  # type: ignore[arg-type]
        for done, (numbers, _) in enumerate(loaded, 1):
            watch.note(numbers)
            if done == given.get("stop"):
                break
            if "stop" not in given:
                states.clear()
    return watch.report | {"state": states[given["stop"] - 1] if "stop" in given else None}


def run_datasets(given: dict[str, Any]) -> dict[str, Any]:
    import datasets

    kind = {"parquet": "parquet", "tar": "webdataset"}[given["ending"]]
    datasets.disable_progress_bars()
    with Watch(given["out"]) as watch:
        data = datasets.load_dataset(kind, data_files=given["source"], split="train", streaming=True)
        for batch in data.shuffle(seed=0, buffer_size=given["window"]).batch(BATCH):
            samples = [(0, {"bin": b, "cls": c}) for b, c in zip(batch["bin"], batch["cls"], strict=True)]
            watch.note(Collate()(samples)[0])
    return watch.report


_PARTS = {"mmhub": run_mmhub, "datasets": run_datasets}


class Watch:
    """Measures time and peak memory above the start, and writes down which samples came."""

    def __init__(self, out: str) -> None:
        self.path, self.numbers, self.done = Path(out), array("q"), threading.Event()
        self.report: dict[str, Any] = {}

    def note(self, numbers: list[Any]) -> None:
        self.numbers.extend(int(number) for number in numbers)

    def __enter__(self) -> Watch:
        Path("/proc/self/clear_refs").write_text("5")
        self.base, self.shared, self.peak = status("VmRSS"), tree_share(), 0
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        self.clock = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.2):
            self.peak = max(self.peak, tree_share())

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.clock
        self.done.set()
        self.sampler.join()
        self.path.write_text(" ".join(map(str, self.numbers)))
        own, shared = status("VmHWM") - self.base, max(0, self.peak - self.shared)
        self.report |= {"seconds": seconds, "own": own / 1e6, "shared": shared / 1e6}


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def tree_share() -> int:
    """Return the bytes of memory of this process and its workers, shared pages counted in part by each."""
    total, children = 0, Path(f"/proc/self/task/{os.getpid()}/children")
    for process in [str(os.getpid()), *children.read_text().split()]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # a worker that has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def facts(options: argparse.Namespace, rows: int) -> list[str]:
    from importlib.metadata import version

    libraries = ("mmhub", "torch", "pyarrow", "datasets")
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = models[0].partition(":")[2].strip() if models else platform.machine()
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    machine = f"{os.cpu_count()} cores of {cpu}; load {os.getloadavg()[0]:.1f} at the end"
    arguments = f"--megabytes {options.megabytes} --shuffle-rows {options.shuffle_rows}"
    return [
        f"# Streaming {rows * SAMPLE / 1e9:.2f} GB: {rows:,} samples of {SAMPLE:,} bytes in {SHARDS} shards",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {done.stdout.strip() or 'unknown'}",
        f"- command: `python benchmarks/streaming.py {arguments}`",
        f"- machine: {machine}; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in libraries)}",
        "- memory: MB above the process with its libraries imported; batches of 32; the files are in the page cache",
    ]


if __name__ == "__main__":
    main()
