"""One optimizer step: forward and backward over its batches, on one process or several, checked before it counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.config import Recipe
from mmhub.data.loader import row_seed
from mmhub.engine.averages import Averages
from mmhub.engine.cached import Cached
from mmhub.engine.compute import autocast
from mmhub.engine.feed import AUTO_ROWS, Turn
from mmhub.engine.meter import Meter
from mmhub.engine.mixing import Mixer
from mmhub.engine.parallel import Parallel, clip_gradients
from mmhub.engine.ranks import Ranks
from mmhub.engine.state import Position
from mmhub.errors import MmhubError
from mmhub.model import Model
from mmhub.optim import learning_rate_factor, seed_step


@dataclass
class Stepper:
    """Take the steps of a run; `stand_in` is computed with weight zero where a rank has no rows of its own."""

    recipe: Recipe
    model: Model
    optimizer: torch.optim.Optimizer
    parallel: Parallel
    ranks: Ranks
    precision: torch.dtype
    meter: Meter
    planned: int  # steps of the whole run, over which the learning rate falls
    stand_in: Batch | None
    where: Callable[[int], str]
    say: Callable[[str], None]
    most_rows: int = 0  # of this rank that are computed at once, 0 = a whole batch
    mixer: Mixer | None = None
    averages: Averages | None = None

    def __post_init__(self) -> None:
        self.options, self.device = self.recipe.train, self.ranks.device
        self.trained = [p for params in self.optimizer.param_groups for p in params["params"]]
        rows = self.options.cached_rows
        self.cached = Cached(self.parallel, self.device, self.precision, rows) if rows else None

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of its peak."""
        return learning_rate_factor(step, self.planned, self.recipe)

    def take(self, turn: Turn, total: float, position: Position) -> tuple[float, float]:
        """Take one step on what all ranks have, of a weight of `total`; return the mean loss and the gradient's norm.

        The weight is that of `Batch.weight`: rows, or targets where the loss is a mean over those.

        Raises:
            MmhubError: a number is not finite, or memory ran out; the weights are as before.
        """
        self.model.train()
        for params in self.optimizer.param_groups:
            params["lr"] = params["base_lr"] * self.rate(position.step)
        own = self._backward(turn, total, position)
        clipped = clip_gradients(self.trained, self.options.clip_norm or math.inf)
        share, norm = torch.stack([own, clipped.to(own)]).tolist()  # one wait for the GPU a step
        (loss,) = self.ranks.sum(share)
        self._check_finite(loss, "loss", turn, position)
        self._check_finite(norm, "gradient norm", turn, position)
        self.optimizer.step()
        if self.averages is not None:
            self.averages.update(position.step, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _backward(self, turn: Turn, total: float, position: Position) -> Tensor:
        """Leave the gradient of the mean loss; with `batch_size = "auto"` in pieces that fit into memory."""
        while True:
            try:
                seed_step(row_seed(self.recipe.seed, self.ranks.rank), position.step)
                return self._gradients(self._pieces(turn, position.pieces), total)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                if not self._smaller_pieces(turn, position):
                    raise self._out_of_memory(position) from None

    def _gradients(self, pieces: list[tuple[Batch, float]], total: float) -> Tensor:
        loss = torch.zeros((), device=self.device)
        backward = self.cached.backward if self.cached else self._plain
        for number, (batch, weight) in enumerate(pieces, 1):
            mixed = self.mixer.mix(batch) if self.mixer and weight else batch
            loss += backward(mixed, weight / total, number == len(pieces))
            if weight:
                self.meter.count(batch)
        return loss

    def _plain(self, batch: Batch, share: float, last: bool) -> Tensor:
        with self.parallel.synchronised(last):
            with autocast(self.device, self.precision):
                output = self.parallel.forward(batch)
            assert output.loss is not None
            part = output.loss * share
            if part.requires_grad:  # else no row has anything that learns, as where one encoder does and all lack it
                (part * self.parallel.scale).backward()
        return part.detach()

    def _pieces(self, turn: Turn, split: int) -> list[tuple[Batch, float]]:
        """What is computed one after the other, with its weight; on several ranks equally many on each."""
        own = [part for batch in turn.batches if batch is not None for part in self._split(batch, split)]
        pieces = [(batch, batch.weight) for batch in own]
        if self.ranks.several:
            assert self.stand_in is not None, "some row could be read, or there would be no step"
            if not self.most_rows:  # all ranks compute the same batch at a time, for they may compare its rows
                batches = turn.batches + [None] * (self.options.accumulate - len(turn.batches))
                return [(self.stand_in, 0.0) if batch is None else (batch, batch.weight) for batch in batches]
            count = max(self.ranks.gather(len(pieces)))
            return pieces + [(self.stand_in, 0.0)] * (count - len(pieces))
        return pieces

    def _split(self, batch: Batch, pieces: int) -> list[Batch]:
        pieces = max(pieces, math.ceil(batch.size / self.most_rows) if self.most_rows else 1)
        return batch.split(pieces) if pieces > 1 else [batch]

    def _smaller_pieces(self, turn: Turn, position: Position) -> bool:
        """Halve what is computed at once, if that is asked for and possible."""
        if self.options.batch_size != "auto":
            return False
        if max(batch.size for batch, _ in self._pieces(turn, position.pieces)) == 1:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        position.pieces *= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory: from here on {math.ceil(AUTO_ROWS / position.pieces)} rows are computed at a time")
        return True

    def _out_of_memory(self, position: Position) -> MmhubError:
        tokens, rows = self.options.batch_tokens, self.options.batch_size
        key, size = ("batch_tokens", f"{tokens} tokens") if tokens else ("batch_size", f"{rows} rows")
        if self.model.task.paired:  # rows are each other's wrong answers, and fewer of them another loss
            hint = "lower train.cached_rows" if self.cached else "set train.cached_rows, the rows computed at once"
            return MmhubError(f"out of memory at step {position.step + 1} with batches of {size}", hint)
        hint = f"lower train.{key} and raise train.accumulate by as much"
        hint += "" if tokens or rows == "auto" else ', or set train.batch_size = "auto"'
        return MmhubError(f"out of memory at step {position.step + 1} with batches of {size}", hint)

    def _check_finite(self, value: float, what: str, turn: Turn, position: Position) -> None:
        if math.isfinite(value):
            return
        own = [self.where(i) for batch in turn.batches if batch for i in batch.index]
        rows = [row for part in self.ranks.gather(own) for row in part]
        shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        raise MmhubError(
            f"the {what} is {value} at step {position.step + 1} (epoch {position.epoch + 1}, batch: {shown})",
            "what was saved before is kept; look at these rows, or lower train.learning_rate",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the CPU PyTorch has no class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
