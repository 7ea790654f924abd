"""A job: answers that are written part by part beside the file they will become, so that a stopped job goes on.

`OUT.parts/` holds `job.json`, which says what the job is of, a lock, and a file for each window: a line that says where
the next one begins, and a JSON answer a line. Each is written whole or not at all. `OUT` appears at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mmhub.bulk.rows import Place
from mmhub.bulk.windows import Answer, Window
from mmhub.errors import UsageError
from mmhub.files import disk_errors, sync, write_file

_FORMAT = 1
_WHAT = "the predictions"


class Job:
    """The parts of one output file, locked while this is open.

    Raises:
        UsageError: another process works on it, or what is there is of other data, another model or other options.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        if self.folder.exists() and not (self.folder / "lock").exists():
            raise UsageError(f"'{self.folder}' exists and holds no job of mmhub", "name another file with --out")
        with disk_errors(_WHAT, out.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / "lock", out)
        try:
            if restart:
                self._sweep(keep=())
            self._check(identity)
            self.start, self.rows, self.skipped = Place(), 0, 0
            self._parts: list[Path] = []
            self._find()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is done to a later run; a job that has done nothing leaves nothing."""
        if not self._parts:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def add(self, window: Window, answers: list[Answer]) -> None:
        """Save a window's answers.

        Raises:
            MmhubError: the disk is full, or the folder not writable.
        """
        skipped = sum("error" in answer for answer in answers)
        head = {"first": window.first, "rows": len(answers), "skipped": skipped, "next": asdict(window.after)}
        lines = "".join(json.dumps(part, ensure_ascii=False) + "\n" for part in (head, *answers))
        path = self.folder / f"{window.first:012d}.jsonl"
        with disk_errors(_WHAT, self.out.parent):
            write_file(path, lines.encode("utf-8", "replace"))  # half a surrogate pair is no text
        self._take(path, head)

    def finish(self, join: Callable[[IO[bytes], Sequence[Path]], None]) -> None:
        """Let `join` write the parts into the output file, which appears when that is done.

        Raises:
            MmhubError: the disk is full, or the folder not writable.
        """
        aside = self.folder / "joined"
        with disk_errors(_WHAT, self.out.parent):
            with aside.open("wb") as file:
                join(file, self._parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.out)
            sync(self.out.parent)
        self._parts = []

    def _check(self, identity: Mapping[str, Any]) -> None:
        """Compare what the parts are of with what is asked for, or note it down."""
        path = self.folder / "job.json"
        known = None
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"format": _FORMAT} | json.loads(json.dumps(identity))
        if known is None or not any(self.folder.glob("*.jsonl")):
            self._sweep(keep=())
            with disk_errors(_WHAT, self.out.parent):
                write_file(path, json.dumps(wanted, indent=1) + "\n")
            return
        other = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if other:
            hint = "give what was given then, name another file with --out, or begin anew with --restart"
            raise UsageError(f"'{self.folder}' holds a job of {_said(other)} than this one", hint)

    def _find(self) -> None:
        """Take the parts that follow each other from the first row on; what comes after a gap is done again."""
        for path in sorted(self.folder.glob("*.jsonl")):
            head: dict[str, Any] = {}
            with suppress(OSError, ValueError), path.open("rb") as file:
                head = json.loads(file.readline())
            if head.get("first") == self.rows:
                self._take(path, head)
        self._sweep(keep=("job.json", *(path.name for path in self._parts)))

    def _take(self, path: Path, head: Mapping[str, Any]) -> None:
        self._parts.append(path)
        self.rows += int(head["rows"])
        self.skipped += int(head["skipped"])
        self.start = Place(**head["next"])

    def _sweep(self, keep: tuple[str, ...]) -> None:
        for path in self.folder.iterdir():
            if path.name not in ("lock", *keep):
                path.unlink(missing_ok=True)


def read_part(path: Path) -> Iterator[Answer]:
    """Yield the answers of a part."""
    with path.open("rb") as file:
        file.readline()
        for line in file:
            yield json.loads(line)


def copy_part(path: Path, to: IO[bytes]) -> None:
    """Write the answers of a part, a JSON line each."""
    with path.open("rb") as file:
        file.readline()
        shutil.copyfileobj(file, to)


def _said(keys: list[str]) -> str:
    """Name what differs."""
    plain = {"format": "another version of mmhub", "model": "another model", "data": "other data"}
    shown = [plain.get(key, f"another --{key.replace('_', '-')}") for key in keys]
    return " and ".join(shown)


def _locked(path: Path, out: Path) -> IO[bytes]:
    """Open a file that no other process may open so until this one closes it or ends."""
    file = path.open("ab")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: its children do not hold it
    except ImportError:
        pass
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UsageError(f"another process is writing '{out}'", "wait for it, or name another file") from None
    return file
