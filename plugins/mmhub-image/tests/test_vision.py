"""Vision towers of transformers: equal to the library's own from pixels to tokens, and rebuilt from a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmhub.errors import InputError, PluginError, TrustError, UsageError
from mmhub.interfaces import Policy, decode_config, encode_config
from mmhub_image.pixels import VisionProcessor
from mmhub_image.vision import TOWERS, VisionTower

SIDE, PATCH = 24, 8
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(30, 50), noise(SIDE, SIDE), noise(70, 31)]


def described(kind: str) -> Any:
    sizes: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH}
    sizes = {key: [value, value] for key, value in sizes.items()} if kind == "internvl_vision" else sizes
    return transformers.AutoConfig.for_model(kind, **SIZES, **sizes)


def saved(folder: Path, kind: str, processor: Any = None) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(described(kind)).eval()
    model.save_pretrained(folder)
    (processor or transformers.CLIPImageProcessor(**CROP)).save_pretrained(folder)
    return model


def tokens_of(tower: VisionTower, pictures: list[Image.Image]) -> torch.Tensor:
    items = tower.processor(pictures, Policy())
    with torch.no_grad():
        return tower(items.data, items.mask).tokens


OFTEN = ("clip_vision_model", "dinov2", "siglip_vision_model")  # the others are inside of models tested elsewhere


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in TOWERS]
)
def test_tokens_of_a_tower_equal_those_of_the_library_for_each_choice_of_layers(kind: str, tmp_path: Path) -> None:
    model = saved(tmp_path, kind)
    pixels = transformers.CLIPImageProcessor(**CROP)(images=PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    chosen: dict[Any, torch.Tensor] = {None: output.last_hidden_state, -2: output.hidden_states[-2]}
    both = torch.cat([output.hidden_states[layer] for layer in (-1, 1)], -1)
    for layer, expected in (*chosen.items(), ([-1, 1], both)):
        tower = VisionTower.from_library(VisionTower.Config(layer=layer), tmp_path).eval()
        found = tokens_of(tower, PICTURES)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (tower.dim, tower.token_count(2)) == (found.shape[2], 2 * found.shape[1])


PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": CROP,
    "SiglipImageProcessor": {"size": {"height": SIDE, "width": SIDE}},
    "BitImageProcessor": CROP,
    "ViTImageProcessor": {"size": {"height": SIDE, "width": SIDE}, "resample": 2},
    "Idefics3ImageProcessor": {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": SIDE}},
    "SmolVLMImageProcessor": {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": SIDE}},
    "GotOcr2ImageProcessor": {"size": {"height": SIDE, "width": SIDE}},
    "LlavaImageProcessor": CROP | {"do_pad": True},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_librarys_own_processor(name: str, tmp_path: Path) -> None:
    library = getattr(transformers, name)(**PROCESSORS[name])
    saved(tmp_path, "siglip_vision_model", library)
    whole = {"do_image_splitting": False} if "max_image_size" in PROCESSORS[name] else {}
    wanted = library(images=PICTURES, return_tensors="pt", **whole)["pixel_values"].reshape(3, 3, SIDE, SIDE)
    tower = VisionTower.from_library(VisionTower.Config(), tmp_path)
    again = VisionProcessor.from_state(json.loads(json.dumps(tower.processor.state())), {})
    for processor in (tower.processor, again):
        data = processor(PICTURES, Policy()).data
        assert data.dtype == torch.uint8
        torch.testing.assert_close(tower.normalise(data), wanted, atol=1e-5, rtol=0)


def test_a_tower_ends_with_the_last_layer_that_is_used_and_every_weight_is_trained(tmp_path: Path) -> None:
    for kind in OFTEN:
        saved(tmp_path, kind)
        for layer in (None, -2):
            tower = VisionTower.from_library(VisionTower.Config(layer=layer), tmp_path)
            items = tower.processor(PICTURES, Policy())
            tower(items.data, items.mask).tokens.square().sum().backward()
            idle = [name for name, one in tower.named_parameters() if one.requires_grad and one.grad is None]
            assert not idle, (kind, layer, idle)
            assert max(tower.layer_numbers().values()) == (3 if layer is None else 2)


def test_a_tower_is_rebuilt_from_its_own_configuration(tmp_path: Path) -> None:
    saved(tmp_path, "clip_vision_model")
    tower = VisionTower.from_library(VisionTower.Config(layer=-2, drop_class=True), tmp_path).eval()
    table = json.loads(json.dumps(encode_config(tower.config)))
    again = VisionTower(decode_config(VisionTower.Config, table, "config.json"), tower.processor).eval()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(tokens_of(again, PICTURES), tokens_of(tower, PICTURES))
    assert tokens_of(again, PICTURES).shape == (3, 9, 16)  # no class token


def test_the_tower_of_a_model_of_pictures_and_texts_is_found_in_its_folder(tmp_path: Path) -> None:
    vision = described("clip_vision_model").to_dict()
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9, "intermediate_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(**CROP).save_pretrained(tmp_path)
    tower = VisionTower.from_library(VisionTower.Config(), tmp_path).eval()
    items = tower.processor(PICTURES, Policy())
    with torch.no_grad():
        expected = model.vision_model(tower.normalise(items.data)).last_hidden_state
    torch.testing.assert_close(tokens_of(tower, PICTURES), expected, atol=1e-6, rtol=0)


def test_a_fresh_tower_takes_squares_of_its_own_size() -> None:
    config = VisionTower.Config(config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8} | SIZES)
    tower = VisionTower(config, VisionTower.make_processor(config))
    assert tokens_of(tower, PICTURES).shape == (3, 4, 16)
    pixels = tower.normalise(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 16, 16))
    torch.testing.assert_close(pixels.amax((1, 2, 3)), torch.tensor([-1.0, 1.0]))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    kind = {"model_type": "clip_vision_model"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"config": {}}, "transformers needs to know the model"),
        ({"config": {"model_type": "clip_vision"}}, "no vision tower of model_type 'clip_vision' is known"),
        ({"config": kind | {"hidden_sise": 8}}, "model_type 'clip_vision_model' has no setting 'hidden_sise'"),
        ({"config": kind | {"image_size": 10**6}}, "image_size is 1000000, and pictures have sides of 1 to 4096"),
        ({"config": kind, "layer": 13}, "layer 13 of 12 layers"),
        ({"config": kind, "layer": []}, "layer is an empty list"),
    ]
    for table, message in cases:
        with pytest.raises(UsageError, match=re.escape(message)):
            VisionTower(VisionTower.Config(**table), VisionProcessor.of_size(16))
    with pytest.raises(UsageError, match="image processor 'DonutImageProcessor' of transformers is not used"):
        VisionProcessor("DonutImageProcessor", {})
    with pytest.raises(TrustError, match="is not a configuration of transformers"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="holds no vision tower that is known, but a 'bert'"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)


def test_damaged_folders_are_errors_that_say_what_lacks(tmp_path: Path) -> None:
    saved(tmp_path, "clip_vision_model")
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    name = next(one for one in tensors if one.endswith("layers.0.mlp.fc1.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(TrustError, match=r"lack 1 tensor\(s\) of its tower, such as 'encoder.layers.0.mlp.fc1.weight'"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    save_file(tensors | {name: torch.zeros(3, 3)}, weights)
    with pytest.raises(TrustError, match=r"do not fit its config.json"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    weights.write_bytes(b"no")
    with pytest.raises(TrustError, match="is not a valid safetensors file"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    weights.unlink()
    with pytest.raises(TrustError, match=r"holds no model.safetensors"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    for file in tmp_path.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(TrustError, match="does not say how pictures are prepared"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)


def test_strips_are_refused_before_they_fill_the_memory() -> None:
    processor = VisionProcessor("CLIPImageProcessor", CROP)
    with pytest.raises(InputError, match="too narrow"):
        processor.read(Image.new("RGB", (60_000, 2)), Policy(max_pixels=1_000_000))


STRANGE = [
    '{"vision_config": "x"}', '{"vision_config": [1]}', '{"model_type": ["vit"]}', "[1]", "[" * 100_000,
    '{"vision_config": {"model_type": {}}}',
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:20])
def test_a_strange_configuration_is_an_error_of_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((TrustError, UsageError)) as caught:
        VisionTower.from_library(VisionTower.Config(), tmp_path)
    assert "config.json" in caught.value.message or "no vision tower" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16_384, "intermediate_size": 65_536}, "of which they hold"),
        ({"num_hidden_layers": 10**9}, "layers"),
    ],
)
def test_sizes_of_a_configuration_take_no_memory_that_the_weights_do_not(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    saved(tmp_path, "clip_vision_model")
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | changes))
    with pytest.raises(TrustError, match=f"do not fit its config.json: .*{message}"):
        VisionTower.from_library(VisionTower.Config(), tmp_path)


def test_weights_are_read_from_the_files_that_the_index_names(tmp_path: Path) -> None:
    model = saved(tmp_path, "clip_vision_model")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, tmp_path / "model-2.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tower = VisionTower.from_library(VisionTower.Config(), tmp_path)
    found, want = dict(tower.tower.named_parameters()), dict(model.named_parameters())
    assert found and all(torch.equal(found[name], want[name]) for name in found)


def test_tokens_are_counted_without_a_change_of_state() -> None:
    config = VisionTower.Config(config={"model_type": "vit", **SIZES, "image_size": 16, "patch_size": 8})
    config = decode_config(VisionTower.Config, {"config": config.config | {"hidden_dropout_prob": 0.5}}, "here")
    tower = VisionTower(config, VisionTower.make_processor(config)).train()
    before = torch.get_rng_state()
    assert tower.token_count(1) == 5 and torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in tower.modules())


IMPOSSIBLE = [
    {"size": {"height": 100_000, "width": 100_000}}, {"size": {"shortest_edge": 5_000}}, {"crop_size": "x"},
    {"max_image_size": {"longest_edge": 10**9}}, {"size": {"height": -1, "width": 8}}, {"size": {"height": True}},
    {"image_mean": "x"}, {"image_mean": [0.5]}, {"image_std": [0, 0, 0]}, {"image_std": [1, 1, float("nan")]},
    {"resample": 9}, {"rescale_factor": 0}, {"do_resize": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("settings", IMPOSSIBLE, ids=str)
def test_settings_that_no_processor_has_are_refused_from_folders_and_checkpoints(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TrustError, match=f"has {next(iter(settings))} = "):
        VisionProcessor.from_state({"kind": "CLIPImageProcessor", "settings": CROP | settings}, {})
    table = {"image_processor_type": "CLIPImageProcessor", **CROP, **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(table))
    with pytest.raises(TrustError):
        VisionProcessor.of_folder(tmp_path)


def test_other_settings_of_a_checkpoint_never_reach_the_library() -> None:
    state = {"kind": "CLIPImageProcessor", "settings": CROP | {"device": "meta", "_processor_class": "x", "fetch": 1}}
    assert VisionProcessor.from_state(state, {}).settings == CROP


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PluginError, match="need that library") as caught:
        VisionProcessor.of_size(16)
    assert "pip install" in str(caught.value.hint)
