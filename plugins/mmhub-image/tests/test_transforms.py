"""A JPEG on disk gives the logits of timm with timm's own test transform, whatever the model's configuration says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from mmhub.interfaces import Policy
from mmhub_image.backbone import TimmEncoder
from mmhub_image.hooks import mmhub_load_foreign
from mmhub_image.processor import ImageProcessor

CASES: list[tuple[str, dict[str, Any]]] = [
    ("test_resnet", {}),
    ("test_vit", {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bilinear"}),
    ("test_convnext", {"crop_mode": "border", "crop_pct": 0.95}),
    ("test_efficientnet", {"crop_mode": "border", "crop_pct": 1.0, "mean": [0.1, 0.5, 0.9], "std": [1.0, 0.5, 0.2]}),
    ("test_byobnet", {"crop_pct": 0.7, "interpolation": "bilinear"}),
    ("test_nfnet", {"crop_mode": "squash", "crop_pct": 0.9}),
]


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((131, 257))
    noisy = np.asarray(smooth).astype(int) + draw.integers(-20, 20, (257, 131, 3))
    path = tmp_path / "photo.jpg"
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)
    return path


def saved(folder: Path, architecture: str, own: dict[str, Any]) -> Any:
    """Save a model as timm does, with other settings for pictures; return it as timm reads it."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model(architecture, num_classes=7), folder, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= own
    path.write_text(json.dumps(config))
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@torch.no_grad()
def theirs(model: Any, path: Path, **settings: Any) -> torch.Tensor:
    transform = create_transform(**resolve_model_data_config(model) | settings, is_training=False)
    return model(transform(Image.open(path).convert("RGB"))[None])


@torch.no_grad()
def ours(encoder: Any, decoder: Any, path: Path) -> torch.Tensor:
    items = encoder.processor([path], Policy())
    return decoder.eval()({"image": encoder.eval()(items.data, items.mask)}).logits


@pytest.mark.parametrize(("architecture", "own"), CASES)
def test_a_photograph_on_disk_gets_timms_logits(
    architecture: str, own: dict[str, Any], jpeg: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model = saved(folder, architecture, own)
    (reader,) = mmhub_load_foreign(folder, json.loads((folder / "config.json").read_text()))
    parts = reader.read(folder)
    state = parts.encoder.processor.state()  # type: ignore[attr-defined]
    assert state | own == state
    expected = theirs(model, jpeg)
    torch.testing.assert_close(ours(parts.encoder, parts.decoder, jpeg), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(48, 80), (96, 64)])
def test_it_does_so_for_pictures_that_are_not_square(
    mode: str, size: tuple[int, int], jpeg: Path, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", "test_resnet", {})
    encoder = TimmEncoder.from_library(TimmEncoder.Config(architecture="test_resnet"), tmp_path / "model").eval()
    changed = encoder.processor.state() | {"image_size": size, "crop_mode": mode, "crop_pct": 0.9}
    items = ImageProcessor.from_state(changed, {})([jpeg], Policy())
    with torch.no_grad():
        found = model.get_classifier()(encoder(items.data, items.mask).pooled)
    expected = theirs(model, jpeg, input_size=(3, *size), crop_mode=mode, crop_pct=0.9)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_real_weights_give_a_photograph_timms_logits(jpeg: Path) -> None:
    path = Path(os.environ.get("MMHUB_REAL_MODELS") or "", "efficientnet_lite0", "model.safetensors")
    if not os.environ.get("MMHUB_REAL_MODELS") or not path.is_file():
        pytest.skip("set MMHUB_REAL_MODELS to a folder with efficientnet_lite0/model.safetensors")
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(path)).eval()
    encoder = TimmEncoder.from_library(TimmEncoder.Config(architecture="tf_efficientnet_lite0"), path).eval()
    items = encoder.processor([jpeg], Policy())
    with torch.no_grad():
        found = model.get_classifier()(encoder(items.data, items.mask).pooled)
    torch.testing.assert_close(found, theirs(model, jpeg), atol=1e-5, rtol=1e-5)
