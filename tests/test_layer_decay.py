"""Layer-wise learning-rate decay: the nearer to the input a layer stands, the slower it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay

from mmhub.build import compose
from mmhub.config import check_recipe
from mmhub.engine import train
from mmhub.engine.optimizer import make_optimizer
from mmhub.errors import Interrupted, UsageError
from mmhub.model import Model
from mmhub.optim import learning_rate_groups
from tests.test_engine import image_only
from tests.test_resume import stop_at, weights

TINY = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
SOUND = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
CONV = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2}  # fmt: skip
LABELS = {"use": "classification", "config": {"labels": ["no", "yes"]}}


def model_of(modality: str, part: dict[str, Any], **options: Any) -> Model:
    return compose(encoders={modality: part}, decoder=LABELS, **options)


def rates(model: Model, modality: str, **part: float) -> dict[str, float]:
    """The rate of each parameter by `role.name`, where the recipe's is 1."""
    recipe = check_recipe({"task": "classification", "model": {"encoders": {modality: {"use": "x"} | part}}})
    groups = learning_rate_groups(model, recipe.model, rate=1.0, decay=0.1)
    found = {id(p): group["base_lr"] for group in groups for p in group["params"]}
    return {f"{role}.{n}": found[id(p)] for role, part in model.parts().items() for n, p in part.named_parameters()}


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_layers_of_timm_models_learn_at_the_rates_that_timm_gives_them(architecture: str) -> None:
    import timm

    model = model_of("image", {"use": "timm", "config": {"architecture": architecture}})
    found = rates(model, "image", layer_decay=0.5)
    whole = timm.create_model(architecture, num_classes=2)
    scales = {id(p): g["lr_scale"] for g in param_groups_layer_decay(whole, layer_decay=0.5) for p in g["params"]}
    own = {name: scales[id(p)] for name, p in whole.named_parameters()}
    shared = {name: value for name, value in own.items() if f"image_encoder.backbone.{name}" in found}
    assert len(shared) >= len(own) - 2, "all but the classifier"
    assert {name: found[f"image_encoder.backbone.{name}"] for name in shared} == shared
    assert found["decoder.head.layers.1.weight"] == 1.0 > min(shared.values())


def test_embeddings_learn_slowest_then_layer_by_layer_up_to_the_head() -> None:
    config = {"config": TINY | {"model_type": "bert"}}
    text = model_of("text", {"use": "transformers", "config": config}, texts=["a good thing"])
    found = rates(text, "text", layer_decay=0.5, lr_multiplier=0.1)

    def rate(part: str) -> set[float]:
        return {round(value, 9) for name, value in found.items() if part in name}

    assert rate("embeddings.") == {round(0.1 * 0.5**4, 9)}
    assert [rate(f"encoder.layer.{i}.") for i in range(3)] == [{0.0125}, {0.025}, {0.05}]
    assert rate("decoder.") == {1.0}


def test_what_hears_is_the_stem_of_an_audio_encoder() -> None:
    found = rates(model_of("audio", {"use": "wav2vec2", "config": {"config": SOUND | CONV}}), "audio", layer_decay=0.5)
    stem = {value for name, value in found.items() if "feature_" in name or "pos_conv" in name}
    assert stem == {0.5**4}
    assert {value for name, value in found.items() if ".layers.2." in name and "conv_layers" not in name} == {0.5}


@pytest.mark.parametrize("stable", [True, False])
def test_a_norm_that_is_applied_after_the_blocks_learns_as_the_head_does(stable: bool) -> None:
    config = SOUND | CONV | {"do_stable_layer_norm": stable, "feat_extract_norm": "layer"}
    found = rates(model_of("audio", {"use": "wav2vec2", "config": {"config": config}}), "audio", layer_decay=0.5)
    norm = [value for name, value in found.items() if "model.encoder.layer_norm." in name]
    assert norm == [1.0 if stable else 0.5**4] * 2
    assert {value for name, value in found.items() if ".layers.0." in name and "conv_layers" not in name} == {0.5**3}


def test_our_own_blocks_count_too() -> None:
    part = {"use": "transformer", "config": {"dim": 8, "depth": 2, "heads": 2}}
    found = rates(model_of("text", part, texts=["a good thing"]), "text", layer_decay=0.5)
    blocks = [{value for name, value in found.items() if f"blocks.{i}." in name} for i in range(2)]
    assert blocks == [{0.25}, {0.5}]
    assert {value for name, value in found.items() if "embed" in name} == {0.125}
    assert found["text_encoder.layers.norm.weight"] == 1.0, "what follows the blocks learns as the head does"


def test_every_parameter_keeps_its_weight_decay_and_is_in_one_group() -> None:
    model = model_of("image", {"use": "timm", "config": {"architecture": "test_vit"}})
    table = {"task": "classification", "model": {"encoders": {"image": {"use": "timm", "layer_decay": 0.7}}}}
    for name in ("adamw", "sgd", "muon"):
        recipe = check_recipe(table | {"train": {"optimizer": name, "weight_decay": 0.1}})
        groups = make_optimizer(model, recipe, torch.device("cpu")).param_groups
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
        assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_an_encoder_without_layers_is_named() -> None:
    model = model_of("text", {"use": "lstm", "config": {"dim": 8}}, texts=["a good thing"])
    with pytest.raises(UsageError, match=r"model\.encoders\.text\.layer_decay: .* has no layers with numbers"):
        rates(model, "text", layer_decay=0.9)


@pytest.mark.parametrize("value", [0, -1, 1.1, float("nan")])
def test_a_decay_that_can_be_none_is_refused(value: float) -> None:
    table = {"task": "classification", "model": {"encoders": {"image": {"use": "timm", "layer_decay": value}}}}
    with pytest.raises(UsageError, match=r"model\.encoders\.image\.layer_decay is .*above 0 and at most 1"):
        check_recipe(table)
    table = {"task": "classification", "model": {"decoder": {"use": "classification", "layer_decay": 0.5}}}
    with pytest.raises(UsageError, match=r"model\.decoder\.layer_decay is given.*for encoders"):
        check_recipe(table)


@pytest.mark.slow
def test_a_run_with_decayed_layers_goes_on_bit_for_bit(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = image_only(tables, epochs=2)
    table["model"]["encoders"]["image"] |= {"layer_decay": 0.5}
    whole = train(table, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole.out)
    assert "layer_decay = 0.5" in (whole.out / "recipe.toml").read_text()
