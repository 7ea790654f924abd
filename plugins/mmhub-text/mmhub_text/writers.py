"""Models of the transformers library that write text: which there are, building them, and what their folders say.

`mmhub_text.library` has the rules that hold for all models of that library.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
)

from mmhub.errors import UsageError
from mmhub.interfaces import Generation
from mmhub_text.embedding import vocabulary
from mmhub_text.frame import read_frame
from mmhub_text.language_processor import LanguageTextProcessor
from mmhub_text.library import Family, hyperparameters, load_inside, load_whole, one_line, quiet, read_table
from mmhub_text.pretrained import _own_tokenizer
from mmhub_text.skeleton import no_initial_weights

# They look ahead of the token they predict, or need more of it than its embedding.
_NO_LANGUAGE_MODELS = {"xlnet", "xlm", "prophetnet", "reformer"}
_MORE = frozenset({"tie_word_embeddings"})


def _language_model(described: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    kind: type[PreTrainedModel] | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(described, None)
    known = hyperparameters(described)
    half = described.model_type in SEQ2SEQ.types  # its decoder would keep layers that nothing reaches
    by_ids = "hidden_size_per_layer_input" in known  # gemma3n looks every layer's input up by id
    other = half or by_ids or "hidden_size" not in known or described.model_type in _NO_LANGUAGE_MODELS
    if kind is None or other:
        what = f"model_type {described.model_type!r} is no language model that can be run here"
        raise UsageError(what, 'use one such as "gpt2", "llama" or "qwen3"')
    return kind


def _translator(described: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    hears = described.model_type in TRANSCRIBERS
    found = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING if hears else MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    kind: type[PreTrainedModel] | None = found.get(described, None)
    if kind is None or described.model_type not in TRANSLATORS | TRANSCRIBERS:
        what = f"model_type {described.model_type!r} is no sequence-to-sequence model that can be run here"
        raise UsageError(what, f"there are {', '.join(sorted(TRANSLATORS | TRANSCRIBERS))}")
    return kind


# Held by a test that compares each of them with transformers.
TRANSLATORS = {
    *("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "mvp", "pegasus", "t5", "umt5"),
}
TRANSCRIBERS = {"whisper"}
INSIDE = frozenset({"idefics3", "internvl", "llava", "smolvlm", "vipllava"})  # they have a language model
LANGUAGE_MODELS = Family(
    find=_language_model, types=frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), more=_MORE, inside=INSIDE
)
SEQ2SEQ = Family(
    find=_translator, types=frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) | TRANSCRIBERS, more=_MORE
)


def arranged(cls: Any, table: dict[str, Any]) -> dict[str, Any]:
    """Move `model_type` and the hyper-parameters beside a Config's own keys into its `config`."""
    if "model_type" not in table:
        return table
    own = {key: value for key, value in table.items() if key in cls.__struct_fields__}
    theirs = {key: value for key, value in table.items() if key not in own}
    return own | {"config": theirs | dict(own.get("config") or {})}


def check_causal(config: PreTrainedConfig) -> None:
    """Raise UsageError for an encoder that could be a language model, but is not described as one."""
    both = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and "is_decoder" in hyperparameters(type(config))
    if both and not config.is_encoder_decoder and not config.is_decoder:
        what = f"a {config.model_type!r} is a language model only with is_decoder = true"
        raise UsageError(what, "set it in config, or train the model as an encoder")


def build_writer(config: PreTrainedConfig, family: Family) -> PreTrainedModel:
    """Build a whole model, with its head, with fresh weights."""
    kind = family.find(type(config))
    try:
        with quiet(), no_initial_weights():
            return _writing(kind(config))
    except Exception as error:  # widths that do not fit each other
        raise UsageError(f"a {config.model_type!r} cannot be built with these settings: {one_line(error)}") from error


def load_writer(config: PreTrainedConfig, folder: Path, family: Family) -> PreTrainedModel:
    """Build it with the safetensors weights of a transformers folder, in fp32.

    Raises:
        TrustError: as `mmhub_text.library.load_model`.
    """
    inside = read_table(folder / "config.json").get("model_type") in family.inside
    return _writing((load_inside if inside else load_whole)(family.find(type(config)), config, folder))


def _writing(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = True  # for those who load it from its own layout; here every call says so itself
    return model


def complete_vocabulary(table: Mapping[str, Any], processor: Any, family: Family) -> dict[str, Any]:
    """Add the number of tokens and the special ids of our own tokenizer, for a model with fresh weights."""
    if table.get("vocab_size") is not None:
        return dict(table)
    from transformers import CONFIG_MAPPING

    found: dict[str, Any] = {"vocab_size": vocabulary(0, processor), "pad_token_id": padding_id(processor)}
    found |= {"bos_token_id": processor.begin_id, "eos_token_id": processor.end_id}
    start = processor.end_id if processor.begin_id is None else processor.begin_id
    found |= {} if start is None or family is not SEQ2SEQ else {"decoder_start_token_id": start}
    kind = table.get("model_type")
    known = hyperparameters(CONFIG_MAPPING[kind]) if kind in family.types else frozenset(found)
    return {key: value for key, value in found.items() if key in known} | dict(table)


def check_vocabulary(described: PreTrainedConfig, processor: Any) -> None:
    """Raise UsageError if the tokenizer has more ids than the model knows; both sizes are named."""
    vocabulary(described.vocab_size, processor)


def padding_id(processor: Any) -> int | None:
    """Return the id of the tokenizer's padding token, None if it has none."""
    tokenizer = getattr(processor, "tokenizer", None)
    ids = (tokenizer.token_to_id(name) for name in ("<pad>", "[PAD]")) if tokenizer is not None else ()
    return next((one for one in ids if one is not None), None)


def generation_table(folder: Path) -> dict[str, Any]:
    """Return what a folder says of writing: its generation_config.json, in older folders a part of config.json."""
    return read_table(folder / "generation_config.json") or read_table(folder / "config.json")


def read_generation(table: Mapping[str, Any], *, whole_length: bool = False) -> Generation:
    """Translate a table of the library; `whole_length`: its `max_length` counts written tokens and the start alone.

    Sampling and beams exclude each other here: several beams win. What of it is not followed is named on stderr.
    """
    _name_ignored(table, whole_length)
    beams = max(1, _number(table, "num_beams", 1, int))
    longest = _number(table, "max_new_tokens", 0, int)
    if not longest and whole_length:
        longest = _number(table, "max_length", 0, int) - 1
    least = max(0, _number(table, "min_new_tokens", 0, int))
    if not least and whole_length:
        least = max(0, _number(table, "min_length", 0, int) - 1)
    longest = longest if longest > 0 else max(Generation().max_new_tokens, least)
    draws = table.get("do_sample") is True and beams == 1
    sampling = {
        "temperature": _number(table, "temperature", 1.0, float),
        "top_k": _number(table, "top_k", 50, int),  # the library's own default
        "top_p": _number(table, "top_p", 1.0, float),
        "min_p": _number(table, "min_p", 0.0, float),
    }
    values: dict[str, Any] = {
        "max_new_tokens": longest,
        "min_new_tokens": min(least, longest),
        "beams": beams,
        "length_penalty": _number(table, "length_penalty", 1.0, float),
        "early_stopping": table.get("early_stopping") is True,
        "repetition_penalty": _number(table, "repetition_penalty", 1.0, float),
    }
    try:
        return Generation(**values, **(sampling if draws else {}))
    except ValueError as error:
        raise UsageError(f"the folder's generation_config.json cannot be used: {error}") from None


# Settings of the library that nothing here corresponds to, with what switches them off.
_NOT_FOLLOWED: dict[str, Any] = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "forced_eos_token_id": None,
    "penalty_alpha": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": None,
    "stop_strings": None,
}
# The same for models that go on with a prompt: lengths count it, and no token is left out.
_NOT_FOLLOWED_BEHIND = {
    "min_length": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
}


def _name_ignored(table: Mapping[str, Any], whole_length: bool) -> None:
    off = _NOT_FOLLOWED | ({} if whole_length else _NOT_FOLLOWED_BEHIND)
    found = [name for name, value in off.items() if table.get(name) not in (None, [], value)]
    words = table.get("bad_words_ids")
    if whole_length and isinstance(words, list) and any(isinstance(word, list) and len(word) > 1 for word in words):
        found.append("bad_words_ids of several tokens")
    if table.get("early_stopping") == "never":
        found.append("early_stopping")
    if table.get("do_sample") is True and _number(table, "num_beams", 1, int) > 1:
        found.append("do_sample with beams")
    if found:
        print(f"warning: the model's generation settings {', '.join(found)} are not followed here", file=sys.stderr)


def ids_of(value: Any) -> tuple[int, ...]:
    """Return one id or a list of ids of a configuration as a tuple, () for none."""
    found = value if isinstance(value, (list, tuple)) else [value]
    return tuple(one for one in found if isinstance(one, int) and not isinstance(one, bool) and one >= 0)


def _number(table: Mapping[str, Any], key: str, default: Any, kind: Any) -> Any:
    value = table.get(key)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return kind(value) if usable and value is not None else default


def read_processor(
    folder: Path, described: PreTrainedConfig, table: Mapping[str, Any] | None = None
) -> tuple[LanguageTextProcessor, int | None]:
    """Read a folder's tokenizer, with what its files say of special tokens and conversations.

    A document begins with the tokenizer's token for that, else the model's, else with the end token, as
    lm-evaluation-harness has it; a prompt as the tokenizer itself has it, so that the same is written as there. The
    processor's `ends` is False, for the weights may not know the end token. Also returned is the begin token if the
    tokenizer itself puts it there.

    Raises:
        UsageError: the tokenizer does not fit the model; both sizes are named.
    """
    tokenizer = _own_tokenizer(folder, table)
    frame = read_frame(folder, tokenizer)
    begin = frame.end_id if frame.begin_id is None else frame.begin_id
    whole = dataclasses.replace(frame, begin_id=begin, ends=False)
    processor = LanguageTextProcessor.of_frame(tokenizer, whole)
    if processor.vocab_size > described.vocab_size:
        what = f"the tokenizer has {processor.vocab_size} ids, and the model in '{folder}' knows {described.vocab_size}"
        raise UsageError(what, "use the tokenizer that the model was trained with")
    if table and table.get("chat_template"):
        processor.take_template(table["chat_template"])
    return processor, frame.begin_id if frame.begins else None
