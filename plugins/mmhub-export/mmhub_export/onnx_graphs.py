"""The format `onnx`: every graph of a model as an ONNX file, checked in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from mmhub.errors import PluginError
from mmhub_export.checks import compare, compare_quiet, ranges, record, silence
from mmhub_export.consumer import describe
from mmhub_export.graphs import Graph, Tensors, cut, plain
from mmhub_export.record import Export

if TYPE_CHECKING:
    from mmhub.model import Model

_IN_ONE_FILE = 1_800_000_000  # bytes of weights; a protobuf file holds at most 2 GiB


def write_onnx(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]]) -> Export:
    """Write the graphs of a model with what a program without mmhub needs around them.

    Raises:
        UsageError: a part cannot be exported. TrustError: what was written answers otherwise.
        PluginError: onnx, onnxscript or onnxruntime is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter writes by it
    except ImportError as error:
        raise PluginError(f"ONNX needs {error.name}", "pip install onnx onnxscript onnxruntime") from None
    with plain(model) as sound:
        return _export(sound, folder, samples, {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__})


def _export(model: Model, folder: Path, samples: Sequence[Mapping[str, Any]], versions: dict[str, str]) -> Export:
    graphs = cut(model, samples)
    checks, described, opset = [], {}, 0
    for graph in graphs:
        path, recorded = folder / f"{graph.name}.onnx", record(graph)
        shapes, opset = _write(graph, recorded, path)
        run = _runner(path)
        checks += [compare(graph, path.name, run), *compare_quiet(graph, path.name, recorded, run)]
        described[graph.name] = {"file": path.name, **shapes, "limits": ranges(graph, recorded, run)}
    facts = {"opset": opset} | describe(model, graphs, described, folder, "onnx")
    return Export(
        format="onnx",
        name=model.name,
        task=model.task.name,
        modalities=model.modalities,
        checks=checks,
        facts=facts,
        versions={"torch": torch.__version__, **versions},
    )


def _write(graph: Graph, recorded: ExportedProgram, path: Path) -> tuple[dict[str, Any], int]:
    """Write one graph; return its shapes for the record, and the version of the operators it uses."""
    with silence(), torch.no_grad():
        program: Any = torch.onnx.export(
            recorded, input_names=list(graph.axes), output_names=list(graph.outputs), verbose=False
        )
    shapes = _name_axes(program.model.graph, graph)
    _forget_places(program.model)
    size = sum(tensor.nbytes for tensor in graph.module.state_dict().values())
    with silence():
        program.save(path, external_data=size > _IN_ONE_FILE)
    return shapes, int(program.model.opset_imports[""])


def _name_axes(written: Any, graph: Graph) -> dict[str, Any]:
    """Give the sizes that vary the names of the record, and return inputs and outputs with their types and shapes."""
    import onnx_ir

    shapes: dict[str, Any] = {"inputs": {}, "outputs": {}}
    for value, (name, axes) in zip(written.inputs, graph.axes.items(), strict=True):
        value.shape = onnx_ir.Shape([axes.get(place, size) for place, size in enumerate(value.shape)])
        shapes["inputs"][name] = _entry(value)
    for value, (name, dims) in zip(written.outputs, graph.outputs.items(), strict=True):
        value.shape = onnx_ir.Shape([dim or size for dim, size in zip(dims, value.shape, strict=True)])
        shapes["outputs"][name] = _entry(value)
    return shapes


def _entry(value: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"type": str(value.dtype).lower(), "shape": sizes}


def _forget_places(model: Any) -> None:
    """Take out where in whose source each node came from: paths of this machine, and half of a small file."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for function in model.functions.values():
        for node in function:
            node.metadata_props.clear()


def _runner(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(case: Tensors) -> Sequence[Any]:
        found: Sequence[Any] = session.run(None, {name: tensor.numpy() for name, tensor in case.items()})
        return found

    return run
