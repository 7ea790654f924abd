"""Blocks: which pieces of a corpus's documents stand in which row of which batch, so that no row has padding.

An epoch's plan is a pure function of the corpus and a few numbers: every process makes the same one, and so does a
resumed run. A block is a row of pieces with a fixed number of predictions. A piece of n predictions has n + 1 tokens,
for its first one is only read; a document that is cut goes on with a piece that repeats the last token before the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from mmhub.batch import Batch, Items
from mmhub.data.corpus import Corpus
from mmhub.data.loader import epoch_order, row_seed
from mmhub.errors import UsageError

Numbers = NDArray[np.int64]


@final
@dataclass(frozen=True)
class Plan:
    """The batches of an epoch, `len` of them; batch k has the blocks from `batch_size` * k on.

    Attributes:
        stateful: does row i of a batch go on where row i of the batch before stopped?
        starts, sizes: the first token of each piece, and how many predictions it has.
        first, last: the pieces of each block. rows: the number of the data row in which each block's document begins.
        continues: does a block go on inside a document that the block before it in its row began?
    """

    corpus: Corpus
    batch_size: int
    stateful: bool
    starts: Numbers
    sizes: Numbers
    first: Numbers
    last: Numbers
    rows: Numbers
    continues: NDArray[np.bool_]

    def __len__(self) -> int:
        return -(-len(self.first) // self.batch_size)

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch | None:
        """Return a process's rows of batch `number`, each `world`-th one from `rank` on; None if it has none of it.

        `items["text"]` holds the pieces; `targets` and `weights` are the number of predictions of each row, (B,) long.
        """
        blocks = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.first)))[rank::world]
        return self._batch(blocks) if len(blocks) else None

    def predictions(self, number: int) -> int:
        """How many tokens all processes together predict in batch `number`."""
        blocks = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return int(sum(self.sizes[a:b].sum() for a, b in zip(self.first[blocks], self.last[blocks], strict=True)))

    def _batch(self, blocks: Numbers) -> Batch:
        first, last = self.first[blocks], self.last[blocks]
        pieces = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        rows = np.repeat(np.arange(len(blocks)), last - first)
        sizes = self.sizes[pieces]
        place = np.arange(int(sizes.max()) + 1)
        mask = place <= sizes[:, None]
        ids = self.corpus.ids[np.where(mask, self.starts[pieces][:, None] + place, 0)]
        counts = torch.from_numpy(np.bincount(rows, sizes, len(blocks)).astype(np.int64))
        text = Items(
            data=torch.from_numpy(np.where(mask, ids, 0).astype(np.int64)),
            mask=torch.from_numpy(mask),
            rows=torch.from_numpy(rows),
            batch=len(blocks),
            continues=torch.from_numpy(self.continues[blocks]) if self.stateful else None,
        )
        index = self.rows[blocks].tolist()
        return Batch(items={"text": text}, size=len(blocks), targets=counts, weights=counts, index=index)


def plan_blocks(corpus: Corpus, *, block: int, batch: int, seed: int, epoch: int, stateful: bool = False) -> Plan:
    """Plan an epoch: documents in an order shuffled by seed and epoch, laid end to end and cut.

    Each block has `block` predictions, and a batch `batch` of them. Blocks come in random order, the one that is left
    over last. If `stateful`, the documents are dealt to `batch` lanes of equal length instead, and row i of each batch
    is the next block of lane i; the last batch is narrower, and the fewer than `batch` tokens that are left over are
    not used in this epoch.

    Raises:
        UsageError: the corpus is shorter than one block, or has no token for each lane.
    """
    total = corpus.predictions
    if total < block:
        hint = f"set train.block_size to {total} or less, or train on more text"
        raise UsageError(f"a block predicts {block} tokens, but the whole corpus has only {total}", hint)
    if stateful and total < batch:
        raise UsageError(f"{batch} rows share {total} tokens", f"set train.batch_size to {total} or less")
    order = np.asarray(epoch_order(len(corpus), seed, epoch), np.int64)
    sizes = (corpus.ends - corpus.starts - 1)[order]
    begins = np.cumsum(sizes) - sizes  # where each document begins, counted in predictions
    cut = _lane_cuts(total, block, batch) if stateful else _block_cuts(total, block, row_seed(seed, epoch))
    cuts = np.unique(np.concatenate([begins, *cut]))
    document = np.searchsorted(begins, cuts, "right") - 1
    offset = cuts - begins[document]
    first, last = (np.searchsorted(cuts, edge) for edge in cut)
    within = offset[first] > 0
    within[:batch] &= not stateful  # nothing stands before the beginning of a lane
    return Plan(
        corpus=corpus,
        batch_size=batch,
        stateful=stateful,
        starts=corpus.starts[order[document]] + offset,
        sizes=np.diff(cuts, append=total),
        first=first,
        last=last,
        rows=corpus.rows[order[document[first]]],
        continues=within,
    )


def count_batches(predictions: int, *, block: int, batch: int, stateful: bool = False) -> int:
    """Return how many batches `plan_blocks` makes of so many predictions."""
    return -(-(predictions // batch) // block) if stateful else -(-predictions // (block * batch))


def _block_cuts(total: int, block: int, seed: int) -> tuple[Numbers, Numbers]:
    """Where blocks begin and end, in the order in which they come."""
    begin = np.arange(0, total, block)
    whole = total // block
    shuffled = torch.randperm(whole, generator=torch.Generator().manual_seed(row_seed(seed, 1))).numpy()
    begin[:whole] = begin[shuffled]
    return begin, np.minimum(begin + block, total)


def _lane_cuts(total: int, block: int, lanes: int) -> tuple[Numbers, Numbers]:
    """The same for lanes side by side: the first block of each, then the second of each, and so on."""
    length = total // lanes
    lane = np.arange(lanes) * length
    begin = np.arange(0, length, block)[:, None]
    return (begin + lane).ravel(), (np.minimum(begin + block, length) + lane).ravel()
