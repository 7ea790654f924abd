"""A job: answers that are written part by part beside the file they will become, so that a stopped job goes on.

`OUT.parts/` holds `job.json`, which says what the job is of, a lock, and a file for each window: a line that says where
the next one begins, and a JSON answer a line. Each is written whole or not at all. `OUT` appears at the end, when
nothing else has that name; a process may be killed anywhere.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from mmhub.bulk.formats import to_json
from mmhub.bulk.rows import Place
from mmhub.bulk.windows import Answer, Window
from mmhub.errors import UsageError
from mmhub.files import disk_errors, sync, write_file

_FORMAT = 1
_WHAT = "the predictions"
_OURS = re.compile(r"lock|joined|job\.json|\d+\.jsonl|\.(job\.json|\d+\.jsonl)\.\d+\.tmp")
_TRIES = 100  # to lock a folder that another process is removing
_open: set[str] = set()  # folders this process works in: a lock keeps others out, and no thread of its own
_opening = threading.Lock()


class Job:
    """The parts of one output file, locked while this is open.

    Raises:
        UsageError: another process works on it, or what is there is of other data, another model or other options.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".parts")
        self.start, self.rows, self.skipped = Place(), 0, 0
        self._parts: list[Path] = []
        with disk_errors(_WHAT, out.parent):
            self._check_free()
            if self.folder.exists() and not _is_job(self.folder):
                raise UsageError(f"'{self.folder}' exists and holds no job of mmhub", "name another file with --out")
            self._lock = _Lock(self.folder, out)
        try:
            with disk_errors(_WHAT, out.parent):
                self._check_free()  # again: one that was just done may have held the lock
                if restart:
                    self._sweep()
                self._check(identity)
                self._find()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is done to a later run; a job that has done nothing leaves nothing."""
        try:
            if not self._parts:
                with suppress(OSError):
                    self._sweep()
                    self._lock.path.unlink()  # last, so that what a kill leaves is locked or empty
                    self.folder.rmdir()
        finally:
            self._lock.close()

    def answers(self) -> Iterator[Answer]:
        """Yield what the parts hold."""
        for path in self._parts:
            yield from read_part(path)

    def add(self, window: Window, answers: list[Answer]) -> None:
        """Save a window's answers.

        Raises:
            MmhubError: the disk is full, or the folder not writable.
        """
        skipped = sum("error" in answer for answer in answers)
        head = {"first": window.first, "rows": len(answers), "skipped": skipped, "next": asdict(window.after)}
        lines = "".join(to_json(part) + "\n" for part in (head, *answers))
        path = self.folder / f"{window.first:012d}.jsonl"
        with disk_errors(_WHAT, self.out.parent):
            write_file(path, lines.encode("utf-8", "replace"))  # half a surrogate pair is no text
        self._take(path, head)

    def finish(self, join: Callable[[IO[bytes], Sequence[Path]], None]) -> None:
        """Let `join` write the parts into the output file, which appears when that is done.

        Raises:
            MmhubError: the disk is full, or the folder not writable. UsageError: another file has the name by now.
        """
        aside = self.folder / "joined"
        with disk_errors(_WHAT, self.out.parent):
            with aside.open("wb") as file:
                join(file, self._parts)
                file.flush()
                os.fsync(file.fileno())
            self._publish(aside)
            sync(self.out.parent)
        self._parts = []

    def _publish(self, aside: Path) -> None:
        try:
            os.link(aside, self.out)  # which replaces nothing, unlike a renaming
        except FileExistsError:
            self._check_free()
            raise
        except OSError:  # a file system without links
            self._check_free()
            os.replace(aside, self.out)

    def _check_free(self) -> None:
        if os.path.lexists(self.out):
            hint = "name another file with --out, or move it away: the same command goes on"
            raise UsageError(f"'{self.out}' exists", hint)

    def _check(self, identity: Mapping[str, Any]) -> None:
        """Compare what the parts are of with what is asked for, or note it down."""
        path = self.folder / "job.json"
        wanted = {"format": _FORMAT} | json.loads(json.dumps(identity))
        if not any(map(_is_part, self.folder.iterdir())):
            self._sweep()
            write_file(path, json.dumps(wanted, indent=1) + "\n")
            return
        known = None
        with suppress(OSError, ValueError):
            known = json.loads(path.read_text(encoding="utf-8"))
        anew = "name another file with --out, or begin anew with --restart"
        if not isinstance(known, dict):
            raise UsageError(f"'{path}' cannot be read, which says what the answers in the folder are to", anew)
        other = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if other:
            hint = f"give what was given then, {anew}"
            raise UsageError(f"'{self.folder}' holds a job of {_said(other)} than this one", hint)

    def _find(self) -> None:
        """Take the parts that follow each other from the first row on; what comes after a gap is done again."""
        for path in sorted(filter(_is_part, self.folder.iterdir())):
            head: Any = None
            with suppress(OSError, ValueError), path.open("rb") as file:
                head = json.loads(file.readline())
            if isinstance(head, dict) and head.get("first") == self.rows:
                self._take(path, head)
        self._sweep(keep=("job.json", *(path.name for path in self._parts)))

    def _take(self, path: Path, head: Mapping[str, Any]) -> None:
        self._parts.append(path)
        self.rows += int(head["rows"])
        self.skipped += int(head["skipped"])
        self.start = Place(**head["next"])

    def _sweep(self, keep: tuple[str, ...] = ()) -> None:
        """Remove what is ours, the last part first and `job.json` after the parts: what a kill leaves is a job."""
        ours = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: (path.name != "job.json", path.name), reverse=True):
            if path.name not in ("lock", *keep):
                path.unlink(missing_ok=True)


def _is_part(path: Path) -> bool:
    return path.suffix == ".jsonl" and path.stem.isdecimal()


def _is_job(folder: Path) -> bool:
    """Has a folder a job in it, or no more than what one that was killed may leave?"""
    if not folder.is_dir():
        return False
    names = os.listdir(folder)
    return "job.json" in names or all(map(_OURS.fullmatch, names))


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


class _Lock:
    """A folder, made if need be, in which no one else may work until this is closed or the process ends.

    Raises:
        UsageError: someone does.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.path = folder / "lock"
        self._key = os.path.realpath(folder)
        self._file: IO[bytes] | None = None
        with _opening:
            if self._key in _open:
                raise _busy("this process is writing", out)
            _open.add(self._key)
        try:
            for _ in range(_TRIES):
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # removed meanwhile, by one that is done
                    self._file = _locked(self.path, out)
                    if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                        return
            raise _busy("another process is writing", out)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        with _opening:
            _open.discard(self._key)


def _busy(what: str, out: Path) -> UsageError:
    return UsageError(f"{what} '{out}'", "wait for it, or name another file")


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
        raise _busy("another process is writing", out) from None
    return file
