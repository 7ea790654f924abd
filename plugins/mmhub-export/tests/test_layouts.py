"""transformers folders: what that library loads answers as the model, whichever library trained it."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import mmhub
from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import Policy
from mmhub.model import Model
from mmhub_export.layouts import write_transformers
from tests.conftest import _one_thread, _own_caches  # noqa: F401

TEXTS = ["a good thing that is new", "a bad thing", "one more thing of the same kind"] * 4


def language_model(task: str = "language-modelling", tokenizer: dict[str, Any] | None = None, **config: Any) -> Model:
    """An untrained Transformer of ours, its weights far from zero, so that every layer counts."""
    table = {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2} | config
    decoder = {"use": "transformer-lm", "config": table}
    model = mmhub.compose(task, decoder=decoder, tokenizer=tokenizer or {"kind": "byte"}, texts=TEXTS).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model


def library(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [{"tied": False, "hidden": 40, "theta": 500.0}, {"tied": True, "kv_heads": 0}, {"depth": 1, "kv_heads": 1}],
)
def test_a_transformer_trained_from_scratch_is_a_llama(config: dict[str, Any], tmp_path: Path) -> None:
    model = language_model(**config)
    found = write_transformers(model, tmp_path, [])
    assert found.facts["architecture"] == "LlamaForCausalLM"
    assert {check["what"]: check["max_error"] <= 1e-4 for check in found.checks} == {"token ids": True, "logits": True}
    theirs, words = library(tmp_path)
    prompt = words("a good", return_tensors="pt").input_ids
    assert prompt[0].tolist() == model.processors["text"].prompt("a good", Policy()).tolist()
    written = theirs.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    (ours,) = model.generate([{"text": "a good"}], max_new_tokens=12)
    assert words.decode(written, skip_special_tokens=True) == ours["text"]
    back = mmhub.load(tmp_path)
    assert back.score(TEXTS, end=True) == pytest.approx(model.score(TEXTS, end=True), abs=1e-3)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_every_tokenizer_trained_here_reads_the_same_ids_there(kind: str, tmp_path: Path) -> None:
    model = language_model(tokenizer={"kind": kind, "vocab_size": 300 if kind == "bpe" else 40})
    samples = [{"text": text} for text in ["a good thing", "one thing , unseen : 7 !"]]
    found = write_transformers(model, tmp_path, samples)
    assert [check["what"] for check in found.checks if check["ok"]] == ["token ids", "logits"]


def test_a_folder_says_what_vllm_and_older_versions_read(tmp_path: Path) -> None:
    model = language_model("chat", {"kind": "byte", "chat_template": "chatml"}, theta=500.0)
    found = write_transformers(model, tmp_path, [])
    assert found.facts["chat_template"] is True
    assert [check["what"] for check in found.checks] == ["token ids", "logits", "token ids of a conversation"]
    config, tokens, settings = (
        json.loads((tmp_path / name).read_text())
        for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<s>", "</s>")
    assert set(settings["eos_token_id"]) == set(model.processors["text"].stop_ids)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert (tmp_path / "tokenizer.json").is_file()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) & 0o044, "others cannot read it"


def test_a_recurrent_language_model_has_no_place_there(tmp_path: Path) -> None:
    decoder = {"use": "lstm-lm", "config": {"dim": 8, "embedding_dim": 8}}
    model = mmhub.compose("language-modelling", decoder=decoder, tokenizer={"kind": "byte"})
    with pytest.raises(UsageError, match="transformers has no recurrent language model such as this LSTMLM"):
        write_transformers(model, tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_part_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    model = mmhub.compose(
        encoders={"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        texts=TEXTS,
    )
    with pytest.raises(UsageError, match="cannot hold a mmhub-text/lstm encoder"):
        write_transformers(model, tmp_path, [])


def test_a_model_of_timm_is_sent_to_the_layout_of_timm(tmp_path: Path) -> None:
    model = mmhub.compose(
        encoders={"image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
    )
    with pytest.raises(UsageError, match="mmhub push --layout timm"):
        write_transformers(model, tmp_path, [])


def bert() -> Model:
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "max_position_embeddings": 32}
    return mmhub.compose(
        encoders={"text": {"use": "transformers", "config": {"config": config}}},
        decoder={"use": "transformers-classification", "config": {"labels": ["no", "yes"], "config": config}},
        texts=TEXTS,
    ).eval()


def test_a_classifier_answers_alike_in_its_own_library(tmp_path: Path) -> None:
    found = write_transformers(bert(), tmp_path, [{"text": text} for text in TEXTS[:3]])
    assert found.facts["architecture"] == "BertForSequenceClassification"
    assert [check["what"] for check in found.checks if check["ok"]] == ["token ids", "logits"]


def test_what_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_text import llama

    whole = llama._tensors

    def changed(model: Any) -> Any:
        return ((name, t * 1.01 if name.endswith("q_proj.weight") else t) for name, t in whole(model))

    monkeypatch.setattr(llama, "_tensors", changed)
    with pytest.raises(TrustError, match="what was written differs in its logits"):
        write_transformers(language_model(), tmp_path, [])
