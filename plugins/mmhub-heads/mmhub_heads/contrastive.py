"""The contrastive head: two streams in one space, where what belongs together is near (CLIP, SigLIP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmhub.batch import Bundle
from mmhub.errors import UsageError, did_you_mean
from mmhub.interfaces import ComponentConfig, PairDecoder, Stream
from mmhub.interfaces.pairs import NO_PAIR
from mmhub.layers import summary
from mmhub_heads.summary import check_head, layers

_ORDER = ("text", "image", "audio")  # which side comes first, unless `sides` says so; others follow by name
_SHARPEST = math.log(100)  # of the learned scale, as in CLIP: above it, training becomes unstable
_SCALE = {"clip": 1 / 0.07, "siglip": 10.0}
_BIAS = -10.0  # of the sigmoid loss, so that the many wrong pairs do not swamp the loss at the start


class Contrastive(PairDecoder):
    """Project the summary of each side to a vector of length 1, and compare all vectors of one side with the other's.

    "clip": each row finds its partner among all others by a softmax, both ways (Radford et al., arXiv:2103.00020).
    Where several rows belong together, the loss of a row is the mean over all its partners, each against everything in
    the batch (UniCL, Yang et al., arXiv:2204.03610): one softmax as before, and no row is left out of it.
    "siglip": each pair of rows is a yes-or-no question, and yes for every pair that belongs together (Zhai et al.,
    arXiv:2303.15343); the loss is the mean over rows of the sum over all they are compared with.
    """

    class Config(ComponentConfig, frozen=True):
        """Settings of the contrastive head.

        `dim` is the width of the common space, `hidden` that of a layer before it, 0 for none. Cosines are multiplied
        by `scale` before the softmax or sigmoid, 0 for the loss's own: 1 / 0.07 for "clip", 10 for "siglip", which
        starts with a bias of -10 as well. `learn_temperature` lets training change the scale (up to 100) and the bias.
        `sides` orders the two streams; text, image, audio, then others by name, unless given.
        """

        dim: int = 256
        loss: Literal["clip", "siglip"] = "clip"
        hidden: int = 0
        dropout: float = 0.0
        scale: float = 0.0
        learn_temperature: bool = True
        sides: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_head(self.dropout, self.hidden)
            if self.dim < 1:
                raise ValueError(f"dim must be at least 1, got {self.dim}")
            if not 0 <= self.scale <= 100:
                raise ValueError(f"scale must be above 0 and at most 100, or 0 for the loss's own, got {self.scale}")
            if self.sides and len(set(self.sides)) != 2:
                raise ValueError(f"sides must be two different streams, got {list(self.sides)}")

    reads = "summary"

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        self.sides, self.dim = _sides(config, inputs), config.dim
        self.log_scale: Tensor
        self.bias: Tensor
        self.projections = nn.ModuleDict(
            {
                name: layers(inputs[name].summary, config.dim, dropout=config.dropout, hidden=config.hidden)
                for name in self.sides
                if name in inputs
            }
        )
        self._hold("log_scale", math.log(config.scale or _SCALE[config.loss]))
        if config.loss == "siglip":
            self._hold("bias", _BIAS)

    def _hold(self, name: str, value: float) -> None:
        """Keep a number that is trained, or only saved with the weights."""
        tensor = torch.full((1,), value)  # FSDP shards no scalars
        if self.config.learn_temperature:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def vectors(self, bundle: Bundle) -> dict[str, Tensor]:
        found, shared = {}, next(iter(self.projections))
        for side in self.sides:
            projection = self.projections[side if side in self.projections else shared]
            vector = F.normalize(projection(summary(bundle[side])).float(), dim=1)
            found[side] = torch.where(bundle[side].present[:, None], vector, 0.0)
        return found

    def scores(self, first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            log_scale = self.log_scale if self.training else self.log_scale.clamp(max=_SHARPEST)  # FSDP's may lie above
            logits: Tensor = first.float() @ second.float().T * log_scale.exp()
            return logits + self.bias if self.config.loss == "siglip" else logits

    def pair_loss(self, vectors: dict[str, Tensor], targets: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                # the weight itself (or the copy of it that FSDP computes with), for a clamped value may get no gradient
                self.log_scale.clamp_(max=_SHARPEST)
        together, real = _groups(targets, self.training)
        first, second = (vectors[side] for side in self.sides)
        if self.config.loss == "siglip":
            losses = _sigmoid_loss(self.scores(first, self._all(second)), together, real)
        else:
            every_first, every_second = self._all(torch.cat([first, second], 1)).split(self.dim, 1)
            one = _softmax_loss(self.scores(first, every_second), together, real)
            losses = (one + _softmax_loss(self.scores(second, every_first), together, real)) / 2
        pairs = targets != NO_PAIR
        return torch.where(pairs, losses, 0.0).sum() / pairs.sum().clamp(min=1)

    def _all(self, rows: Tensor) -> Tensor:
        """The rows (B, ...) of all processes; in evaluation, where each measures its batches by itself, its own."""
        gathered: Tensor = _Gather.apply(rows) if self.training and _several() else rows
        return gathered


def _groups(targets: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Which of all rows each own one belongs to, (B, C) bool, and which have a pair at all, (C,) bool."""
    groups = _padded_gather(targets, NO_PAIR) if training and _several() else targets
    real = groups != NO_PAIR
    return (targets[:, None] == groups) & real, real


def _softmax_loss(logits: Tensor, together: Tensor, real: Tensor) -> Tensor:
    """Minus the mean log-probability of a row's partners among the real columns, (B,); a row without a pair gives 0."""
    log_p = logits.masked_fill(~real, torch.finfo(logits.dtype).min).log_softmax(1)
    return -torch.where(together, log_p, 0.0).sum(1) / together.sum(1).clamp(min=1)


def _sigmoid_loss(logits: Tensor, together: Tensor, real: Tensor) -> Tensor:
    """The loss of a yes or no about each real column, summed over them, (B,)."""
    return -torch.where(real, F.logsigmoid(torch.where(together, logits, -logits)), 0.0).sum(1)


def _sides(config: Contrastive.Config, inputs: Mapping[str, Stream]) -> tuple[str, str]:
    names = sorted(inputs, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    if "fused" in names:
        raise UsageError(
            "a contrastive head compares streams, and these arrive mixed", 'remove [model.fusion] or use = "streams"'
        )
    known = (names[0], f"{names[0]}_pair") if len(names) == 1 else tuple(names)
    if len(known) != 2:
        streams = ", ".join(names) or "none"
        raise UsageError(f"a contrastive head compares two streams, and there are {len(names)}: {streams}", "keep two")
    for side in config.sides:
        if side not in known:
            hint = did_you_mean(side, known) or f"the streams are {known[0]} and {known[1]}"
            raise UsageError(f"sides of the contrastive head names {side!r}, which is no stream", hint)
    first, second = config.sides or known
    return first, second


# -- vectors of all processes --------------------------------------------------------------------------------------


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """All processes' rows, padded to the same number; a row's gradient is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        return _padded_gather(rows, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()][: ctx.size]


def _padded_gather(rows: Tensor, padding: float) -> Tensor:
    """Join the rows (B, ...) of all processes in their order, each padded to the largest B."""
    sizes = [torch.zeros((), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(rows)))  # through the CPU, which need not wait for a GPU
    most = max(int(size) for size in sizes)
    padded = rows.new_full((most, *rows.shape[1:]), padding)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat(parts)
