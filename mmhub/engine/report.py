"""What a run tells: metrics.jsonl, plug-in trackers, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmhub.files import write_file
from mmhub.plugins import hook_items
from mmhub.records import cause


@dataclass(frozen=True)
class TrainRun:
    """What trackers learn about a run (hook `mmhub_train_callbacks`)."""

    folder: Path
    config: Mapping[str, Any]  # the resolved recipe as plain data
    total_steps: int


class Reporter:
    """Report to people on stderr and to machines in metrics.jsonl; `quiet` silences the former."""

    def __init__(self, run: TrainRun, *, quiet: bool, step: int, lines: int) -> None:
        self.run, self.quiet = run, quiet
        self._path = run.folder / "metrics.jsonl"
        self.lines = self._keep_lines(lines)
        self._bar = tqdm(
            total=run.total_steps, initial=step, unit="step", disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True, leave=False,
        )  # fmt: skip
        self._trackers = hook_items("mmhub_train_callbacks", run=run)
        self._tell("on_start", run)

    def step(self, loss: float) -> None:
        self._bar.update()
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and hand the numbers to the trackers."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.lines += 1
        flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
        flat |= {f"{k}/{name}": v for k, part in values.items() if isinstance(part, dict) for name, v in part.items()}
        self._tell("on_log", step, flat)

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def say_from_signal(self, text: str) -> None:
        """Say a line from inside a signal handler, where Python's own streams may be in the middle of a write."""
        if not self.quiet:
            with suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    def watch(self, parts: Iterator[Any], total: int) -> Iterator[Any]:
        """Show the progress of an evaluation."""
        yield from tqdm(
            parts, total=total, desc="evaluating", unit="batch", leave=False,
            disable=self.quiet or not sys.stderr.isatty(),
        )  # fmt: skip

    def close(self) -> None:
        self._bar.close()
        self._tell("on_end", self.run)

    def _tell(self, event: str, *args: Any) -> None:
        """Call every tracker; one that fails is dropped with a line, and training goes on."""
        for plugin, tracker in list(self._trackers):
            try:
                getattr(tracker, event)(*args)
            except Exception as error:
                self._trackers.remove((plugin, tracker))
                name = type(tracker).__qualname__
                print(f"warning: plugin {plugin} is off: {name}.{event} failed: {cause(error)}", file=sys.stderr)

    def _keep_lines(self, count: int) -> int:
        """A resumed run repeats what came after its checkpoint: the old lines of that part go."""
        if not self._path.exists():
            return 0
        old = self._path.read_bytes().splitlines(keepends=True)
        kept = old[:count]
        if len(kept) < len(old):
            write_file(self._path, b"".join(kept))
        return len(kept)
