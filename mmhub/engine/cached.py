"""Contrastive batches larger than memory: the gradient of a loss between rows, with few rows computed at once.

GradCache (Gao et al., arXiv:2101.06983): the loss depends on the vectors of all rows, and these on one row each. So the
vectors are computed without a graph first, the loss and its gradient by them second, and that is carried into the
weights third, a few rows at a time, which are computed once more with the same dropout.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmhub.batch import Batch
from mmhub.engine.compute import autocast
from mmhub.engine.parallel import Parallel
from mmhub.interfaces import PairDecoder


@dataclass(frozen=True)
class Cached:
    """Leave the gradients of a paired model's loss while at most `rows` rows are computed at once.

    They are those of the whole batch computed at once, for parts that see each row by itself: a batch norm sees the
    rows that are computed with it.
    """

    parallel: Parallel
    device: torch.device
    precision: torch.dtype
    rows: int

    def backward(self, batch: Batch, share: float, last: bool) -> Tensor:
        """Return this process's part of the loss, (), which counts `share`; `last` exchanges the gradients.

        Every process has to call it at the same time, if only with a batch that does not count.
        """
        parts = replace(batch, targets=None).split(math.ceil(batch.size / self.rows))
        vectors, states = self._vectors(parts)
        loss, slope, own = self._slope(vectors, batch.targets, share)
        for number, (part, state) in enumerate(zip(parts, states, strict=True), 1):
            end = number == len(parts)
            state.restore()
            with self.parallel.synchronised(last=last and end):
                with self._autocast():
                    found = self.parallel.forward(part).logits
                carried = (found * slope[: part.size]).sum()
                slope = slope[part.size :]
                for parameter, gradient in own if end else ():  # with the last part, when others may be waiting for it
                    carried = carried + (parameter * gradient).sum()
                carried.backward()
        return loss

    def _vectors(self, parts: list[Batch]) -> tuple[Tensor, list[RandomState]]:
        """Both sides' vectors of all rows, (B, 2, E), and the random state before each part."""
        found, states = [], []
        for part in parts:
            states.append(RandomState.now(self.device))
            # an autocast of its own, for a weight cast without a graph must not be kept
            with torch.no_grad(), self._autocast(), _statistics_kept(self.parallel.model):
                found.append(self.parallel.model(part).logits)
        return torch.cat(found).requires_grad_(), states

    def _slope(
        self, vectors: Tensor, targets: Tensor, share: float
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss, its gradient by the vectors, and by those parameters that it depends on itself."""
        decoder: Any = self.parallel.model.decoder
        assert isinstance(decoder, PairDecoder)
        loss = decoder.pair_loss(dict(zip(decoder.sides, vectors.unbind(1), strict=True)), targets) * share
        trained: list[Tensor] = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        slope, *own = torch.autograd.grad(loss * self.parallel.scale, [vectors, *trained], allow_unused=True)
        both = zip(trained, own, strict=True)
        return loss.detach(), slope, [(weight, gradient) for weight, gradient in both if gradient is not None]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let batch norms leave their running statistics as they are: the rows are computed once more, with a graph."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@dataclass(frozen=True)
class RandomState:
    """The generators that a module may draw from, as `mmhub.optim.seed_step` seeds them."""

    cpu: Tensor
    gpu: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)  # of the current device, which is the one that trains
        random.setstate(self.python)
        np.random.set_state(self.numpy)
