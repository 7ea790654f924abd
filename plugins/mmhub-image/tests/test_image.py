"""The image plugin against timm itself, against bad inputs, and against the promises of the encoder contract."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from mmhub.errors import InputError, NotFoundError, TrustError, UsageError
from mmhub.interfaces import Policy, decode_config
from mmhub_image.augment import RECIPES
from mmhub_image.backbone import TimmEncoder
from mmhub_image.decode import open_image
from mmhub_image.processor import ImageProcessor

POLICY = Policy()
SMALL = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout")


def picture(width: int = 61, height: int = 47, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture: noise would hide errors of a pixel."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def build(architecture: str = "test_resnet", **options: Any) -> TimmEncoder:
    torch.manual_seed(0)
    config = TimmEncoder.Config(architecture=architecture, **options)
    return TimmEncoder(config, TimmEncoder.make_processor(config)).eval()


def processor(**options: Any) -> ImageProcessor:
    settings = {"image_size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)} | options
    return ImageProcessor(ImageProcessor.Settings(**settings))


def encoder_of(processor: ImageProcessor) -> TimmEncoder:
    return TimmEncoder(TimmEncoder.Config(architecture="test_resnet"), processor).eval()


# --- parity with timm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SMALL)
def test_tokens_and_pooled_are_those_of_timm(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(architecture, num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    config = TimmEncoder.Config(architecture=architecture)
    ours = TimmEncoder.from_library(config, tmp_path / "weights.safetensors").eval()
    items = ours.processor([picture(), picture(seed=1)], POLICY)
    with torch.no_grad():
        features = ours(items.data, items.mask)
        grid = theirs.forward_features(ours.normalise(items.data))
        pooled = theirs.forward_head(grid, pre_logits=True)
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.tokens.flatten().sort().values, grid.flatten().sort().values)
    assert features.tokens.shape == (*features.mask.shape, ours.dim)
    assert features.mask.all() and features.pooled.shape[1] == ours.pooled_dim


def test_tokens_follow_the_rows_of_the_grid() -> None:
    encoder = build("test_resnet")
    data = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        grid = encoder.backbone.forward_features(data)
        tokens = encoder(data, torch.ones(1, 1, dtype=torch.bool)).tokens
    assert grid.shape[2:] == (3, 5)
    torch.testing.assert_close(tokens[0, 2 * 5 + 4], grid[0, :, 2, 4])


def test_channels_last_models_give_tokens_of_their_width() -> None:
    encoder = build("test_mambaout")
    assert encoder.backbone.output_fmt == "NHWC"
    data = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        grid = encoder.backbone.forward_features(data)
        tokens = encoder(data, torch.ones(1, 1, dtype=torch.bool)).tokens
    torch.testing.assert_close(tokens[0, 5 + 3], grid[0, 1, 3])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_timms_evaluation_transform(mode: Any, size: tuple[int, int], interpolation: Any) -> None:
    ours = processor(image_size=size, crop_mode=mode, interpolation=interpolation, crop_pct=0.9)
    settings = ours.state()
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    theirs = create_transform((3, *size), is_training=False, **{key: settings[key] for key in keys})
    for width, height in ((61, 47), (20, 90), (500, 333)):
        image = picture(width, height)
        pixels = encoder_of(ours).normalise(ours.read(encoded(image), POLICY)[None])[0]
        torch.testing.assert_close(pixels, theirs(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto"])
def test_the_processor_of_an_architecture_is_timms_own(architecture: str) -> None:
    theirs = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    ours = TimmEncoder.make_processor(TimmEncoder.Config(architecture=architecture)).settings
    assert ours.image_size == theirs["input_size"][1:]
    assert (ours.mean, ours.std, ours.interpolation) == (theirs["mean"], theirs["std"], theirs["interpolation"])
    assert (ours.crop_pct, ours.crop_mode) == (theirs["crop_pct"], theirs["crop_mode"])


def test_real_weights_load_and_agree_with_timm() -> None:
    folder = os.environ.get("MMHUB_REAL_MODELS")
    path = Path(folder or "", "efficientnet_lite0", "model.safetensors")
    if not folder or not path.is_file():
        pytest.skip("set MMHUB_REAL_MODELS to a folder with efficientnet_lite0/model.safetensors")
    config = TimmEncoder.Config(architecture="tf_efficientnet_lite0", image_size=96)
    ours = TimmEncoder.from_library(config, path).eval()
    theirs = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(path)).eval()
    items = ours.processor([picture(200, 150)], POLICY)
    assert ours.processor.settings.mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(ours.normalise(items.data)), pre_logits=True)
        torch.testing.assert_close(ours(items.data, items.mask).pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "crop", "flip", "strong"])
def test_pixels_are_normalised_by_the_encoder_to_the_last_bit_as_by_a_processor(name: Any) -> None:
    """Checkpoints of encoders that were given normalised pixels answer as before."""
    ours, raws = processor(augment=name), [picture(), picture(seed=1), picture(200, 50)]
    encoder, (mean, std) = encoder_of(ours), ours.scale()
    for seeds in (None, [3, 4, 5]):
        data = ours(raws, POLICY, seeds).data
        changed = name == "strong" and seeds is not None
        assert data.dtype == (torch.float32 if changed else torch.uint8)
        before = data if changed else torch.stack([(one.float() / 255 - mean) / std for one in data])
        assert torch.equal(encoder.normalise(data), before)
        mask = torch.ones(3, 1, dtype=torch.bool)
        with torch.no_grad():
            assert torch.equal(encoder(data, mask).tokens, encoder(before, mask).tokens)


@pytest.mark.gpu
def test_a_gpu_normalises_pixels_as_a_cpu_does() -> None:
    encoder = build()
    data = encoder.processor([picture(), picture(seed=1)], POLICY).data
    wanted = encoder.normalise(data)
    torch.testing.assert_close(encoder.to("cuda").normalise(data.to("cuda")).cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_the_scale_of_pixels_is_no_part_of_the_weights() -> None:
    encoder = build()
    assert not {"mean", "std"} & encoder.state_dict().keys()
    data = encoder.processor([picture()], POLICY).data
    wanted = encoder.normalise(data)
    assert encoder.to(torch.float64).normalise(data).dtype == torch.float64
    assert encoder.to(torch.bfloat16).normalise(data).dtype == torch.bfloat16
    assert wanted.dtype == torch.float32


# --- what may be handed over --------------------------------------------------------------------------------------


def test_every_form_of_one_picture_gives_the_same_pixels(tmp_path: Path) -> None:
    image, read = picture(), processor().read
    (tmp_path / "a.png").write_bytes(encoded(image))
    array = np.asarray(image)
    forms: list[Any] = [
        encoded(image), tmp_path / "a.png", str(tmp_path / "a.png"), {"bytes": encoded(image), "path": None},
        image, array, torch.from_numpy(array.copy()).permute(2, 0, 1),
    ]  # fmt: skip
    first = read(forms[0], POLICY)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    for form in forms[1:]:
        torch.testing.assert_close(read(form, POLICY), first, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = open_image(encoded(picture(mode=mode), kind), POLICY)
    assert image.mode == "RGB" and image.size == (61, 47)


def test_transparent_parts_lie_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert open_image(encoded(clear), POLICY).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert open_image(encoded(palette, transparency=0), POLICY).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(kind: str) -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16))
    assert open_image(encoded(grey, kind), POLICY).getpixel((0, 0)) == (0x80, 0x80, 0x80)


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    image = picture()
    turned = open_image(encoded(image, exif=exif), POLICY)
    assert turned.size == (47, 61)
    assert turned.getpixel((46, 0)) == image.getpixel((0, 0))


def bomb(side: int = 20_000) -> bytes:
    """A PNG whose header promises side x side pixels, and which holds a few."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animated() -> bytes:
    frames = [picture(seed=seed) for seed in range(2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"not a picture\n", "is not an image"),
        (encoded(picture())[:-2000], "damaged PNG"),
        (encoded(picture(), "JPEG")[:-200], "damaged JPEG"),
        (encoded(picture())[:20], "is a damaged image"),
        (bomb(8_000), "more than the limit of 50000000"),
        (bomb(20_000), "too many pixels"),
        (encoded(Image.new("RGB", (1, 60_000))), "too narrow"),
        (animated(), "is animated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "TIFF"), "32-bit"),
    ],
)
def test_a_bad_file_is_named_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        processor()([None, tmp_path / "bad.png"], POLICY)
    assert "bad.png" in str(caught.value) and "\n" not in str(caught.value)
    assert (caught.value.row, caught.value.modality) == (1, "image")


@pytest.mark.parametrize(
    "raw",
    [7, np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8), torch.zeros(3, 8, 8)],
)
def test_other_objects_are_refused(raw: Any) -> None:
    with pytest.raises(InputError, match="is not an image"):
        processor().read(raw, POLICY)


def test_the_pixel_limit_is_the_policys() -> None:
    with pytest.raises(InputError, match="61x47 = 2867 pixels"):
        processor().read(picture(), Policy(max_pixels=2866))


# --- augmentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_augmentation_is_a_pure_function_of_picture_and_seed(name: Any) -> None:
    augment = processor(augment=name)
    raws = [picture(), picture(seed=1)]
    torch.manual_seed(1)
    first = augment(raws, POLICY, [5, 6]).data
    torch.manual_seed(2)
    again = augment([raws[1], raws[0]], POLICY, [6, 5]).data
    torch.testing.assert_close(first, again.flip(0), rtol=0, atol=0)
    assert not torch.equal(first, augment(raws, POLICY, [7, 8]).data)
    torch.testing.assert_close(augment(raws, POLICY).data, processor(augment="none")(raws, POLICY, [5, 6]).data)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_augmentation_without_variation_shows_what_evaluation_shows(mode: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(RECIPES, "crop", type(RECIPES["crop"])())
    augment = processor(augment="crop", crop_mode=mode, crop_pct=0.8)
    image = picture(200, 133)
    seen, shown = augment([image], POLICY, [0]).data.float(), augment([image], POLICY).data.float()
    assert (seen - shown).abs().mean() < 15  # of 255; they round sizes to pixels differently


def test_only_flip_and_strong_mirror() -> None:
    half = Image.new("RGB", (32, 32), "black")
    half.paste("white", (0, 0, 16, 32))
    for name, mirrors in (("crop", False), ("flip", True), ("strong", True)):
        data = processor(augment=name, crop_pct=1.0)([half] * 40, POLICY, range(40)).data.float().mean(1)
        seen = (data[:, :, 24:].mean((1, 2)) > data[:, :, :8].mean((1, 2))).sum()
        assert bool(seen) == mirrors


# --- the encoder's contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_picture_is_encoded_alone_as_in_a_batch(architecture: str) -> None:
    encoder = build(architecture)
    raws = [picture(seed=seed) for seed in range(3)]
    items = encoder.processor(raws, POLICY)
    assert items.mask.shape == (3, 1) and items.mask.all()
    with torch.no_grad():
        together = encoder(items.data, items.mask)
        for row, raw in enumerate(raws):
            alone = encoder.processor([raw], POLICY)
            single = encoder(alone.data, alone.mask)
            torch.testing.assert_close(single.tokens[0], together.tokens[row], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(single.pooled[0], together.pooled[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", [*SMALL, "tf_efficientnet_lite0", "mobilenetv4_conv_small"])
def test_it_builds_on_the_meta_device(architecture: str) -> None:
    with torch.device("meta"):
        empty = build(architecture)
    assert all(parameter.is_meta for parameter in empty.parameters())
    full = build(architecture)
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}


@pytest.mark.parametrize("architecture", ["test_vit", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_weights_fill_a_model_built_without_data(architecture: str, monkeypatch: Any) -> None:
    full = build(architecture, image_size=64)
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, value: torch.nn.Parameter | None) -> None:
        register(module, name, value if value is None else torch.nn.Parameter(value.detach().to("meta")))

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_parameter", on_meta)
        empty = TimmEncoder(full.config, full.processor).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(full.state_dict(), assign=True)
    items = full.processor([picture()], POLICY)
    with torch.no_grad():
        torch.testing.assert_close(empty(items.data, items.mask), full(items.data, items.mask))


def test_config_and_processor_rebuild_the_encoder() -> None:
    encoder = build("test_vit", image_size=64, augment="flip", crop_pct=1.0)
    state = json.loads(json.dumps(encoder.processor.state()))
    again = TimmEncoder.load_processor(encoder.config, state, {})
    assert again.settings == encoder.processor.settings
    assert again.state() == state and again.settings.image_size == (64, 64)
    other = TimmEncoder(encoder.config, again).eval()
    other.load_state_dict(encoder.state_dict())
    items = again([picture()], POLICY)
    with torch.no_grad():
        torch.testing.assert_close(other(items.data, items.mask), encoder(items.data, items.mask))


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_image_size_reaches_model_and_pixels(architecture: str) -> None:
    encoder = build(architecture, image_size=64)
    items = encoder.processor([picture()], POLICY)
    assert items.data.shape == (1, 3, 64, 64)
    assert (
        encoder(items.data, items.mask).tokens.shape[1] == {"test_vit": 4 * 4 + 1, "test_resnet": 2 * 2}[architecture]
    )


def test_gradients_reach_every_parameter() -> None:
    encoder = build("test_resnet").train()
    features = encoder(torch.randn(2, 3, 64, 64), torch.ones(2, 1, dtype=torch.bool))
    (features.pooled.square().sum() + features.tokens.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"architecture": "resnet1o"}, "unknown architecture 'resnet1o'.*did you mean 'resnet1"),
        ({"architecture": "resnet18.nonsense"}, "unknown pretrained tag.*resnet18.a1_in1k"),
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "weights as .init.*"),
        ({"architecture": "local-dir:folder"}, "weights as .init.*"),
        ({"architecture": "test_vit", "augment": "mirror"}, "model.encoders.image.config.augment"),
        ({"architecture": "test_vit", "imagesize": 3}, "did you mean 'image_size'"),
        ({"architecture": "test_vit", "image_size": 0}, "config.image_size"),
        ({}, "'architecture' is missing"),
    ],
)
def test_a_wrong_config_says_what_is_right(table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_config(TimmEncoder.Config, table, "model.encoders.image.config")


def test_an_option_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot build 'vgg11' with drop_path_rate=0\.1"):
        build("vgg11", drop_path=0.1)


def test_a_model_of_several_grids_is_refused() -> None:
    with pytest.raises(UsageError, match="several token grids"):
        build("crossvit_9_240")(torch.zeros(1, 3, 240, 240), torch.ones(1, 1, dtype=torch.bool))


# --- timm's own checkpoints ---------------------------------------------------------------------------------------


def save_timm(folder: Path, architecture: str, **saved: Any) -> timm.models.ResNet:
    torch.manual_seed(3)
    model = timm.create_model(architecture, num_classes=7).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": architecture} | saved))
    return model


def test_a_folder_says_how_pictures_are_prepared(tmp_path: Path) -> None:
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 48, 48], "crop_pct": 1.0}
    save_timm(tmp_path, "test_resnet", pretrained_cfg=own | {"interpolation": "bilinear"})
    encoder = TimmEncoder.from_library(TimmEncoder.Config(architecture="test_resnet"), tmp_path)
    settings = encoder.processor.settings
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (settings.image_size, settings.crop_pct, settings.interpolation) == ((48, 48), 1.0, "bilinear")
    assert encoder.config.image_size == 48
    asked = TimmEncoder.Config(architecture="test_resnet", image_size=64)
    assert TimmEncoder.from_library(asked, tmp_path).processor.settings.image_size == (64, 64)


def test_positions_are_resampled_to_another_image_size(tmp_path: Path) -> None:
    save_timm(tmp_path, "test_vit")
    config = TimmEncoder.Config(architecture="test_vit", image_size=96)
    encoder = TimmEncoder.from_library(config, tmp_path / "model.safetensors")
    assert encoder.backbone.pos_embed.shape[1] == 6 * 6 + 1


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    model = save_timm(tmp_path, "test_resnet")
    with pytest.raises(UsageError, match=r"not those of 'test_vit': \d+ missing"):
        TimmEncoder.from_library(TimmEncoder.Config(architecture="test_vit"), tmp_path)
    weights = model.state_dict()
    weights["conv1.0.weight"] = torch.zeros(1, 2, 3, 4) if "conv1.0.weight" in weights else weights.pop("conv1.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"conv1\.0\.weight has shape \(1, 2, 3, 4\), not"):
        TimmEncoder.from_library(TimmEncoder.Config(architecture="test_resnet"), tmp_path)


def test_missing_and_damaged_files_are_told_apart(tmp_path: Path) -> None:
    config = TimmEncoder.Config(architecture="test_resnet")
    with pytest.raises(NotFoundError, match="no weights"):
        TimmEncoder.from_library(config, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(TrustError, match="not a valid safetensors"):
        TimmEncoder.from_library(config, tmp_path)
    save_timm(tmp_path, "test_resnet", model_args={"norm_layer": "os.system"})
    with pytest.raises(UsageError, match="norm_layer"):
        TimmEncoder.from_library(config, tmp_path)


def test_a_single_small_picture_can_be_trained_on() -> None:
    """The last batch of an epoch may hold one row, and its 1x1 feature map has no variance for batch norm."""
    config = TimmEncoder.Config(architecture="test_resnet", image_size=32)
    encoder = TimmEncoder(config, TimmEncoder.make_processor(config)).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    features = encoder(torch.randn(1, 3, 32, 32), torch.ones(1, 1, dtype=torch.bool))
    features.pooled.sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert all(m.training for m in encoder.modules())
