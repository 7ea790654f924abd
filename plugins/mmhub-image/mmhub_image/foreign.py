"""Whole timm models: a folder of timm's to our encoder and classifier, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from mmhub.errors import TrustError, UsageError
from mmhub.interfaces import Decoder, ForeignParts, decode_config
from mmhub.interfaces.labels import distinct_labels
from mmhub_image.backbone import TimmEncoder, build_options, read_weights
from mmhub_image.classifier import TimmClassifier


def read_timm(folder: Path) -> ForeignParts:
    """Read a timm folder: config.json and model.safetensors.

    Raises:
        UsageError: timm does not know the architecture. TrustError: a file is damaged or missing.
    """
    table = _read_config(folder)
    where = str(folder / "config.json")
    config = decode_config(TimmEncoder.Config, {"architecture": table["architecture"], "augment": "crop"}, where)
    encoder = TimmEncoder.from_library(config, folder)
    classes = _count_classes(table, folder)
    if not classes:
        return ForeignParts(encoder=encoder, encoder_id="mmhub-image/timm")
    weights, whole = read_weights(folder), _whole(encoder, classes)
    name, layer = whole.pretrained_cfg.get("classifier"), whole.get_classifier()
    if not isinstance(name, str) or not isinstance(layer, nn.Linear) or f"{name}.weight" not in weights:
        left_out = f"{table['architecture']} classifier"
        return ForeignParts(encoder=encoder, encoder_id="mmhub-image/timm", left_out=left_out)
    settings = TimmClassifier.Config(labels=_labels(table, classes), bias=layer.bias is not None)
    decoder = TimmClassifier(settings, {"image": encoder.stream})
    tensors = {key: weights[f"{name}.{key}"] for key in decoder.layer.state_dict() if f"{name}.{key}" in weights}
    _load_layer(decoder, tensors, folder)
    return ForeignParts(
        encoder=encoder,
        encoder_id="mmhub-image/timm",
        decoder=decoder,
        decoder_id="mmhub-image/timm-classifier",
        task="classification",
    )


def _load_layer(decoder: TimmClassifier, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        decoder.layer.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    except RuntimeError:
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        raise TrustError(f"the classifier in '{folder}' has the shapes {shapes}, not those config.json says") from None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        table = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise TrustError(f"'{folder / 'config.json'}' cannot be read: {error}") from None
    return dict(table)


def _count_classes(table: dict[str, Any], folder: Path) -> int:
    pretrained = table.get("pretrained_cfg")
    number = table.get("num_classes", pretrained.get("num_classes") if isinstance(pretrained, dict) else 0)
    if not isinstance(number, int) or not 0 <= number <= 1_000_000:
        raise TrustError(f"'{folder / 'config.json'}' gives {number!r} as num_classes")
    return number


def _labels(table: dict[str, Any], classes: int) -> tuple[str, ...]:
    """The names that config.json gives the classes, else their numbers."""
    pretrained = table.get("pretrained_cfg")
    own = pretrained if isinstance(pretrained, dict) else {}
    names = table.get("label_names") or own.get("label_names")
    if not isinstance(names, list) or len(names) != classes:
        return tuple(str(i) for i in range(classes))
    return distinct_labels([str(name) for name in names])


def _whole(encoder: TimmEncoder, classes: int) -> Any:
    """The same architecture with a classifier, without memory for any of it."""
    with torch.device("meta"):
        return timm.create_model(
            encoder.config.architecture, pretrained=False, **build_options(encoder.config) | {"num_classes": classes}
        )


def write_timm(encoder: TimmEncoder, decoder: Decoder | None, folder: Path) -> None:
    """Write a folder that `timm.create_model("local-dir:...", pretrained=True)` loads.

    Raises:
        UsageError: the model has a head other than timm's own.
    """
    if decoder is not None and not isinstance(decoder, TimmClassifier):
        kind = type(decoder)
        raise UsageError(
            f"the timm layout cannot hold this model's head ({kind.__module__}.{kind.__qualname__})",
            "push it as it is; timm has room for its own classifier, and for models without one",
        )
    labels = list(decoder.config.labels) if decoder else []
    model: Any = _whole(encoder, len(labels))
    tensors = encoder.backbone.state_dict()
    if decoder is not None:
        name = model.pretrained_cfg["classifier"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in decoder.layer.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    settings, options = encoder.processor.settings, build_options(encoder.config)
    data = {key: getattr(settings, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    data["input_size"] = (3, *settings.image_size)
    names = {"label_names": labels} if labels else {}
    save_for_hf(
        model,
        folder,
        model_config=names,
        model_args=options | {"num_classes": len(labels)},
        safe_serialization=True,
        data_config=data,
    )
