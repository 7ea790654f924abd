"""What a rank trains next: its share of every batch of an epoch, from where an earlier run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

import numpy as np

from mmhub.batch import Batch, Items
from mmhub.config import Recipe
from mmhub.data.inputs import usable
from mmhub.data.lanes import batch_shares
from mmhub.data.lengths import Lengths
from mmhub.data.loader import Collate, Loaded, load_batches, on_device, row_seed, worker_count
from mmhub.data.plan import plan_epoch, plan_window
from mmhub.data.sources import Rows
from mmhub.data.stream import Stream
from mmhub.engine.ranks import Ranks, shared
from mmhub.engine.state import Position
from mmhub.errors import InputError, MmhubError, UsageError

AUTO_ROWS = 64  # rows a step of `batch_size = "auto"`


@dataclass
class Turn:
    """This rank's share of one optimizer step, and the position in the data once it is done."""

    batches: list[Batch | None] = field(default_factory=list)  # None where this rank has no row of a batch
    skipped: list[str] = field(default_factory=list)
    error: MmhubError | None = None
    count: int = 0  # batches of the epoch that are done after it
    stream: Any = None  # likewise, the place in a stream


@dataclass
class Feed:
    """Cut the training data into batches and load them; the same for any number of worker processes.

    Row numbers make the same global batches on any number of ranks; a stream is shared out by shards.
    """

    recipe: Recipe
    rows: Rows | Stream
    collate: Collate
    measure: Callable[[Sequence[Any]], Lengths | None]  # rows of a stream's window, to their lengths
    lengths: Lengths | None
    ranks: Ranks
    _planned: tuple[int, list[list[int]]] = (-1, [])

    @property
    def batch_size(self) -> int:
        size = self.recipe.train.batch_size
        return AUTO_ROWS if isinstance(size, str) else size

    @property
    def most_rows(self) -> int:
        """How many rows of a batch this rank computes at once, 0 for all of them."""
        return 0

    def batches(self, epoch: int = 0) -> int | None:
        """The number of batches in an epoch, None where only its end will tell."""
        if isinstance(self.rows, Rows):
            return len(self._plan(epoch))
        if self.recipe.train.batch_tokens:
            return None
        return self.rows.batches_known(self.batch_size, self.ranks.world, epoch, self.recipe.seed)

    def digest(self) -> bytes:
        """Return what must be the same on all ranks: the batches of the first epoch, or the shards of a stream."""
        if isinstance(self.rows, Stream):
            return repr((self.rows.source, self.rows.bytes)).encode()
        plan = self._plan(0)
        return np.array([len(part) for part in plan] + [row for part in plan for row in part], np.int64).tobytes()

    def steps(self) -> int:
        """The number of optimizer steps that the whole run is planned for.

        Raises:
            UsageError: a stream of unknown length without `train.max_steps`.
        """
        options = self.recipe.train
        batches = self.batches()
        if batches is None:
            if not options.max_steps:
                hint = "set train.max_steps, over which the learning rate falls"
                raise UsageError(f"how many batches '{self.rows.source}' makes is not known before it is read", hint)
            return options.max_steps
        steps = math.ceil(batches / options.accumulate) * options.epochs
        return min(steps, options.max_steps or steps)

    def turns(self, position: Position) -> Iterator[Turn]:
        """Yield this rank's optimizer steps in what is left of the epoch at `position`."""
        # augmentation differs by epoch; the position itself changes while the steps are taken
        self.collate = replace(self.collate, seed=row_seed(self.recipe.seed, position.epoch))
        turn = Turn(count=position.batches)
        for number, (loaded, place) in enumerate(self._loaded(position), 1):
            turn.batches.append(loaded.batch)
            turn.skipped += loaded.skipped
            turn.error = turn.error or loaded.error
            turn.count, turn.stream = turn.count + 1, place
            if number % self.recipe.train.accumulate == 0 or turn.error:
                yield turn
                turn = Turn(count=turn.count)
        if turn.batches:
            yield turn

    def _loaded(self, position: Position) -> Iterator[tuple[Loaded, Any]]:
        workers = worker_count(self.recipe.data.workers, self.ranks.device)
        cuda = self.ranks.device.type == "cuda"
        if isinstance(self.rows, Rows):
            order: Any = (part[self.ranks.rank :: self.ranks.world] for part in self._plan(position.epoch))
            order = list(order)[position.batches :]
            loaded = load_batches(self.collate, order, workers, pin_memory=cuda)
            yield from ((part, None) for part in on_device(loaded, self.ranks.device))
            return
        places: list[Any] = []  # one for every batch that was handed to a worker and has not come back

        def batches() -> Iterator[list[tuple[int, dict[str, Any]]]]:
            assert isinstance(self.rows, Stream)
            for rows, place in self._stream(position):
                places.append(place)
                yield rows

        for part in on_device(load_batches(self.collate, batches(), workers, pin_memory=cuda), self.ranks.device):
            yield part, places.pop(0)

    def _plan(self, epoch: int) -> list[list[int]]:
        options = self.recipe.train
        if self._planned[0] != epoch:
            plan = plan_epoch(
                len(self.rows),  # type: ignore[arg-type]
                lengths=self.lengths,
                batch_size=self.batch_size,
                batch_tokens=options.batch_tokens,
                group_by_length=options.group_by_length,
                seed=self.recipe.seed,
                epoch=epoch,
            )
            self._planned = (epoch, plan)
        return self._planned[1]

    def _stream(self, position: Position) -> Iterator[tuple[list[tuple[int, dict[str, Any]]], Any]]:
        assert isinstance(self.rows, Stream)
        options, ranks = self.recipe.train, self.ranks

        share = batch_shares(self.batch_size, ranks.world)[ranks.rank]

        def cut(rows: Sequence[tuple[int, dict[str, Any]]], seed: int) -> list[list[int]]:
            return plan_window(
                len(rows),
                lengths=self.measure(rows) if options.group_by_length or options.batch_tokens else None,
                batch_size=share,
                batch_tokens=options.batch_tokens // ranks.world,
                group_by_length=options.group_by_length,
                seed=seed,
            )

        return self.rows.batches(
            position.epoch,
            seed=self.recipe.seed,
            rank=ranks.rank,
            world=ranks.world,
            cut=cut,
            batch_size=0 if options.batch_tokens else self.batch_size,
            state=position.stream,
        )


def stand_in(collate: Collate, rows: Rows | Stream) -> Batch:
    """Return a batch of one readable row, for ranks that have none of a batch; it takes part with weight zero.

    Raises:
        InputError: there is none.
    """
    single = replace(collate, skip=True, seed=None)
    for numbered in rows.numbered() if isinstance(rows, Stream) else enumerate(rows):
        if (loaded := single([numbered])).batch is not None:
            return loaded.batch
    raise shared(InputError("none of the training rows could be read", "check the data"))


def stand_in_items(collate: Collate, rows: Rows | Stream, most: int | None = None) -> dict[str, Items]:
    """Return one item of every modality, with which ranks run an encoder for which they have none.

    Of conversations, what is in none of the first `most` rows (None: of all) is left out.

    Raises:
        InputError: a modality is in no row, and rows are no conversations.
    """
    found = {}
    for name, column in collate.inputs.items():
        if collate.talks is not None and name == "text":
            continue  # every conversation has one
        cells = rows.cells(column) if isinstance(rows, Stream) else enumerate(rows.column(column))
        items = (_items_of(collate, name, column, number, value) for number, value in islice(cells, most))
        item = next((one for one in items if one is not None and len(one)), None)
        if item is not None:
            found[name] = item
        elif collate.talks is None:
            hint = "leave its encoder out, or train in one process"
            raise shared(InputError(f"no training row has a readable {name} in column '{column}'", hint))
    return found


def _items_of(collate: Collate, name: str, column: str, number: int, value: Any) -> Items | None:
    """The items of one modality of a row, None where it cannot be read; of a conversation the first."""
    if collate.talks is None:
        single = replace(collate, skip=True, seed=None, features={}, read={}, target="")
        batch = single([(number, {column: value})]).batch
        return None if batch is None else batch.items[name]
    processor = collate.processors[name]
    raw = usable(name, value, collate.rows.folder(number))
    with suppress(InputError):
        return cast(Items, processor([next(iter(processor.items_of(raw)), None)], collate.policy))
    return None
