"""safetensors-fp16: half the bytes, read by every mmhub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmhub
from mmhub.checkpoint import load, read_config
from mmhub.errors import TrustError
from mmhub.model import Model
from mmhub_export.halves import half_state, write_fp16
from mmhub_export.probes import outputs
from tests.conftest import _one_thread, _own_caches  # noqa: F401


def classifier() -> Model:
    return mmhub.compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 64, "embedding_dim": 64}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        tokenizer={"kind": "bpe", "vocab_size": 300},
        texts=["a good thing", "a bad thing"],
    ).eval()


def test_matrices_are_halved_vectors_and_buffers_kept_and_all_is_fp32_again(tmp_path: Path) -> None:
    model = classifier()
    model.save(tmp_path / "whole")
    (tmp_path / "half").mkdir()
    found = write_fp16(model, tmp_path / "half", [{"text": "a bad thing"}])
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim > 1} == {torch.float16}
    assert torch.float16 not in {tensor.dtype for tensor in stored.values() if tensor.ndim < 2}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[0] > 1.8 * sizes[1]
    assert read_config(tmp_path / "half").mmhub_format == 1  # any version of mmhub reads it
    loaded = load(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    samples = [{"text": "a good thing"}]
    torch.testing.assert_close(outputs(loaded, samples), outputs(model, samples), atol=1e-2, rtol=0)
    assert [check["what"] for check in found.checks] == ["weights", "outputs"]


def test_a_matrix_too_large_for_fp16_is_stored_in_bf16(tmp_path: Path) -> None:
    model = classifier()
    weight = model.encoders["text"].get_parameter("embed.weight")
    with torch.no_grad():
        weight[0, 0] = 70000.0
    state = half_state(model.parts())
    assert [name for name, tensor in state.items() if tensor.dtype == torch.bfloat16] == ["text_encoder.embed.weight"]
    found = write_fp16(model, tmp_path, [])
    assert found.facts["weights"]["types"]["bfloat16"] == weight.numel()
    assert load(tmp_path).encoders["text"].get_parameter("embed.weight")[0, 0].item() == pytest.approx(70000, rel=4e-3)


def test_a_broken_model_is_not_written(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TrustError, match="hold NaN or infinity"):
        write_fp16(model, tmp_path, [])


def test_half_of_an_int8_checkpoint_is_an_ordinary_one(tmp_path: Path) -> None:
    from mmhub_export.eighths import write_int8

    for name in ("int8", "half"):
        (tmp_path / name).mkdir()
    write_int8(classifier(), tmp_path / "int8", [])
    write_fp16(mmhub.load(tmp_path / "int8"), tmp_path / "half", [])
    assert read_config(tmp_path / "half").mmhub_format == 1
