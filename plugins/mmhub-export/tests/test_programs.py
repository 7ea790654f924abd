"""torch.export: programs that run where torch is and mmhub is not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mmhub_export import programs
from mmhub_export.checks import record
from mmhub_export.graphs import Graph
from tests.conftest import _one_thread, _own_caches  # noqa: F401

from .test_onnx import MODELS, check_example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of itself


@pytest.mark.slow
def test_a_classifier_runs_where_mmhub_cannot_be_imported(tmp_path: Path) -> None:
    found = check_example("torch-export", "classes", tmp_path, "mmhub", "mmhub_text")
    assert found["graphs"]["model"]["inputs"]["data"] == {"type": "int64", "shape": ["batch", "length"]}
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        graphs = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    assert graphs and not any(b"site-packages" in graph or b"/mmhub" in graph for graph in graphs)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "model.pt2").symlink_to("/dev/full")
    cases = [{"data": torch.ones(2, 3)}]
    graph = Graph("model", nn.Sequential(nn.Linear(3, 2)), {"data": {0: "batch"}}, {"found": ("batch", "")}, cases)
    with pytest.raises(OSError, match="No space left"):
        programs._write(graph, record(graph), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"classes"}))
def test_every_kind_of_model_runs_as_a_program(name: str, tmp_path: Path) -> None:
    check_example("torch-export", name, tmp_path, "mmhub")
