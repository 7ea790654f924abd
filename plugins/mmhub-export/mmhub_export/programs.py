"""The format `torch-export`: every graph of a model as a `torch.export` program, which runs where torch alone is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from mmhub_export.checks import compare, compare_quiet, ranges, record, silence
from mmhub_export.consumer import describe
from mmhub_export.graphs import Graph, Tensors, cut, plain
from mmhub_export.record import Export

if TYPE_CHECKING:
    from mmhub.model import Model


def write_programs(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    """Write the graphs of a model as .pt2 files with what a program without mmhub needs around them.

    Raises:
        UsageError: a part cannot be exported. TrustError: what was written answers otherwise.
    """
    with plain(model) as sound:
        return _export(sound, folder, samples)


def _export(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    graphs = cut(model, samples)
    checks, described = [], {}
    for graph in graphs:
        path, recorded = folder / f"{graph.name}.pt2", record(graph)
        shapes = _write(graph, recorded, path)
        run = _runner(path)
        checks += [compare(graph, path.name, run), *compare_quiet(graph, path.name, recorded, run)]
        described[graph.name] = {"file": path.name, **shapes, "limits": ranges(graph, recorded, run)}
    return Export(
        format="torch-export",
        name=model.name,
        task=model.task.name,
        modalities=model.modalities,
        checks=checks,
        facts=describe(model, graphs, described, folder, "torch-export"),
        versions={"torch": torch.__version__},
    )


def _write(graph: Graph, recorded: ExportedProgram, path: Path) -> dict[str, Any]:
    """Write one graph; return its shapes for the record."""
    content = io.BytesIO()  # torch's own writer ends the process where a disk is full
    with silence():
        torch.export.save(recorded, content)
    with path.open("wb") as file:
        file.write(content.getbuffer())
    return {
        "inputs": {name: _entry(graph.cases[0][name], axes) for name, axes in graph.axes.items()},
        "outputs": {
            name: _entry(tensor, {place: dim for place, dim in enumerate(dims) if dim})
            for (name, dims), tensor in zip(graph.outputs.items(), graph.answers()[0], strict=True)
        },
    }


def _entry(tensor: torch.Tensor, axes: Mapping[int, str]) -> dict[str, Any]:
    sizes = [axes.get(place, size) for place, size in enumerate(tensor.shape)]
    return {"type": str(tensor.dtype).removeprefix("torch."), "shape": sizes}


def _runner(path: Path) -> Any:
    with silence():
        module = torch.export.load(path).module(check_guards=False)  # they hold guesses about sizes, such as odd ones

    def run(case: Tensors) -> Sequence[Any]:
        with torch.no_grad():
            found: Sequence[Any] = module(*case.values())
        return found

    return run
