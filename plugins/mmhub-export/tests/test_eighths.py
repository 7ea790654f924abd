"""int8: a quarter of the bytes, read by `mmhub.load`, compared before it is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmhub
from mmhub.checkpoint import load, read_config
from mmhub.config import LoraRecipe
from mmhub.errors import TrustError, UsageError
from mmhub.model import Model
from mmhub.weights import quantized_state
from mmhub_export import eighths
from mmhub_export.eighths import write_int8
from mmhub_export.formats import write_format
from mmhub_export.probes import outputs
from mmhub_export.record import Export
from tests.conftest import _one_thread, _own_caches, client, hub  # noqa: F401

TEXTS = ["a good thing that is new", "a bad thing", "one more thing"]


def classifier() -> Model:
    return mmhub.compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 64, "embedding_dim": 64}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        tokenizer={"kind": "bpe", "vocab_size": 300},
        texts=TEXTS,
    ).eval()


def language_model(use: str = "transformer-lm", **config: Any) -> Model:
    table = {"dim": 64, "depth": 2, "heads": 4} if use == "transformer-lm" else {"dim": 64, "embedding_dim": 64}
    return mmhub.compose(
        "language-modelling", decoder={"use": use, "config": table | config}, tokenizer={"kind": "byte"}
    ).eval()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("make", [classifier, language_model, lambda: language_model("lstm-lm")])
def test_it_is_a_checkpoint_that_answers_alike_from_a_quarter_of_the_bytes(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "whole")
    (tmp_path / "int8").mkdir()
    found = write_int8(model, tmp_path / "int8", [])
    loaded = load(tmp_path / "int8")
    assert size(tmp_path / "whole") > 2.5 * size(tmp_path / "int8")
    samples = [{"text": text} for text in TEXTS]
    wanted, answers = outputs(model, samples), outputs(loaded, samples)
    assert not torch.equal(wanted, answers)
    torch.testing.assert_close(answers, wanted, atol=0.05, rtol=0.05)
    assert [check["what"] for check in found.checks] == ["weights", "outputs on made-up inputs"]
    assert all(check["ok"] for check in found.checks)
    assert found.facts["weights"]["types"]["int8"] > found.facts["weights"]["types"]["float32"]


def test_ties_survive(tmp_path: Path) -> None:
    model = mmhub.compose(
        "translation",
        encoders={"text": {"use": "lstm", "config": {"dim": 64, "embedding_dim": 64}}},
        decoder={"use": "seq2seq", "config": {"dim": 64, "depth": 1, "heads": 2}},
        tokenizer={"kind": "bpe", "vocab_size": 300},
        texts=TEXTS,
    )
    tied = read_config(model.save(tmp_path / "whole")).tied
    (tmp_path / "int8").mkdir()
    write_int8(model, tmp_path / "int8", [])
    assert read_config(tmp_path / "int8").tied == tied
    parameters = [len(list(one.parameters())) for one in (model, load(tmp_path / "int8"))]
    assert parameters[0] == parameters[1]


@pytest.mark.slow
def test_adapters_are_merged(tmp_path: Path) -> None:
    from mmhub.adapters import adapter_of, apply_lora

    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 64}
    model = mmhub.compose(
        "language-modelling",
        decoder={"use": "transformers-lm", "config": {"config": config}},
        tokenizer={"kind": "byte"},
    ).eval()
    apply_lora(model, "decoder", LoraRecipe(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wanted = outputs(model, [{"text": "a"}])
    found = write_int8(model, tmp_path, [])
    assert found.facts["merged"] == ["decoder"]
    loaded = load(tmp_path)
    assert adapter_of(loaded.decoder) is None
    torch.testing.assert_close(outputs(loaded, [{"text": "a"}]), wanted, atol=0.1, rtol=0.1)


def test_what_answers_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized_state

    def damaged(parts: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
        found = whole(parts)
        name = next(name for name in found if name.endswith(":scale"))
        return found | {name: found[name] * 1.5}

    monkeypatch.setattr(eighths, "quantized_state", damaged)
    with pytest.raises(TrustError, match=r"what was written differs in its weights: by 0\.5, and no more"):
        write_int8(classifier(), tmp_path, [])


def test_a_model_in_packed_weights_says_to_load_it_without(tmp_path: Path) -> None:
    from mmhub.quantize import quantize

    packed = quantize(language_model(), "int8")
    for format in ("int8", "safetensors-fp16", "transformers"):
        with pytest.raises(UsageError, match=r"cannot be saved or trained on; load it without quantize"):
            write_format(format, packed, tmp_path, [])
        assert not list(tmp_path.iterdir())


def test_what_was_loaded_can_be_kept_in_8_bits(tmp_path: Path) -> None:
    write_int8(language_model(), tmp_path, [])
    plain, packed = load(tmp_path), mmhub.load(tmp_path, quantize="int8")
    samples = [{"text": "a good"}]
    torch.testing.assert_close(outputs(packed, samples), outputs(plain, samples), atol=0.05, rtol=0.05)


def test_the_card_the_licence_and_the_origin_come_along(tmp_path: Path) -> None:
    source = classifier().save(tmp_path / "mine")
    (source / "README.md").write_text("---\nlicense: mit\nmodel-index: []\n---\n\n# mine\n\nMy own words.\n")
    (source / "LICENSE").write_text("MIT")
    (source / "provenance.json").write_text(json.dumps({"steps": 7, "parents": [{"part": "decoder", "name": "x"}]}))
    (tmp_path / "int8").mkdir()
    record = write_int8(mmhub.load(source), tmp_path / "int8", []).write(tmp_path / "int8")
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "license: mit" in card
    assert "My own words." in card
    assert "model-index" not in card
    assert "The weights are those of `mine`, stored in 8 bits by `mmhub export`." in card
    assert (tmp_path / "int8" / "LICENSE").read_text() == "MIT"
    facts = json.loads((tmp_path / "int8" / "provenance.json").read_text())
    assert facts["steps"] == 7
    assert [parent["name"] for parent in facts["parents"]] == ["x", "mine"]
    assert record["name"] == "mine"
    written = [path.read_text() for path in (tmp_path / "int8").iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text for text in written)


@pytest.mark.usefixtures("client")
@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads
def test_it_is_pushed_pulled_and_named_after_what_it_was_made_of(hub: str, tmp_path: Path) -> None:  # noqa: F811
    mmhub.push(classifier().save(tmp_path / "mine"), "org/whole", license="mit")
    (tmp_path / "int8").mkdir()
    found: Export = write_int8(mmhub.load("org/whole"), tmp_path / "int8", [])
    found.write(tmp_path / "int8")
    pushed = mmhub.push(tmp_path / "int8", "org/small")
    assert "export.json" in pushed.files
    assert not pushed.left_out
    text = (tmp_path / "int8" / "README.md").read_text()
    assert "base_model:\n- org/whole\n" in text
    folder = mmhub.pull("org/small", local_dir=tmp_path / "pulled")
    card = (folder / "README.md").read_text()
    assert "base_model:\n- org/whole\nbase_model_relation: quantized\n" in card
    assert "license: mit" in card
    samples = [{"text": "a good thing"}]
    assert mmhub.load("org/small").predict(samples) == load(tmp_path / "int8").predict(samples)
    assert mmhub.load("org/small#text").modalities == ("text",)


def test_what_cannot_be_read_with_made_up_inputs_is_compared_by_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmhub.testing.samples.built_in", lambda modality: ())
    assert [check["what"] for check in write_int8(classifier(), tmp_path, []).checks] == ["weights"]
