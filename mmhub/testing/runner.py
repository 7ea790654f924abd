"""Run checks in a process of their own, so that a crash, an exit or a hang is the finding of one check.

After such a check the others go on in a new process. Each has a temporary home, caches and working folder.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from mmhub.errors import MmhubError
from mmhub.testing.contract import one_line

_KEPT = ("MMHUB_PLUGINS", "MMHUB_DISABLE_PLUGINS", "MMHUB_DEBUG")
_START = 60.0  # seconds beyond the limit that a process may take to report its first check


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a check ended: "passed", "failed" or "skipped", with the one line that says why; time in seconds."""

    id: str
    status: str
    message: str
    seconds: float


def run_checks(distribution: str, ids: Sequence[str], timeout: float) -> Iterator[Outcome]:
    """Run the checks of an installed plugin by id and yield how each ended, in order; `timeout` is seconds a check.

    Raises:
        MmhubError: no check can be begun.
    """
    left = list(ids)
    while left:
        before = len(left)
        with tempfile.TemporaryDirectory(prefix="mmhub-check-", ignore_cleanup_errors=True) as folder:
            for outcome in _one_process(distribution, list(left), timeout, Path(folder)):
                left.remove(outcome.id)
                yield outcome
        if len(left) == before:
            raise MmhubError(f"the checks of {distribution} could not be started", "set MMHUB_DEBUG=1 and try again")


def _one_process(distribution: str, ids: Sequence[str], timeout: float, folder: Path) -> Iterator[Outcome]:
    """Run checks until they are done or one takes the process down."""
    with (folder / "stderr").open("w+", encoding="utf-8", errors="replace") as noise:
        worker = _start(folder, noise)
        try:
            yield from _outcomes(worker, distribution, ids, timeout, noise)
        finally:
            _kill(worker)


def _outcomes(
    worker: subprocess.Popen[str], distribution: str, ids: Sequence[str], timeout: float, noise: IO[str]
) -> Iterator[Outcome]:
    lines = _lines_of(worker)
    assert worker.stdin is not None
    with suppress(BrokenPipeError):
        print(json.dumps({"plugin": distribution, "ids": list(ids)}), file=worker.stdin, flush=True)
    left, begun = list(ids), False
    while left:
        try:
            report = lines.get(timeout=timeout if begun else _START + timeout)
        except queue.Empty:
            yield _failed(left[0], f"it did not end within {timeout:g} s; expected a result", timeout)
            return
        if report is None:
            how = _describe(worker.wait())
            if not begun and left == list(ids):
                raise MmhubError(f"the checks of {distribution} could not be started: {how}", _last_line(noise))
            yield _failed(left[0], f"it ended the process: {how}; expected a result", 0.0)
            return
        begun = "begin" in report
        if not begun:
            yield msgspec.convert(report, Outcome)
            left.pop(0)


def _failed(check: str, message: str, seconds: float) -> Outcome:
    return Outcome(id=check, status="failed", message=message, seconds=seconds)


def _last_line(noise: IO[str]) -> str | None:
    noise.seek(0)
    said = [line for line in noise.read().splitlines() if line.strip()]
    return one_line(said[-1]) if said else None


def _start(folder: Path, noise: IO[str]) -> subprocess.Popen[str]:
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "mmhub.testing.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        text=True,
        encoding="utf-8",
        cwd=work,
        env=_environment(home),
        start_new_session=True,
    )


def _environment(home: Path) -> dict[str, str]:
    """This process's variables, without mmhub's and the Hub's own, and with another home folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MMHUB_", "HF_", "XDG_"))}
    kept |= {key: os.environ[key] for key in _KEPT if key in os.environ}
    folders = {"HOME": home, "USERPROFILE": home, "MMHUB_CACHE": home / "cache", "MMHUB_CONFIG": home / "config"}
    return kept | {key: str(path) for key, path in folders.items()} | {"PYTHONPATH": _path(), "OMP_NUM_THREADS": "1"}


def _path() -> str:
    """What this process finds modules by beyond an installation: PYTHONPATH, and the folder `python -m` adds."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = [sys.path[0]] if sys.path and sys.path[0] in ("", os.getcwd()) else []
    return os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in [*first, *given]))


def _lines_of(worker: subprocess.Popen[str]) -> queue.Queue[dict[str, Any] | None]:
    """The reports of a process as they come; None when there are no more."""
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


def _kill(worker: subprocess.Popen[str]) -> None:
    """End a process and what it started."""
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe:
            with suppress(OSError):
                pipe.close()
