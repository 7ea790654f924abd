"""torch.export: programs that run where torch is and mmhub is not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.conftest import _one_thread, _own_caches  # noqa: F401

from .test_onnx import MODELS, check_example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of itself


def test_a_classifier_runs_where_mmhub_cannot_be_imported(tmp_path: Path) -> None:
    record = check_example("torch-export", "classes", tmp_path, "mmhub", "mmhub_text")
    assert record["graphs"]["model"]["inputs"]["data"] == {"type": "int64", "shape": ["batch", "length"]}
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        graphs = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    assert graphs and not any(b"site-packages" in graph or b"/mmhub" in graph for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"classes"}))
def test_every_kind_of_model_runs_as_a_program(name: str, tmp_path: Path) -> None:
    check_example("torch-export", name, tmp_path, "mmhub")
