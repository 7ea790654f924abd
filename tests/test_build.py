"""Putting a model together: by name, from other checkpoints' parts, and with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmhub.build import build_model, compose
from mmhub.config import ModelRecipe
from mmhub.errors import InputError, MmhubError, NotFoundError, UsageError
from mmhub.interfaces import decode_config, find_task
from mmhub.model import Model
from mmhub.optim import learning_rate_groups

AUDIO = {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}
TEXT = {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}
YES = {"use": "classification", "config": {"labels": ["no", "yes"]}}
DATA: dict[str, list[Any]] = {"text": ["a b", None, "c a"], "target": ["no", "yes", "no"]}


def values(name: str) -> Iterable[Any]:
    return DATA.get(name, [])


def build(task: str = "classification", **model: Any) -> Model:
    recipe = decode_config(ModelRecipe, model, "model")
    return build_model(find_task(task), recipe, values)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of audio and text, with all weights moved off their initial values."""
    model = compose(encoders={"audio": AUDIO, "text": TEXT}, decoder=YES, texts=["a b c"], seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model.save(tmp_path_factory.mktemp("saved") / "model")


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_composing_takes_names_or_tables_and_picks_an_obvious_fusion() -> None:
    alone = compose(encoders={"audio": "cnn"}, decoder=YES)
    assert (alone.sources["fusion"].spec.name, alone.task.name) == ("streams", "classification")
    both = compose(encoders={"audio": AUDIO, "text": TEXT}, decoder=YES, texts=["a b"])
    assert both.sources["fusion"].spec.name == "attention"
    assert both.modalities == ("audio", "text")
    assert both.predict({"text": "a"})[0]["label"] in ("no", "yes")
    numbers = compose("regression", encoders={"audio": AUDIO}, decoder={"config": {"mean": 0.0, "std": 1.0}})
    assert numbers.sources["decoder"].id == "mmhub-heads/regression"


def test_a_tokenizer_and_a_chat_template_are_found_beside_the_recipe(tmp_path: Path) -> None:
    learned: Any = compose(encoders={"text": TEXT}, decoder=YES, texts=["a b c"]).processors["text"]
    for name, content in learned.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "turns.jinja").write_text("{{ messages }}")
    lm = {"use": "lstm-lm", "config": {"dim": 8, "embedding_dim": 8}}
    for name in ("tokenizer.json", "./tokenizer.json", "."):
        table = {"kind": "pretrained", "name": name, "chat_template": "turns.jinja"}
        recipe = decode_config(ModelRecipe, {"decoder": lm, "tokenizer": table}, "model")
        model = build_model(find_task("language-modelling"), recipe, values, folder=tmp_path)
        processor: Any = model.language_model.processor
        assert processor.chat_template == "{{ messages }}" and recipe.tokenizer == table


def test_the_seed_decides_every_weight() -> None:
    first, again, other = (compose(encoders={"audio": AUDIO}, decoder=YES, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_labels_and_tokenizer_come_from_the_training_values() -> None:
    model = build(encoders={"text": TEXT})
    assert model.decoder.config.labels == ("no", "yes")
    vocabulary = model.processors["text"].tokenizer.get_vocab()
    assert {"a", "b", "c"} <= set(vocabulary)


def test_an_encoder_can_be_frozen_and_given_its_own_rate() -> None:
    model = build(encoders={"audio": AUDIO | {"freeze": True}})
    assert model.frozen == {"audio"}
    assert not any(p.requires_grad for p in model.encoders["audio"].parameters())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({}, UsageError, r"the recipe names no encoder; add \[model\.encoders\.text\]"),
        ({"encoders": {"audio": {}}}, UsageError, "model.encoders.audio: the key 'use' is missing"),
        ({"encoders": {"audio": "cn"}}, NotFoundError, "there is no audio_encoder 'cn'; did you mean 'cnn'"),
        ({"encoders": {"audio": AUDIO}, "fusion": {"use": "atention"}}, NotFoundError, "did you mean 'attention'"),
        ({"encoders": {"audio": AUDIO}, "decoder": {"use": "clasification"}}, NotFoundError, "'classification'"),
        (
            {"encoders": {"audio": AUDIO}, "decoder": {"use": "regression"}},
            UsageError,
            "decoder mmhub-heads/regression does not serve the task 'classification'; it serves regression",
        ),
        (
            {"encoders": {"audio": {"use": "cnn", "config": {"dmi": 3}}}},
            UsageError,
            r"model\.encoders\.audio\.config: unknown key 'dmi'; did you mean 'dim'",
        ),
        (
            {"encoders": {"audio": AUDIO}, "fusion": {"use": "gated", "config": {"dims": 3}}},
            UsageError,
            r"model\.fusion\.config: unknown key 'dims'; did you mean 'dim'",
        ),
        (
            {"encoders": {"audio": AUDIO}, "decoder": {"use": "classification", "freeze": True, "lora": {}}},
            UsageError,
            "model.decoder: freeze and lora are both given",
        ),
        ({"encoders": {"audio": AUDIO}, "fusion": {"init": "x"}}, UsageError, "model.fusion: init, freeze and lora"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_says_what_to_do(model: dict[str, Any], error: type[MmhubError], message: str) -> None:
    if isinstance(model.get("encoders", {}).get("audio"), str):
        model = model | {"encoders": {"audio": {"use": model["encoders"]["audio"]}}}
    with pytest.raises(error, match=message):
        build(**model)


def test_an_unknown_key_of_a_part_is_an_error() -> None:
    with pytest.raises(UsageError, match="unknown key 'confg'; did you mean 'config'"):
        compose(encoders={"audio": {"use": "cnn", "confg": {}}}, decoder=YES)


def test_a_tokenizer_needs_texts() -> None:
    with pytest.raises(InputError, match="no training text to fit the text processor on"):
        compose(encoders={"text": TEXT}, decoder=YES)


def test_an_encoder_can_come_from_a_checkpoint(saved: Path) -> None:
    model = build(encoders={"text": {"init": str(saved)}, "audio": {"init": f"{saved}#audio", "use": "cnn"}})
    whole = compose(encoders={"audio": AUDIO, "text": TEXT}, decoder=YES, texts=["a b c"], seed=7)
    assert model.sources["text_encoder"].id == "mmhub-text/lstm"
    for modality in ("audio", "text"):
        before, now = (list(m.encoders[modality].parameters()) for m in (whole, model))
        assert all(torch.equal(a + 0.01, b) for a, b in zip(before, now, strict=True))
    assert set(model.processors["text"].tokenizer.get_vocab()) >= {"a", "b", "c"}


def test_a_checkpoints_component_can_be_named_with_its_role(saved: Path) -> None:
    assert same(
        build(encoders={"audio": {"init": f"{saved}#audio_encoder"}}).encoders["audio"],
        build(encoders={"audio": {"init": f"{saved}#audio"}}).encoders["audio"],
    )


def test_a_configuration_that_agrees_with_init_is_fine_and_another_is_an_error(saved: Path) -> None:
    build(encoders={"audio": AUDIO | {"init": str(saved)}})
    changed = {"init": str(saved), "config": {"dim": 32}}
    with pytest.raises(UsageError, match=r"model.encoders.audio.config.dim is 32, but init has 16; leave config out"):
        build(encoders={"audio": changed})
    with pytest.raises(UsageError, match=r"model.encoders.audio.config: unknown key 'dmi'; did you mean 'dim'"):
        build(encoders={"audio": {"init": str(saved), "config": {"dmi": 32}}})


def test_init_must_hold_what_use_and_the_modality_say(saved: Path) -> None:
    with pytest.raises(UsageError, match='init holds a mmhub-audio/cnn, not a conformer; set use = "cnn"'):
        build(encoders={"audio": {"use": "conformer", "init": str(saved)}})
    with pytest.raises(UsageError, match=r"model.encoders.text: init holds an audio_encoder, mmhub-audio/cnn"):
        build(encoders={"text": {"init": f"{saved}#audio"}})
    with pytest.raises(NotFoundError, match="has no component 'image_encoder'"):
        build(encoders={"image": {"init": str(saved)}})
    with pytest.raises(NotFoundError, match="has no component 'audo_encoder'; did you mean 'audio_encoder'"):
        build(encoders={"audio": {"init": f"{saved}#audo"}})


def test_a_librarys_own_weights_need_the_component_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is no mmhub checkpoint, and the key 'use' is missing"):
        build(encoders={"audio": {"init": str(tmp_path)}})
    with pytest.raises(UsageError, match="CNN has no library format to read"):
        build(encoders={"audio": {"use": "cnn", "init": str(tmp_path)}})


def test_a_relative_init_starts_from_the_recipes_folder(saved: Path) -> None:
    recipe = decode_config(ModelRecipe, {"encoders": {"audio": {"init": "./model#audio"}}}, "model")
    model = build_model(find_task("classification"), recipe, values, folder=saved.parent)
    assert model.sources["audio_encoder"].spec.name == "cnn"


def test_a_base_is_fine_tuned_as_it_is_or_with_a_new_decoder(saved: Path) -> None:
    model = build(base=str(saved), encoders={"audio": {"freeze": True, "lr_multiplier": 0.1}})
    assert model.frozen == {"audio"}
    assert model.decoder.config.labels == ("no", "yes")
    other = build("regression", base=str(saved), decoder={"use": "regression", "config": {"mean": 0.0, "std": 1.0}})
    assert (other.task.name, other.sources["decoder"].spec.name) == ("regression", "regression")
    assert same(other.encoders, model.encoders)


def test_a_new_decoder_on_a_base_follows_the_seed(saved: Path) -> None:
    first, again = (build(base=str(saved), decoder=YES) for _ in range(2))
    assert same(first.decoder, again.decoder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"encoders": {"audio": {"use": "cnn"}}}, "brings its own encoders"),
        ({"fusion": {"use": "gated"}}, "brings its own encoders"),
        ({"tokenizer": {"kind": "word"}}, "brings its own encoders, tokenizer"),
        ({"encoders": {"image": {"freeze": True}}}, "has no 'image' encoder; it has audio, text"),
    ],
)
def test_a_base_takes_no_other_parts(saved: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(base=str(saved), **model)


def test_a_base_must_serve_the_task(saved: Path) -> None:
    with pytest.raises(UsageError, match="does not serve the task 'regression'"):
        build("regression", base=str(saved))


def test_groups_carry_each_encoders_rate_and_decay_matrices_alone() -> None:
    table = {"encoders": {"audio": AUDIO | {"lr_multiplier": 0.1}, "text": TEXT | {"freeze": True}}}
    recipe = decode_config(ModelRecipe, table, "model")
    model = build_model(find_task("classification"), recipe, values)
    groups = learning_rate_groups(model, recipe, rate=0.5, decay=0.01)
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == sum(len(group["params"]) for group in groups), "no parameter is in two groups"
    for name, parameter in model.named_parameters():
        if name.startswith("encoders.text"):
            assert id(parameter) not in where
            continue
        group = where[id(parameter)]
        assert group["lr"] == group["base_lr"] == pytest.approx(0.05 if "encoders.audio" in name else 0.5)
        assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0)


def test_training_nothing_is_an_error() -> None:
    model = build(encoders={"audio": AUDIO})
    model.requires_grad_(False)
    with pytest.raises(MmhubError, match="nothing to train: every part is frozen"):
        learning_rate_groups(model, ModelRecipe(), 0.1, 0.0)


def test_training_inputs_of_any_modality_can_be_given() -> None:
    given = compose(encoders={"text": TEXT}, decoder=YES, values={"text": ["a b c"]}, seed=3)
    short = compose(encoders={"text": TEXT}, decoder=YES, texts=["a b c"], seed=3)
    sample = {"text": "a c"}
    assert given.predict(sample) == short.predict(sample)


def test_a_plugins_own_modality_alone_has_no_name_on_the_hub() -> None:
    task = find_task("classification")
    assert task.pipeline_tag(("timeseries",)) == ""
    assert task.pipeline_tag(("image",)) == "image-classification"
    assert task.pipeline_tag(("timeseries", "text")) == "any-to-any"
    assert find_task("embedding").pipeline_tag(("timeseries",)) == "feature-extraction"
