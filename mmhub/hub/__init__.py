"""Publish to and load from the Hugging Face Hub, or any server that speaks its protocol (`HF_ENDPOINT`).

The functions are imported on first use: listing what a Hub holds needs no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmhub.hub.pull import load, pull
    from mmhub.hub.push import push

__all__ = ["load", "pull", "push"]
_HOMES = {"load": "mmhub.hub.pull", "pull": "mmhub.hub.pull", "push": "mmhub.hub.push"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


class _Package(ModuleType):
    """Importing the module `mmhub.hub.pull` must not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
