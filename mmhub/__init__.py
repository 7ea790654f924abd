"""mmhub: put model parts together by name. Importing this package imports nothing else; names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmhub.build import compose
    from mmhub.engine import train
    from mmhub.evaluation import evaluate
    from mmhub.hub.pull import load, pull
    from mmhub.hub.push import push
    from mmhub.model import Model

__all__ = ["Model", "__version__", "compose", "evaluate", "load", "pull", "push", "train"]

# No submodule may carry one of these names: importing it would replace the function by the module.
_HOMES = {
    "Model": "mmhub.model",
    "compose": "mmhub.build",
    "evaluate": "mmhub.evaluation",
    "load": "mmhub.hub",
    "pull": "mmhub.hub",
    "push": "mmhub.hub",
    "train": "mmhub.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmhub' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
