"""The processes that train together: who this one is, and what they tell each other."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from mmhub.errors import MmhubError, UsageError

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # how long a process may wait for another, for instance while that one evaluates


@dataclass(frozen=True)
class Ranks:
    """This process among all that train one model; alone where nothing launched several.

    What they tell each other goes through the CPU (gloo), so that it never waits for a GPU's queue of work.
    """

    rank: int = 0
    world: int = 1
    local: int = 0  # the number of this process on its machine, which decides its GPU
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, prints and logs."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world > 1

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.several:
            self.sum(0.0)

    def sum(self, *values: float) -> list[float]:
        """Add numbers over all processes."""
        if not self.several:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, data: Any) -> list[Any]:
        """Return every process's JSON-ready data, in the order of ranks; as JSON, for nothing is ever unpickled."""
        if not self.several:
            return [data]
        own = torch.frombuffer(bytearray(msgspec.json.encode(data)), dtype=torch.uint8)
        sizes = [int(size) for size in self._collect(torch.tensor([len(own)]))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        found: Sequence[Tensor] = self._collect(padded)
        texts = (part[:size].numpy().tobytes() for part, size in zip(found, sizes, strict=True))
        return [msgspec.json.decode(text) for text in texts]

    def tell(self, data: Any) -> Any:
        """Return the first process's JSON-ready data to all."""
        return self.gather(data if self.first else None)[0]

    def _collect(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor)
        return found


def join(device: torch.device) -> Ranks:
    """Join the group that `torchrun` launched this process into, until the process ends; alone without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return Ranks(device=device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            count = f"{torch.cuda.device_count()} GPUs"
            raise UsageError(f"process {local} of this machine has no GPU: there are {count}", "start one for each")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), dist.get_world_size(), local, device)


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what is left of a model wrapped for the group would outlive the group's threads
        dist.destroy_process_group()


_E = TypeVar("_E", bound=MmhubError)


def shared(error: _E) -> _E:
    """Mark an error that all processes raise alike, so that one of them says it for all."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process is gone; gloo has no class for it."""
    return "gloo" in str(error) and ("Connection" in str(error) or "Broken pipe" in str(error))
