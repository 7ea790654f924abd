"""Recording a graph, and comparing what was written with the model."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mmhub.errors import TrustError, UsageError
from mmhub_export.graphs import Graph, Head, Tensors

TOLERANCE = 1e-4  # of the largest value of a tensor where that is above 1
_LOGGERS = ("torch", "torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir", "onnxruntime")
_BOUNDLESS = 2**31

Run = Callable[[Tensors], Sequence[Any]]  # what was written, on a case of its graph


def record(graph: Graph) -> ExportedProgram:
    """Record a graph with the sizes that may vary left open.

    Raises:
        UsageError: the part does something that no graph can hold.
    """
    graph.answers()  # heads find out what they are when they first run, which cannot be recorded
    case = graph.cases[0]
    shapes = tuple(dict.fromkeys(graph.axes[name], Dim.DYNAMIC) for name in case)
    try:
        with silence(), torch.no_grad():
            program = torch.export.export(graph.module, tuple(case.values()), dynamic_shapes=_shaped(graph, shapes))
    except Exception as error:  # whatever torch makes of a part that it cannot record
        raise UsageError(
            f"the part {graph.name!r} of this model cannot be exported: {_reason(error)}",
            'write it with --format transformers where it has such a layout, or use "mmhub serve"',
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # tells the paths of this machine
    return program


def ranges(graph: Graph, program: ExportedProgram, run: Run) -> dict[str, dict[str, int]]:
    """Return by named size the least and the most it may be, where something limits it.

    What recording takes for the least may be a guess: what answers as the model does at a size of 1 has no such limit.
    """
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    users = [node for node in nodes if node.name in program.graph_signature.user_inputs]
    found: dict[str, dict[str, int]] = {name: {"max": most} for name, most in graph.most.items()}
    for node, (_, axes) in zip(users, graph.axes.items(), strict=True):
        for axis, name in axes.items():
            size = node.meta["val"].shape[axis]
            bound = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
            if bound is None:
                continue
            limits = found.setdefault(name, {})
            if int(bound.lower) > 2:  # 2 is what recording assumes, and nothing that is asked for
                limits["min"] = int(bound.lower)
            if bound.upper < limits.get("max", _BOUNDLESS):
                limits["max"] = int(bound.upper)
    for name, limits in found.items():
        if "min" in limits and _runs_at_one(graph, name, run):
            del limits["min"]
    return {name: limits for name, limits in found.items() if limits}


def _runs_at_one(graph: Graph, size: str, run: Run) -> bool:
    case = graph.cases[0]
    for name, axes in graph.axes.items():
        for axis in (axis for axis, found in axes.items() if found == size):
            case = case | {name: case[name].narrow(axis, 0, 1).contiguous()}
    try:
        with torch.no_grad():
            expected = graph.module(*case.values())
        return _worst(expected, run(case)) <= TOLERANCE
    except Exception:  # whatever the runtime makes of a size that it cannot do
        return False


def compare(graph: Graph, what: str, run: Run) -> dict[str, Any]:
    """Run what was written on all cases of its graph, and return the entry of the record.

    Raises:
        TrustError: it answers otherwise than the model.
    """
    worst, shapes = 0.0, []
    for case, expected in zip(graph.cases, graph.answers(), strict=True):
        try:
            found = run(case)
        except Exception as error:  # a size that it was not recorded for
            shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in case.items())
            raise TrustError(
                f"{what} does not run on {shown}: {_reason(error)}", "this is a bug of mmhub-export"
            ) from error
        worst = max(worst, _worst(expected, found))
        shapes.append([list(tensor.shape) for tensor in case.values()])
    _require(what, worst)
    return {"what": what, "max_error": worst, "tolerance": TOLERANCE, "ok": True, "shapes": shapes}


def compare_quiet(graph: Graph, what: str, program: ExportedProgram, run: Run) -> list[dict[str, Any]]:
    """Compare on silence and next to it, with what was recorded, not with the model; return entries of the record.

    Frames that are all alike are divided by next to nothing there, and what the model sees of them is how its own sums
    round. Graphs round less (mmhub-audio's `LogMel`); `from_model` says how far that takes them from the model.

    Raises:
        TrustError: it answers otherwise than what was recorded.
    """
    if not graph.quiet:
        return []
    exact = program.module(check_guards=False)
    worst = apart = 0.0
    with torch.no_grad():
        for case in graph.quiet:
            wanted, found = exact(*case.values()), run(case)
            worst = max(worst, _worst(wanted, found))
            apart = max(apart, _worst(graph.module(*case.values()), found))
    _require(what := f"{what} on silence", worst)
    return [{"what": what, "max_error": worst, "tolerance": TOLERANCE, "ok": True, "from_model": apart}]


def _require(what: str, error: float) -> None:
    if not error <= TOLERANCE:
        raise TrustError(
            f"{what} answers otherwise than the model: {error:.2g} apart, {TOLERANCE:g} allowed", "nothing was written"
        )


def _worst(expected: Sequence[Tensor], found: Sequence[Any]) -> float:
    return max(error_of(a, torch.as_tensor(b)) for a, b in zip(expected, found, strict=True))


def error_of(expected: Tensor, found: Tensor) -> float:
    """The largest difference, by the largest value where that is above 1; infinite for another shape or no number."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.dtype == torch.bool:
        return 0.0 if torch.equal(expected, found.bool()) else float("inf")
    if not expected.numel():
        return 0.0
    expected, found = expected.double(), found.double()
    error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1))
    return error if error == error else float("inf")


@contextmanager
def silence() -> Iterator[None]:
    """Keep what exporters say on the way off stderr: all that matters is raised or recorded."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _shaped(graph: Graph, shapes: tuple[dict[int, Any], ...]) -> Any:
    """As `torch.export` wants it: what arrives by *tensors is a tuple of its own."""
    return (shapes,) if isinstance(graph.module, Head) else shapes


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
