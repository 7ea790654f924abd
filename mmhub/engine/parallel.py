"""One model on several processes: replicated (DDP) or sharded (FSDP2), behind the same few calls as on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmhub.batch import Batch, Output
from mmhub.config import TrainRecipe
from mmhub.engine.blocks import find_blocks
from mmhub.engine.ranks import Ranks
from mmhub.errors import UsageError
from mmhub.model import Model
from mmhub.weights import named_tensors


class Parallel:
    """Run the forward pass of a model that trains on all ranks.

    Gradients are averaged over the ranks; `scale` turns a rank's share of the loss into what that average expects.
    """

    def __init__(self, model: Model, options: TrainRecipe, ranks: Ranks, precision: torch.dtype) -> None:
        self.model, self.ranks = model, ranks
        self.sharded = ranks.several and options.parallel == "fsdp"
        self._ddp: Any = None
        if ranks.several and not any(parameter.requires_grad for parameter in model.parameters()):
            return  # the optimizer says that nothing is trained
        if self.sharded:
            _shard(model, ranks, precision)
        elif ranks.several:
            self._ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Run a batch once, for a sharded model learns in its first pass which module is the outermost."""
        if self.sharded:
            sharded: Any = self.model.eval()
            sharded(batch)
            sharded.reshard()

    def forward(self, batch: Batch) -> Output:
        output: Output = (self._ddp or self.model)(batch)
        return output

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Exchange gradients only in the `last` backward pass of an optimizer step."""
        if self.sharded:
            sharded: Any = self.model
            sharded.set_requires_gradient_sync(last)
        with self._ddp.no_sync() if self._ddp is not None and not last else nullcontext():
            yield

    @property
    def scale(self) -> float:
        return float(self.ranks.world)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let parts of a model be called by themselves, as evaluation does; every rank must take part.

        Statistics, such as those of batch norms, are the first rank's, which are also the ones that are saved.
        """
        if self.ranks.several:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        if not self.sharded:
            yield
            return
        sharded: Any = self.model
        sharded.unshard()
        try:
            yield
        finally:
            sharded.reshard()

    def tensors(self) -> dict[str, Tensor] | None:
        """Return a sharded model's tensors by name, whole, on the first rank's CPU; every rank must call it.

        None for a model that is whole everywhere.
        """
        if not self.sharded:
            return None
        found = {}
        for name, tensor in named_tensors(self.model.parts())[0].items():
            whole = _whole(tensor)
            if self.ranks.first:
                found[name] = whole.detach().cpu().contiguous()
        return found


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit`; return the norm before, as a scalar of all ranks."""
    return _whole(nn.utils.clip_grad_norm_(parameters, limit))


def _whole(tensor: Any) -> Tensor:
    """Put a sharded tensor together on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shard(model: Model, ranks: Ranks, precision: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state: each repeated block by itself, and what is left together.

    What may be called more often on one rank than on another stays in the last group, whose weights are gathered once
    a step: fusions and decoders (for every modality alone), and encoders that padding disturbs (for every length).
    Inputs are left as they are: autocast makes them small where a layer wants it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = precision != torch.float32 and ranks.device.type == "cuda"
    dtypes = {"param_dtype": precision, "reduce_dtype": torch.float32} if low else {}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    alone = ("decoder.",) if len(model.encoders) > 1 else ()
    uneven = (
        "fusion.",
        *alone,
        *(f"encoders.{m}." for m, e in model.encoders.items() if not cast(Any, e).padding_invariant),
    )
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    try:
        for name, block in find_blocks(model):
            if not name.startswith(uneven):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    except (NotImplementedError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"this model cannot be sharded: {text}", 'use train.parallel = "ddp"') from None
