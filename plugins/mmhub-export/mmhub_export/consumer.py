"""What a program without mmhub needs beside the graphs: how raw inputs become tensors, and logits answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmhub.files import write_file
from mmhub.interfaces import Classifier, LanguageModel, LanguageProcessor, PairDecoder, TextDecoder, encode_config
from mmhub_export.example import write_example
from mmhub_export.graphs import Graph

if TYPE_CHECKING:
    from mmhub.model import Model


def describe(
    model: Model, graphs: Sequence[Graph], described: Mapping[str, Any], folder: Path, format: str
) -> dict[str, Any]:
    """Return the facts of the record, and write tokenizers, tables, README.md and example.py to the folder."""
    inputs = {name: _input(name, processor, folder) for name, processor in model.processors.items()}
    decoder: Any = model.decoder
    if isinstance(decoder, TextDecoder) and not decoder.reads_text:
        inputs["written"] = _text(decoder.processor, folder, "written_")
    facts = {
        "graphs": {graph.name: {**described[graph.name], "padding": graph.padded} for graph in graphs},
        "preprocessing": inputs,
        "answer": _answer(model),
    }
    write_example(model.name, model.task.name, format, facts, folder)
    return facts


def _input(name: str, processor: Any, folder: Path) -> dict[str, Any]:
    """How a raw input of a modality becomes the tensors of its graph, as far as its processor says it in JSON."""
    if name == "text":
        return _text(processor, folder, "")
    state = {key: value for key, value in processor.state().items() if key != "augment"}
    if name == "image" and "kind" in state:
        return {"pixels": _PIXELS, **state}
    if name == "image":
        own = {key: state.pop(key) for key in ("mean", "std") if key in state}
        return {"pixels": _PIXELS, **state, "normalisation_inside": own}
    if hasattr(processor, "log_mel"):
        return _frames(processor, folder) | state
    if name == "audio":
        return {"waveform": "float32 mono from -1 to 1, (N, S), zeros behind its end", **state}
    return {"processor": type(processor).__name__, **state}


_PIXELS = (
    "uint8 RGB, (N, 3, H, W), normalised inside; upright as EXIF says, transparent parts on white, and of 16 bits the "
    "high byte"
)


def _frames(processor: Any, folder: Path) -> dict[str, Any]:
    """Whisper's frames, whose filters are a table of their own."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, processor._filters.numpy(), allow_pickle=False)
    write_file(folder / "mel_filters.npy", file.getvalue())
    how = {"sample_rate": 16000, "window": 400, "hop": 160, "filters": "mel_filters.npy"}
    return {"log_mel": {**how, "seconds": processor.window_seconds}}


def _text(processor: Any, folder: Path, prefix: str) -> dict[str, Any]:
    state = processor.state()
    found = {key: state[key] for key in _TEXT_KEYS if state.get(key) is not None}
    if isinstance(processor, LanguageProcessor):
        found["hidden"] = _hidden(processor)
    for file, content in processor.files().items():
        write_file(folder / f"{prefix}{file}", content)
        found[file.partition(".")[0]] = f"{prefix}{file}"
    return found


def _hidden(processor: LanguageProcessor) -> list[int]:
    """The tokens that a text is shown without."""
    added = json.loads(processor.files().get("tokenizer.json", "{}")).get("added_tokens", ())
    return sorted(token["id"] for token in added if token["special"] and not processor.decode([token["id"]]))


_TEXT_KEYS = ("max_length", "empty_id", "sep_id", "words", "begin_id", "end_id", "stop_ids", "begins", "ends", "names")


def _answer(model: Model) -> dict[str, Any]:
    """What logits mean."""
    decoder: Any = model.decoder
    config, kind = decoder.config, model.task.name
    if isinstance(decoder, PairDecoder):
        return _pairs(decoder)
    if isinstance(decoder, LanguageModel):
        return {"kind": "next token", "context": decoder.context, "generation": encode_config(decoder.generation)}
    if isinstance(decoder, TextDecoder):
        return _writing(decoder)
    if isinstance(decoder, Classifier):
        return {"kind": "softmax", "labels": list(decoder.labels.names), "temperature": decoder.temperature}
    if kind == "multilabel" and hasattr(config, "threshold"):
        return {"kind": "sigmoid", "labels": list(decoder.labels.names), "threshold": config.threshold}
    if kind == "regression" and hasattr(decoder, "std"):
        return {"kind": "value", "mean": decoder.mean, "std": decoder.std}
    if kind == "tagging" and hasattr(decoder, "labels"):
        labels = list(decoder.labels.names)
        return {"kind": "softmax of each word's first token", "labels": labels, "temperature": decoder.temperature}
    if kind == "question-answering" and hasattr(config, "max_answer_tokens"):
        keys = ("max_answer_tokens", "unanswerable", "threshold")
        return {"kind": "span", **{key: getattr(config, key) for key in keys if hasattr(config, key)}}
    if kind == "speech-recognition" and hasattr(decoder, "units"):
        pieces = list(decoder.units.pieces)
        return {"kind": "ctc", "blank": 0, "pieces": pieces, "token_seconds": decoder.seconds, "tidy": config.tidy}
    return {"kind": "vector" if kind == "embedding" else "logits"}


def _pairs(decoder: Any) -> dict[str, Any]:
    """How vectors become scores; of a head that scores in a way of its own, that the vectors are compared."""
    found: dict[str, Any] = {"kind": "cosine", "sides": list(decoder.sides)}
    if hasattr(decoder, "log_scale"):
        found["scale"] = float(decoder.log_scale.detach().exp().clamp(max=100).reshape(-1)[0])
    if hasattr(decoder, "bias"):
        found["bias"] = float(decoder.bias.detach().reshape(-1)[0])
    return found


def _writing(decoder: Any) -> dict[str, Any]:
    """How a text is written: what it begins with, what may not come, and what ends it."""
    config = decoder.config
    stops = list(decoder.processor.stop_ids or (decoder.processor.end_id,))
    return {
        "kind": "next token",
        "begin": [decoder.start, *getattr(decoder, "given", ())],
        "suppress": list(getattr(config, "suppress", ())),
        "suppress_first": list(getattr(config, "begin_suppress", ())),
        "stop": stops,
        "context": decoder.context,
        "generation": encode_config(decoder.generation),
    }
