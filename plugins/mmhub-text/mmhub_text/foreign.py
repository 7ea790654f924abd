"""Whole models of transformers and sentence-transformers, read into our encoders and heads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmhub.errors import UsageError
from mmhub.interfaces import ForeignParts, ForeignReader
from mmhub.interfaces.labels import class_names
from mmhub_text.head import HEADS, TransformersClassification
from mmhub_text.library import encodes_text, find_folder, read_description, read_json, read_table
from mmhub_text.pretrained import Transformers
from mmhub_text.sentence import SentenceTransformers
from mmhub_text.sentence import refusal as refusal_of_modules

_ENCODER = "mmhub-text/transformers"
_WRITES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSeq2SeqLM")
_BARE = ("Model", "ForMaskedLM", "ForPreTraining")  # what such a class has on top is only for pretraining


def find_reader(folder: Path, config: Mapping[str, Any]) -> list[ForeignReader]:
    """Offer to read sentence-transformers models and transformers encoders; refuse models that write text."""
    if isinstance(read_json(folder / "modules.json"), list):
        read = _read_sentence_transformers
        return [ForeignReader(library="sentence-transformers", read=read, refusal=refusal_of_modules(folder))]
    if not encodes_text(config):
        return []
    kind = _architecture(config)
    refusal = None
    if kind.endswith(_WRITES):
        refusal = UsageError(
            f"a {kind} writes text, which mmhub does not do yet",
            'its encoder can start one of yours: [model.encoders.text] use = "transformers", init = its name',
        )
    return [ForeignReader(library="transformers", read=_read_transformers, refusal=refusal)]


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _read_sentence_transformers(folder: Path) -> ForeignParts:
    encoder = SentenceTransformers.from_library(SentenceTransformers.Config(), folder)
    return ForeignParts(encoder=encoder, encoder_id="mmhub-text/sentence-transformers")


def _read_transformers(folder: Path) -> ForeignParts:
    folder = find_folder(folder)
    table = read_table(folder / "config.json")
    kind, labels = _architecture(table), class_names(table)
    encoder = Transformers.from_library(Transformers.Config(), folder)
    several = table.get("problem_type") == "multi_label_classification"
    if kind.endswith("ForSequenceClassification") and table["model_type"] in HEADS and len(labels) > 1 and not several:
        decoder = TransformersClassification.from_library(folder, read_description(folder, {}), labels)
        return ForeignParts(
            encoder=encoder,
            encoder_id=_ENCODER,
            decoder=decoder,
            decoder_id="mmhub-text/transformers-classification",
            task="classification",
        )
    left_out = "" if kind.endswith(_BARE) else kind
    return ForeignParts(encoder=encoder, encoder_id=_ENCODER, left_out=left_out)
