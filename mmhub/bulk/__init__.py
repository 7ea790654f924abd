"""Answers of a model to tables of any size: streamed, by length, and gone on with after a stop."""

from __future__ import annotations

from mmhub.bulk.formats import write_file_of
from mmhub.bulk.identity import file_identity, model_identity
from mmhub.bulk.rows import open_table
from mmhub.bulk.run import Done, Options, in_batches, predict_table

__all__ = [
    "Done",
    "Options",
    "file_identity",
    "in_batches",
    "model_identity",
    "open_table",
    "predict_table",
    "write_file_of",
]
