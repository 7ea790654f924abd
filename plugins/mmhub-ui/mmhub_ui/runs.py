"""Training runs, read from their folders while they go on: what is appended to a file is read, and no more.

A run is a folder with a recipe.toml and a metrics.jsonl, sessions.jsonl or stages/. Its files may grow, be cut off in
the middle of a line, be shortened by a run that resumes, or vanish; none of it is an error. How runs are shown is left
to `mmhub_ui.monitor`.
"""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Literal

State = Literal["running", "finished", "stopped"]

_METRICS, _SESSIONS, _STAGES, _DONE = "metrics.jsonl", "sessions.jsonl", "stages", "done.json"
_DEPTH = 4  # folders below the one that is watched
_MOST_RUNS = 500
_MOST_POINTS = 4000  # of a series; beyond, every second goes
_LARGE = 4 * 2**20  # bytes; of a longer piece a sample of its lines is read
_SAMPLES = 3000
_LONGEST = 2**26  # bytes of a line
_HUGE = 1e30  # numbers beyond are none that a run measures, and some of them break arithmetic
_FRESH = 120.0  # seconds without a word after which a run counts as stopped, unless its lines are far apart


class Points:
    """Numbers by step, thinned evenly where there are too many; the newest, the least and the most are always known."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, float]] = []
        self._every, self._seen = 1, 0
        self.last = self.least = self.most = (0.0, math.nan)

    def add(self, step: float, value: float) -> None:
        self.last = (step, value)
        self.least = self.last if not self._seen or value < self.least[1] else self.least
        self.most = self.last if not self._seen or value > self.most[1] else self.most
        if self._seen % self._every == 0:
            self._kept.append(self.last)
        self._seen += 1
        if len(self._kept) > _MOST_POINTS:
            self._kept = self._kept[::2]
            self._every *= 2

    def all(self) -> list[tuple[float, float]]:
        """Return (step, value) in the order of the file."""
        return [*self._kept, *([self.last] if self._kept and self._kept[-1] != self.last else [])]


class LineFile:
    """A file of JSON lines with a "step", followed from where it was left; `points` are its numbers by name.

    Numbers of a table have its name before theirs: `valid/accuracy`, `speed/tokens_per_second`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._end, self._tail = 0, b""  # what was read, and its last bytes: to see whether they still stand there
        self.entries: list[dict[str, Any]] = []  # lines without numbers to draw, such as those of sessions.jsonl
        self.points: dict[str, Points] = {}
        self.last_step = 0.0

    def read(self) -> bool:
        """Read what came since; say whether anything changed."""
        try:
            with self.path.open("rb") as file:
                return self._follow(file, os.fstat(file.fileno()).st_size)
        except OSError:
            gone = self._end > 0
            self._forget()
            return gone

    def _follow(self, file: BinaryIO, size: int) -> bool:
        file.seek(max(self._end - len(self._tail), 0))
        replaced = file.read(len(self._tail)) != self._tail
        if replaced:
            self._forget()
        if size <= self._end:
            return replaced
        lines = _sampled(file, self._end, size) if size - self._end > _LARGE else _whole(file, self._end, size)
        before = self._end
        for start, line in lines:
            self._end, self._tail = start + len(line), line[-64:]
            self._take(line)
        return replaced or self._end > before

    def _take(self, text: bytes) -> None:
        with suppress(ValueError, RecursionError):  # a line that a killed process left
            line = json.loads(text)
            step = _number(line.get("step")) if isinstance(line, dict) else None
            if step is None:
                return
            self.last_step = max(self.last_step, step)
            if self.path.name == _SESSIONS:
                self.entries.append(line)
                return
            for name, value in _flat(line):
                if name != "step":
                    self.points.setdefault(name, Points()).add(step, value)


def _whole(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The complete lines from `start` on, with where they begin."""
    file.seek(start)
    for line in file.read(size - start).splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield start, line
        start += len(line)


def _sampled(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Lines spread evenly over a long piece, every evaluation, and the last; as `_whole` gives them."""
    gap = max((size - start) // _SAMPLES, 1)
    for begin, data in _pieces(file, start, size):
        wanted = {_line_start(data, place) for place in range((start - begin) % gap, len(data), gap)}
        place = data.find(b'"valid"')
        while place >= 0:
            wanted.add(_line_start(data, place))
            place = data.find(b'"valid"', data.find(b"\n", place))
        wanted.add(_line_start(data, len(data) - 1))
        for place in sorted(wanted):
            yield begin + place, data[place : data.find(b"\n", place) + 1]


def _pieces(file: BinaryIO, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Complete lines, some megabytes of them at a time, with where they begin."""
    file.seek(start)
    rest, left = b"", size - start
    while len(rest) < _LONGEST and (read := file.read(min(_LARGE, left))):
        left -= len(read)
        lines, newline, rest = (rest + read).rpartition(b"\n")
        if newline:
            yield start, lines + newline
            start += len(lines) + 1


def _line_start(data: bytes, place: int) -> int:
    return data.rfind(b"\n", 0, place) + 1


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a table; those of tables in a table, "outer inner", as reports name them."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}{' ' if above else '/'}")
        elif (number := _number(value)) is not None:
            yield f"{above}{key}", number


def _number(value: Any) -> float | None:
    with suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _HUGE:
            return float(value)
    return None


class _Part:
    """A run without stages, or one stage of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.sessions = LineFile(folder / _METRICS), LineFile(folder / _SESSIONS)
        self.touched = 0.0  # when it last gave a sign of life, in seconds since 1970

    def read(self) -> bool:
        names = (_METRICS, _SESSIONS, "checkpoints", "recipe.toml")
        self.touched = max(_modified(self.folder / name) for name in names)
        return any([self.metrics.read(), self.sessions.read()])

    @property
    def steps(self) -> float:
        """What the steps of the next stage come after."""
        with suppress(OSError, ValueError):
            done = json.loads((self.folder / _DONE).read_bytes())
            return float(done["steps"]) if isinstance(done, dict) and "steps" in done else self.metrics.last_step
        return self.metrics.last_step

    def starts(self) -> list[dict[str, Any]]:
        return [entry for entry in self.sessions.entries if "end" not in entry]


class RunLog:
    """What one run tells, all stages of it joined: their steps, seconds and epochs count on.

    Attributes:
        name: its folder, as seen from the folder that is watched. version: grows with every change.
        series: numbers by name, each [(step, value)]. marks: steps at which it was resumed, or a stage began.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.version = name, folder, 0
        self.series: dict[str, list[tuple[float, float]]] = {}
        self.marks: list[float] = []
        self._parts: dict[Path, _Part] = {}
        self._offsets = [0.0]  # the steps before each of them
        self._known: tuple[tuple[int, int] | None, dict[str, Any]] = None, {}

    def read(self) -> bool:
        """Read what came since; say whether anything changed."""
        stages = (path for path in (self.folder / _STAGES).glob("*-*") if _stage_number(path) is not None)
        folders = sorted(stages, key=lambda path: _stage_number(path) or 0) or [self.folder]
        known = self._known
        self._known = self._read_recipe()
        same = self._known[0] == known[0] and folders == list(self._parts)
        self._parts = {folder: self._parts.get(folder) or _Part(folder) for folder in folders}
        changed = [part.read() for part in self._parts.values()]
        if same and not any(changed):
            return False
        self._join()
        self.version += 1
        return True

    def _join(self) -> None:
        series: dict[str, list[tuple[float, float]]] = {}
        marks, offset, before, offsets = [], 0.0, {"seconds": 0.0, "epoch": 0.0}, []
        for number, part in enumerate(self._parts.values()):
            offsets.append(offset)
            steps = [step for entry in part.starts() if (step := _number(entry["step"])) is not None]
            marks += [offset + step for step in (steps if number else steps[1:])]
            for name, points in part.metrics.points.items():
                add = before.get(name, 0.0)
                series.setdefault(name, []).extend((offset + step, add + y) for step, y in points.all())
            before = {name: series[name][-1][1] if series.get(name) else 0.0 for name in before}
            if number + 1 < len(self._parts):
                offset += part.steps
        self.series, self.marks, self._offsets = series, marks, offsets  # whoever draws meanwhile has the old ones

    # -- what is said of it ---------------------------------------------------------------------------------------

    @property
    def _current(self) -> _Part:
        return list(self._parts.values())[-1]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the run said of itself when it was last started, {} if it never did a step."""
        starts = self._current.starts() if self._parts else []
        return starts[-1] if starts else {}

    @property
    def task(self) -> str:
        return str(self.facts.get("task") or self.recipe().get("task") or "")

    @property
    def step(self) -> int:
        return int(self._offsets[-1] + self._current.metrics.last_step) if self._parts else 0

    @property
    def total(self) -> int | None:
        """The steps it is to make, as far as known."""
        number = _number(self.facts.get("total_steps"))
        return None if number is None else int(self._offsets[-1] + number)

    @property
    def stage(self) -> str:
        """Such as "2/3 joint"; '' for a run without stages."""
        number, _, name = self._current.folder.name.partition("-")
        return f"{number}/{len(self._stages())} {name}" if self._current.folder != self.folder else ""

    def best(self) -> tuple[str, float, float] | None:
        """The main metric, its best value, and at which step; the last loss where nothing was evaluated yet."""
        name = str(self.facts.get("monitor", ""))
        higher = self.facts.get("higher_is_better", True)
        found = []
        for offset, part in zip(self._offsets, self._parts.values(), strict=False):
            if points := part.metrics.points.get(f"valid/{name}"):  # they know it also where the series was thinned
                step, value = points.most if higher else points.least
                found.append((value, offset + step))
        if not found:
            loss = self.series.get("loss")
            return ("loss", loss[-1][1], loss[-1][0]) if loss else None
        value, step = max(found, key=lambda one: one[0] if higher else -one[0])
        return name, value, step

    def state(self, now: float | None = None) -> tuple[State, str]:
        """Whether it runs, and what is known of how it ended."""
        ends = [str(entry["end"]) for entry in self._current.sessions.entries[-1:] if "end" in entry]
        last = self._current.folder == self.folder or (_stage_number(self._current.folder) or 0) >= len(self._stages())
        if ends and (ends[0] != "finished" or last):
            return ("finished", "") if ends[0] == "finished" else ("stopped", ends[0])
        silent = (time.time() if now is None else now) - self._current.touched
        if silent <= max(_FRESH, 4 * self._gap()):
            return "running", ""
        if not self._current.sessions.entries and (self.folder / "model" / "config.json").is_file():
            return "finished", ""
        return "stopped", "without a word"

    def _gap(self) -> float:
        """Seconds between the last two lines."""
        seconds = self.series.get("seconds", [])
        return seconds[-1][1] - seconds[-2][1] if len(seconds) > 1 else 0.0

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, {} where it cannot be read."""
        return self._known[1]

    def _read_recipe(self) -> tuple[tuple[int, int] | None, dict[str, Any]]:
        """The recipe, and what tells whether the file is another."""
        file, stamp = self.folder / "recipe.toml", None
        with suppress(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
            found = file.stat()
            stamp = found.st_mtime_ns, found.st_size
            return self._known if stamp == self._known[0] else (stamp, tomllib.loads(file.read_text(encoding="utf-8")))
        return stamp, {}

    def _stages(self) -> list[Any]:
        train = self.recipe().get("train")
        stages = train.get("stages") if isinstance(train, dict) else None
        return stages if isinstance(stages, list) else []

    def touched(self) -> float:
        return max((part.touched for part in self._parts.values()), default=0.0)


class Runs:
    """The runs below a folder, kept between looks; several threads may look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._logs: dict[str, RunLog] = {}
        self._lock = Lock()

    def look(self) -> dict[str, RunLog]:
        """Return the runs that are there now by name, the newest first, each with what it has told up to now."""
        with self._lock:
            found = _find(self.root)
            logs = {name: self._logs.get(name) or RunLog(name, folder) for name, folder in found.items()}
            for log in logs.values():
                log.read()
            self._logs = dict(sorted(logs.items(), key=lambda item: -item[1].touched()))
            return self._logs


def _find(root: Path) -> dict[str, Path]:
    """The folders of runs by their names; neither links nor hidden folders are followed, nor runs entered."""
    if _is_run(root):
        return {root.resolve().name: root}
    found: dict[str, Path] = {}
    for place, folders, _ in os.walk(root):
        at = Path(place).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_link(place, name))
        runs = [name for name in folders if _is_run(Path(place) / name)]
        found |= {_readable((at / name).as_posix()): Path(place) / name for name in runs}
        folders[:] = [name for name in folders if name not in runs] if len(at.parts) < _DEPTH else []
        if len(found) >= _MOST_RUNS:
            break
    return found


def _is_link(place: str, name: str) -> bool:
    return Path(place, name).is_symlink()


def _readable(name: str) -> str:
    """A name of which every character can be sent: those of folders may be any bytes."""
    return os.fsencode(name).decode("utf-8", "replace")


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (_METRICS, _SESSIONS, _STAGES)) and (
        (folder / "recipe.toml").is_file() or (folder / _METRICS).is_file()
    )


def _stage_number(folder: Path) -> int | None:
    number = folder.name.partition("-")[0]
    return int(number) if number.isascii() and number.isdecimal() else None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
