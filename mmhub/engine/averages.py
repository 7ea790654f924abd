"""The moving average of the weights that training passes through, which is evaluated and saved in their place.

Polyak averaging with an exponential window, as in timm's ModelEmaV3 and TensorFlow's ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmhub.engine.tensors import reshard
from mmhub.model import Model


class Averages:
    """Averages of what is trained of a model: one more copy of it, in fp32 at least.

    Buffers in floating point, such as the statistics of batch norms, are averaged as well; counters are not. What is
    frozen has no copy. Parameters that are shared have one, and of sharded ones each process keeps its pieces.

    Attributes:
        tensors: the averages by `role.name`, laid out as what they are of.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay, self._model = decay, model
        self._sources = dict(_trained(model))
        self.tensors = {name: _copy(source) for name, source in self._sources.items()}

    @torch.no_grad()
    def update(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Move towards the weights after optimizer step number `step`, from 0; the decay grows to its value at first.

        Of parameters in half precision the optimizer's fp32 copies count.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        means, values = [], []
        for name, source in self._sources.items():
            master = optimizer.state[source].get("master") if source in optimizer.state else None
            mean = _local(self.tensors[name])
            means.append(mean)
            values.append(_local(source if master is None else master).to(mean.dtype))
        torch._foreach_lerp_(means, values, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model hold the averages; every rank must take part. The weights, kept aside, come back afterwards.

        They take the memory that gradients have in a step.
        """
        reshard(self._model)
        with torch.no_grad():
            kept = {name: _local(source).clone() for name, source in self._sources.items()}
            for name, source in self._sources.items():
                _local(source).copy_(_local(self.tensors[name]))
        try:
            yield
        finally:
            reshard(self._model)
            with torch.no_grad():
                for name, source in self._sources.items():
                    _local(source).copy_(kept[name])


def _trained(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What is averaged of a model by name, each tensor once."""
    seen: set[int] = set()
    for role, part in model.parts().items():
        parameters = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
        for name, tensor in (*parameters, *(_statistics(part) if parameters else ())):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{role}.{name}", tensor


def _statistics(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are saved and are no counters."""
    for prefix, module in part.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set and buffer.is_floating_point():
                yield name, buffer


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.float() if copy.dtype in (torch.bfloat16, torch.float16) else copy


def _local(tensor: Any) -> Tensor:
    """This process's piece of a sharded tensor, and any other as it is."""
    found: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return found
