"""What the models of a server are called: a local folder by its own name, so that no answer holds a path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_PLAIN = "model"  # what a run calls the folder of its model: the folder above says which


def public_names(models: Sequence[str]) -> dict[str, str]:
    """Return by what a model is called the name that was given for it, in the order of those.

    Names that are no folders stay as they are. Of folders that would be called alike, the second is `name-2`.
    """
    called = {given: _called(given) for given in dict.fromkeys(models)}
    taken = {given for given, name in called.items() if given == name}
    for given, name in called.items():
        if given != name:
            called[given] = _free(name, taken)
            taken.add(called[given])
    return {name: given for given, name in called.items()}


def _called(given: str) -> str:
    path = Path(os.path.abspath(Path(given.removeprefix("local:")).expanduser()))
    if not path.is_dir():
        return given
    above = path.parent.name if path.name == _PLAIN else ""
    return above or path.name or given


def _free(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
