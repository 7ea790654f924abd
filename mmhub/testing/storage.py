"""Checks of every component: what is saved comes back, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mmhub
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import expect
from mmhub.testing.isolation import home_folder, work_folder
from mmhub.testing.subject import Subject, difference, subject_of
from mmhub.testing.watch import Watch, watched

_RULE = "checkpoint"


def save_load(check: Check) -> None:
    """A model with it, saved by `Model.save` and loaded by `mmhub.load`, gives bit-identical outputs, its processor
    included; also after training has changed its parameters and buffers."""
    subject: Subject = subject_of(check)
    module = _trained(subject)
    inputs = subject.inputs()
    with torch.no_grad(), subject.installed():
        before = subject.run(module, inputs)
        folder = subject.model(module).save(work_folder() / "model")
        torch.manual_seed(1234)
        loaded = mmhub.load(str(folder))
        again = _part_of(loaded, module, subject.model(module).parts()).eval()
        gap = difference(subject.run(again, inputs), before, 0.0)
    expect(not gap, f"loaded again, {gap}", "bit-identical outputs", _RULE)
    if hasattr(subject, "items"):
        same = _same_items(subject.items(module.processor), subject.items(again.processor))
        expect(same, "the loaded processor reads the same input differently", "equal tensors", _RULE)


def state_dict(check: Check) -> None:
    """A second instance of the same configuration that is given its state, strictly, gives the same outputs."""
    subject: Subject = subject_of(check)
    one, two = _trained(subject), subject.part(seed=99)
    inputs = subject.inputs()
    two.load_state_dict(one.state_dict(), strict=True)
    with torch.no_grad():
        gap = difference(subject.run(two, inputs), subject.run(one, inputs), 0.0)
    expect(not gap, f"with the state of another instance, {gap}", "the same outputs: all state in state_dict", _RULE)


def offline(check: Check) -> None:
    """Building, running, saving and loading it open no connection, not even to this machine."""
    seen, _ = _life(subject_of(check))
    expect(not seen.connections, f"it calls {seen.connections[:1]}", "no connection", "no network")


def writes(check: Check) -> None:
    """Building, running, saving and loading it write nothing but the checkpoint: not to the home folder, not elsewhere
    (temporary files apart)."""
    seen, strays = _life(subject_of(check))
    found = [*seen.writes, *strays]
    expect(not found, f"it writes to {_shown(found[0]) if found else ''}", "nothing outside the checkpoint", _RULE)


def _life(subject: Subject) -> tuple[Watch, list[str]]:
    """Build, run, train, save and load under watch. What fails because it was refused is the watch's finding."""
    subject.part()
    error: Exception | None = None
    with watched(work_folder()) as seen:
        try:
            module = subject.part()
            subject.run(module, subject.inputs())
            subject.loss(subject.run(module.train(), subject.inputs()))
            with subject.installed():
                mmhub.load(str(subject.model(module.eval()).save(work_folder() / "model")))
        except Exception as raised:
            error = raised
    strays = [str(path) for path in home_folder().rglob("*") if path.is_file()]
    if error is not None and not (seen.connections or seen.writes):
        raise error
    return seen, strays


def _trained(subject: Subject) -> Any:
    """A part whose parameters and buffers are not those it starts with."""
    module = subject.perturbed()
    with torch.no_grad():
        subject.run(module.train(), subject.inputs())
    return module.eval()


def _part_of(model: Any, module: Any, parts: Mapping[str, Any]) -> Any:
    """The part of a loaded model that plays the role of `module`."""
    role = next(role for role, part in parts.items() if part is module)
    return model.parts()[role]


def _same_items(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _shown(path: str) -> str:
    home = str(home_folder())
    return f"~{path[len(home) :]}" if path.startswith(home) else str(Path(path))
