"""Decoders that learn which inputs belong together: pictures and captions, sounds and texts, questions and answers."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmhub.batch import Bundle, Output
from mmhub.errors import InputError
from mmhub.interfaces.labels import at_row
from mmhub.interfaces.roles import Decoder

NO_PAIR = -1  # the target of a row that has one side alone: it is no part of the loss, not even as a wrong answer


class PairDecoder(Decoder):
    """Two streams in one space, in which what belongs together is near.

    The two sides of a row are the streams `sides`. Where a model has one encoder alone, a row holds two items of it:
    the first is the stream named like its modality, the second the same with `_pair` behind.

    Attributes:
        sides: the names of the two streams. dim: width E of the space.
    """

    tasks: ClassVar[tuple[str, ...]] = ("retrieval",)
    paired: ClassVar[bool] = True
    sides: tuple[str, str]
    dim: int

    @abstractmethod
    def vectors(self, bundle: Bundle) -> dict[str, Tensor]:
        """Return each side of each row as a vector of length 1, (B, E) fp32; zero where the row has no such side."""

    @abstractmethod
    def pair_loss(self, vectors: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return the mean loss of this process's rows, (); rows of all processes are each other's wrong answers.

        Rows with the same target, (B,) long, belong together; those of `NO_PAIR` do not count, and without any other
        the loss is 0, with a graph. Every process has to call this, and its backward pass, at the same time.
        """

    @abstractmethod
    def scores(self, first: Tensor, second: Tensor) -> Tensor:
        """Return how well vectors (A, E) of one side fit those of the other, (C, E), as logits (A, C)."""

    def encode_targets(self, targets: Sequence[Any]) -> Tensor:
        """Number the groups of rows that belong together, (B,) long: equal values are one group, None is `NO_PAIR`."""
        return torch.tensor([_group(target, row) for row, target in enumerate(targets)], dtype=torch.long)

    def weigh(self, targets: Tensor) -> Tensor:
        """Return what each row counts in the mean loss, (B,): 1, or 0 without a pair."""
        return (targets != NO_PAIR).long()

    def void(self, targets: Tensor) -> Tensor:
        """Return the targets of a batch that only keeps other processes company."""
        return torch.full_like(targets, NO_PAIR)

    def forward(self, bundle: Bundle, targets: Tensor | None = None) -> Output:
        """Return the vectors of both sides as logits, (B, 2, E), and the loss of the pairs if targets are given."""
        vectors = self.vectors(bundle)
        loss = None if targets is None else self.pair_loss(vectors, targets)
        return Output(logits=torch.stack([vectors[side] for side in self.sides], 1), loss=loss)

    def predict(self, output: Output, details: bool = True) -> list[dict[str, Any]]:
        """Answer `{"embeddings": {side: vector}}`, with the sides that a row has."""
        there = (output.logits != 0).any(2).tolist()
        rows = zip(output.logits.float().tolist(), there, strict=True)
        return [
            {"embeddings": {side: v for side, v, known in zip(self.sides, row, has, strict=True) if known}}
            for row, has in rows
        ]


def _group(target: Any, row: int) -> int:
    if target is None:
        return NO_PAIR
    if isinstance(target, bool) or not isinstance(target, (int, str, float, tuple, list, bytes)):
        raise at_row(InputError(f"a group of rows is named by a text or a number, got {target!r}"), row)
    if isinstance(target, int) and 0 <= target < 2**62:
        return target
    return int.from_bytes(hashlib.blake2b(repr(target).encode(), digest_size=8).digest(), "big") >> 1
