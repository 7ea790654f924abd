"""Whole timm models: read with their classifier, and written so that timm reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor

from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import ForeignParts, Policy, Stream
from mmhub_image.backbone import TimmEncoder
from mmhub_image.classifier import TimmClassifier
from mmhub_image.hooks import mmhub_load_foreign, mmhub_write_foreign

LABELS = ["cat", "dog", "fox"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 190, 3), dtype=np.uint8))
NAMES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050", "test_byobnet")


def save(folder: Path, architecture: str = "test_resnet", *, classes: int = 3, **config: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_for_hf(model, folder, model_config={"label_names": LABELS} | config, safe_serialization=True)
    return model.eval()


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(folder: Path) -> ForeignParts:
    (reader,) = mmhub_load_foreign(folder, json.loads((folder / "config.json").read_text()))
    return reader.read(folder)


@torch.no_grad()
def logits_of(parts: ForeignParts) -> Tensor:
    items = parts.encoder.processor([PICTURE], Policy())
    assert parts.decoder
    return parts.decoder.eval()({"image": parts.encoder.eval()(items.data, items.mask)}).logits


@torch.no_grad()
def library_logits(model: Any) -> Tensor:
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return model.eval()(transform(PICTURE)[None])


@pytest.mark.parametrize("architecture", NAMES)
def test_a_model_gives_the_logits_of_timm_and_is_written_back_equal(architecture: str, tmp_path: Path) -> None:
    save(tmp_path / "theirs", architecture)
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    parts = read(tmp_path / "theirs")
    torch.testing.assert_close(logits_of(parts), library_logits(model), atol=1e-5, rtol=1e-5)
    assert (parts.task, parts.decoder_id) == ("classification", "mmhub-image/timm-classifier")
    assert parts.decoder and parts.decoder.config.labels == ("cat", "dog", "fox")
    (writer,) = mmhub_write_foreign(parts.encoder, parts.decoder, "timm")
    writer.write(tmp_path / "back")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    torch.testing.assert_close(library_logits(back), library_logits(model), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["label_names"] == LABELS


def test_the_pictures_are_prepared_as_config_json_says_and_stay_so_when_written_back(tmp_path: Path) -> None:
    save(tmp_path / "theirs")
    own = json.loads((tmp_path / "theirs" / "config.json").read_text())["pretrained_cfg"]
    changed = own | {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.8, "input_size": [3, 96, 96], "interpolation": "bicubic"}
    edit(tmp_path / "theirs", pretrained_cfg=changed)
    parts = read(tmp_path / "theirs")
    assert parts.encoder.processor.settings.image_size == (96, 96)
    model = timm.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True)
    torch.testing.assert_close(logits_of(parts), library_logits(model), atol=1e-5, rtol=1e-5)
    (writer,) = mmhub_write_foreign(parts.encoder, parts.decoder, "timm")
    writer.write(tmp_path / "back")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    torch.testing.assert_close(library_logits(back), library_logits(model), atol=1e-5, rtol=1e-5)


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    for names in (None, ["too", "few"]):
        save(tmp_path, label_names=names)
        parts = read(tmp_path)
        assert parts.decoder and parts.decoder.config.labels == ("0", "1", "2")


def test_a_model_without_classes_is_an_encoder_and_is_written_as_one(tmp_path: Path) -> None:
    model = save(tmp_path / "theirs", classes=0, label_names=None)
    parts = read(tmp_path / "theirs")
    assert (parts.decoder, parts.left_out, parts.task) == (None, "", "embedding")
    (writer,) = mmhub_write_foreign(parts.encoder, None, "timm")
    writer.write(tmp_path / "back")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True)
    assert torch.equal(library_logits(back), library_logits(model))


def test_a_classifier_that_is_no_single_layer_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, "deit_tiny_distilled_patch16_224")
    parts = read(tmp_path)
    assert (parts.decoder, parts.left_out) == (None, "deit_tiny_distilled_patch16_224 classifier")


def test_a_classifier_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"fc.weight": torch.zeros(2, 96)}, tmp_path / "model.safetensors")
    with pytest.raises(TrustError, match=r"the classifier in .* has the shapes"):
        read(tmp_path)
    edit(tmp_path, num_classes="many")
    with pytest.raises(TrustError, match="gives 'many' as num_classes"):
        read(tmp_path)
    edit(tmp_path, architecture="no_such_net")
    with pytest.raises(UsageError, match="unknown architecture 'no_such_net'"):
        read(tmp_path)


def test_another_head_has_no_place_in_timms_layout(tmp_path: Path) -> None:
    save(tmp_path)
    parts = read(tmp_path)
    (writer,) = mmhub_write_foreign(parts.encoder, torch.nn.Identity(), "timm")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the timm layout cannot hold this model's head"):
        writer.write(tmp_path / "back")
    assert list(mmhub_write_foreign(parts.encoder, None, "transformers")) == []
    assert list(mmhub_load_foreign(tmp_path, {"model_type": "vit", "architecture": "x"})) == []
    with pytest.raises(UsageError, match="reads an image encoder alone"):
        TimmClassifier(TimmClassifier.Config(labels=("a", "b")), {"fused": Stream(8)})
    assert isinstance(parts.encoder, TimmEncoder)
