"""Vision towers of the transformers library: CLIP, SigLIP, DINOv2 and those inside of multimodal language models."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.errors import TrustError, UsageError, did_you_mean
from mmhub.hub.integrity import read_index
from mmhub.interfaces import ComponentConfig, Encoder, Policy
from mmhub_image.library import library, quiet, reason
from mmhub_image.pixels import MAX_SIDE, VisionProcessor

# Each type with the class it is built as; `AutoModel` would take other types, too.
TOWERS = {
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "idefics3_vision": "Idefics3VisionTransformer",
    "internvl_vision": "InternVLVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "smolvlm_vision": "SmolVLMVisionTransformer",
    "vit": "ViTModel",
}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models of pictures and texts
# What stands behind the tokens, for summaries that nothing here reads; of some types its norm is part of their output.
_BEHIND = ("head", "pooler", "layernorm", "post_layernorm")
_NORMED = {"dinov2", "idefics3_vision", "internvl_vision", "siglip_vision_model", "smolvlm_vision", "vit"}
_PREFIXES = ("model.vision_tower.", "vision_tower.", "model.vision_model.", "vision_model.", "")
# Declared by every configuration, but no hyper-parameters of a tower.
_NOT_OURS = {
    *("architectures", "transformers_version", "id2label", "label2id", "num_labels", "problem_type", "dtype"),
    *("torch_dtype", "output_hidden_states", "output_attentions", "return_dict", "name_or_path", "auto_map", "self"),
    *("attn_implementation", "quantization_config", "kwargs", "is_encoder_decoder", "chunk_size_feed_forward"),
    *(
        "vision_use_head",
        "add_pooling_layer",
        "reshape_hidden_states",
        "apply_layernorm",
        "out_features",
        "out_indices",
    ),
}


class VisionTower(Encoder):
    """A vision transformer of transformers without what summarises a picture. Tokens are a class token, where the type
    has one, and the patches row by row."""

    modality = "image"
    padding_invariant = True  # every picture has the same size, there is no padding

    mean: Tensor
    std: Tensor

    class Config(ComponentConfig, frozen=True):
        """`config` holds `model_type` and hyper-parameters under transformers' own names; `init` brings its own.

        `layer` tells which hidden states are the tokens, as the library counts them: 0 = before the first layer, -1 =
        after the last one, without the norm behind it; a list gives those of several layers side by side. Left out, it
        is the output of the model. `drop_class` leaves out the first token.
        """

        config: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
        layer: int | list[int] | None = None
        drop_class: bool = False

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> VisionProcessor:
        return VisionProcessor.of_size(int(_describe(config.config).image_size))

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> VisionProcessor:
        return VisionProcessor.from_state(state, files)

    def __init__(self, config: Config, processor: VisionProcessor) -> None:
        described = _describe(config.config)
        super().__init__(msgspec.structs.replace(config, config=_table(described)), processor)
        self.layers = _layers(config.layer, described)
        self.tower = _build(described, self.layers)
        self.dim = int(described.hidden_size) * max(1, len(self.layers))
        for name, values in zip(("mean", "std"), processor.scale(), strict=True):
            self.register_buffer(name, values, persistent=False)
        self._tokens_each: int | None = None

    @classmethod
    def from_library(cls, config: Config, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        """Read the tower of a transformers folder, its own or that of a larger model: JSON and safetensors only.

        Raises:
            UsageError: no tower is known by that type. TrustError: a file is missing or damaged.
        """
        table = _read_description(Path(path)) | dict(config.config)
        processor = VisionProcessor.of_folder(Path(path))
        described, shapes = _describe(table), _own_shapes(Path(path))
        if int(described.num_hidden_layers) > len(shapes):
            raise _no_fit(Path(path), f"{described.num_hidden_layers} layers of {len(shapes)} tensors")
        with torch.device("meta"):  # what a stranger's config.json asks for takes no memory before it is compared
            encoder = cls(msgspec.structs.replace(config, config=table), processor)
        wanted, stored = sum(p.numel() for p in encoder.tower.parameters()), sum(map(math.prod, shapes.values()))
        if wanted > 2 * stored:
            raise _no_fit(Path(path), f"a tower of {wanted:,} numbers, of which they hold {stored:,}")
        encoder.tower = _load(described, encoder.layers, Path(path))
        encoder.mean, encoder.std = processor.scale()
        return encoder

    def token_count(self, positions: int) -> int:
        """Return the number of tokens of one picture, found by encoding one."""
        if self._tokens_each is None:
            size = self.processor.read(torch.zeros(3, 64, 64, dtype=torch.uint8), Policy()).shape
            weight = next(self.tower.parameters())
            training = [module for module in self.tower.modules() if module.training]
            self.tower.eval()  # dropout would change the random state
            try:
                with torch.no_grad():
                    self._tokens_each = self._tokens(weight.new_zeros(1, *size)).shape[1]
            finally:
                for module in training:
                    module.training = True
        return positions * self._tokens_each

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode pixels (N, 3, H, W) to tokens (N, T, D). uint8 pixels are normalised here."""
        tokens = self._tokens(self.normalise(data))
        return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def normalise(self, data: Tensor) -> Tensor:
        """Return uint8 pixels (N, 3, H, W) as the tower takes them, and floating-point ones as they are."""
        if data.is_floating_point():
            return data
        pixels: Tensor = (data.float() - self.mean) / self.std
        return pixels.to(next(self.tower.parameters()).dtype)

    def _tokens(self, pixels: Tensor) -> Tensor:
        several = len(self.layers) > 1
        found = self.tower(pixels, output_hidden_states=several)
        tokens = torch.cat([found.hidden_states[i] for i in self.layers], -1) if several else found.last_hidden_state
        return tokens[:, 1:] if self.config.drop_class else tokens


def _describe(table: Mapping[str, Any]) -> Any:
    """Build the library's configuration.

    Raises:
        UsageError: the type or a key is unknown (near matches are suggested), or a value is not possible.
    """
    kind = table.get("model_type")
    if not isinstance(kind, str) or kind not in TOWERS:
        hint = did_you_mean(str(kind), TOWERS) or f"there are {', '.join(TOWERS)}"
        what = f"no vision tower of model_type {kind!r} is known" if kind else "transformers needs to know the model"
        raise UsageError(what, hint if kind else 'give `init`, or config = {model_type = "clip_vision_model", ...}')
    known = _hyperparameters(kind)
    values = {key: value for key, value in table.items() if key != "model_type"}
    for key in values:
        if key not in known:
            raise UsageError(f"model_type {kind!r} has no setting {key!r}", did_you_mean(key, known))
    size = values.get("image_size")
    for side in size if isinstance(size, (list, tuple)) else [size]:
        if isinstance(side, (int, float)) and not 1 <= side <= MAX_SIDE:
            raise UsageError(f"image_size is {side}, and pictures have sides of 1 to {MAX_SIDE} pixels here")
    try:
        return library().AutoConfig.for_model(kind, **values)
    except Exception as error:  # whatever the configuration class makes of a bad value
        raise UsageError(f"model_type {kind!r} does not accept these settings: {reason(error)}") from None


def _hyperparameters(kind: str) -> set[str]:
    declared = inspect.signature(library().CONFIG_MAPPING[kind].__init__).parameters
    return {key for key in declared if key not in _NOT_OURS and key[:1] != "_"}


def _table(described: Any) -> dict[str, Any]:
    known = _hyperparameters(described.model_type)
    values = {key: value for key, value in described.to_dict().items() if key in known and value is not None}
    return {"model_type": described.model_type, **values}


def _layers(chosen: int | list[int] | None, described: Any) -> list[int]:
    """Which hidden states are the tokens, from 0; [] for the output of the model."""
    if chosen is None:
        return []
    count = int(described.num_hidden_layers) + 1
    asked = chosen if isinstance(chosen, list) else [chosen]
    for layer in asked:
        if not -count <= layer < count:
            raise UsageError(f"layer {layer} of {count - 1} layers", f"layers go from {-count} to {count - 1}")
    if not asked:
        raise UsageError("layer is an empty list", "leave it out for the output of the model")
    return [layer % count for layer in asked]


def _build(described: Any, layers: list[int]) -> Any:
    kind = described.model_type
    try:
        with quiet():
            tower = _class(kind)(_shortened(described, layers))
    except Exception as error:  # widths that do not fit each other
        raise UsageError(f"a {kind!r} cannot be built with these settings: {reason(error)}") from error
    _trim(tower, kind, layers)
    return tower


def _shortened(described: Any, layers: list[int]) -> Any:
    """The configuration of a tower that ends with its last layer that is used."""
    shorter = type(described).from_dict(described.to_dict() | {"vision_use_head": False})
    if layers:
        shorter.num_hidden_layers = max(layers)
    return shorter


def _trim(tower: Any, kind: str, layers: list[int]) -> None:
    """Take off what stands behind the tokens, so that every weight takes part in training."""
    inner = getattr(tower, "vision_model", tower)  # some versions of the library have a module around it
    for name in _BEHIND:
        norm = name.endswith("layernorm")
        if getattr(inner, name, None) is not None and not (norm and kind in _NORMED and not layers):
            setattr(inner, name, nn.Identity() if norm else None)
    for name, parameter in tower.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)  # for pretraining


def _class(kind: str) -> Any:
    found = library().MODEL_MAPPING[library().CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found


def _read_description(folder: Path) -> dict[str, Any]:
    """The settings of the tower that a folder's config.json describes."""
    try:
        table = json.loads((folder / "config.json").read_bytes())
        part = table.get("vision_config")
        kind = (part or table).get("model_type") or _WHOLE.get(table.get("model_type"))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        what = f"'{folder / 'config.json'}' is not a configuration of transformers: {reason(error)}"
        raise TrustError(what) from None
    if not isinstance(kind, str) or kind not in TOWERS:
        raise UsageError(
            f"'{folder}' holds no vision tower that is known, but a {kind!r}", f"known: {', '.join(TOWERS)}"
        )
    try:
        described = library().CONFIG_MAPPING[kind].from_dict(part or table)
    except Exception as error:
        raise TrustError(f"'{folder / 'config.json'}' is not usable: {reason(error)}") from None
    return _table(described)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the tower, wherever they stand in the folder's files, as fp32."""
    prefix, places = _own(folder)
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        with safe_open(file, framework="pt") as stored:
            names = [name for name in places if places[name] == file]
            found |= {name[len(prefix) :]: stored.get_tensor(name).float() for name in names}
    return found


def _own_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the tower's tensors, by the headers of the files."""
    _, places = _own(folder)
    found: dict[str, list[int]] = {}
    for file in set(places.values()):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_slice(name).get_shape() for name in places if places[name] == file}
    return found


def _own(folder: Path) -> tuple[str, dict[str, Path]]:
    """What the names of the tower's tensors begin with in the folder, and the file of each."""
    places = _places(folder)
    prefix = next(one for one in _PREFIXES if any(name.startswith(one) for name in places))
    return prefix, {name: file for name, file in places.items() if name.startswith(prefix)}


def _no_fit(folder: Path, why: str) -> TrustError:
    return TrustError(f"the weights in '{folder}' do not fit its config.json: {why}")


def _load(described: Any, layers: list[int], folder: Path) -> Any:
    """Build the tower with the folder's tensors; the library itself translates their older names."""
    tensors, kind = _read_tensors(folder), _class(described.model_type)
    try:
        with quiet():
            tower, report = kind.from_pretrained(
                None,
                config=_shortened(described, layers),
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # other shapes
        raise _no_fit(folder, reason(error)) from None
    _trim(tower, described.model_type, layers)
    missing = sorted(set(report["missing_keys"]) & tower.state_dict().keys())
    if missing:
        raise TrustError(
            f"the weights in '{folder}' lack {len(missing)} tensor(s) of its tower, such as {missing[0]!r}"
        )
    return tower


def _places(folder: Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor."""
    found: dict[str, Path] = {}
    names = set(read_index(folder).values()) or {"model.safetensors"}
    if not any((folder / name).is_file() for name in names):
        raise TrustError(f"'{folder}' holds no model.safetensors", "convert the weights to safetensors")
    for file in sorted(folder / name for name in names):
        try:
            with safe_open(file, framework="pt") as stored:
                found |= dict.fromkeys(stored.keys(), file)
        except (OSError, SafetensorError) as error:
            raise TrustError(f"'{file}' is not a valid safetensors file: {error}", "fetch it again") from None
    if not found:
        raise TrustError(f"'{folder}' holds no tensors", "fetch it again")
    return found
