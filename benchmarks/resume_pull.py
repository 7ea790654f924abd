"""Kill a pull half way and start it again: how many bytes travel, beside huggingface_hub's own download.

    python benchmarks/resume_pull.py [--megabytes 1024] [--out table.md]

The server is on loopback and counts what it sends. Both clients fetch one safetensors file by a plain HTTP download.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faulty_hub import COMMIT, REPO, FaultyHub

MMHUB = """
import sys
from mmhub.hub.download import fetch, in_cache, list_files
fetch(in_cache(sys.argv[1]), sys.argv[2], list_files(sys.argv[1], sys.argv[2]).values())
"""
HF = """
import sys
from huggingface_hub import hf_hub_download
hf_hub_download(sys.argv[1], "model.safetensors", revision=sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    size = options.megabytes * 2**20
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, huggingface_hub {_version()}"
    block = random.Random(0).randbytes(2**20)
    lines = [
        "# Resuming a pull",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_revision()}",
        f"- command: `python benchmarks/resume_pull.py --megabytes {options.megabytes}`",
        f"- machine: {machine}; load {os.getloadavg()[0]:.1f} at the start",
        "",
        "| client | whole pull, s | sent until the kill, MB | sent after it, MB | of what was missing | resumed, s |",
        "|---|---|---|---|---|---|",
    ]
    with FaultyHub({"model.safetensors": block * options.megabytes}) as server:
        for name, script in (("mmhub", MMHUB), ("huggingface_hub", HF)):
            lines.append(f"| {name} | {_measure(server, script, size)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


def _version() -> str:
    from importlib.metadata import version

    return version("huggingface_hub")


def _measure(server: FaultyHub, script: str, size: int) -> str:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as halved:
        seconds = _run(server, script, whole)
        server.sent = 0
        process = _start(server, script, halved)
        while server.sent < size // 2:
            time.sleep(0.001)
        process.kill()
        process.wait()
        time.sleep(0.2)
        before, server.sent = server.sent, 0
        resumed = _run(server, script, halved)
    missing = size - before
    cells = (
        f"{seconds:.1f}",
        f"{before / 1e6:.0f}",
        f"{server.sent / 1e6:.0f}",
        f"{server.sent / missing:.2f}",
        f"{resumed:.1f}",
    )
    return " | ".join(cells)


def _revision() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _start(server: FaultyHub, script: str, cache: str) -> subprocess.Popen[bytes]:
    own = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": cache, "MMHUB_CACHE": cache, "NO_PROXY": "127.0.0.1"}
    environment = os.environ | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, REPO, COMMIT], env=environment)


def _run(server: FaultyHub, script: str, cache: str) -> float:
    begin = time.perf_counter()
    if _start(server, script, cache).wait():
        raise SystemExit("the client failed")
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
