"""wav2vec 2.0, HuBERT and WavLM from transformers: waveform in, one token for every 20 ms out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import msgspec
import torch
import transformers
from torch import Tensor

from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.interfaces import ComponentConfig, Encoder
from mmhub_audio.files import Channel
from mmhub_audio.library import (
    Value,
    build,
    configure,
    load_exactly,
    model_config,
    read_json,
    read_tensors,
    sampling_rate,
)
from mmhub_audio.processor import AudioProcessor, check_channel, check_rate
from mmhub_audio.scratch import finish

# Hyper-parameters that shape the encoder. Nothing else is handed on to transformers.
_SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "layerdrop",
    "initializer_range",
    "layer_norm_eps",
    "feat_extract_norm",
    "feat_extract_activation",
    "conv_dim",
    "conv_stride",
    "conv_kernel",
    "conv_bias",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "do_stable_layer_norm",
    "apply_spec_augment",
    "mask_time_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "mask_feature_prob",
    "mask_feature_length",
)
# Off unless a recipe asks: both leave parameters without a gradient, which distributed training rejects.
_QUIET: dict[str, Value] = {"apply_spec_augment": False, "layerdrop": 0.0}
_OLD_NAMES = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


class Wav2Vec2Family(Encoder):
    """The three share everything but the model class and a few hyper-parameters.

    Models whose first convolution is followed by a group norm (every base-size one) normalise over time, padding
    included: they take clips of equal length, without a mask, as they were trained. Those with layer norm take a mask.
    """

    modality = "audio"
    name: ClassVar[str]  # component and transformers' model_type
    library: ClassVar[tuple[Any, Any]]  # transformers' configuration and model classes
    keys: ClassVar[tuple[str, ...]] = _SHARED

    class Config(ComponentConfig, frozen=True):
        """`config` holds transformers' hyper-parameters by its names; what is left out takes transformers' default."""

        sample_rate: int = 16000  # Hz
        channel: Channel = "mix"  # of several: their mean, the "first", or the one of that number, from 0
        do_normalize: bool = True  # zero mean and unit variance for each clip
        config: dict[str, Value] = msgspec.field(default_factory=dict)

        def __post_init__(self) -> None:
            check_rate(self.sample_rate)
            check_channel(self.channel)

    def __init__(self, config: Any, processor: Any) -> None:
        hyper = _library_config(type(self), config.config)
        table = {key: _plain(getattr(hyper, key)) for key in self.keys}
        super().__init__(msgspec.structs.replace(config, config=table), processor)
        self.model = build(self.library[1], hyper, self.name)
        self.dim = hyper.hidden_size
        self.token_seconds = math.prod(hyper.conv_stride) / config.sample_rate
        self.padding_invariant = hyper.feat_extract_norm == "layer" and not table.get("conv_pos_batch_norm", False)

    @classmethod
    def make_processor(cls, config: Any, tokenizer: Mapping[str, Any] | None = None) -> AudioProcessor:
        hyper = _library_config(cls, config.config)
        return AudioProcessor(
            AudioProcessor.Config(
                sample_rate=config.sample_rate,
                channel=config.channel,
                do_normalize=config.do_normalize,
                min_samples=_receptive_field(hyper),
            )
        )

    @classmethod
    def load_processor(cls, config: Any, state: Mapping[str, Any], files: Mapping[str, bytes]) -> AudioProcessor:
        return AudioProcessor.from_state(state, files)

    @classmethod
    def from_library(cls, config: Any, path: Path, tokenizer: Mapping[str, Any] | None = None) -> Self:
        stored = model_config(path, cls.name, cls.name)
        if stored.get("add_adapter"):
            raise UsageError(f"'{path}' has a convolutional adapter on top, which `{cls.name}` does not support")
        preprocessor = read_json(path, "preprocessor_config.json")
        table = {k: stored[k] for k in cls.keys if k in stored} | _QUIET | dict(config.config)
        config = msgspec.structs.replace(
            config,
            sample_rate=sampling_rate(preprocessor, config.sample_rate, path),
            do_normalize=bool(preprocessor.get("do_normalize", config.do_normalize)),
            config=table,
        )
        with torch.device("meta"):
            encoder = cls(config, None)
        encoder.processor = cls.make_processor(encoder.config)
        tensors = _rename(read_tensors(path, (f"{cls.name}.", "")))
        if "masked_spec_embed" not in dict(encoder.model.named_parameters()):
            tensors.pop("masked_spec_embed", None)
        load_exactly(encoder.model, tensors, path)
        return encoder

    def token_count(self, positions: int) -> int:
        hyper = self.model.config
        for kernel, stride in zip(hyper.conv_kernel, hyper.conv_stride, strict=True):
            positions = (positions - kernel) // stride + 1
        return positions

    def layer_numbers(self) -> dict[str, int]:
        """Number the layers as names tell, but for a norm that is registered before the blocks and applied after."""
        after = "model.encoder.layer_norm." if self.model.config.do_stable_layer_norm else ()
        return {name: number for name, number in super().layer_numbers().items() if not name.startswith(after)}

    def forward(self, data: Tensor, mask: Tensor) -> Features:
        output = self.model(data, attention_mask=mask.long() if self.padding_invariant else None)
        lengths = self.model._get_feat_extract_output_lengths(mask.sum(1))
        tokens = output.last_hidden_state
        real = torch.arange(tokens.shape[1], device=mask.device)[None] < lengths[:, None]
        return finish(tokens, real)


class Wav2Vec2(Wav2Vec2Family):
    """wav2vec 2.0, Baevski et al. 2020 (arXiv:2006.11477)."""

    name = "wav2vec2"
    library = (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model)
    keys = (*_SHARED, "mask_feature_min_masks", "adapter_attn_dim")


class Hubert(Wav2Vec2Family):
    """HuBERT, Hsu et al. 2021 (arXiv:2106.07447)."""

    name = "hubert"
    library = (transformers.HubertConfig, transformers.HubertModel)
    keys = (*_SHARED, "mask_feature_min_masks", "feat_proj_layer_norm", "conv_pos_batch_norm")


class WavLM(Wav2Vec2Family):
    """WavLM, Chen et al. 2022 (arXiv:2110.13900)."""

    name = "wavlm"
    library = (transformers.WavLMConfig, transformers.WavLMModel)
    keys = (*_SHARED, "num_buckets", "max_bucket_distance")

    def __init__(self, config: Any, processor: Any) -> None:
        # transformers hands torch's attention a bool and a float mask together; torch answers with a warning a layer.
        warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
        super().__init__(config, processor)


def _library_config(cls: type[Wav2Vec2Family], table: Mapping[str, Value]) -> Any:
    """Build transformers' configuration from a table of allowed keys."""
    table = _QUIET | dict(table)
    if not table["apply_spec_augment"]:
        table |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}  # or an unused parameter would be made
    hyper = configure(cls.library[0], table, cls.keys, cls.name)
    if hyper.feat_extract_norm not in ("group", "layer"):
        raise UsageError(f"{cls.name}: feat_extract_norm must be 'group' or 'layer', not {hyper.feat_extract_norm!r}")
    return hyper


def _receptive_field(hyper: Any) -> int:
    """Samples the convolutional front end needs to make one frame."""
    need = 1
    for kernel, stride in zip(reversed(hyper.conv_kernel), reversed(hyper.conv_stride), strict=True):
        need = (need - 1) * stride + kernel
    return need


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weight-normalised tensors the names that torch's parametrization uses; older files have shorter ones."""
    renamed = {}
    for name, tensor in tensors.items():
        old = next((end for end in _OLD_NAMES if name.endswith(end)), None)
        renamed[name.removesuffix(old) + _OLD_NAMES[old] if old else name] = tensor
    return renamed
