"""Vectors of length 1 from a model, and what tells one model from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.checkpoint import structure_of
from mmhub.errors import InputError, UsageError
from mmhub.index.store import Vectors
from mmhub.interfaces import PairDecoder
from mmhub.layers import summary
from mmhub.model import Model
from mmhub.weights import state_of


def check_model(model: Model) -> None:
    """Raise UsageError for a model that gives no vectors."""
    if model.task.writes or not model.encoders:
        raise UsageError(
            f"{model.name or 'this model'} is for {model.task.name}, and gives no vectors to search by",
            "name a model for retrieval, embedding or classification, or one encoder of it, NAME#image",
        )


def check_query(model: Model, query: Mapping[str, Any], modality: str) -> None:
    """Raise UsageError for a query that cannot be compared with what was indexed as `modality`."""
    if len(query) != 1:
        raise UsageError(f"a query is one text, picture or sound, got {', '.join(query) or 'none'}", "give one")
    (name,) = query
    if name not in model.modalities:
        raise UsageError(f"'{model.name}' has no input {name!r}", f"it takes {', '.join(model.modalities)}")
    if name != modality and not isinstance(model.decoder, PairDecoder):
        raise UsageError(
            f"'{model.name}' is for {model.task.name}: its vectors of {name} and of {modality} cannot be compared",
            f"search by {modality}, or index with a model for retrieval",
        )


@torch.inference_mode()
def vectors_of(model: Model, batch: Batch, modality: str) -> Vectors:
    """Return a vector of length 1 for each row of a batch on the model's device, (B, D), zero where it has none."""
    bundle = model.fused(batch)
    decoder: Any = model.decoder
    if decoder.paired:
        found: Tensor = decoder.vectors(bundle)[modality]
    else:
        found = summary(bundle["fused" if "fused" in bundle else modality])
    return torch.nn.functional.normalize(found.float(), dim=1).cpu().numpy()


def query_vector(model: Model, query: Mapping[str, Any]) -> Vectors:
    """Return the vector of a query, (1, D).

    Raises:
        InputError: it cannot be read, or is empty.
    """
    (modality,) = query
    was_training = model.training
    model.eval()
    try:
        found = vectors_of(model, model.collate([query]).to(model.device), modality)
    finally:
        model.train(was_training)
    if not usable_rows(found).all():
        raise InputError(f"this {modality} has no vector", "give one that is not empty")
    return found


def usable_rows(vectors: Vectors) -> Any:
    """Say which rows can be compared, (B,) bool: those that are neither zero nor broken by an overflow."""
    return np.isfinite(vectors).all(1) & (vectors != 0).any(1)


def identity_of(model: Model) -> str:
    """Return a hash of a model's weights, configuration and processors: of all that its vectors depend on."""
    state, tied = state_of(model.parts())
    structure = structure_of(model, tied)
    bare = msgspec.structs.replace(structure.config, library_version="", requires=[])
    hasher = hashlib.sha256(msgspec.json.encode(bare, order="deterministic"))
    for name, content in sorted(structure.files.items()):
        hasher.update(f"{name} {len(content)} ".encode())
        hasher.update(content)
    for name, tensor in sorted(state.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
