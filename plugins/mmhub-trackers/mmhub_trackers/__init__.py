"""Send training runs to the trackers that MMHUB_TRACKERS names, through the hook `mmhub_train_callbacks`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

from mmhub.spec import hookimpl


@hookimpl
def mmhub_train_callbacks(run: Any) -> list[Any]:
    """Track with what MMHUB_TRACKERS, a list such as "wandb,trackio", asks for; what cannot be used is said."""
    asked = dict.fromkeys(name.strip().lower() for name in os.environ.get("MMHUB_TRACKERS", "").split(","))
    asked.pop("", None)
    if not asked:
        return []
    from mmhub_trackers.trackers import TRACKERS

    found = []
    for name in asked:
        if name not in TRACKERS:
            _warn(f"MMHUB_TRACKERS names {name!r}; known are {', '.join(TRACKERS)}")
        elif name not in sys.modules and find_spec(name) is None:
            _warn(f"MMHUB_TRACKERS names {name}, which is not installed: pip install 'mmhub-trackers[{name}]'")
        else:
            found.append(TRACKERS[name]())
    return found


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
