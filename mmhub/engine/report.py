"""What a run tells: metrics.jsonl, report.html, trackers, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.engine.chart import short
from mmhub.engine.page import METRICS, SESSIONS, write_page
from mmhub.engine.provenance import hardware, known_data, public, public_text, versions
from mmhub.engine.ranks import Ranks
from mmhub.files import write_file
from mmhub.model import Model
from mmhub.plugins import hook_items
from mmhub.records import cause

LINE_EVERY = 10.0  # seconds of training between plain lines


@dataclass(frozen=True)
class TrainRun:
    """What trackers learn about a run (hook `mmhub_train_callbacks`)."""

    folder: Path
    config: Mapping[str, Any]  # the resolved recipe as plain data, without logins and folders
    total_steps: int


def run_facts(
    model: Model,
    device: torch.device,
    precision: torch.dtype,
    ranks: Ranks,
    train: Rows | Stream | None = None,
    valid: Rows | None = None,
) -> dict[str, Any]:
    """What report.html says about the model, the machine and the data, as JSON data."""
    parts = {}
    for role, part in model.parts().items():
        source = model.sources.get(role)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in part.parameters()]
        parts[role] = {
            "use": source.id if source else type(part).__name__,
            "parameters": sum(size for size, _ in sizes),
            "trained": sum(size for size, learns in sizes if learns),
        }
    return {
        "task": model.task.name,
        "monitor": model.task.monitor,
        "higher_is_better": model.task.higher_is_better,
        "parts": parts,
        "device": str(device),
        "precision": str(precision).removeprefix("torch."),
        "processes": ranks.world,
        "hardware": hardware(),
        "versions": versions(model),
        "data": known_data(train, valid) if train is not None and ranks.first else {},
    }


class Reporter:
    """Report to people on stderr and to machines in the run folder; `quiet` silences the former.

    Of several processes the first alone reports. `step` is the one a run goes on from, `lines` those of metrics.jsonl
    that still hold, `facts` what `run_facts` found.
    """

    def __init__(
        self,
        run: TrainRun,
        *,
        quiet: bool,
        step: int,
        lines: int,
        ranks: Ranks | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        first = ranks is None or ranks.first
        self.run = run = replace(run, config=public(run.config))
        self.quiet, self.lines, self._first = quiet or not first, lines, first
        self._path, self._step = run.folder / METRICS, step
        on_terminal = not self.quiet and sys.stderr.isatty()
        self._plain = not self.quiet and not on_terminal
        self._said, self._speed = time.monotonic(), ""
        self._outer = sys.exception()  # what the caller is dealing with is not about this run
        self._start: dict[str, Any] | None = self._entry() | {"total_steps": run.total_steps} | dict(facts or {})
        self._bar = tqdm(
            total=run.total_steps, initial=step, unit="step", disable=not on_terminal, dynamic_ncols=True, leave=False
        )
        self._trackers: list[tuple[Any, Any]] = []
        if first:
            self.lines = self._keep_lines(lines)
            self._trackers = hook_items("mmhub_train_callbacks", run=run)
            self._tell("on_start", run)

    def step(self, loss: float | None = None) -> None:
        """An optimizer step is done; its loss where it is known."""
        if self._start:
            self._note(self._start)  # a run that fails before its first step leaves nothing
        self._step += 1
        self._bar.update()
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}{self._speed}", refresh=False)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and hand the numbers to the trackers; what a table holds is named a/b."""
        self.lines += 1
        if not self._first:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
        flat |= {f"{k}/{name}": v for k, part in values.items() if isinstance(part, dict) for name, v in part.items()}
        self._tell("on_log", step, flat)
        if "loss" in values:
            self._speed = _speed(values.get("speed", {}))
            self._say_plain(step, values["loss"])

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
        """End the report, with report.html if a step was made; an exception on its way out is what ended the run."""
        self._bar.close()
        if not self._first:
            return
        if self._path.exists() or not self._start:
            self._end()
        self._tell("on_end", self.run)

    def _end(self) -> None:
        if self._start:
            self._note(self._start)
        error = sys.exception()
        failed = error is not None and error is not self._outer
        end = (" ".join(str(error).split()) or type(error).__name__) if failed else "finished"
        self._note(self._entry() | {"end": public_text(end)})
        try:
            write_page(self.run.folder)
        except Exception as problem:  # the run is worth more than its picture
            print(f"warning: report.html is not written: {cause(problem)}", file=sys.stderr)

    def _say_plain(self, step: int, loss: float) -> None:
        """Show life in a log file."""
        now = time.monotonic()
        if self._plain and now - self._said >= LINE_EVERY:
            self._said = now
            self.say(f"step {step}/{self.run.total_steps}: loss {loss:.4f}{self._speed}")

    def _entry(self) -> dict[str, Any]:
        return {"time": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"), "step": self._step}

    def _note(self, entry: Mapping[str, Any]) -> None:
        """Keep a beginning or an end in sessions.jsonl."""
        self._start = None
        if self._first:
            with suppress(OSError), (self.run.folder / SESSIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

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


def _speed(speed: Mapping[str, float]) -> str:
    """The rates worth a place on a line."""
    names = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s"}
    shown = [f", {short(speed[key])} {name}" for key, name in names.items() if speed.get(key)]
    if speed.get("mfu"):
        shown.append(f", MFU {speed['mfu']:.1%}")
    if speed.get("data_wait_share", 0) >= 0.2:
        shown.append(f", waiting for data {speed['data_wait_share']:.0%}")
    return "".join(shown)
