"""The hooks a plugin may implement, in the module that its `mmhub` entry point names.

A plugin marks its implementation with `mmhub.spec.hookimpl` and lists the hook's name under `hooks` in its manifest;
the module is imported only when one of those fires. Arguments are passed by name, and new ones are only ever added, so
an implementation may take fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("mmhub")


@hookspec
def mmhub_train_callbacks(run: Any) -> Iterable[Any]:  # type: ignore[empty-body]  # pluggy wants functions, not a class
    """Return (or yield) callback objects that watch one training run, such as an experiment tracker.

    Called once per run, on rank 0 only, before the first step. A callback has three methods, each called on rank 0:

    - `on_start(run)`: training begins or resumes.
    - `on_log(step, metrics)`: after optimizer step `step` (from 1), with `metrics` a flat dict name -> number.
    - `on_end(run)`: training is over.

    Args:
        run: the training run. `run.folder` is the run folder (a `Path`), `run.config` the resolved recipe as plain
            data, `run.total_steps` the number of optimizer steps planned.
    """


def hook_names() -> tuple[str, ...]:
    """Return the names of all hooks of this version of mmhub."""
    return tuple(name for name in globals() if name.startswith("mmhub_"))
