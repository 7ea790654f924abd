"""`mmhub plugins install|uninstall|lock|restore|rollback`: change the plugins of this environment, and take it back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.errors import MmhubError, NotFoundError, PluginError, UsageError
from mmhub.install.environment import check_changeable, installed
from mmhub.install.hold import locked
from mmhub.install.plan import Plan, Refused, make_plan, warnings
from mmhub.install.tools import Tool, find_tool

if TYPE_CHECKING:
    from mmhub.install.journal import Transaction
    from mmhub.install.request import Request

F = TypeVar("F", bound=Callable[..., Any])


def change_options(command: F) -> F:
    """Add what every command that changes something has: --dry-run, --yes, --json, --quiet."""
    dry = click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
    yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
    return dry(yes(json_option(quiet_option(command))))


def allow_option(command: F) -> F:
    """Add the repeatable `--allow-change NAME`, passed on as `allow_change`."""
    text = "Let NAME move although others need it (torch, numpy, an installed plugin, …). Repeatable."
    return click.option("--allow-change", metavar="NAME", multiple=True, help=text)(command)


source_option = click.option("--allow-source", is_flag=True, help="Build what has no wheel. This runs its code.")


@click.command()
@click.argument("what", nargs=-1)
@click.option("-r", "--requirements", type=click.Path(), multiple=True, help="A file of requirements, or a lock.")
@click.option("-e", "--editable", type=click.Path(), multiple=True, help="The source folder of a plugin you work on.")
@click.option("-U", "--upgrade", is_flag=True, help="Take the newest versions of what is named.")
@allow_option
@source_option
@click.option("--fresh", is_flag=True, help="Take uploads of the last 7 days, too.")
@change_options
def install(
    what: Sequence[str],
    requirements: Sequence[str],
    editable: Sequence[str],
    upgrade: bool,
    allow_change: Sequence[str],
    allow_source: bool,
    fresh: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Install plugins: names with or without versions, or paths of wheels. Shows first what would change."""
    from mmhub.install.request import read_request

    locks = [path for path in requirements if Path(path).name.startswith("pylock.")]
    if locks:
        if what or editable or len(requirements) > 1:
            raise UsageError(f"'{locks[0]}' is a lock, which stands alone", "mmhub plugins restore LOCK")
        _restore_lock(Path(locks[0]), allow_change, allow_source, dry_run, yes, as_json, quiet)
        return
    with _environment(dry_run, quiet):
        request = read_request(
            what, editable, requirements, allowed=allow_change, upgrade=upgrade, source=allow_source, fresh=fresh
        )
        _carry_out_request(request, "install", dry_run, yes, as_json, quiet)


@click.command()
@click.argument("names", nargs=-1, required=True)
@change_options
def uninstall(names: Sequence[str], dry_run: bool, yes: bool, as_json: bool, quiet: bool) -> None:
    """Remove the plugins NAMES, broken ones included. What they needed stays."""
    from mmhub.install.remove import plan_removal

    with _environment(dry_run, quiet):
        _carry_out(plan_removal(names), "uninstall", None, dry_run, yes, as_json, quiet)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="The file to write.  [default: pylock.mmhub.toml]")
@json_option
@quiet_option
def lock(out: Path | None, as_json: bool, quiet: bool) -> None:
    """Write the installed plugins and all they need to a lock file (PEP 751), with hashes."""
    from mmhub.install.lock import FILE, write_lock

    path = out or Path(FILE)
    with _environment(True, quiet):
        pins = write_lock(path, find_tool)
    local = [pin.name for pin in pins if pin.public_url.startswith("file:")]
    if local:
        note(f"note: a path on this machine is where the lock has {', '.join(local)} from", quiet)
    rows = [{"name": pin.name, "version": pin.version, "url": pin.public_url, "sha256": pin.sha256} for pin in pins]
    emit({"file": str(path), "packages": rows}, as_json, f"{path}: {len(pins)} packages")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@allow_option
@source_option
@click.option("--fresh", is_flag=True, help="Without FILE: take uploads of the last 7 days, too.")
@change_options
def restore(
    file: Path | None,
    allow_change: Sequence[str],
    allow_source: bool,
    fresh: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Install exactly what the lock FILE lists. Without FILE, what was asked for in this environment before."""
    from mmhub.install.asked import is_source, read_asked
    from mmhub.install.request import read_request

    if file is not None:
        _restore_lock(file, allow_change, allow_source, dry_run, yes, as_json, quiet)
        return
    with _environment(dry_run, quiet):
        lines = read_asked()
        if not lines:
            raise NotFoundError("no plugins are on record for this environment", "mmhub plugins restore LOCK")
        folders = [line.removeprefix("-e ") for line in lines if line.startswith("-e ")]
        plain = [line for line in lines if not line.startswith("-e ")]
        source = allow_source or any(map(is_source, plain))
        request = read_request(plain, folders, allowed=allow_change, source=source, fresh=fresh)
        _carry_out_request(request, "restore", dry_run, yes, as_json, quiet)


@click.command()
@change_options
def rollback(dry_run: bool, yes: bool, as_json: bool, quiet: bool) -> None:
    """Undo the last change of plugins, offline. Again: the one before it."""
    from mmhub.install import journal
    from mmhub.install.apply import look, roll_back
    from mmhub.install.plan import Change

    with _environment(dry_run, quiet) as repaired:
        one = repaired[0] if repaired else journal.last_change()  # what was left unfinished was the last change
        changes = [Change(name=name, old=new, new=old) for name, old, new in journal.differences(one)]
        text = "\n".join(change.line() for change in changes) or "no package changed"
        go = bool(repaired) or _confirmed([change.line() for change in changes], dry_run, yes, as_json, quiet)
        rows = [] if not go else look() if repaired else roll_back(one)
    data = {"changes": [change.data() for change in changes], "applied": go, "transaction": one.number}
    done = f"rolled back change {one.number} ({one.record['command']} of {one.record['when'][:16]})"
    emit(data | {"plugins": _states(rows)}, as_json, f"{text}\n{done}" if go else text)


def _restore_lock(
    path: Path, allowed: Sequence[str], source: bool, dry: bool, yes: bool, as_json: bool, quiet: bool
) -> None:
    from mmhub.install.lock import plan_restore, read_lock
    from mmhub.records import canonical

    with _environment(dry, quiet):
        pins, protected = read_lock(path)
        with _diff_of_a_refusal():
            plan = plan_restore(pins, [canonical(name) for name in allowed], source)
        here = installed()
        for name, version in protected.items():
            if name in here and here[name].version != version:
                note(f"locked beside {name} {version}; here is {here[name].version}, which stays", quiet)
        _carry_out(plan, "restore", find_tool() if plan.pins else None, dry, yes, as_json, quiet)


def _carry_out_request(request: Request, command: str, dry_run: bool, yes: bool, as_json: bool, quiet: bool) -> None:
    tool = find_tool()
    if sys.stderr.isatty():
        note(f"asking the package index, with {tool.name} ...", quiet)
    with _diff_of_a_refusal():
        plan = make_plan(request, tool, lambda text: note(text, quiet))
    _carry_out(plan, command, tool, dry_run, yes, as_json, quiet)


def _carry_out(
    plan: Plan, command: str, tool: Tool | None, dry_run: bool, yes: bool, as_json: bool, quiet: bool
) -> None:
    """Show a plan, ask, apply it, and print the result."""
    from mmhub.install.apply import apply, remember

    for line in warnings(plan, installed()):
        note(f"note: {line}", quiet)
    changes = list(plan.changes)
    lines = [change.line() for change in changes]
    go = bool(lines) and _confirmed(lines, dry_run, yes, as_json, quiet)
    if not lines and not dry_run:
        try:
            remember(plan)
        except MmhubError as error:
            note(f"note: {error.message}", quiet)
    number: int | None = None
    rows: list[dict[str, Any]] = []
    if go:
        fetches = any(pin.kind != "file" or not pin.url.startswith("file:") for pin in plan.pins)
        one, rows = apply(plan, command, tool, show=fetches and sys.stderr.isatty() and not quiet)
        number = one.number
        changes = [replace(change, new=one.version_after(change.name)) for change in changes]
    data = {"changes": [change.data() for change in changes], "applied": go, "transaction": number}
    text = "\n".join(change.line() for change in changes) or "nothing to do: everything is there"
    if go and not yes:  # the lines were shown with the question
        text = "done; `mmhub plugins rollback` takes it back"
    emit(data | {"plugins": _states(rows)}, as_json, text)
    if go and command != "uninstall":
        for file in one.record.get("startup", []):
            note(f"note: {file} runs whenever Python starts", quiet)
        _report(plan, rows, quiet)


def _confirmed(lines: Sequence[str], dry_run: bool, yes: bool, as_json: bool, quiet: bool) -> bool:
    """Is it to be done? Asks on a terminal, after showing what.

    Raises:
        UsageError: nobody is there to ask.
    """
    if dry_run or yes:
        return not dry_run
    if not as_json:
        print("\n".join(lines), file=sys.stderr)
    if as_json or not sys.stdin.isatty():
        raise UsageError(
            "this changes the environment, and nobody can be asked", "add --yes, or --dry-run to only look"
        )
    if not click.confirm("change this?", err=True):
        raise MmhubError("nothing was changed")
    return True


def _report(plan: Plan, rows: Sequence[dict[str, Any]], quiet: bool) -> None:
    """Say which of the things asked for are no plugins, and fail if one cannot be used."""
    states = {row["distribution"]: row for row in rows}
    for name in plan.names:
        if name not in states:
            note(f"note: {name} is no plugin of mmhub", quiet)
    changed = {change.name for change in plan.changes}
    bad = [row for name, row in states.items() if name in changed and row["status"] in ("broken", "incompatible")]
    if bad:
        said = "; ".join(f"{row['distribution']} {row['version']} is {row['status']}: {row['problem']}" for row in bad)
        raise PluginError(f"installed, and cannot be used: {said}", "undo it with `mmhub plugins rollback`")


def _states(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("distribution", "version", "status", "problem")} for row in rows]


@contextmanager
def _environment(only_look: bool, quiet: bool) -> Iterator[list[Transaction]]:
    """Hold this environment alone, and first take back what a killed process left unfinished in it: yields that."""
    from mmhub.install import journal

    check_changeable()
    waiting = lambda: note("waiting for another mmhub that changes this environment", quiet)  # noqa: E731
    with locked(to_change=not only_look, waiting=waiting) as mine:
        repaired = journal.repair() if mine else []
        for one in repaired:
            unfinished = f"an unfinished `mmhub plugins {one.record['command']}`"
            note(f"note: {unfinished} was taken back; plugins are as before it", quiet)
        yield repaired


@contextmanager
def _diff_of_a_refusal() -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        print("\n".join(change.line() for change in refused.plan.changes), file=sys.stderr)
        raise
