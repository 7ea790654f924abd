"""What a model's README says, for a list or a summary: its licence, what it builds on, and its first sentence.

It was written by strangers, and a broken one is as good as none. Writing cards is left to `mmhub.hub.card`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CARD_CHARS = 2**18


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a README says: its metadata, and the first sentence under its title."""

    summary: str = ""
    license: str = ""
    parents: tuple[tuple[str, str], ...] = ()  # (name, relation)
    tags: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def read_card(folder: Path) -> Card:
    """Read the README in a folder; an empty card if there is none."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            return parse_card(file.read(_CARD_CHARS))
    except OSError:
        return Card()


def parse_card(text: str) -> Card:
    """Read a README: metadata that is not YAML counts for nothing."""
    found = re.match(r"\A\s*---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    data: Any = {}
    if found:
        with suppress(ValueError):
            data = parse_metadata(found[1][: 2**16])
    body = text[found.end() :] if found else text
    return card_of(data if isinstance(data, dict) else {}, body)


def parse_metadata(text: str) -> Any:
    """Return what the YAML at the top of a card says.

    Raises:
        ValueError: it is none, or nested too deeply: yaml takes time that grows with the square of that.
    """
    import yaml

    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST or re.search(rf"^[ \t]*([-?][ \t]+){{{_DEEPEST}}}", text, re.MULTILINE):
        raise ValueError("it is nested too deeply")
    if re.search(r"<<['\"]?\s*:|!!merge", text):
        raise ValueError("it merges mappings by '<<', which can make a few lines take all memory")
    try:
        return yaml.safe_load(text)
    except Exception as error:  # whatever its constructors make of a tag that does not fit its value
        raise ValueError(str(error)) from None


_DEEPEST = 64


def card_of(data: Mapping[str, Any], body: str = "") -> Card:
    """Return the card of metadata as they stand in a README or as a Hub lists them."""
    relation = data.get("base_model_relation")
    kind = relation if isinstance(relation, str) else "base model"
    kept = ("license", "license_name", "language", "datasets", "base_model", "pipeline_tag", "library_name", "tags")
    plain = {key: data[key] for key in kept if isinstance(data.get(key), str) or strings(data.get(key))}
    own = plain.get("license_name") if data.get("license") == "other" else None
    return Card(
        summary=_first_sentence(body),
        license=", ".join(one for one in strings(own or data.get("license")) if one.lower() != "unknown"),
        parents=tuple((name, kind) for name in strings(data.get("base_model"))),
        tags=strings(data.get("tags")),
        metadata={key: value if isinstance(value, str) else strings(value) for key, value in plain.items()},
    )


def _first_sentence(body: str) -> str:
    """The first paragraph that is prose, without links, not longer than a few lines."""
    # What is opened and not closed ends with the text, or searching for its end would take quadratic time.
    prose = re.sub(r"<!--.*?(-->|\Z)|```.*?(```|\Z)|^#[^\n]*", "\n\n", body, flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", prose):
        line = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", " ".join(paragraph.split()))
        if line and not line.startswith(("|", "<", "!", "- ", "* ", ">", "---")):
            return line if len(line) <= 300 else line[:299] + "…"
    return ""


def strings(value: Any) -> list[str]:
    """Return the texts in a list, or the one text; whatever else it is counts for nothing."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item]
