"""Our language and sequence-to-sequence models in the folders of transformers, as that library saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from mmhub.errors import UsageError
from mmhub.interfaces import ForeignWriter, Generation, LanguageModel
from mmhub_text.library import describe_model, quiet, read_table
from mmhub_text.pretrained import Transformers
from mmhub_text.tokenizer import parse_tokenizer
from mmhub_text.transformer_lm import TransformerLM
from mmhub_text.transformers_lm import TransformersLM
from mmhub_text.transformers_seq2seq import TransformersSeq2Seq
from mmhub_text.writers import SEQ2SEQ, build_writer


def text_writer(encoder: Any, decoder: Any, layout: str) -> list[ForeignWriter]:
    """Offer to write a language model, or a sequence-to-sequence model on the encoder it came with."""
    if not isinstance(decoder, LanguageModel) and not isinstance(encoder, Transformers):
        return []

    def write(folder: Path) -> None:
        with quiet():
            model = _language_model(decoder) if isinstance(decoder, LanguageModel) else _joined(encoder, decoder)
            model.generation_config = _settings(decoder, model)
            model.save_pretrained(folder)
            _tokenizer(encoder, decoder).save_pretrained(folder)
        _also_for_older(folder)

    return [ForeignWriter(layout=layout, write=write)]


def _also_for_older(folder: Path) -> None:
    """Say in the words of transformers 4 what version 5 named anew, beside them: vLLM and others are built on both."""
    for name in ("config.json", "tokenizer_config.json"):
        table = read_table(folder / name)
        turns = table.get("rope_parameters") or {}
        if turns.get("rope_type") == "default" and "rope_theta" in turns:
            table["rope_theta"] = turns["rope_theta"]
        if table.get("tokenizer_class") == "TokenizersBackend":
            table["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / name).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _language_model(decoder: LanguageModel) -> PreTrainedModel:
    """The library's own model, or one that computes what ours does."""
    if isinstance(decoder, TransformersLM):
        return decoder.model
    if isinstance(decoder, TransformerLM):
        from mmhub_text.llama import as_llama  # few need it

        return as_llama(decoder)
    raise UsageError(
        f"transformers has no recurrent language model such as this {type(decoder).__name__}",
        "use it as it is, or train a transformer-lm, which has a place there",
    )


def _joined(encoder: Transformers, decoder: TransformersSeq2Seq) -> PreTrainedModel:
    """One transformers model with the tensors of our encoder and decoder."""
    described = describe_model(decoder.config.config, SEQ2SEQ)
    model: Any = build_writer(described, SEQ2SEQ)
    states = {id(model.get_encoder()): encoder.model, id(model): decoder.model}
    for part in (model, model.get_encoder()):
        found = part.load_state_dict(states[id(part)].state_dict(), strict=False)
        if found.unexpected_keys:
            raise UsageError("the transformers layout holds a decoder with its own encoder alone", "push it as it is")
    for name, tensor in decoder.model.state_dict().items():
        if not torch.equal(model.state_dict()[name], tensor):
            what = f"the transformers layout shares {name} with the encoder, and this model has two"
            raise UsageError(what, "push the model as it is")
    model.config.decoder_start_token_id = decoder.start
    joined: PreTrainedModel = model
    return joined


def _settings(decoder: Any, model: Any) -> GenerationConfig:
    """Our way of writing in the library's terms."""
    ours: Generation = decoder.generation
    ids = {"bos_token_id": decoder.processor.begin_id, "eos_token_id": list(decoder.processor.stop_ids) or None}
    ids["pad_token_id"] = getattr(model.config, "pad_token_id", None)
    if isinstance(decoder, TransformersSeq2Seq):
        ids |= {"decoder_start_token_id": decoder.start, "forced_bos_token_id": decoder.config.forced_begin}
        ids["bad_words_ids"] = [[one] for one in decoder.config.suppress] or None
    values: dict[str, Any] = {
        "max_new_tokens": ours.max_new_tokens,
        "num_beams": ours.beams,
        "repetition_penalty": ours.repetition_penalty,
        "do_sample": ours.temperature > 0,
    }
    if ours.min_new_tokens:
        values["min_new_tokens"] = ours.min_new_tokens
    if ours.beams > 1:
        values |= {"length_penalty": ours.length_penalty, "early_stopping": ours.early_stopping}
    if ours.temperature > 0:
        values |= {"temperature": ours.temperature, "top_k": ours.top_k, "top_p": ours.top_p}
        values |= {"min_p": ours.min_p} if ours.min_p else {}
    return GenerationConfig(**values, **{key: value for key, value in ids.items() if value is not None})


def _tokenizer(encoder: Any, decoder: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of what is read and written; a sequence-to-sequence model has one for both."""
    processor = decoder.processor
    tokenizer = parse_tokenizer(processor.files()["tokenizer.json"])
    if isinstance(decoder, LanguageModel):
        if processor.begins and tokenizer.post_processor is None and processor.begin_id is not None:
            begin = tokenizer.id_to_token(processor.begin_id)  # trained here: there is nothing yet that puts it there
            tokenizer.post_processor = processors.TemplateProcessing(
                f"{begin} $A", special_tokens=[(begin, processor.begin_id)]
            )
        limit = decoder.context
    else:
        _check_one_tokenizer(encoder.processor.tokenizer, tokenizer)
        tokenizer, limit = parse_tokenizer(encoder.processor.files()["tokenizer.json"]), encoder.processor.max_length
    names = {name: token for name, token in processor.names.items() if tokenizer.token_to_id(token) is not None}
    more = {"chat_template": processor.chat_template} if processor.chat_template else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **({} if limit is None else {"model_max_length": limit}),
        model_input_names=["input_ids", "attention_mask"],
        **(names | more),
    )


def _check_one_tokenizer(source: Any, target: Any) -> None:
    if source.get_vocab() != target.get_vocab():
        raise UsageError(
            "the transformers layout has one tokenizer for both sides, and this model has two", "push it as it is"
        )
