"""Any timm backbone as an mmhub image encoder: built from a name, filled from a safetensors file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Self

import msgspec
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, group_parameters
from torch import Tensor, nn

from mmhub.batch import Features
from mmhub.errors import NotFoundError, TrustError, UsageError, did_you_mean
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub_image.augment import Augment
from mmhub_image.build import build_timm
from mmhub_image.processor import ImageProcessor

_SIZE = msgspec.Meta(ge=1, le=4096)
_HEAD = "head.weight"  # a name that timm's patterns count with the classifier


class TimmEncoder(Encoder):
    """A timm backbone without its classifier.

    Tokens are what `forward_features` gives: the (H*W, D) grid of a convolutional net, or a transformer's tokens with
    its class and register tokens first. `pooled` is timm's own pooled vector, what its classifier would see.
    """

    modality = "image"
    padding_invariant = True  # every picture has the same size, there is no padding

    mean: Tensor
    std: Tensor

    class Config(ComponentConfig, frozen=True):
        """Choose a backbone; pretrained weights come from `init` in the recipe, not from here.

        `architecture` is a timm name, with a pretrained tag if its preprocessing is wanted. `image_size` and
        `crop_pct` default to the model's own; `drop_path` is the stochastic depth rate in training; `pool` is timm's
        `global_pool`, '' for the architecture's own.
        """

        architecture: str
        image_size: Annotated[int, _SIZE] | None = None  # pixels, a square
        crop_pct: Annotated[float, msgspec.Meta(gt=0, le=4)] | None = None  # 1 = show the whole short side
        drop_path: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
        pool: str = ""
        augment: Augment = "crop"

        def __post_init__(self) -> None:
            _check_architecture(self.architecture)

    @classmethod
    def make_processor(cls, config: Config, tokenizer: Mapping[str, Any] | None = None) -> ImageProcessor:
        return _make_processor(config, _library_config(config.architecture))

    @classmethod
    def load_processor(cls, config: Config, state: Mapping[str, Any], files: Mapping[str, bytes]) -> ImageProcessor:
        return ImageProcessor.from_state(state, files)

    def __init__(self, config: Config, processor: ImageProcessor) -> None:
        super().__init__(config, processor)
        self.backbone = _build(config)
        self.dim = int(self.backbone.num_features)  # type: ignore[arg-type]
        self._tokens_each: int | None = None
        for name, values in zip(("mean", "std"), processor.scale(), strict=True):
            self.register_buffer(name, values, persistent=False)
        self.pooled_dim = int(getattr(self.backbone, "head_hidden_size", self.dim))
        # Depthwise nets run up to 1.5 times as fast on a CPU in this layout; plain ResNets train 10 % slower.
        self._layout = torch.channels_last if _is_depthwise(self.backbone) else torch.contiguous_format

    def token_count(self, positions: int) -> int:
        """Return the number of tokens of one picture, found by encoding one."""
        if self._tokens_each is None:
            weight = next(self.backbone.parameters())
            pixels = weight.new_zeros(1, 3, *self.processor.settings.image_size)
            was_training = self.backbone.training
            self.backbone.eval()
            with torch.no_grad():
                self._tokens_each = self._tokens(self.backbone.forward_features(pixels)).shape[1]  # type: ignore[operator]
            self.backbone.train(was_training)
        return positions * self._tokens_each

    def layer_numbers(self) -> dict[str, int]:
        """Return the numbers that timm's own `param_groups_layer_decay` gives; what it counts with the head is left
        out."""
        matcher = getattr(self.backbone, "group_matcher", None)
        if matcher is None:
            return super().layer_numbers()
        names = [(name, None) for name in (*dict(self.backbone.named_parameters()), _HEAD)]
        found = group_parameters(SimpleNamespace(named_parameters=lambda: names), matcher(coarse=False), reverse=True)
        return {f"backbone.{name}": number for name, number in found.items() if number < found[_HEAD]}

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        """Encode pixels (N, 3, H, W) to tokens (N, T, D) and pooled (N, P); T follows from the image size.

        uint8 pixels are normalised here; floating-point ones are taken to be so already.
        """
        data = self.normalise(data)
        with _fixed_statistics(self.backbone if self.training and len(data) == 1 else None):
            features = self.backbone.forward_features(data.contiguous(memory_format=self._layout))  # type: ignore[operator]
            pooled = self.backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]
        tokens = self._tokens(features)
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens=tokens, mask=real, pooled=pooled)

    def normalise(self, data: Tensor) -> Tensor:
        """Return uint8 pixels (N, 3, H, W) as the backbone takes them, and floating-point ones as they are."""
        if data.is_floating_point():
            return data
        pixels: Tensor = (data.float() / 255 - self.mean) / self.std
        return pixels.to(next(self.backbone.parameters()).dtype)

    @classmethod
    def from_library(cls, config: Config, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        """Build with the weights in a timm safetensors file, or a folder with `model.safetensors` and `config.json`.

        A folder's `config.json` also says how pictures were normalised; a lone file leaves that to `architecture`.

        Raises:
            NotFoundError: there is no safetensors file. TrustError: it is damaged.
            UsageError: the weights do not belong to `config`.
        """
        path = Path(path)
        weights = read_weights(path)
        config, library = _adopt(config, path)
        encoder = cls(config, _make_processor(config, library))
        encoder.backbone.load_state_dict(_fit_weights(encoder.backbone, weights, config.architecture, path))
        return encoder

    def _tokens(self, features: Any) -> Tensor:
        """Flatten (N, C, H, W), (N, H, W, C) or (N, T, C) to (N, T, C)."""
        if not isinstance(features, Tensor):
            raise UsageError(
                f"architecture {self.config.architecture!r} gives several token grids", "choose one that gives one"
            )
        if features.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


@contextmanager
def _fixed_statistics(model: nn.Module | None) -> Iterator[None]:
    """Let batch norms use their running statistics: those of a single small picture may have no variance at all."""
    norms = [] if model is None else [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = [norm for norm in norms if norm.training]
    try:
        for norm in training:
            norm.eval()
        yield
    finally:
        for norm in training:
            norm.train()


def _check_architecture(name: str) -> None:
    if ":" in name or "/" in name:
        raise ValueError(f"architecture {name!r} is an address; give timm's plain name, and the weights as `init`")
    if not timm.is_model(name):
        close = did_you_mean(name.partition(".")[0], timm.list_models())
        raise ValueError(f"unknown architecture {name!r}; {close or 'see timm.list_models() for the names'}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(tagged for tagged in get_arch_pretrained_cfgs(name) if "." in tagged)
        raise ValueError(f"unknown pretrained tag in {name!r}; known: {tags or 'none'}") from None


def _library_config(architecture: str) -> dict[str, Any]:
    """What timm itself says about a model: input size, normalisation, crop."""
    config = get_pretrained_cfg(architecture)
    return config.to_dict() if config is not None else {}


def _make_processor(config: TimmEncoder.Config, library: dict[str, Any]) -> ImageProcessor:
    data = resolve_data_config(args={"crop_pct": config.crop_pct}, pretrained_cfg=library)
    height, width = (config.image_size,) * 2 if config.image_size else data["input_size"][1:]
    state = {key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    return ImageProcessor.from_state(state | {"image_size": (height, width), "augment": config.augment}, {})


def build_options(config: TimmEncoder.Config) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` for a backbone without a classifier."""
    options: dict[str, Any] = {"num_classes": 0}
    if config.image_size and _library_config(config.architecture).get("fixed_input_size"):
        options["img_size"] = config.image_size  # other models take any size, and have no such argument
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if config.pool:
        options["global_pool"] = config.pool
    return options


def _build(config: TimmEncoder.Config) -> nn.Module:
    options = build_options(config)
    try:
        return build_timm(config.architecture, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items() if key != "num_classes")
        raise UsageError(f"timm cannot build {config.architecture!r} with {given or 'its defaults'}: {error}") from None


def _is_depthwise(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels for module in model.modules())


def read_weights(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"no weights at '{file}'", "only safetensors are read; convert other formats with timm")
    try:
        weights: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise TrustError(f"'{file}' is not a valid safetensors file: {error}", "fetch it again") from None
    return weights


def _adopt(config: TimmEncoder.Config, path: Path) -> tuple[TimmEncoder.Config, dict[str, Any]]:
    """Complete `config` with what a timm folder's config.json says; return it with the model's data settings."""
    library = _library_config(config.architecture)
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return config, library
    try:
        saved = json.loads(file.read_bytes())
        own, options = saved.get("pretrained_cfg", saved), saved.get("model_args") or {}
        native = tuple(library.get("input_size", ()))
        library |= {key: value for key, value in own.items() if value is not None}
    except (ValueError, AttributeError, TypeError) as error:
        raise TrustError(f"'{file}' is not a timm configuration: {error}") from None
    known = {"img_size", "global_pool", "num_classes", "drop_path_rate", "drop_rate"}
    unknown = sorted(key for key, value in options.items() if key not in known and (key, value) != ("in_chans", 3))
    if unknown:
        raise UsageError(f"'{file}' was built with options mmhub does not support: {', '.join(unknown)}")
    changes: dict[str, Any] = {}
    size = options.get("img_size") or (library.get("input_size") or (None,))[-1]
    if config.image_size is None and isinstance(size, int) and size != (native or (None,))[-1]:
        changes["image_size"] = size
    if not config.pool and isinstance(options.get("global_pool"), str):
        changes["pool"] = options["global_pool"]
    return msgspec.structs.replace(config, **changes), library


def _fit_weights(model: nn.Module, weights: dict[str, Tensor], architecture: str, path: Path) -> dict[str, Tensor]:
    """Drop the classifier, and let timm convert older names and other image sizes; what is left must fit exactly."""
    fitted = _without_classifier(model, weights)
    problem = _mismatch(model, fitted)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if problem and convert:
        try:
            converted = _without_classifier(model, convert(dict(weights), model))
        except Exception:  # timm's converters assume the right architecture; the first problem tells more
            converted = fitted
        if not _mismatch(model, converted):
            return converted
    if problem:
        raise UsageError(
            f"the weights in '{path}' are not those of {architecture!r}: {problem}", "check `architecture`"
        )
    return fitted


def _without_classifier(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    # A classifier "head.fc" may have a norm or hidden layer beside it, which a model without classes lacks as well.
    prefixes = tuple(f"{name.split('.')[0]}." for name in ((names,) if isinstance(names, str) else names))
    own = model.state_dict()
    return {key: value for key, value in weights.items() if key in own or not key.startswith(prefixes)}


def _mismatch(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Say how `weights` differ from what `model` holds, '' if they fit."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    parts = [_few(what, keys) for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    for key in sorted(wrong)[:1]:
        shapes = f"{tuple(weights[key].shape)}, not {tuple(own[key].shape)}"
        parts.append(f"{key} has shape {shapes}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    return "; ".join(parts)


def _few(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
