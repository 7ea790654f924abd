"""Push and pull one gigabyte through `mmhub hub serve` on loopback, beside `cp` + `sha256sum` of the same bytes.

    python benchmarks/hub_speed.py [--megabytes 1024] [--rounds 3] [--minutes 5] [--folder FOLDER] [--out table.md]

Every round runs each step once, so that all of them see the same machine; a round that would end after `--minutes` is
not begun. Clients are fresh processes; their start (importing torch takes seconds) is part of their wall time and also
given apart, as the time of the same command on a checkpoint of a few kilobytes. Python keeps its bytecode in the work
folder, as an installation does in its own. `cp` and the peer, huggingface_hub, move the one large weights file, mmhub
the whole checkpoint.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

STEPS = (
    "cp + sha256sum",
    "mmhub push",
    "mmhub push again",
    "mmhub pull",
    "hf upload (LFS)",
    "hf upload (Xet)",
    "hf download",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begin = time.monotonic()
    scratch = Path(tempfile.mkdtemp(dir=options.folder, prefix="hub-speed-"))
    os.environ["MMHUB_CACHE"] = str(scratch / "mmhub-cache")
    os.environ["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        large, small = checkpoint(scratch / "large", options.megabytes), checkpoint(scratch / "small", 1)
        rounds: list[dict[str, float]] = []
        longest = 0.0
        while len(rounds) < options.rounds and time.monotonic() - begin + longest < 60 * options.minutes:
            start = time.monotonic()
            rounds.append(measure(scratch / f"round{len(rounds)}", large, small))
            longest = max(longest, time.monotonic() - start)
        report = table(rounds, large_file(large).stat().st_size, options)
        print(report)
        if options.out:
            options.out.write_text(report + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def checkpoint(folder: Path, megabytes: int) -> Path:
    """A checkpoint whose weights are random bytes that no deduplication can shrink: an LSTM with a large vocabulary."""
    width = 8 if megabytes < 2 else megabytes * 250
    script = f"""
import torch
from mmhub.build import compose
model = compose(
    encoders={{"text": {{"use": "lstm", "config": {{"dim": 16, "embedding_dim": {width}}}}}}},
    fusion={{"use": "concat"}},
    decoder={{"use": "classification", "config": {{"labels": ["no", "yes"]}}}},
    texts=[" ".join(f"w{{i}}" for i in range(1000))],
)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
model.save({str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def large_file(folder: Path) -> Path:
    """The file with the bulk of the weights: large models are split by component."""
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def measure(scratch: Path, large: Path, small: Path) -> dict[str, float]:
    scratch.mkdir()
    weights = large_file(large)
    found = {"cp + sha256sum": wall(lambda: copy_and_hash(weights, scratch / "copy"))}
    (scratch / "copy").unlink()
    with Server(scratch / "hub") as server:
        env = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(scratch / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

        def mmhub(*arguments: object) -> Callable[[], None]:
            return lambda: run([sys.executable, "-m", "mmhub", *map(str, arguments), "--quiet", "--json"], env)

        def hf(code: str, **more: str) -> Callable[[], None]:
            setup = f"import huggingface_hub as h; api=h.HfApi(token=False); w={str(weights)!r}; "
            return lambda: run([sys.executable, "-c", setup + code], env | more)

        if not (small.parent / "warm").exists():  # fill Python's own caches
            run([sys.executable, "-m", "mmhub", "pull", str(small), "--quiet"], env)
            (small.parent / "warm").touch()
        found["start: push"] = wall(mmhub("push", small, "bench/small"))
        found["start: pull"] = wall(mmhub("pull", "bench/small"))
        found["mmhub push"] = wall(mmhub("push", large, "bench/large"))
        found["server CPU after push"], found["server peak MB after LFS push"] = server.cpu(), server.peak()
        found["mmhub push again"] = wall(mmhub("push", large, "bench/large", "-m", "again"))
        shutil.rmtree(scratch / "home", ignore_errors=True)
        found["mmhub pull"] = wall(mmhub("pull", "bench/large"))
        found["server peak MB after pull"] = server.peak()
        shutil.rmtree(scratch / "home", ignore_errors=True)
        upload = (
            "api.create_repo('bench/{0}'); api.upload_file(path_or_fileobj=w, path_in_repo='w', repo_id='bench/{0}')"
        )
        found["hf upload (LFS)"] = wall(hf(upload.format("lfs"), HF_HUB_DISABLE_XET="1"))
        found["hf download"] = wall(hf("h.hf_hub_download('bench/lfs', 'w', token=False)"))
        shutil.rmtree(scratch / "home", ignore_errors=True)
        found["hf upload (Xet)"] = wall(hf(upload.format("xet")))
        found["server peak MB after Xet push"] = server.peak()
    shutil.rmtree(scratch)
    return found


def copy_and_hash(source: Path, target: Path) -> None:
    run(["cp", str(source), str(target)])
    run(["sha256sum", str(target)])


def wall(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:6]}: exit {done.returncode}\n{done.stderr[-2000:]}")


class Server:
    """`mmhub hub serve` in its own process, with its address, CPU seconds and peak memory."""

    def __init__(self, data: Path) -> None:
        command = [sys.executable, "-m", "mmhub", "hub", "serve", "--data", str(data), "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        self.url = ""
        for line in self._process.stderr:
            self.url = next((word for word in line.split() if word.startswith("http://")), "")
            if self.url:
                break
        threading.Thread(target=self._process.stderr.read, daemon=True).start()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self) -> float:
        """Peak resident memory in MB, of the server alone (shared library pages included)."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def table(rounds: list[dict[str, float]], size: int, options: argparse.Namespace) -> str:
    middle = {name: statistics.median(round[name] for round in rounds) for name in rounds[0]}
    base = middle["cp + sha256sum"]
    machine = f"{os.cpu_count()} x {cpu()}, Python {platform.python_version()}, {versions()}"
    lines = [
        f"# Hub speed: {size / 1e9:.2f} GB of safetensors over loopback",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {machine};",
        f"`python benchmarks/hub_speed.py --megabytes {options.megabytes} --rounds {options.rounds}`;",
        f"load {os.getloadavg()[0]:.1f} at the end; median of {len(rounds)} rounds, range in brackets.",
        "Process start included.",
        "",
        "| step | seconds | of `cp` + `sha256sum` | MB/s |",
        "|---|---|---|---|",
    ]
    for name in STEPS:
        values = [round[name] for round in rounds]
        seconds, spread = middle[name], f"{min(values):.2f}-{max(values):.2f}"
        lines.append(f"| {name} | {seconds:.2f} ({spread}) | {seconds / base:.2f} x | {size / 1e6 / seconds:.0f} |")
    lines += ["", "The same commands on a checkpoint of a few kB (process start and round trips): "]
    lines[-1] += ", ".join(f"{name.split()[1]} {middle[name]:.2f} s" for name in middle if name.startswith("start"))
    lines += [
        "",
        "Server: " + ", ".join(f"{name[7:]} {middle[name]:.1f}" for name in middle if name.startswith("server")) + ".",
    ]
    return "\n".join(lines)


def cpu() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("mmhub", "huggingface-hub", "hf-xet", "safetensors"))


if __name__ == "__main__":
    main()
