"""Fuzzing with atheris: python -m tests.fuzz.run [TARGET...] --seconds 60 --corpus tests/fuzz/corpus

Targets run one after the other, each in a process of its own, guided by the coverage of mmhub's own modules. A crash
is anything but an `MmhubError`, more than 2 seconds of computing or 10 by the clock, or more memory than a target may
take; its input is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import TARGETS, allowed

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
PATIENCE = float(os.environ.get("MMHUB_FUZZ_PATIENCE", "1"))  # how much slower a machine, such as a CI's, may be
SECONDS, CLOCK = 2 * PATIENCE, round(10 * PATIENCE)  # an input may take
MEGABYTES = 300  # beyond what the target took before the first
_LONGEST = {"safetensors": 8192, "picture": 8192, "sound": 8192, "tokenizer": 8192}


@dataclass(frozen=True)
class Result:
    """What fuzzing a target came to: `edges` and `features` are libFuzzer's measures of coverage."""

    target: str
    runs: int
    edges: int
    features: int
    seconds: float
    crash: Path | None
    said: str = ""


def fuzz(name: str, arguments: list[str]) -> None:
    """Feed one target until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["mmhub", *_plugins()]):
        read = TARGETS[name]()
        with_model = name in ("predict", "completions")
        allowed(read, b"{}" if with_model else b"")  # what is imported late is imported now
    if name == "template":
        from mmhub_text import sandbox

        sandbox.SECONDS = 0.2  # what would take longer ends all the same, and more is tried

    def one(content: bytes) -> None:
        begun = time.thread_time()
        try:
            allowed(read, content)
            if time.thread_time() - begun > SECONDS:
                raise TimeoutError(f"it computes for more than {SECONDS:g} seconds")
        except BaseException as error:
            if type(error).__name__ == "PanicException":
                raise RuntimeError(f"a panic came through: {error}") from None
            raise

    atheris.Setup([sys.argv[0], *arguments, f"-rss_limit_mb={_peak() + MEGABYTES}"], one)
    atheris.Fuzz()


def _peak() -> int:
    """The megabytes that this process took at most, as libFuzzer counts them: modules are in it, and their bytecode."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _plugins() -> list[str]:
    return [path.name for path in ROOT.glob("plugins/*/mmhub_*") if path.is_dir()]


def run(name: str, corpus: Path, seconds: int, crashes: Path) -> Result:
    """Fuzz one target in a process of its own, from the files of its corpus, which stays as it is."""
    with tempfile.TemporaryDirectory(prefix="mmhub-corpus-") as grown:
        (corpus / name).mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={seconds}",
            f"-timeout={CLOCK}",  # the machine may do other work
            f"-max_len={_LONGEST.get(name, 4096)}",
            f"-artifact_prefix={crashes}/{name}-",
            "-print_final_stats=1",
        ]
        command = [sys.executable, "-m", "tests.fuzz.run", "--child", name, "--", *options, grown, str(corpus / name)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        begun = time.monotonic()
        before = set(crashes.glob(f"{name}-*"))
        done = subprocess.run(command, cwd=crashes, env=environment, capture_output=True, text=True, errors="replace")
        took = time.monotonic() - begun
    text = done.stderr
    found = sorted(set(crashes.glob(f"{name}-*")) - before)
    bad = done.returncode != 0
    said = reason(done.stdout + text) if bad else ""  # atheris prints the exception, libFuzzer complains
    numbers = [_last(pattern, text) for pattern in (r"number_of_executed_units: (\d+)", r"cov: (\d+)", r"ft: (\d+)")]
    crash = (found[0] if found else crashes / f"{name}-unknown") if bad else None
    return Result(name, numbers[0] or _last(r"#(\d+)\s", text), numbers[1], numbers[2], took, crash, said)


def _last(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def reason(text: str) -> str:
    """The exception or libFuzzer's own complaint, with where it was raised."""
    lines = [line.strip() for line in text.splitlines()]
    wanted = [
        line for line in lines if re.search(r"^(\w+\.)*\w+(Error|Exception|Exit|Interrupt)\b|ERROR: libFuzzer", line)
    ]
    places = [line for line in lines if line.startswith("File ") and "mmhub" in line]
    return " | ".join([*wanted[:2], *places[-1:]])[:400] or text[-300:]


def table(results: list[Result], seconds: int) -> str:
    """The results as benchmarks/results has them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        "# Fuzzing",
        "",
        f"- date: {time.strftime('%Y-%m-%d')}; commit: {commit.strip()}",
        f"- command: `python -m tests.fuzz.run {' '.join(sys.argv[1:])}`",
        f"- machine: {os.cpu_count()} cores, Python {platform.python_version()}, atheris (libFuzzer)",
        f"- allowed for an input: {SECONDS:g} s of computing, {CLOCK} s by the clock, {MEGABYTES} MB beyond the start",
        f"- work: {seconds} s a target; edges and features are libFuzzer's coverage of mmhub's own Python",
        f"- {sum(one.runs for one in results):,} executions, {sum(one.crash is not None for one in results)} crashes",
        "",
        "| target | executions | edges | features | seconds | crash |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        crash = "none" if one.crash is None else one.said.replace("|", "\\|")
        lines.append(f"| {one.target} | {one.runs:,} | {one.edges} | {one.features} | {one.seconds:.0f} | {crash} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz what reads strangers' bytes.")
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--crashes", type=Path, help="where inputs that crash are kept; a temporary folder by default")
    parser.add_argument("--table", type=Path, help="where to write the results")
    wanted = parser.parse_args()
    unknown = set(wanted.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target {min(unknown)!r}; there are {', '.join(TARGETS)}")
    crashes = (wanted.crashes or Path(tempfile.mkdtemp(prefix="mmhub-crashes-"))).resolve()
    crashes.mkdir(parents=True, exist_ok=True)
    results = []
    for name in wanted.targets or TARGETS:
        one = run(name, wanted.corpus.resolve(), wanted.seconds, crashes)
        results.append(one)
        crash = f"CRASH {one.crash}: {one.said}" if one.crash else "no crash"
        print(f"{name}: {one.runs:,} executions, {one.edges} edges, {one.features} features, {crash}", flush=True)
    if wanted.table:
        wanted.table.write_text(table(results, wanted.seconds), "utf-8")
    bad = any(one.crash for one in results)
    if not bad and not wanted.crashes:
        shutil.rmtree(crashes)
    return int(bad)


if __name__ == "__main__":
    if "--child" in sys.argv:
        fuzz(sys.argv[sys.argv.index("--child") + 1], sys.argv[sys.argv.index("--") + 1 :])
    else:
        sys.exit(main())
