"""Our text models in the folders of transformers and sentence-transformers, as those libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mmhub.errors import UsageError
from mmhub.interfaces import Decoder, Encoder, ForeignWriter
from mmhub_text.head import TransformersClassification, with_labels
from mmhub_text.library import classifier_class, describe_model, quiet
from mmhub_text.pretrained import Transformers
from mmhub_text.processor import TextProcessor
from mmhub_text.sentence import ACTIVATIONS, SentenceTransformers
from mmhub_text.tokenizer import parse_tokenizer

_SPECIAL = {
    "unk_token": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|endoftext|>"),
}
_WRITERS = ("TransformersLM", "TransformersSeq2Seq", "TransformerLM", "LSTMLM", "RNNLM")
_MODULES = "sentence_transformers.models"  # where every version of that library finds its modules


def find_writer(encoder: Encoder, decoder: Decoder | None, layout: str) -> list[ForeignWriter]:
    """Offer to write the encoders and the models that write text that are transformers models."""
    if layout == "transformers" and type(decoder).__name__ in _WRITERS:
        from mmhub_text.writing import text_writer  # few need it

        return text_writer(encoder, decoder, layout)
    if not isinstance(encoder, (Transformers, SentenceTransformers)):
        return []

    def write(folder: Path) -> None:
        words = encoder.words if isinstance(encoder, SentenceTransformers) else encoder
        head = _checked_head(decoder, layout)
        _check_whole(words, layout)
        with quiet():
            (words.model if head is None else _joined(words, head)).save_pretrained(folder)
            _tokenizer(words.processor).save_pretrained(folder)
        if layout == "sentence-transformers":
            _write_modules(encoder, folder)

    return [ForeignWriter(layout=layout, write=write)]


def _checked_head(decoder: Decoder | None, layout: str) -> TransformersClassification | None:
    if decoder is None or (isinstance(decoder, TransformersClassification) and layout == "transformers"):
        return decoder
    kind = type(decoder)
    raise UsageError(
        f"the {layout} layout cannot hold this model's head ({kind.__module__}.{kind.__qualname__})",
        "push it as it is; transformers has room for the head of its own classifiers, and for models without one",
    )


def _check_whole(words: Transformers, layout: str) -> None:
    if describe_model(words.config.config).is_encoder_decoder:
        kind = words.config.config["model_type"]
        raise UsageError(f"the {layout} layout cannot hold the encoder of a {kind!r} alone", "push the model as it is")


def _joined(words: Transformers, head: TransformersClassification) -> PreTrainedModel:
    """One transformers classifier that shares the tensors of our encoder and head."""
    labels = head.config.labels
    config = with_labels(describe_model(words.config.config), len(labels))
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    kind = classifier_class(config)
    with torch.device("meta"):
        model: Any = kind(config)
    getattr(model, model.base_model_prefix).load_state_dict(words.model.state_dict(), strict=False, assign=True)
    model.load_state_dict(head.head.state_dict(), strict=False, assign=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, left
    joined: PreTrainedModel = model
    return joined


def _tokenizer(processor: TextProcessor) -> PreTrainedTokenizerFast:
    tokenizer = parse_tokenizer(processor.files()["tokenizer.json"])
    names = {"pad_token": tokenizer.id_to_token(processor.pad_id)} | {
        key: name for key, names in _SPECIAL.items() for name in names[::-1] if tokenizer.token_to_id(name) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=processor.max_length,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def _write_modules(encoder: Any, folder: Path) -> None:
    """What sentence-transformers keeps beside the transformer: its list of modules, and a folder for each."""
    modules: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = [("Transformer", {}, {})]
    if isinstance(encoder, SentenceTransformers):
        modules.append(("Pooling", _pooling_table(encoder.words.dim, list(encoder.config.pooling)), {}))
        for linear, layer in zip(encoder.dense, encoder.config.dense, strict=True):
            tensors = {f"linear.{name}": tensor.contiguous() for name, tensor in linear.state_dict().items()}
            modules.append(("Dense", _dense_table(linear, layer.activation), tensors))
        modules += [("Normalize", {}, {})] * encoder.config.normalize
    else:
        modules.append(("Pooling", _pooling_table(encoder.dim, [encoder.config.pooling]), {}))
    rows = []
    for number, (kind, table, tensors) in enumerate(modules):
        path = f"{number}_{kind}" if number else ""
        rows.append({"idx": number, "name": str(number), "path": path, "type": f"{_MODULES}.{kind}"})
        if path:
            (folder / path).mkdir()
            _write(folder / path / "config.json", table)
        if tensors:
            save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "modules.json", rows)
    limits = {"max_seq_length": encoder.processor.max_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", limits)


def _pooling_table(dim: int, modes: list[str]) -> dict[str, Any]:
    switches = {mode: f"pooling_mode_{mode}" for mode in ("mean_sqrt_len_tokens", "lasttoken")}
    switches |= {mode: f"pooling_mode_{mode}_tokens" for mode in ("mean", "max", "weightedmean")}
    switches["cls"] = "pooling_mode_cls_token"
    order = {"pooling_mode": modes} if len(modes) > 1 else {}  # the switches have one of their own
    return {"word_embedding_dimension": dim} | {key: mode in modes for mode, key in switches.items()} | order


def _dense_table(linear: Any, activation: str) -> dict[str, Any]:
    path = next(path for path, kind in ACTIVATIONS.items() if kind.__name__.lower() == activation)
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    return sizes | {"bias": linear.bias is not None, "activation_function": path}


def _write(path: Path, table: Any) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
