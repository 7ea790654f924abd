"""Multimodal language models of transformers, taken apart: a vision tower, what joins it, and a language model.

The tower is read by a component of mmhub-image and the projector by the fusion of mmhub itself, so that what is opened
here is an ordinary model: chatted with, trained further and published as any other. Where a picture stands in a
conversation is said by the chat template, and no token holds its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from mmhub.errors import MmhubError, TrustError, UsageError
from mmhub.interfaces import ForeignParts, ForeignReader
from mmhub.interfaces.foreign import ForeignPart
from mmhub_text.chat import render
from mmhub_text.library import quiet, read_part, read_table
from mmhub_text.writers import INSIDE, LANGUAGE_MODELS

_TOWER = "mmhub-image/transformers-vision"
_JOINTS = ("model.multi_modal_projector.", "multi_modal_projector.", "model.connector.")
_PICTURE = [{"type": "image"}, {"type": "text", "text": "?"}]


@dataclass(frozen=True, kw_only=True)
class Joint:
    """How one type of model joins pictures to its text.

    Attributes:
        towers: the types of vision towers it may have.
        projector: given its configuration, that of our projector. tensors: theirs by our names in that projector.
        tower: given its configuration, the settings of our vision tower.
        before, after: tokens that stand around the tokens of a picture.
        tiles: does its own processor also cut pictures into tiles, each a picture of its own, unless told not to?
    """

    towers: tuple[str, ...]
    projector: Callable[[Any], dict[str, Any]]
    tensors: Mapping[str, str]
    tower: Callable[[Any], dict[str, Any]] = field(default=lambda config: {})
    before: str = ""
    after: str = ""
    tiles: bool = False


def _chosen_layer(config: Any) -> dict[str, Any]:
    several = getattr(config, "vision_feature_layers", None)  # ViP-LLaVA's, as files and older versions call it
    layer = config.vision_feature_layer if several is None else several
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    return {"layer": layer if isinstance(layer, int) else list(layer), "drop_class": strategy == "default"}


def _last_layer(config: Any) -> dict[str, Any]:
    chosen = _chosen_layer(config)
    return chosen if chosen["layer"] != -1 else {"drop_class": chosen["drop_class"]}  # with the norm behind it


_MLP = {"linear_1": "body.0", "linear_2": "body.2"}
_IDEFICS = Joint(
    towers=("idefics3_vision", "smolvlm_vision"),
    projector=lambda config: {"kind": "linear", "shuffle": config.scale_factor},
    tensors={"modality_projection.proj": "body"},
    before="<fake_token_around_image><global-img>",
    after="<fake_token_around_image>",
    tiles=True,
)
JOINTS = {
    "llava": Joint(
        towers=("clip_vision_model", "siglip_vision_model"),
        projector=lambda config: {"kind": "mlp"},
        tensors=_MLP,
        tower=_chosen_layer,
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": Joint(
        towers=("internvl_vision",),
        projector=lambda config: {"kind": "mlp", "shuffle": round(1 / config.downsample_ratio), "norm": True},
        tensors=_MLP | {"layer_norm": "norm"},
        tower=_last_layer,
        before="<img>",
        after="</img>",
        tiles=True,
    ),
    "vipllava": Joint(
        towers=("clip_vision_model",),
        projector=lambda config: {"kind": "mlp", "norm": True},
        tensors=_MLP | {"projector_layernorm": "norm"},
        tower=_chosen_layer,
    ),
}
assert set(JOINTS) == INSIDE, "writers reads the language models inside of these"


def multimodal_reader(config: Mapping[str, Any]) -> list[ForeignReader]:
    """Offer to read a language model that sees, or to say why not; [] for any other model, such as CLIP."""
    names, parts = config.get("architectures"), ("vision_config", "audio_config")
    writes = isinstance(names, list) and bool(names) and str(names[0]).endswith("ForConditionalGeneration")
    if str(config.get("model_type")) in JOINTS or (
        writes and any(isinstance(config.get(key), Mapping) for key in parts)
    ):
        return [_reader(config)]
    return []


def _reader(config: Mapping[str, Any]) -> ForeignReader:
    return ForeignReader(
        library="transformers",
        read=read_multimodal,
        refusal=_refusal(config),
        components=(("image_encoder", _TOWER),),
    )


def _refusal(table: Mapping[str, Any]) -> MmhubError | None:
    kind = str(table.get("model_type"))
    if kind not in JOINTS:
        what = f"a multimodal model of model_type {kind!r} is not read here"
        return UsageError(what, f"there are {', '.join(sorted(JOINTS))}")
    try:
        config = _described(table)
        LANGUAGE_MODELS.find(type(config.text_config))
    except MmhubError as error:
        return error
    joint, tower = JOINTS[kind], config.vision_config.model_type
    if tower not in joint.towers:
        return UsageError(f"its vision tower is a {tower!r}", f"a {kind!r} is read with {' or '.join(joint.towers)}")
    for key, ours in (("projector_hidden_act", "gelu"), ("projector_layernorm_eps", 1e-5)):
        if getattr(config, key, ours) != ours:
            return UsageError(f"its {key} is {getattr(config, key)!r}", f"mmhub has {ours!r} there")
    return None


def _described(table: Mapping[str, Any]) -> Any:
    try:
        with quiet():
            config = CONFIG_MAPPING[table["model_type"]].from_dict(dict(table))
            for part in (config.vision_config, config.text_config):
                if not isinstance(part, PreTrainedConfig):
                    raise TypeError(f"vision_config and text_config are tables, not {str(part)[:40]!r}")
            return config
    except Exception as error:  # whatever the configuration class makes of it
        raise TrustError(f"its config.json is not usable: {' '.join(str(error).split())[:300]}") from None


def read_multimodal(folder: Path) -> ForeignParts:
    """Read the folder of a multimodal language model.

    Raises:
        UsageError, TrustError: its chat template has no place for a picture, or a file is missing or damaged.
    """
    from mmhub_text.transformers_lm import TransformersLM  # few need it

    config = _described(read_table(folder / "config.json"))
    joint = JOINTS[config.model_type]
    decoder = TransformersLM.from_library(TransformersLM.Config(), folder, {})
    _take_template(decoder.processor, folder, config, joint)
    if joint.tiles:
        print("note: pictures are read whole; the model's own processor cuts large ones into tiles", file=sys.stderr)
    return ForeignParts(
        decoder=decoder,
        decoder_id="mmhub-text/transformers-lm",
        senses={"image": ForeignPart(id=_TOWER, path=folder, config=joint.tower(config))},
        projectors={"image": joint.projector(config)},
        weights=_joint_weights(folder, config, joint),
        task="chat",
    )


def _joint_weights(folder: Path, config: PreTrainedConfig, joint: Joint) -> dict[str, Tensor]:
    """The projector's tensors by the names that the fusion has for them; a bias that it lacks is zero."""
    found: dict[str, Tensor] = {}
    for name, tensor in read_part(folder, _JOINTS).items():
        layer, _, key = name.rpartition(".")
        if layer not in joint.tensors:
            raise TrustError(f"the projector in '{folder}' has an unknown tensor {name!r}")
        found[f"projectors.image.{joint.tensors[layer]}.{key}"] = tensor
    for name, tensor in list(found.items()):
        if name.endswith(".weight"):
            found.setdefault(f"{name.removesuffix('weight')}bias", tensor.new_zeros(len(tensor)))
    return found


def _take_template(processor: Any, folder: Path, config: Any, joint: Joint) -> None:
    """Let the processor lay out conversations with pictures as the folder's own chat template does."""
    number = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    token = None if number is None else processor.tokenizer.id_to_token(number)
    if token is None:
        raise TrustError(f"the tokenizer in '{folder}' does not know the image token {number} of its config.json")
    template = processor.chat_template or _older_template(folder)
    if not template:
        raise UsageError(f"'{folder}' has no chat template", "add its chat_template.jinja")
    if token not in template:
        raise UsageError(f"the chat template in '{folder}' never writes {token!r}", "add one that does")
    for mark in (joint.before, joint.after):
        if any(processor.tokenizer.token_to_id(f"<{one}") is None for one in mark.split("<")[1:]):
            raise TrustError(f"the tokenizer in '{folder}' has no {mark}, which stands beside its pictures")
    processor.chat_template = _with_begin(template, processor)
    processor.media_tokens = {"image": token}
    processor.media_around = {"image": (joint.before, joint.after)} if joint.before else {}


def _older_template(folder: Path) -> str:
    """The chat template where older versions of the library kept it."""
    tables = (read_table(folder / name) for name in ("chat_template.json", "processor_config.json"))
    return next((found for table in tables if isinstance(found := table.get("chat_template"), str)), "")


def _with_begin(template: str, processor: Any) -> str:
    """The template, with the begin token in front where the tokenizer puts it there and the template does not."""
    begin = processor.names.get("bos_token")
    if not processor.begins or not begin:
        return template
    laid = render([{"role": "user", "content": _PICTURE}], template, processor.names)
    return template if laid.startswith(begin) else "{{ bos_token }}" + template
