"""Language models with weights of 8 and 4 bits say nearly the same, take less memory and are not saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmhub.adapters import apply_lora
from mmhub.build import compose
from mmhub.config import LoraRecipe
from mmhub.errors import PluginError, TrustError, UsageError
from mmhub.hub import load
from mmhub.model import Model
from mmhub.quantize import Int4Linear, Int8Linear, _TorchaoInt4, quantize, weight_bytes
from tests.conftest import png

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "by"]
OWN = {"dim": 64, "depth": 2, "heads": 2, "hidden": 192, "dropout": 0.0, "word_dropout": 0.0}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
QWEN = {
    "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128,
}  # fmt: skip
KINDS = {"transformer-lm": OWN, "gpt2": GPT2, "qwen2": QWEN}
SAMPLES = [{"text": "the cat saw"}, {"text": "two dogs run by a mat"}]


def language_model(kind: str = "transformer-lm", task: str = "language-modelling", **more: Any) -> Model:
    torch.manual_seed(0)
    use = kind if kind == "transformer-lm" else "transformers-lm"
    texts = [" ".join(WORDS)] * 3
    decoder = {"use": use, "config": KINDS[kind]}
    return compose(task=task, decoder=decoder, tokenizer={"kind": "word"}, texts=texts, **more).eval()


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model(model.collate(SAMPLES)).logits


def distance(found: Tensor, want: Tensor) -> float:
    return float((found - want).detach().norm() / want.detach().norm())


@pytest.mark.parametrize(("make", "error"), [(Int8Linear, 0.02), (Int4Linear, 0.12)])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_a_packed_layer_gives_nearly_the_products_of_its_weights(make: Any, error: float, rows: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 48), torch.randn(rows, 96)
    packed = make(layer.weight.detach(), layer.bias)
    found = packed(x[None])
    assert found.shape == (1, rows, 48) and found.dtype == x.dtype
    if rows:
        assert 0 < distance(found[0], layer(x)) < error


def test_rows_have_the_same_products_few_or_many_at_a_time() -> None:
    packed = Int8Linear(torch.randn(48, 96), None)
    x = torch.randn(64, 96)
    assert distance(torch.cat([packed(part) for part in x.split(8)]), packed(x)) < 2e-3


ODD_WIDTHS = """
import torch
from mmhub.quantize import Int8Linear
for width in (100, 300, 341):
    for rows in (1, 2, 3, 5):
        packed, x = Int8Linear(torch.randn(width, width), None), torch.randn(rows, width)
        want = x @ (packed.codes.float() * packed.scale.float()[:, None]).T
        assert (packed(x) - want).norm() < 0.01 * want.norm(), (width, rows)
"""


@pytest.mark.slow
def test_widths_that_the_kernel_reads_beyond_are_multiplied_without_it() -> None:
    done = subprocess.run([sys.executable, "-c", ODD_WIDTHS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # in a process of its own, for reading on ended it


@pytest.mark.parametrize("make", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38])
def test_weights_that_are_no_numbers_are_not_quantised(make: Any, value: float) -> None:
    weight = torch.randn(32, 64)
    weight[3, 5], weight[3, 6] = value, -value
    with pytest.raises(TrustError, match="infinite or not a number"):
        make(weight, None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("int4", 0.3)])
def test_a_quantised_language_model_says_nearly_the_same_in_less_memory(name: str, bits: str, error: float) -> None:
    model = language_model(name)
    want, before = logits(model), weight_bytes(model)
    heads = {id(p) for p in model.decoder.parameters() if p.shape[0] == model.decoder.processor.vocab_size}
    quantize(model, bits)
    assert 0 < distance(logits(model), want) < error
    assert weight_bytes(model) < (0.4 if bits == "int8" else 0.3) * before
    assert heads and heads <= {id(p) for p in model.parameters()}, "embeddings and heads stay"
    assert not [m for m in model.decoder.modules() if type(m).__name__ == "Conv1D"]


@pytest.mark.parametrize("name", KINDS)
def test_keys_and_values_are_kept_as_without_quantisation(name: str) -> None:
    model = quantize(language_model(name), "int8")
    once = model.generate([{"text": "the cat"}], max_new_tokens=6)[0]["text"]
    longer = "the cat"
    for _ in range(6):
        longer = f"{longer} {model.generate([{'text': longer}], max_new_tokens=1)[0]['text']}".strip()
    assert longer.split()[2:] == once.split()
    both = model.generate([{"text": "the cat"}, {"text": "two dogs run by"}], max_new_tokens=6)
    assert both[0]["text"] == once


def test_a_conversation_with_a_picture_goes_on_with_weights_of_four_bits() -> None:
    images = {"image": {"use": "timm", "config": {"architecture": "test_vit", "image_size": 32}}}
    model = language_model(task="chat", encoders=images)
    encoder = weight_bytes(model.encoders)
    quantize(model, "int4")
    picture = {"role": "user", "content": [{"type": "image", "image": png(1)}, {"type": "text", "text": "the cat"}]}
    assert isinstance(model.predict([{"messages": [picture]}])[0]["text"], str)
    assert weight_bytes(model.encoders) == encoder


def test_adapters_are_merged_first() -> None:
    model = language_model("qwen2")
    apply_lora(model, "decoder", LoraRecipe(rank=4, targets=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    want, plain = logits(model), logits(language_model("qwen2"))
    quantize(model, "int8")
    assert distance(logits(model), want) < 0.03 < distance(plain, want)


def test_a_quantised_model_is_loaded_by_name_and_not_saved(tmp_path: Path) -> None:
    language_model().save(tmp_path / "model")
    model = load(tmp_path / "model", quantize="int8")
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    with pytest.raises(UsageError, match="a quantised model cannot be saved"):
        model.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(UsageError, match="no quantization 'int3'") as refused:
        quantize(language_model(), "int3")
    assert "int" in refused.value.hint
    labels = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    classifier = compose(encoders={"text": {"use": "lstm"}}, decoder=labels, tokenizer={"kind": "word"}, texts=["a b"])
    with pytest.raises(UsageError, match="models that write texts, and this one is for classification"):
        quantize(classifier, "int8")
    recurrent = compose(
        task="language-modelling", decoder={"use": "lstm-lm"}, tokenizer={"kind": "word"}, texts=["a b"]
    )
    with pytest.raises(UsageError, match="no linear layer of this model"):
        quantize(recurrent, "int8")


def test_four_bits_on_a_gpu_say_that_torchao_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(PluginError, match="torchao, which is not installed") as missing:
        _TorchaoInt4(torch.randn(16, 32), None)
    assert missing.value.hint == "run: pip install torchao"


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("int4", 0.3)])
def test_a_gpu_computes_quantised_weights_nearly_as_the_processor(bits: str, error: float) -> None:
    if bits == "int4":
        pytest.importorskip("torchao")
    for name in KINDS:
        model = language_model(name)
        want = logits(model)
        quantize(model.to("cuda"), bits)
        with torch.no_grad():
            found = model(model.collate(SAMPLES).to("cuda")).logits
        assert 0 < distance(found.cpu(), want) < error
