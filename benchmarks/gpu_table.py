"""What the GPU benchmarks share: their options, timing, and the table with its hardware, versions, commit and date."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmhub.device import find_device, use_fast_matmul
from mmhub.engine.flops import peak_flops

RESULTS = Path(__file__).parent / "results"


def options(doc: str | None, **more: int) -> argparse.Namespace:
    """Read the command line; `more` are whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="a few steps at a size for any CPU; writes no table")
    parser.add_argument("--steps", type=int, default=20, help="steps to time, after as many as compilation needs")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    found = parser.parse_args()
    if not found.toy and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --toy runs on any CPU")
    found.device = find_device("cpu" if found.toy else "cuda")
    found.steps, found.warm = (2, 1) if found.toy else (found.steps, 5)
    use_fast_matmul(found.device)
    return found


def seconds_a_step(step: Callable[[], Any], chosen: argparse.Namespace) -> float:
    """The median time of a step, the first ones left out; a GPU is waited for before and after each block of steps."""
    for _ in range(chosen.warm):
        step()
    times = []
    for _ in range(3):
        wait(chosen.device)
        begin = time.perf_counter()
        for _ in range(chosen.steps):
            step()
        wait(chosen.device)
        times.append((time.perf_counter() - begin) / chosen.steps)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> str:
    """Peak memory since the last call, GiB."""
    if device.type != "cuda":
        return "-"
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak:.1f}"


def share_of_peak(flops: float, device: torch.device) -> str:
    """MFU in bf16, for a number of FLOP/s; '-' where the peak of this device is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device), torch.bfloat16) if device.type == "cuda" else None
    return f"{100 * flops / peak:.1f} %" if peak else "-"


def write(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], chosen: argparse.Namespace) -> None:
    """Print the table, and keep it under results/ unless it is a toy's."""
    name = Path(sys.argv[0]).stem
    command = " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    lines = [
        f"# {title}",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_commit()}",
        f"- command: `{command}`",
        f"- machine: {_machine(chosen.device)}; Python {platform.python_version()}",
        f"- versions: {', '.join(_versions('mmhub', 'torch', 'timm'))}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not chosen.toy:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)


def _versions(*libraries: str) -> Iterator[str]:
    for library in libraries:
        with suppress(PackageNotFoundError):
            yield f"{library} {version(library)}"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}; {os.cpu_count()} x {cpu_model()}"
    return f"{os.cpu_count()} x {cpu_model()}, {torch.get_num_threads()} threads, no GPU"


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
