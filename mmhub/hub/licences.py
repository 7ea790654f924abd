"""Licences along a chain of models: where a model came from, and whether one it builds on asks for more than it does.

A reading aid and no legal advice: it knows families of licences, not their texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# From free to restricted; the first family that matches counts, and what matches none is terms of somebody's own.
_FAMILIES = (
    ("no-derivatives", 5, r"cc-by(-nc)?-nd.*"),
    ("non-commercial", 4, r"cc-by-nc.*|.*non-?commercial.*|fair-noncommercial.*|h-research|intel-research|apple-amlr"),
    ("strong copyleft", 2, r"a?gpl(-.*)?|osl-.*|cc-by-sa.*|eupl.*|gfdl.*|ofl.*"),
    ("weak copyleft", 1, r"lgpl.*|mpl.*|epl.*|ms-pl|cddl.*"),
    (
        "permissive",
        0,
        r"apache-2\.0|mit(-0)?|bsd.*|isc|unlicense|wtfpl|zlib|cc0-1\.0|cc-by-[1-4]\.\d|pddl|ncsa|bsl-1\.0|odc-by|afl-3\.0",
    ),
)
_OWN_TERMS = ("own terms", 3)


@dataclass(frozen=True, kw_only=True)
class Link:
    """One model of the chain: what it is to the one it was asked for, and its licence, '' where none is known."""

    name: str
    relation: str
    license: str
    parent: str = ""


def family(license: str) -> tuple[str, int]:
    """Return a licence's family and how much it restricts, 0 (nothing to speak of) to 5.

    >>> family("apache-2.0"), family("cc-by-nc-4.0")
    (('permissive', 0), ('non-commercial', 4))
    """
    plain = license.strip().lower()
    return next(((name, rank) for name, rank, pattern in _FAMILIES if re.fullmatch(pattern, plain)), _OWN_TERMS)


def chain(
    name: str,
    license: str,
    parents: Sequence[tuple[str, str]],
    look_up: Callable[[str], tuple[str, Sequence[tuple[str, str]]]],
    *,
    most: int = 12,
) -> list[Link]:
    """Return a model and all that it was made from, each once.

    `parents` are (name, relation); `look_up` returns the licence and parents of a name. At most `most` are looked up:
    a card can name anything.
    """
    links, seen = [Link(name=name, relation="this model", license=license)], {name}
    waiting = [(parent, relation, name) for parent, relation in parents]
    while waiting and len(links) <= most:
        parent, relation, child = waiting.pop(0)
        if parent in seen:
            continue
        seen.add(parent)
        found, its_parents = look_up(parent)
        links.append(Link(name=parent, relation=relation, license=found, parent=child))
        waiting += [(grand, kind, parent) for grand, kind in its_parents]
    return links


def warnings(links: Sequence[Link]) -> list[str]:
    """Say where the first model's licence is unknown, or grants more than a licence further up the chain."""
    own = links[0]
    said = [] if own.license else [f"no licence is given for {own.name}"]
    named, rank = family(own.license) if own.license else ("", 0)
    for link in links[1:]:
        if not link.license:
            said.append(f"the licence of {link.name} ({link.relation}) is unknown")
            continue
        theirs, restricts = family(link.license)
        if restricts > rank:
            mine = f"than {own.license} ({named})" if own.license else "and this model names none"
            said.append(f"{link.name} ({link.relation}) is under {link.license} ({theirs}), more restrictive {mine}")
        elif theirs == _OWN_TERMS[0] and link.license != own.license:
            said.append(f"{link.name} ({link.relation}) is under terms of its own: {link.license}")
    return said
