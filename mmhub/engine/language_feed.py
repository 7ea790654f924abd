"""What a rank trains a language model on: blocks of a corpus that was read once, or of the documents of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmhub.batch import Batch, Items
from mmhub.data.blocks import Plan, plan_blocks
from mmhub.data.cells import cell
from mmhub.data.corpus import Corpus
from mmhub.data.lanes import batch_shares
from mmhub.data.loader import Loaded, on_device, usable
from mmhub.data.stream import Stream
from mmhub.engine.feed import Feed
from mmhub.engine.state import Position
from mmhub.errors import InputError, UsageError

RECURRENT_BLOCK = 64  # tokens through which a recurrent model's gradient flows
LARGEST_BLOCK = 1024  # tokens of a block, where the model itself sets no limit
_IDS = "\0ids"  # the key of a row's token ids, once they are known


def block_size(wanted: int, decoder: Any) -> int:
    """Return how many tokens a row of a batch predicts: `wanted`, or what suits the model.

    Raises:
        UsageError: the model's context is shorter.
    """
    if wanted and decoder.context is not None and wanted > decoder.context:
        raise UsageError(
            f"train.block_size is {wanted}, and the model has a context of {decoder.context} tokens", "lower it"
        )
    return wanted or (RECURRENT_BLOCK if decoder.stateful else min(decoder.context or LARGEST_BLOCK, LARGEST_BLOCK))


@dataclass
class LanguageFeed(Feed):
    """Blocks in place of rows. A batch has `batch_size` blocks; with `batch_tokens` as many as hold so many tokens.

    A stream's batches are groups of whole documents of about as many tokens.
    """

    corpus: Corpus | None = None
    decoder: Any = None
    _blocks: tuple[int, Plan | None] = (-1, None)

    @property
    def block(self) -> int:
        return block_size(self.recipe.train.block_size, self.decoder)

    @property
    def batch_size(self) -> int:
        tokens = self.recipe.train.batch_tokens
        return max(1, tokens // self.block) if tokens else super().batch_size

    @property
    def most_rows(self) -> int:
        """A document of a stream is never cut, however long; twice what a batch should have is computed at once."""
        return 0 if self.corpus is not None else 2 * self._share

    @property
    def _share(self) -> int:
        return batch_shares(self.batch_size, self.ranks.world)[self.ranks.rank]

    def batches(self, epoch: int = 0) -> int | None:
        return len(self._epoch(epoch)) if self.corpus is not None else None

    def digest(self) -> bytes:
        return super().digest() if self.corpus is None else self.corpus.digest()

    def _loaded(self, position: Position) -> Iterator[tuple[Loaded, Any]]:
        cuda = self.ranks.device.type == "cuda"

        def pinned(parts: Iterator[Loaded]) -> Iterator[Loaded]:
            return (part.pin_memory() if cuda else part for part in parts)

        if self.corpus is not None:
            plan, rank, world = self._epoch(position.epoch), self.ranks.rank, self.ranks.world
            parts = (Loaded(plan.batch(k, rank, world)) for k in range(position.batches, len(plan)))
            yield from ((part, None) for part in on_device(pinned(parts), self.ranks.device))
            return
        places: list[Any] = []

        def groups() -> Iterator[Loaded]:
            for rows, place in self._documents(position):
                places.append(place)
                yield self._packed(rows, position.epoch)

        for part in on_device(pinned(groups()), self.ranks.device):
            yield part, places.pop(0)

    def _epoch(self, epoch: int) -> Plan:
        number, plan = self._blocks
        if plan is None or number != epoch:
            assert self.corpus is not None
            options = {"block": self.block, "batch": self.batch_size, "stateful": self.decoder.stateful}
            plan = plan_blocks(self.corpus, **options, seed=self.recipe.seed, epoch=epoch)
            self._blocks = epoch, plan
        return plan

    # -- streams --------------------------------------------------------------------------------------------------

    def _documents(self, position: Position) -> Iterator[tuple[list[tuple[int, dict[str, Any]]], Any]]:
        assert isinstance(self.rows, Stream)
        ranks = self.ranks
        tokens = self.block * self._share

        def cut(rows: Sequence[tuple[int, dict[str, Any]]], seed: int) -> list[list[int]]:
            return group_by_size([self._size(number, row) for number, row in rows], tokens)

        return self.rows.batches(
            position.epoch,
            seed=self.recipe.seed,
            rank=ranks.rank,
            world=ranks.world,
            cut=cut,
            batch_size=0,
            state=position.stream,
        )

    def _size(self, number: int, row: dict[str, Any]) -> int:
        """Read a document's ids and note them in its row, or what is wrong with it; return its predictions."""
        if _IDS not in row:
            try:
                row[_IDS] = self._read(usable("text", cell(row, self.collate.inputs["text"])))
            except InputError as error:
                place = f"{self.rows.where(number)}, column '{self.collate.inputs['text']}'"
                hint = error.hint or 'fix the row, or set data.on_error = "skip"'
                row[_IDS] = InputError(f"{place}: {error.message}", hint)
        return 0 if isinstance(row[_IDS], InputError) else max(0, len(row[_IDS]) - 1)

    def _read(self, text: Any) -> Any:
        if text is None or (isinstance(text, str) and not text.strip()):
            return np.zeros(0, np.int32)
        return np.asarray(self.decoder.processor.read(text, self.collate.policy), np.int32)

    def _packed(self, rows: Sequence[tuple[int, dict[str, Any]]], epoch: int) -> Loaded:
        """Pack whole documents into blocks."""
        errors = [row[_IDS] for _, row in rows if isinstance(row[_IDS], InputError)]
        if errors and not self.collate.skip:
            return Loaded(error=errors[0])
        skipped = list(map(str, errors))
        known = [(number, row[_IDS]) for number, row in rows if not isinstance(row[_IDS], InputError)]
        known = [(number, ids) for number, ids in known if len(ids) > 1]
        if not known:
            return Loaded(skipped=skipped)
        corpus = Corpus(
            ids=np.concatenate([ids for _, ids in known]),
            ends=np.cumsum([len(ids) for _, ids in known]),
            rows=np.array([number for number, _ in known], np.int64),
            words=0,
            utf8=0,
            unknown=0,
        )
        block = min(self.block, corpus.predictions)
        plan = plan_blocks(corpus, block=block, batch=corpus.predictions, seed=self.recipe.seed, epoch=epoch)
        return Loaded(plan.batch(0), skipped=skipped)


def group_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a row of sizes into neighbours that reach `limit` together; positions, each once.

    >>> group_by_size([3, 4, 9, 1], 6)
    [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = [[]]
    total = 0
    for place, size in enumerate(sizes):
        if total >= limit:
            groups.append([])
            total = 0
        groups[-1].append(place)
        total += size
    return groups if sizes else []


def stand_in_text() -> Batch:
    """Return a batch of two ids, for ranks that have no row of one; it takes part with weight zero."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    one = torch.ones(1, dtype=torch.long)
    text = Items(ids, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, dtype=torch.long), 1)
    return Batch(items={"text": text}, size=1, targets=one, weights=one)
