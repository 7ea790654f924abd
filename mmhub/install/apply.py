"""Carry a plan out as one transaction, and look whether mmhub still works after it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmhub.errors import ExitCode, Interrupted, MmhubError, PluginError
from mmhub.install import asked, journal
from mmhub.install.environment import Installed, broken_by, every_copy, installed
from mmhub.install.journal import Transaction
from mmhub.install.plan import Plan
from mmhub.install.tools import Tool
from mmhub.records import CORE

_START = 300  # seconds for a fresh mmhub to list its plugins


def apply(
    plan: Plan, command: str, tool: Tool | None, *, show: bool = False
) -> tuple[Transaction, list[dict[str, Any]]]:
    """Make the changes of a plan, all or none; return the transaction and what `plugins ls` says after it.

    Raises:
        MmhubError: it failed, and nothing was changed. Interrupted: the same, because the user asked to stop.
    """
    leaving = every_copy(plan.leaving)  # refuses what cannot be removed before anything begins
    removed = [change.name for change in plan.changes if not change.new]
    one = journal.begin(command)
    with _all_or_nothing(one):
        if plan.pins:
            assert tool
            tool.unpack(plan.pins, one.new, source=plan.source, show=show)
            _check_unpacked(one, plan, leaving)
            pins = [dataclasses.asdict(pin) | {"url": pin.public_url} for pin in plan.pins]
            one.write(pins=pins, startup=journal.startup_files(one))
        journal.commit(one, leaving)
        listing = look()
        asked.write_asked(asked.merged(one.record["asked"], plan.asked, removed))
        journal.finish(one)
    return one, listing


def remember(plan: Plan) -> None:
    """Write down what a plan without changes asked for, so that `restore` knows it, too."""
    lines = asked.read_asked()
    new = asked.merged(lines, plan.asked)
    if set(new) != set(lines):
        asked.write_asked(new)


def roll_back(one: Transaction) -> list[dict[str, Any]]:
    """Take a finished transaction back; return what `plugins ls` says after it."""
    journal.undo(one)
    return look()


def look() -> list[dict[str, Any]]:
    """Start mmhub anew and return its list of plugins.

    Raises:
        MmhubError: it does not start.
    """
    switches = ("MMHUB_STRICT_PLUGINS", "MMHUB_DEBUG")
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    here = sys.path[:1] == [os.getcwd()]  # `python -m mmhub`; else modules of the user's folder must not be imported
    alone = ["-I"] if sys.flags.isolated else [] if here else ["-P"]
    command = [sys.executable, *alone, "-m", CORE, "plugins", "ls", "--json"]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_START,
            check=False,
        )  # fmt: skip
        if done.returncode == 0:
            rows: list[dict[str, Any]] = json.loads(done.stdout)["plugins"]
            return rows
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        said = str(error)
    raise MmhubError(f"mmhub does not start any more after this change: {said[:300]}")


@contextmanager
def _all_or_nothing(one: Transaction) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        journal.undo(one)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted("interrupted; nothing was changed", exit_code=ExitCode.INTERRUPTED) from None
        if isinstance(error, MmhubError) and "nothing was changed" not in str(error):
            error.hint = f"nothing was changed; {error.hint}" if error.hint else "nothing was changed"
        raise


def _check_unpacked(one: Transaction, plan: Plan, leaving: Sequence[Installed]) -> None:
    """The tool must have unpacked what was planned and nothing else, and every plugin must have what it needs."""
    new = journal.unpacked(one)
    planned = {change.name: change.new for change in plan.changes if change.pin and change.pin.version == change.new}
    wrong = sorted(name for name, dist in new.items() if planned.get(name, dist.version) != dist.version)
    strange = sorted(({pin.name for pin in plan.pins} ^ set(new)) | set(wrong))
    if strange:
        raise MmhubError(f"the installer unpacked something else than what was planned: {', '.join(strange)}")
    changing = {change.name for change in plan.changes}
    result = {name: dist for name, dist in installed().items() if name not in changing} | new
    unmet = broken_by({name: dist.version for name, dist in result.items()}, new.values())
    if unmet:
        raise PluginError(f"not everything that a plugin needs would be there: {'; '.join(unmet)}")
    journal.check_files(one, leaving)
