"""What the user asked for in each environment: `plugins.toml` among the settings, so that it survives a rebuild."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from mmhub.errors import UsageError
from mmhub.files import disk_errors, write_file
from mmhub.install.hold import held
from mmhub.install.pins import without_secret
from mmhub.install.places import prefix
from mmhub.records import canonical
from mmhub.registry import config_folder

FILE = "plugins.toml"
_HEAD = (
    "# Plugins asked for with `mmhub plugins install`, by environment; `mmhub plugins restore` installs them again.\n"
)


def read_asked() -> list[str]:
    """Return the requirement lines recorded for this environment.

    Raises:
        UsageError: the file is damaged.
    """
    return list(_read().get(str(prefix()), []))


def write_asked(lines: Sequence[str]) -> None:
    """Replace the lines of this environment; those of others stay."""
    path = config_folder() / FILE
    with disk_errors("the record of plugins", path.parent), held(path.with_name(f".{FILE}.lock")):
        write_file(path, _text(_read() | {str(prefix()): list(lines)}))


def _text(table: Mapping[str, Sequence[str]]) -> str:
    import tomlkit

    document = tomlkit.document()
    document.add("schema", tomlkit.item(1))
    environments = tomlkit.table()
    for root, rows in sorted(table.items()):
        entry = tomlkit.table()
        entry.add("requirements", tomlkit.item(list(rows)).multiline(len(rows) > 1))
        if rows:
            environments.add(root, entry)
    document.add("environments", environments)
    return _HEAD + tomlkit.dumps(document)


def merged(lines: Sequence[str], new: Mapping[str, str], without: Sequence[str] = ()) -> list[str]:
    """Return `lines` with those of the names in `new` replaced and those in `without` left out."""
    gone = {*new, *without}
    kept = [line for line in lines if name_of(line) not in gone]
    return kept + [without_secret(line) for line in new.values()]


def name_of(line: str) -> str:
    """Return the distribution that a recorded line is about, the line itself where it does not say (`-e PATH`)."""
    try:
        return canonical(Requirement(line.partition(" --hash")[0]).name)
    except InvalidRequirement:
        return line


def is_source(line: str) -> bool:
    """Would installing a recorded line build something? It was allowed to when the line was recorded."""
    address = line.rpartition(" @ ")[2]
    return ("://" in address or line.startswith("file:")) and not address.partition("#")[0].endswith(".whl")


def _read() -> dict[str, list[str]]:
    path = config_folder() / FILE
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return {root: [str(line) for line in entry["requirements"]] for root, entry in table["environments"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error!r}", "correct it, or delete it to start anew") from None
