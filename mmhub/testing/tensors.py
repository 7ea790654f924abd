"""Checks of every component: random numbers, gradients, training mode, precisions, devices and compilation."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmhub.testing.catalogue import Check
from mmhub.testing.contract import expect
from mmhub.testing.subject import Subject, difference, subject_of

_RULE = "batching and seeds never change a result"


def determinism(check: Check) -> None:
    """The same seed gives the same weights, building sets no seed itself, and in evaluation mode two passes are equal
    and draw no random number."""
    subject: Subject = subject_of(check)
    one, two = subject.part(seed=3), subject.part(seed=3)
    gap = difference(dict(two.state_dict()), dict(one.state_dict()), 0.0)
    expect(not gap, f"built twice with one seed, {gap}", "the same weights", _RULE)
    subject.part(seed=4)
    first = torch.rand(8)
    subject.part(seed=5)
    expect(not torch.equal(first, torch.rand(8)), "building sets torch's seed", "the caller's to stay", _RULE)
    inputs = subject.inputs()
    with torch.no_grad():
        before = _random_states()
        out = subject.run(one, inputs)
        drawn = [name for name, state in _random_states().items() if state != before[name]]
        expect(not drawn, f"evaluation draws from {drawn}", "no random numbers", _RULE)
        gap = difference(subject.run(one, inputs), out, 0.0)
        expect(not gap, f"run twice in evaluation mode, {gap}", "equal outputs", _RULE)
        gap = difference(subject.run(two, inputs), out, 0.0)
        expect(not gap, f"of two instances built with one seed, {gap}", "equal outputs", _RULE)


def inputs_unchanged(check: Check) -> None:
    """Running it leaves its inputs as they were."""
    subject: Subject = subject_of(check)
    module, inputs = subject.part(), subject.inputs()
    before = {name: tensor.clone() for name, tensor in subject.tensors(inputs).items()}
    for mode in (False, True):
        with torch.no_grad():
            subject.run(module.train(mode), inputs)
        gap = difference(subject.tensors(inputs), before, 0.0)
        expect(not gap, f"after it ran, its input {gap}", "inputs left as they are", "Features")


def gradients(check: Check) -> None:
    """Every trainable parameter gets a gradient that is not zero everywhere, in evaluation mode, over inputs that
    include missing modalities, and from weights that are not zero (a branch may start so)."""
    subject: Subject = subject_of(check)
    module = subject.perturbed()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained:
        return
    outputs = subject.run(module, subject.inputs())
    loss = subject.loss(outputs)
    expect(loss.requires_grad, "no output depends on a parameter", "gradients", "roles")
    loss.backward()
    without = [name for name, p in trained.items() if p.grad is None]
    expect(not without, f"no gradient reaches {without[:3]}", "one for every parameter", "roles")
    zero = [name for name, p in trained.items() if p.grad is not None and not p.grad.any()]
    expect(not zero, f"the gradient of {zero[:3]} is zero", "one that is not", "roles")


def training(check: Check) -> None:
    """In training mode it runs, on several items and on a single one; its loss and gradients are finite."""
    subject: Subject = subject_of(check)
    module, inputs = subject.part().train(), subject.inputs()
    for what, given in (("several", inputs), ("one", subject.single(inputs))):
        module.zero_grad()
        loss = subject.loss(subject.run(module, given))
        expect(bool(torch.isfinite(loss)), f"with {what}, the loss is {loss.item()}", "a finite one", "roles")
        if loss.requires_grad:
            loss.backward()
        bad = [n for n, p in module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        expect(not bad, f"with {what}, the gradient of {bad[:2]} is not finite", "finite ones", "roles")


def autocast(check: Check) -> None:
    """Under bf16 autocast it runs: same shapes, finite, and close to fp32."""
    subject: Subject = subject_of(check)
    module, inputs = subject.part(), subject.inputs()
    with torch.no_grad(), _quiet():
        wanted = subject.run(module, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            found = subject.run(module, inputs)
    gap = difference(found, wanted, 0.1)
    expect(not gap, f"under bf16 autocast {gap}", "what fp32 gives, within a tenth", "precision")


def compile(check: Check) -> None:
    """`torch.compile` traces it (backend "eager", breaks in the graph allowed), and outputs stay the same."""
    subject: Subject = subject_of(check)
    module, inputs = subject.part(), subject.inputs()
    torch._dynamo.reset()
    try:
        with torch.no_grad(), _quiet():
            wanted = subject.run(module, inputs)
            found = subject.run(_Compiled(module), inputs)
    finally:
        torch._dynamo.reset()
    gap = difference(found, wanted, 1e-4)
    expect(not gap, f"compiled, {gap}", "the same outputs", "compile")


def moves(check: Check) -> None:
    """`.to` moves all of it: tensors are parameters or buffers, and it runs in double precision."""
    subject: Subject = subject_of(check)
    module, inputs = subject.part(), subject.inputs()
    loose = list(_loose_tensors(module))
    expect(not loose, f"{loose[:2]} are plain tensors, which stay behind", "register_buffer", "roles")
    with torch.no_grad():
        wanted = subject.run(module, inputs)
        module = module.to(torch.float64)
        left = [name for name, t in module.state_dict().items() if t.dtype == torch.float32]
        expect(not left, f"{left[:2]} stay in fp32", "all tensors to follow .to", "roles")
        found = subject.run(module, subject.cast(inputs, torch.float64))
    gap = difference(found, wanted, 1e-3)
    expect(not gap, f"in double precision {gap}", "the same outputs", "roles")
    module.to("meta")


class _Compiled:
    """A compiled module that still has the module's attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._call = module, torch.compile(module, backend="eager")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries warn about precisions and graph breaks, which are not this kit's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _random_states() -> dict[str, Any]:
    import numpy

    kind, keys, *rest = cast("tuple[Any, ...]", numpy.random.get_state())
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": (kind, keys.tolist(), rest),
    }


def _loose_tensors(module: nn.Module) -> Iterator[str]:
    """Names of attributes that are tensors, or hold some, which are no parameters or buffers."""
    kept = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, Tensor) and id(item) not in kept for item in held):
                yield f"{path}.{name}".lstrip(".")
