"""A set of features on disk, read by row; mapped, not loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmhub.batch import Encoded, Features, pad_sequences
from mmhub.errors import InputError, TrustError
from mmhub.feature_cache import hold, read_manifest
from mmhub.files import sha256
from mmhub.weights import read_tensors


class FeatureStore:
    """The features of one modality for every row of a data set, mapped from files.

    Raises:
        TrustError: the files are not those that were written; found out only if `check`.
    """

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self.path = path
        try:
            hold(path, self)
            facts = read_manifest(path)
            if check:
                _check_shards(path, facts["shards"])
            shards = [dict(read_tensors(path / shard["file"])) for shard in facts["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrustError(f"'{path}' is damaged: {error}", "it can be removed") from None
        self.modality: str = facts["modality"]
        self.bytes = sum(shard["bytes"] for shard in facts["shards"])
        self._dim: int = facts["dim"]
        self.unreadable = {int(row): problem for row, problem in facts["unreadable"].items()}
        self._shards = shards
        self._index(facts["rows"])

    def __reduce__(self) -> Any:
        return FeatureStore, (self.path,)  # a worker process maps the files itself

    def _index(self, rows: int) -> None:
        """Find each row's items, which follow each other, and each item's place."""
        counts = [len(shard["rows"]) for shard in self._shards]
        owners = np.concatenate([np.zeros(0, np.int64), *(shard["rows"].numpy() for shard in self._shards)])
        self._ends = np.array(list(accumulate(counts)), np.int64)  # of shards, in items
        self._starts = [np.concatenate(([0], shard["lengths"].cumsum(0).numpy())) for shard in self._shards]
        self._count = np.bincount(owners, minlength=rows)
        self._first = np.zeros(rows, np.int64)
        self._first[owners[::-1]] = np.arange(len(owners))[::-1]  # of several items the first is written last

    def has(self, row: int) -> bool:
        """Say whether the row has an input, readable or not."""
        return bool(self._count[row]) or row in self.unreadable

    def take(self, rows: Sequence[int]) -> Encoded:
        """Return the features of these rows.

        Raises:
            InputError: one was unreadable; `row` is its position in `rows`.
        """
        for position, row in enumerate(rows):
            if row in self.unreadable:
                error = InputError(*self.unreadable[row])
                error.row, error.modality = position, self.modality
                raise error
        counts = self._count[list(rows)]
        owners = np.repeat(np.arange(len(rows)), counts)
        nth = np.arange(len(owners)) - np.repeat(counts.cumsum() - counts, counts)  # of its row's items
        return Encoded(self._features(self._first[list(rows)][owners] + nth), torch.from_numpy(owners))

    def _features(self, items: Any) -> Features:
        if not len(items):
            return Features(torch.zeros(0, 1, self._dim), torch.zeros(0, 1, dtype=torch.bool))
        shards = np.searchsorted(self._ends, items, side="right")
        places = items - np.concatenate(([0], self._ends))[shards]
        pairs = list(zip(shards.tolist(), places.tolist(), strict=True))
        lengths = [int(self._starts[shard][place + 1] - self._starts[shard][place]) for shard, place in pairs]
        pooled = None
        if "pooled" in self._shards[0]:
            pooled = torch.stack([self._shards[shard]["pooled"][place] for shard, place in pairs])
        if "tokens" not in self._shards[0]:  # nobody reads them, but whether there are any
            assert pooled is not None
            return Features(
                pooled.new_zeros(len(items), 1, self._dim), torch.tensor(lengths)[:, None] > 0, pooled=pooled
            )
        starts = [int(self._starts[shard][place]) for shard, place in pairs]
        tokens, mask = pad_sequences(
            [self._shards[s]["tokens"][at : at + n] for (s, _), at, n in zip(pairs, starts, lengths, strict=True)]
        )
        if not mask.shape[1]:
            tokens, mask = tokens.new_zeros(len(items), 1, self._dim), mask.new_zeros(len(items), 1)
        return Features(tokens, mask, pooled=pooled)


def _check_shards(path: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    for shard in shards:
        file = path / shard["file"]
        if file.stat().st_size != shard["bytes"]:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {shard['bytes']}")
        if sha256(file) != shard["sha256"]:
            raise ValueError(f"{file.name} has changed")
