"""Whole models of transformers and sentence-transformers, read into our encoders and heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError
from mmhub.interfaces import ForeignParts, ForeignReader
from mmhub.interfaces.labels import class_names
from mmhub_text.head import HEADS, TransformersClassification
from mmhub_text.library import Family, encodes_text, find_folder, read_description, read_json, read_table
from mmhub_text.multimodal import multimodal_reader
from mmhub_text.pretrained import Transformers
from mmhub_text.sentence import SentenceTransformers
from mmhub_text.sentence import refusal as refusal_of_modules
from mmhub_text.writers import LANGUAGE_MODELS, SEQ2SEQ, check_causal

_ENCODER = "mmhub-text/transformers"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
_TRANSLATORS = ("ForConditionalGeneration", "ForSeq2SeqLM", "MTModel")
_BARE = ("Model", "ForMaskedLM", "ForPreTraining")  # what such a class has on top is only for pretraining


def find_reader(folder: Path, config: Mapping[str, Any]) -> list[ForeignReader]:
    """Offer to read sentence-transformers models, transformers encoders, and its models that write text."""
    if isinstance(read_json(folder / "modules.json"), list):
        return [
            ForeignReader(
                library="sentence-transformers", read=_read_sentence_transformers, refusal=refusal_of_modules(folder)
            )
        ]
    if found := multimodal_reader(config):
        return found
    if not encodes_text(config):
        return []
    kind = _architecture(config)
    if kind.endswith(_LANGUAGE_MODELS + _TRANSLATORS):
        family = LANGUAGE_MODELS if kind.endswith(_LANGUAGE_MODELS) else SEQ2SEQ
        read = _read_language_model if family is LANGUAGE_MODELS else _read_translator
        return [ForeignReader(library="transformers", read=read, refusal=_refusal(folder, family))]
    return [ForeignReader(library="transformers", read=_read_transformers)]


def _refusal(folder: Path, family: Family) -> MmhubError | None:
    try:
        config = read_description(folder, {}, family)
        if family is LANGUAGE_MODELS:
            check_causal(config)
    except MmhubError as error:
        start = 'its encoder can start one of yours: [model.encoders.text] use = "transformers", init = its name'
        return type(error)(error.message, start)
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _read_sentence_transformers(folder: Path) -> ForeignParts:
    encoder = SentenceTransformers.from_library(SentenceTransformers.Config(), folder)
    return ForeignParts(encoder=encoder, encoder_id="mmhub-text/sentence-transformers")


def _read_language_model(folder: Path) -> ForeignParts:
    from mmhub_text.transformers_lm import TransformersLM  # few need it

    decoder = TransformersLM.from_library(TransformersLM.Config(), folder, {})
    return ForeignParts(decoder=decoder, decoder_id="mmhub-text/transformers-lm", task="language-modelling")


def _read_translator(folder: Path) -> ForeignParts:
    from mmhub_text.transformers_seq2seq import TransformersSeq2Seq

    encoder = Transformers.from_library(Transformers.Config(), folder)
    decoder = TransformersSeq2Seq.from_library(TransformersSeq2Seq.Config(), folder, {"text": encoder.stream})
    decoder.tie({"text": encoder})
    return ForeignParts(
        encoder=encoder,
        encoder_id=_ENCODER,
        decoder=decoder,
        decoder_id="mmhub-text/transformers-seq2seq",
        task="translation",
    )


def _read_transformers(folder: Path) -> ForeignParts:
    folder = find_folder(folder)
    table = read_table(folder / "config.json")
    kind, labels = _architecture(table), class_names(table)
    encoder = Transformers.from_library(Transformers.Config(), folder)
    several = table.get("problem_type") == "multi_label_classification"
    if kind.endswith("ForSequenceClassification") and table["model_type"] in HEADS and len(labels) > 1 and not several:
        decoder = TransformersClassification.of_folder(folder, read_description(folder, {}), labels)
        return ForeignParts(
            encoder=encoder,
            encoder_id=_ENCODER,
            decoder=decoder,
            decoder_id="mmhub-text/transformers-classification",
            task="classification",
        )
    left_out = "" if kind.endswith(_BARE) else kind
    return ForeignParts(encoder=encoder, encoder_id=_ENCODER, left_out=left_out)
