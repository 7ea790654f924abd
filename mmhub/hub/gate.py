"""The publishing gate: all that speaks against sending a checkpoint, found before anything is sent.

What a folder's files hold is `mmhub.hub.staging`'s part; the card, the message, statements and overlap stand here.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmhub.hub.cache import as_table, read_json
from mmhub.hub.card import around_section, read_card, read_results
from mmhub.hub.findings import Finding, refusal
from mmhub.hub.leaks import find_leaks
from mmhub.hub.staging import Staged, finding_of
from mmhub.hub.statements import KINDS, Kind, overlap_line, stated_in, stated_under_headings, training_data
from mmhub.registry import read_registries

PROVENANCE = "provenance.json"
NOTED, REFUSED = 0.01, 0.2  # share of evaluation rows that are training rows, beyond what such rows repeat anyway
_NAMES: dict[Kind, str] = {"intended_use": "intended use", "limits": "limits", "training_data": "training data"}
_HOW = 'under [card] of the recipe, or under a heading such as "Intended use" in README.md'


def findings(
    folder: Path, card: str, staged: Sequence[Finding] = (), *, repo: str, message: str = "", reason: str = ""
) -> list[Finding]:
    """Return what speaks against publishing the checkpoint in `folder`, and what its owner should know.

    `card` is the README as it would be sent, with the user's text; `staged` was found in files; `message` is that of
    the commit, and `reason` why the owner insists, both of which are published, too.
    """
    found = list(staged)
    known = {one.kind for one in found if one.message.startswith("'README.md'")}  # which the card repeats
    leaks = [leak for leak in find_leaks(card, form="card") if leak.kind not in known]
    found += [finding_of(f"the card of '{repo}'", leak) for leak in leaks]
    for where, text in (("the commit message", message), ("the reason for --force", reason)):
        found += [finding_of(where, leak) for leak in find_leaks(text)]
    facts = as_table(read_json(folder / PROVENANCE))
    return [*dict.fromkeys(found), *_licence(card), *_statements(card, facts), *_overlaps(folder, facts)]


def decide(folder: Path, found: Sequence[Finding], force: str | None, left_out: Sequence[str] = ()) -> list[Finding]:
    """Return what was found, of which `force` lets pass what may be forced: None is no force, a text the reason.

    Raises:
        Untrusted, Unstated: anything is left that forbids publishing; names all of it.
    """
    insists = force is not None
    passed = [
        replace(one, severity="note", forced=True) if insists and one.severity == "refuse" and one.forceable else one
        for one in found
    ]
    if any(one.severity == "refuse" for one in passed):
        raise refusal(str(folder), passed, left_out)
    return passed


@contextmanager
def with_forced(folder: Path, source: Path, staged: Staged, found: Sequence[Finding], reason: str) -> Iterator[Any]:
    """Yield a folder and its files to be sent, in which provenance.json says what was forced; `folder` itself stays.

    What the checkpoint in `source` was forced to before stands there, too.
    """
    forced = [one for one in found if one.forced]
    if not forced:
        yield folder, staged
        return
    day = datetime.now(UTC).date().isoformat()
    facts = as_table(read_json(source / PROVENANCE))
    before = facts.get("forced")
    facts["forced"] = (before if isinstance(before, list) else []) + [
        {"finding": f"{one.kind}: {one.public or one.message}", "reason": reason, "date": day} for one in forced
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for name in staged.files:
            if name != PROVENANCE:
                _stand_in(folder / name, Path(temporary) / name)
        (Path(temporary) / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        yield Path(temporary), replace(staged, files=tuple(sorted({*staged.files, PROVENANCE})))


def _stand_in(path: Path, there: Path) -> None:
    there.parent.mkdir(parents=True, exist_ok=True)
    try:
        there.symlink_to(path.resolve())
    except OSError:  # not everybody may make links on Windows
        shutil.copyfile(path, there)


def _licence(card: str) -> list[Finding]:
    if read_card(card)[0].get("license"):
        return []
    hint = "add --license, e.g. --license apache-2.0"
    return [Finding(kind="licence", message="no licence is given for the model", hint=hint)]


def _statements(card: str, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what the card does not say of a model, or says with nothing but a placeholder."""
    headings: dict[Kind, bool] = {}
    for text in around_section(read_card(card)[1]):
        for kind, given in stated_under_headings(text).items():
            headings[kind] = headings.get(kind, False) or given
    for kind, given in headings.items():
        if not given:
            message = f"the card has a heading for {_NAMES[kind]}, and nothing stands under it"
            yield Finding(kind="statement", message=message, hint="write it, or remove the heading", forceable=True)
    said: set[str] = {kind for kind, given in headings.items() if given} | set(stated_in(facts))
    strict = read_registries().wants_statements()
    if strict and "training_data" not in said and not training_data(facts):
        message = f"nothing says what the model was trained on, and {strict} sets [hub] require_statements"
        yield Finding(kind="statement", message=message, hint=f"say it {_HOW}", forceable=True)
    missing = [_NAMES[kind] for kind in KINDS if kind not in {*said, *headings}]
    if missing:
        message = f"of {', '.join(missing)} the card says only what was recorded"
        yield Finding(kind="statement", message=message, hint=f"say more {_HOW}", severity="note")


def _overlaps(folder: Path, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Find evaluation data that was trained on, as `mmhub train` and `mmhub eval --against` record it."""
    measured = [as_table(as_table(facts.get("overlap")).get("valid"))]
    measured += [as_table(result.get("overlap")) for result in read_results(folder)]
    for found in measured:
        share, repeats = (_share(found.get(key)) for key in ("exact_share", "repeats"))
        if share <= NOTED:
            continue
        strict = read_registries().refuses_overlap()
        refused = strict is not None and share - repeats > REFUSED
        yield Finding(
            kind="overlap",
            message=f"{overlap_line(found)}: measured results say little of new inputs",
            hint="remove them from the training or the evaluation data, and measure again",
            severity="refuse" if refused else "note",
            forceable=refused,
        )


def _share(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        return 0.0
    return float(value)
