"""Importing a library without what it imports in turn for uses that are not ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any


@contextmanager
def deferred(module: str, function: str) -> Iterator[None]:
    """Inside the block, `from module import function` gives a stand-in that imports the real one when it is called.

    Anything else of the module is the real thing, imported at once; after the block, so is the module itself.
    """
    if module in sys.modules:
        yield
        return
    stand_in: Any = ModuleType(module)

    def real() -> Any:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
        return import_module(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(real(), function)(*args, **kwargs)

    def look_up(name: str) -> Any:
        if name.startswith("__"):  # the import statement asks whether this is a package
            raise AttributeError(name)
        return getattr(real(), name)

    setattr(stand_in, function, call)
    stand_in.__getattr__ = look_up
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
