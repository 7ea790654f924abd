"""`mmhub plugins check`: test an installed plugin against its contracts, in a process of its own."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

import click
import msgspec

from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.plugins import explain_absent
from mmhub.errors import PluginError, UsageError, did_you_mean
from mmhub.plugins import Plugin, get_index
from mmhub.testing.catalogue import checks_of
from mmhub.testing.runner import Outcome, run_checks

_SHOWN = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


@click.command()
@click.argument("name")
@click.option("-k", "pattern", metavar="PATTERN", help="Only checks whose id contains it, or matches it with * and ?.")
@click.option(
    "--timeout",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="End a check after so long.",
)
@json_option
@quiet_option
def check(name: str, pattern: str | None, timeout: float, as_json: bool, quiet: bool) -> None:
    """Test the installed plugin NAME against the contracts of its components, commands and hooks.

    Runs the plugin's code, offline, in a process with a temporary home folder.
    """
    plugin = _find(name)
    ids = _choose([one.id for one in checks_of(plugin)], pattern)
    outcomes = []
    for outcome in run_checks(plugin.distribution, ids, timeout):
        outcomes.append(outcome)
        if not as_json:
            click.echo(_line(outcome))
        elif outcome.status == "failed":
            note(_line(outcome), quiet)
    counts = Counter(outcome.status for outcome in outcomes)
    summary = f"{plugin}: {', '.join(f'{counts[status]} {status}' for status in _SHOWN)}"
    data = {"plugin": plugin.distribution, "version": plugin.version, **{status: counts[status] for status in _SHOWN}}
    emit(data | {"checks": [msgspec.to_builtins(outcome) for outcome in outcomes]}, as_json, summary)
    if counts["failed"]:
        failed = f"{plugin} breaks {counts['failed']} of {len(outcomes)} contracts"
        raise PluginError(failed, "what each checks: docs/contract.md of mmhub, or the docstrings in mmhub.testing")


def _find(name: str) -> Plugin:
    index = get_index()
    plugin = index.plugin(name) or index.plugin(f"mmhub-{name}")
    if plugin is None:
        raise explain_absent(name, [one.distribution for one in index.plugins])
    if plugin.status == "disabled":
        raise PluginError(f"{plugin} is disabled: {plugin.problem}", "switch it on to check it")
    return plugin


def _choose(ids: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return ids
    chosen = [one for one in ids if pattern in one or fnmatchcase(one, pattern)]
    if not chosen:
        raise UsageError(f"no check matches {pattern!r}", did_you_mean(pattern, ids) or f"for instance {ids[0]}")
    return chosen


def _line(outcome: Outcome) -> str:
    shown = f"{_SHOWN[outcome.status]:<8}{outcome.id}"
    return f"{shown}: {outcome.message}" if outcome.message else shown
