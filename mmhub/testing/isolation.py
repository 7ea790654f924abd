"""Where a check runs: a temporary home and working folder, its own caches, and random states that are put back."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_HOME = ("HOME", "USERPROFILE")
_INSIDE = {"XDG_CACHE_HOME": ".cache", "XDG_CONFIG_HOME": ".config", "MMHUB_CONFIG": ".config/mmhub"}


@contextmanager
def isolated() -> Iterator[Path]:
    """Run the block in an empty working folder `work`, with `home` beside it as the user's home folder."""
    before, drawer = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="mmhub-check-", ignore_cleanup_errors=True) as folder, ExitStack() as undo:
        place = Path(os.path.realpath(folder))
        home, work = place / "home", place / "work"
        home.mkdir()
        work.mkdir()
        variables = dict.fromkeys(_HOME, str(home)) | {key: str(home / name) for key, name in _INSIDE.items()}
        variables |= {"MMHUB_CACHE": str(work / ".mmhub"), "TMPDIR": str(work)}
        _set_variables(undo, variables)
        undo.callback(setattr, tempfile, "tempdir", drawer)
        undo.callback(os.chdir, before)
        os.chdir(work)
        tempfile.tempdir = str(work)
        for restore, state in _process_states():
            undo.callback(restore, state)
        yield place


def work_folder() -> Path:
    """Return the only folder in which a check's code may write."""
    return Path(os.path.realpath(str(tempfile.tempdir)))


def home_folder() -> Path:
    return work_folder().parent / "home"


def _set_variables(undo: ExitStack, variables: dict[str, str]) -> None:
    for key, value in variables.items():
        old = os.environ.get(key)
        undo.callback(os.environ.pop, key, None) if old is None else undo.callback(os.environ.__setitem__, key, old)
        os.environ[key] = value


def _process_states() -> list[tuple[Any, Any]]:
    """What is put back afterwards, and how."""
    states: list[tuple[Any, Any]] = [(random.setstate, random.getstate())]
    if "numpy" in sys.modules:
        import numpy

        states.append((numpy.random.set_state, numpy.random.get_state()))
    if "torch" in sys.modules:
        import torch

        states.append((torch.set_rng_state, torch.get_rng_state()))
        states.append((torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(1)  # tiny inputs: more threads only wait for each other
    return states
