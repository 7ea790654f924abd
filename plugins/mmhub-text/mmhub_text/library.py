"""Reading and building encoders of the transformers library, without ever running or keeping anyone's code.

A model is described by `model_type` and the hyper-parameters its configuration class declares; nothing else of a
config.json is kept, and only safetensors weights are read.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import logging

from mmhub.errors import MmhubError, NotFoundError, TrustError, UsageError, did_you_mean
from mmhub.hub.foreign import VOCABULARIES
from mmhub.hub.integrity import read_index
from mmhub.reading import TOKENIZER_BYTES, read_plain
from mmhub_text.deferral import deferred
from mmhub_text.skeleton import no_initial_weights
from mmhub_text.tokenizer import parse_tokenizer

with deferred("scipy.optimize", "linear_sum_assignment"):  # takes half a second, for training detection models
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        MODEL_MAPPING,
        MODEL_MAPPING_NAMES,
    )

DEFAULT_LENGTH = 512  # tokens, where a model has no limit of its own

# Declared by every configuration, but not hyper-parameters: bookkeeping, task heads, or switches of the output.
_NOT_OURS = {
    *("architectures", "transformers_version", "id2label", "label2id", "num_labels", "problem_type", "dtype"),
    *("torch_dtype", "output_hidden_states", "output_attentions", "return_dict", "use_cache", "name_or_path"),
    *("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation", "quantization_config"),
    *("add_cross_attention", "is_encoder_decoder", "gradient_checkpointing", "tie_word_embeddings", "kwargs", "self"),
}
# Their positions start after the padding id, so that many of `max_position_embeddings` cannot be used.
_OFFSET_POSITIONS = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet"),
    *("longformer", "ibert", "xmod"),
}
# Right padding, with a mask, changes no real token; held by a test that runs each of them.
PADDING_INVARIANT = {
    *("albert", "bart", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "gpt2"),
    *("llama", "marian", "mbart", "modernbert", "mpnet", "mt5", "pegasus", "qwen3", "rembert", "roberta", "roformer"),
    *("t5", "umt5", "xlm-roberta"),
}
# Masks bf16 scores with the lowest fp32 number, and so fails under autocast.
FULL_PRECISION = {"deberta"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a transformers model is wanted for: the class it is built as, and the hyper-parameters that adds.

    `inside` are types of larger models of which one is a part: its `text_config`.
    """

    find: Callable[[type[PreTrainedConfig]], type[PreTrainedModel]]
    types: frozenset[str]
    more: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()


def describe_model(table: Mapping[str, Any], family: Family | None = None) -> PreTrainedConfig:
    """Build the library's configuration from a table of `model_type` and hyper-parameters.

    Raises:
        UsageError: the type or a key is unknown (near matches are suggested), or a value is not possible.
    """
    family = family or ENCODERS
    kind = _model_type(table, family)
    family.find(CONFIG_MAPPING[kind])
    values = {key: value for key, value in table.items() if key != "model_type"}
    known = hyperparameters(CONFIG_MAPPING[kind]) | family.more
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or f"it has, among others: {', '.join(sorted(known)[:8])}"
            raise UsageError(f"model_type {kind!r} has no setting {key!r}", hint)
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    except Exception as error:  # whatever the configuration class makes of a bad value
        raise UsageError(f"model_type {kind!r} does not accept these settings: {one_line(error)}") from None
    config.use_cache = False  # decoder-only types would keep keys and values that nobody asks for
    return config


def complete_table(config: PreTrainedConfig, family: Family | None = None) -> dict[str, Any]:
    """Return `model_type` and every hyper-parameter, as plain data that `describe_model` accepts."""
    known = (hyperparameters(type(config)) | (family or ENCODERS).more) - set(config.attribute_map)
    values = {key: value for key, value in config.to_dict().items() if key in known and _is_plain(value)}
    return {"model_type": config.model_type, **values}


def read_description(folder: Path, changes: Mapping[str, Any], family: Family | None = None) -> PreTrainedConfig:
    """Read config.json of a transformers folder and apply `changes` to its hyper-parameters."""
    family = family or ENCODERS
    table = read_table(folder / "config.json")
    if not table:
        raise NotFoundError(f"'{folder}' holds no config.json", "give `init` a transformers folder")
    if str(table.get("model_type")) in family.inside:
        table = language_part(table, folder)
    kind = _model_type(table, family)
    if changes.get("model_type", kind) != kind:
        raise UsageError(f"'{folder}' holds a {kind!r}, not a {changes['model_type']!r}", "leave model_type out")
    # The class itself translates older spellings; only what it declares survives.
    left_out = _NOT_OURS - family.more
    raw = {key: value for key, value in table.items() if key not in left_out and key[:1] != "_"}
    try:
        with quiet():
            config = CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:
        raise TrustError(f"'{folder / 'config.json'}' is not usable: {one_line(error)}") from None
    return describe_model(complete_table(config, family) | dict(changes), family)


def language_part(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The description of the language model inside of a multimodal one."""
    left_out = _NOT_OURS - {"tie_word_embeddings"}
    try:
        with quiet():
            whole = CONFIG_MAPPING[table["model_type"]].from_dict(
                {key: value for key, value in table.items() if key not in left_out}
            )
            found: dict[str, Any] = whole.text_config.to_dict()
    except Exception as error:
        raise TrustError(f"'{folder / 'config.json'}' is not usable: {one_line(error)}") from None
    return found | {"tie_word_embeddings": bool(whole.tie_word_embeddings)}


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the encoder with fresh weights."""
    kind, both = _encoder_class(type(config)), config.is_encoder_decoder  # the library changes it while it builds
    try:
        with quiet(), no_initial_weights():
            return _encoder_part(kind(config, **_no_pooler(kind)), both)
    except Exception as error:  # widths that do not fit each other
        raise UsageError(f"a {config.model_type!r} cannot be built with these settings: {one_line(error)}") from error


def load_model(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Build the encoder with the safetensors weights of a transformers folder, in fp32.

    Raises:
        TrustError: there are no such weights, or they lack tensors or have other shapes than config.json says.
    """
    kind, both = _encoder_class(type(config)), config.is_encoder_decoder
    return _encoder_part(load_whole(kind, config, folder, **_no_pooler(kind)), both)


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that classifies texts with this type of model.

    Raises:
        UsageError: there is none.
    """
    kind: type[PreTrainedModel] | None = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        raise UsageError(f"transformers has no classification head for model_type {config.model_type!r}")
    return kind


def load_classifier(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Build the whole classifier with the safetensors weights of a transformers folder, in fp32.

    Raises:
        TrustError: as `load_model`.
    """
    return load_whole(classifier_class(config), config, folder)


def load_whole(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, **options: Any) -> PreTrainedModel:
    """Build a model of class `kind` with the safetensors weights of a transformers folder, in fp32."""
    _check_weights(folder)
    options |= {"use_safetensors": True, "local_files_only": True}
    return _load(kind, folder, folder, config=config, **options)


def load_inside(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Build the language model of class `kind` that is part of the model in a transformers folder, in fp32."""
    tensors, base = {}, f"{kind.base_model_prefix}."
    for name, tensor in read_part(folder, _LANGUAGE).items():
        inner = name.removeprefix(base)
        tensors[inner if inner.startswith("lm_head.") else base + inner] = tensor
    return _load(kind, None, folder, all_taken=True, config=config, state_dict=tensors)


# What the language model's tensors begin with in a larger model; its head may stand beside it.
_LANGUAGE = ("model.language_model.", "language_model.", "model.text_model.", "lm_head.")


def read_part(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the tensors of one part of a model whose names begin with one of `prefixes`, without it, in fp32.

    Raises:
        TrustError: there are none, or a file is damaged.
    """
    _check_weights(folder)
    shards = read_index(folder)
    found: dict[str, Tensor] = {}
    for file in sorted({*shards.values()} if shards else {"model.safetensors"}):
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for name in list(stored.keys()):
                    prefix = next((one for one in prefixes if name.startswith(one)), None)
                    if prefix is not None:
                        inner = name if prefix == "lm_head." else name[len(prefix) :]
                        found[inner] = stored.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise TrustError(f"'{folder / file}' cannot be read: {one_line(error)}", "fetch it again") from None
    if not found:
        raise TrustError(f"'{folder}' holds no tensors named '{prefixes[0]}...'", "fetch it again")
    return found


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("model*.safetensors*")):
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f" (only {', '.join(others)}, which could run code)" if others else ""
        raise TrustError(f"'{folder}' holds no model.safetensors{found}", "convert the weights to safetensors")
    read_index(folder)  # the library itself would follow it to a pickle, or out of the folder


def _load(
    kind: type[PreTrainedModel], source: Path | None, folder: Path, all_taken: bool = False, **options: Any
) -> PreTrainedModel:
    """Build a model; `all_taken`: refuse tensors that it has no place for."""
    options |= {"dtype": torch.float32, "output_loading_info": True}
    try:
        with quiet():
            model, report = kind.from_pretrained(source, **options)
    except Exception as error:  # damaged files, other shapes
        raise TrustError(f"the weights in '{folder}' cannot be loaded: {one_line(error)}") from None
    if missing := sorted(set(report["missing_keys"]) - _computed(model)):
        raise TrustError(f"the weights in '{folder}' lack {len(missing)} tensor(s), such as {missing[0]!r}")
    spare = sorted(name for name in report["unexpected_keys"] if not name.endswith("inv_freq"))
    if all_taken and spare:
        what = f"its config.json has no place for {len(spare)} tensor(s) of its language model, such as {spare[0]!r}"
        raise TrustError(f"the weights in '{folder}' do not fit: {what}")
    loaded: PreTrainedModel = model
    return loaded


def _computed(model: PreTrainedModel) -> set[str]:
    """The names of tables of sines, which some types hold as parameters and leave out of their files."""
    tables = {name: part for name, part in model.named_modules() if "Sinusoidal" in type(part).__name__}
    for table in tables.values():
        table.requires_grad_(False)
    return {f"{name}.weight" for name in tables}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's model.safetensors, in fp32.

    Raises:
        TrustError: there is no such file, or it is damaged.
    """
    file = folder / "model.safetensors"
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrustError(f"'{file}' cannot be read: {one_line(error)}", "mmhub reads safetensors alone") from None
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a transformers folder, or convert its older tokenizer files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return parse_tokenizer(read_plain(path, TOKENIZER_BYTES), str(path))
    if not any((folder / name).is_file() for name in VOCABULARIES):  # else the library makes up an empty one
        raise NotFoundError(f"'{folder}' holds no tokenizer", "it should hold a tokenizer.json")
    from transformers import AutoTokenizer  # takes long to import, and few need it

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return parse_tokenizer(tokenizer.backend_tokenizer.to_str(), str(folder))
    except MmhubError:
        raise
    except Exception as error:
        message = f"the tokenizer files in '{folder}' cannot be read: {one_line(error)}"
        raise TrustError(message, "save them as tokenizer.json") from None


def read_pooling(folder: Path) -> str:
    """Return how a sentence-transformers folder summarises a text, `mean` for any other folder.

    Raises:
        UsageError: in a way we do not have.
    """
    chosen = pooling_modes(read_table(folder / "1_Pooling" / "config.json"))
    if len(chosen) > 1 or not set(chosen) <= {"mean", "cls"}:
        raise UsageError(
            f"'{folder}' pools by {' and '.join(chosen)}", 'set pooling = "mean" or "cls" to go on without'
        )
    return chosen[0]


# How sentence-transformers named its ways of pooling before it named them by one key, in its order.
_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def pooling_modes(table: Mapping[str, Any]) -> list[str]:
    """Return the ways of pooling in the config.json of a sentence-transformers Pooling module, the mean if none is."""
    named = table.get("pooling_mode")
    if named:
        return [str(mode) for mode in named] if isinstance(named, list) else [str(named)]
    return [mode for key, mode in _POOLING_SWITCHES.items() if table.get(key)] or ["mean"]


def encodes_text(table: Mapping[str, Any]) -> bool:
    """Does config.json describe a model of transformers that encodes text?"""
    try:
        _encoder_class(CONFIG_MAPPING[_model_type(table, ENCODERS)])
    except (UsageError, KeyError):
        return False
    return True


def read_length(folder: Path, config: PreTrainedConfig) -> int:
    """Return the number of tokens a folder's model was made for: the smallest limit any of its files names."""
    limits = [
        read_table(folder / "sentence_bert_config.json").get("max_seq_length"),
        read_table(folder / "tokenizer_config.json").get("model_max_length"),
        position_limit(config),
    ]
    real = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 10**9]
    return min(real, default=DEFAULT_LENGTH)


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model has positions for, special ones included; None if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return positions - (config.pad_token_id if config.pad_token_id is not None else 0) - 1
    return positions


def find_folder(path: Path) -> Path:
    """Return the folder that holds config.json: `path`, or the first module of a sentence-transformers folder."""
    modules = read_json(path / "modules.json")
    if (path / "config.json").is_file() or not (isinstance(modules, list) and modules and isinstance(modules[0], dict)):
        return path
    first = path / str(modules[0].get("path", ""))
    return first if first.resolve().is_relative_to(path.resolve()) else path


def _model_type(table: Mapping[str, Any], family: Family) -> str:
    kind, known = table.get("model_type"), family.types
    if not kind:
        raise UsageError("transformers needs to know the model", 'give `init`, or config = {model_type = "bert", ...}')
    if not isinstance(kind, str) or kind not in known:
        own = "it needs code of its own, which mmhub never runs" if table.get("auto_map") else None
        raise UsageError(f"transformers has no model_type {kind!r}", own or did_you_mean(str(kind), known))
    return kind


def hyperparameters(kind: type[PreTrainedConfig]) -> set[str]:
    declared = _parameters(kind.__init__) | set(kind.attribute_map)
    return {key for key in declared - _NOT_OURS if key[:1] != "_"}


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _is_plain(value: Any) -> bool:
    """Whether a value is JSON data without private keys."""
    if isinstance(value, dict):
        keys = all(isinstance(key, str) and key not in _NOT_OURS and key[:1] != "_" for key in value)
        return keys and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _encoder_class(described: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    kind = MODEL_FOR_TEXT_ENCODING_MAPPING.get(described, None) or MODEL_MAPPING.get(described, None)
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind is None or kind.main_input_name != "input_ids" or "hidden_size" not in hyperparameters(described):
        raise UsageError(f"model_type {described.model_type!r} does not encode text", 'use one such as "bert" or "t5"')
    result: type[PreTrainedModel] = kind
    return result


ENCODERS = Family(find=_encoder_class, types=frozenset({*MODEL_MAPPING_NAMES, *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES}))


def _no_pooler(kind: type[PreTrainedModel]) -> dict[str, Any]:
    """Leave out the layer behind `pooler_output`, which nothing here reads."""
    return {"add_pooling_layer": False} if "add_pooling_layer" in _parameters(kind.__init__) else {}


def _encoder_part(model: PreTrainedModel, both: bool) -> PreTrainedModel:
    """Return the encoder if the model has `both` it and a decoder."""
    if both:
        model = model.get_encoder()
    if isinstance(pooler := getattr(model, "pooler", None), torch.nn.Module):
        pooler.requires_grad_(False)  # built by types that cannot leave it out; it would never get a gradient
    return model


def read_table(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no file."""
    table = read_json(path)
    if not isinstance(table, dict | None):
        raise TrustError(f"'{path}' should hold a JSON object")
    return table or {}


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None if there is no file."""
    try:
        return json.loads(read_plain(path, TOKENIZER_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise TrustError(f"'{path}' is not readable JSON: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's loading bars, reports and advice off the terminal.

    Its handlers are turned down, not its logger: Python would forget what it knows of all loggers' levels each time.
    """
    logger, bars = logging.get_logger(), logging.is_progress_bar_enabled()
    passed_on, levels = logger.propagate, [(handler, handler.level) for handler in logger.handlers]
    logger.propagate = passed_on and not levels
    for handler, level in levels:
        handler.setLevel(max(level, logging.ERROR))
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.propagate = passed_on
        for handler, level in levels:
            handler.setLevel(level)
        if bars:
            logging.enable_progress_bar()
