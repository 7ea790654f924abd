"""ONNX: graphs that onnxruntime runs as the model does, and an example that needs neither mmhub nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

import mmhub
from mmhub.model import Model
from mmhub_export import onnx_graphs
from mmhub_export.checks import compare, record
from mmhub_export.formats import write_format
from mmhub_export.graphs import Graph
from tests.conftest import _one_thread, _own_caches  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of itself
TEXTS = ["a good thing", "a bad thing and a long one", "no"]
TEXT = {"use": "transformer", "config": {"dim": 32, "depth": 1, "heads": 2}}
LSTM = {"use": "lstm", "config": {"dim": 16, "embedding_dim": 8, "depth": 2}}
IMAGE = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}
AUDIO = {"use": "cnn", "config": {"sample_rate": 8000, "n_mels": 16, "dim": 16, "channels": [4, 4]}}
YES = {"use": "classification", "config": {"labels": ["no", "yes"]}}
WRITER = {"use": "seq2seq", "config": {"dim": 32, "depth": 1, "heads": 2, "generation": {"max_new_tokens": 5}}}
WORDS, BYTES = {"kind": "word"}, {"kind": "byte"}
QUESTION = {"question": "a good thing", "context": "a bad thing and a long one"}
MODELS: dict[str, dict[str, Any]] = {
    "captions": {"task": "captioning", "encoders": {"image": IMAGE}, "decoder": WRITER, "tokenizer": BYTES},
    "answers": {"task": "question-answering", "encoders": {"text": TEXT}, "decoder": {"use": "span"}},
    "classes": {"encoders": {"text": TEXT}, "decoder": YES},
    "labels": {
        "task": "multilabel",
        "encoders": {"audio": AUDIO},
        "decoder": {"use": "multilabel", "config": {"labels": ["a", "b"], "threshold": 0.4}},
    },
    "mixed": {"encoders": {"audio": AUDIO, "image": IMAGE, "text": TEXT}, "fusion": "attention", "decoder": YES},
    "numbers": {
        "task": "regression",
        "encoders": {"text": LSTM},
        "decoder": {"use": "regression", "config": {"mean": 2.0, "std": 3.0}},
    },
    "pairs": {"task": "retrieval", "encoders": {"image": IMAGE, "text": TEXT}},
    "speech": {
        "task": "speech-recognition",
        "encoders": {"audio": AUDIO},
        "decoder": {"use": "ctc", "config": {"units": "word", "vocabulary": ["one", "two"]}},
    },
    "tags": {
        "task": "tagging",
        "encoders": {"text": TEXT},
        "decoder": {"use": "tagging", "config": {"labels": ["O", "B-X"]}},
    },
    "translation": {"task": "translation", "encoders": {"text": TEXT}, "decoder": WRITER},
    "words": {
        "task": "language-modelling",
        "decoder": {"use": "lstm-lm", "config": {"dim": 16, "embedding_dim": 8}},
        "tokenizer": WORDS,
    },
}
BLOCK = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def made(name: str) -> Model:
    parts = {"tokenizer": WORDS, "texts": TEXTS} | MODELS[name]
    return mmhub.compose(**parts).eval()


def files(folder: Path) -> dict[str, str]:
    """A sample of each modality, media as files."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "one.png")
    soundfile.write(folder / "one.wav", 0.1 * draw.standard_normal(3000), 8000)
    return {"text": "a good thing", "image": str(folder / "one.png"), "audio": str(folder / "one.wav")}


def answer(folder: Path, sample: Mapping[str, str], *blocked: str) -> Any:
    """What the example prints, run where some packages cannot be imported."""
    if "context" in sample:
        sample = {"text": sample["question"], "context": sample["context"]}
    arguments = [part for name, raw in sample.items() for part in (f"--{name}", raw)]
    command = [sys.executable, "-c", BLOCK.format(blocked=set(blocked)), str(folder / "example.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_example(format: str, name: str, folder: Path, *blocked: str) -> dict[str, Any]:
    """Export a model, run its example, and compare with `Model.predict`; return the record."""
    model, out = made(name), folder / "out"
    out.mkdir()
    record = write_format(format, model, out, []).write(out)
    assert all(check["ok"] and check["max_error"] <= 1e-4 for check in record["checks"])
    sounds = "audio" in model.modalities
    assert any(check["what"].endswith("on silence") for check in record["checks"]) == sounds
    if format == "onnx":  # programs refuse sizes below what was taken for the least, whether or not they would do
        assert all("min" not in limit for graph in record["graphs"].values() for limit in graph["limits"].values())
    whole = {key: raw for key, raw in files(folder).items() if key in model.modalities}
    one = dict([next(iter(whole.items()))])
    for sample in [whole, one] if name == "mixed" else [whole]:
        if name == "answers":
            whole = model.predict([{"text": QUESTION}])[0]
            assert answer(out, QUESTION, *blocked) == {"text": whole["text"]}
            continue
        found = answer(out, sample, *blocked)
        if name == "pairs":
            vectors: Any = model.embed([sample])
            assert np.allclose(found["text"], vectors["text"][0], atol=1e-4)
            assert np.allclose(found["image"], vectors["image"][0], atol=1e-4)
        elif name == "words":
            assert found["score"] == pytest.approx(model.score(sample["text"], end=False)[0], abs=1e-4)
            assert found["text"] == model.generate([sample], max_new_tokens=20)[0]["text"]
        else:
            expected = model.predict([sample])[0]
            assert {key: found[key] for key in found} == {
                key: pytest.approx(expected[key], abs=1e-4) if key != "labels" else expected[key] for key in found
            }
    return record


def test_a_small_graph_answers_alike_in_onnxruntime_at_any_size(tmp_path: Path) -> None:
    cases = [{"data": torch.randn(rows, 3)} for rows in (2, 1, 5)]
    graph = Graph("model", nn.Sequential(nn.Linear(3, 2)), {"data": {0: "batch"}}, {"found": ("batch", "")}, cases)
    graph.given = [(graph.module(case["data"]).detach(),) for case in cases]
    shapes, opset = onnx_graphs._write(graph, record(graph), tmp_path / "model.onnx")
    assert opset >= 18
    assert shapes["outputs"] == {"found": {"type": "float", "shape": ["batch", 2]}}
    assert compare(graph, "it", onnx_graphs._runner(tmp_path / "model.onnx"))["max_error"] < 1e-6
    content = (tmp_path / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


@pytest.mark.slow
def test_a_classifier_runs_where_neither_mmhub_nor_torch_can_be_imported(tmp_path: Path) -> None:
    record = check_example("onnx", "classes", tmp_path, "mmhub", "torch", "mmhub_text")
    assert record["opset"] >= 18 and record["answer"]["labels"] == ["no", "yes"]
    graph = record["graphs"]["model"]
    assert graph["inputs"]["data"]["shape"] == graph["inputs"]["mask"]["shape"] == ["batch", "length"]
    assert graph["outputs"] == {"logits": {"type": "float", "shape": ["batch", 2]}}
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b".py" not in content  # nothing of the machine it was made on
    readme = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "example.py").read_text() in readme and "`model.onnx`" in readme


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"classes"}))
def test_every_kind_of_model_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    check_example("onnx", name, tmp_path, "mmhub", "torch")
