"""Whole audio models of transformers: a folder to our encoder and classifier, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from mmhub.errors import UsageError
from mmhub.interfaces import Decoder, Encoder, ForeignParts
from mmhub.interfaces.labels import class_names
from mmhub_audio.classifier import AudioClassifier
from mmhub_audio.library import load_exactly, read_json, read_tensors
from mmhub_audio.wav2vec2 import Hubert, Wav2Vec2, Wav2Vec2Family, WavLM
from mmhub_audio.whisper import Whisper

_ENCODERS: dict[str, type[Encoder]] = {"wav2vec2": Wav2Vec2, "hubert": Hubert, "wavlm": WavLM, "whisper": Whisper}
_CTC, _WRITER = "mmhub-heads/ctc", "mmhub-text/transformers-seq2seq"
_CLASSIFIERS = {
    "wav2vec2": transformers.Wav2Vec2ForSequenceClassification,
    "hubert": transformers.HubertForSequenceClassification,
    "wavlm": transformers.WavLMForSequenceClassification,
}


def parts_of_others(folder: Path, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the components of other plugins, (kind, name), without which the folder's model is not read as a whole.

    Before the weights are there, its vocabulary is taken to come with them.
    """
    coming = not any(folder.glob("*.safetensors"))
    whole = _whole_name(table)
    if table["model_type"] == "whisper":
        writes = whole.endswith("ForConditionalGeneration") and (coming or _has_tokenizer(folder))
        return (("decoder", _WRITER),) if writes else ()
    hears = whole.endswith("ForCTC") and (coming or (folder / "vocab.json").is_file())
    return (("decoder", _CTC),) if hears else ()


def read_transformers(folder: Path) -> ForeignParts:
    """Read a transformers folder of one of these types.

    Raises:
        UsageError, TrustError: it holds no such model, no safetensors weights, or damaged ones.
    """
    table = read_json(folder, "config.json")
    kind = str(table["model_type"])
    if kind == "whisper" and _whole_name(table).endswith("ForConditionalGeneration") and _has_tokenizer(folder):
        return _read_whisper(folder)
    cls: Any = _ENCODERS[kind]
    rate = read_json(folder, "preprocessor_config.json").get("sampling_rate", 16000)
    encoder = cls.from_library(cls.Config(sample_rate=rate), folder)
    whole = _whole_name(table)
    if whole.endswith("ForSequenceClassification") and not table.get("use_weighted_layer_sum"):
        return ForeignParts(
            encoder=encoder,
            encoder_id=f"mmhub-audio/{kind}",
            decoder=_read_classifier(encoder, table, folder),
            decoder_id="mmhub-audio/audio-classification",
            task="classification",
        )
    if whole.endswith("ForCTC") and (folder / "vocab.json").is_file():
        return ForeignParts(
            encoder=encoder,
            encoder_id=f"mmhub-audio/{kind}",
            decoder_id=_CTC,
            decoder_from=folder,
            task="speech-recognition",
        )
    bare = whole.endswith(("Model", "ForPreTraining"))
    return ForeignParts(encoder=encoder, encoder_id=f"mmhub-audio/{kind}", left_out="" if bare else whole)


def _read_whisper(folder: Path) -> ForeignParts:
    """Whisper as a whole: what it writes with is a sequence-to-sequence decoder as for texts."""
    return ForeignParts(
        encoder=Whisper.from_library(Whisper.Config(whole_window=True), folder),
        encoder_id="mmhub-audio/whisper",
        decoder_id=_WRITER,
        decoder_from=folder,
        task="speech-recognition",
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _whole_name(table: Mapping[str, Any]) -> str:
    names = table.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _read_classifier(encoder: Encoder, table: Mapping[str, Any], folder: Path) -> AudioClassifier:
    parts = {name: read_tensors(folder, (f"{name}.",)) for name in ("projector", "classifier")}
    tensors = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}
    config = AudioClassifier.Config(labels=class_names(table), size=len(tensors["projector.weight"]))
    with torch.device("meta"):
        decoder = AudioClassifier(config, {"audio": encoder.stream})
    load_exactly(decoder, tensors, folder)
    return decoder


def write_transformers(encoder: Wav2Vec2Family, decoder: Decoder | None, folder: Path) -> None:
    """Write a folder that transformers' AutoModel, or AutoModelForAudioClassification, loads.

    Raises:
        UsageError: the model has a head that those have no place for.
    """
    if decoder is not None and not isinstance(decoder, AudioClassifier):
        kind = type(decoder)
        raise UsageError(
            f"the transformers layout cannot hold this model's head ({kind.__module__}.{kind.__qualname__})",
            "push it as it is; transformers has room for its own classifiers, and for models without one",
        )
    model: Any = encoder.model if decoder is None else _joined(encoder, decoder)
    model.save_pretrained(folder)
    settings = encoder.processor.config
    table = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "sampling_rate": settings.sample_rate,
        "do_normalize": settings.do_normalize,
        "return_attention_mask": encoder.padding_invariant,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _joined(encoder: Wav2Vec2Family, decoder: AudioClassifier) -> Any:
    """One transformers classifier that shares the tensors of our encoder and head."""
    labels = decoder.config.labels
    config = type(encoder.model.config).from_dict(encoder.model.config.to_dict())
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.classifier_proj_size = decoder.config.size
    with torch.device("meta"):
        model: Any = _CLASSIFIERS[encoder.name](config)
    getattr(model, encoder.name).load_state_dict(encoder.model.state_dict(), assign=True)
    model.load_state_dict(decoder.state_dict(), strict=False, assign=True)
    return model
