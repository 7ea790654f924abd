"""What a repository says about itself in README.md and config.json, read with limits: the files come from anyone."""

import importlib
import json
from functools import lru_cache
from typing import Any

from mmhub_hubserver.store import Commit, Repo

MAX_BYTES = 1 << 20
_MAX_FRONT_MATTER_CHARS = 64 << 10
_MAX_YAML_DEPTH = 50


class CardError(Exception):
    """The front matter of a README is not valid."""


def card_data(repo: Repo, commit: Commit) -> dict[str, Any]:
    """Return the front matter of the README at this commit, empty if there is none that can be read."""
    content = _small(repo, commit, "README.md")
    if not content:
        return {}
    try:
        card: dict[str, Any] = json.loads(_parsed(_front_text(content.decode("utf-8", "replace"))))
    except CardError:
        return {}
    return card


def config(repo: Repo, commit: Commit) -> dict[str, Any] | None:
    """Return what listings show of config.json."""
    content = _small(repo, commit, "config.json")
    try:
        data = json.loads(content) if content else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    return {name: data[name] for name in ("architectures", "model_type") if name in data}


def front_matter(readme: str) -> dict[str, Any]:
    """Parse the YAML between the first two `---` lines; empty when PyYAML is not installed.

    Raises:
        CardError: it is not YAML, not a table, or could take unbounded time or memory.
    """
    return _yaml(_front_text(readme))


def _yaml(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        return {}
    try:
        _refuse_yaml_bombs(yaml, text)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CardError(" ".join(str(error).split())) from None
    if data is not None and not isinstance(data, dict):
        raise CardError("expected a table of keys and values")
    return {str(key): value for key, value in (data or {}).items()}


def check(readme: str) -> str | None:
    """Check a README before it is committed; return a warning, if there is reason for one.

    Raises:
        CardError: its front matter is not valid.
    """
    card = front_matter(readme)
    if not isinstance(card.get("model-index", []), list):
        raise CardError('"model-index" must be an array')
    return None if card else "empty or missing yaml metadata in repo card"


def _small(repo: Repo, commit: Commit, path: str) -> bytes | None:
    entry = commit.files.get(path)
    if entry is None or entry.lfs or entry.size > MAX_BYTES:
        return None
    return repo.content(entry)


def _refuse_yaml_bombs(yaml: Any, text: str) -> None:
    """Aliases expand without bound, and PyYAML takes quadratic time in the depth of open brackets."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if depth > _MAX_YAML_DEPTH or isinstance(token, yaml.AliasToken):
            raise CardError("aliases and deep nesting are not supported")


def _front_text(readme: str) -> str:
    lines = readme[:_MAX_FRONT_MATTER_CHARS].lstrip("\ufeff \r\n\t").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return ""
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    return "\n".join(lines[1:end])


@lru_cache(maxsize=256)  # keyed on the front matter only: a README may be long
def _parsed(text: str) -> str:
    try:
        return json.dumps(_yaml(text), default=str, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CardError(str(error)) from None
