"""Cross-entropy over large vocabularies without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**25  # logits held at once: 128 MiB in fp32


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Mean of `F.cross_entropy(hidden @ weight.T + bias, targets)` over the targets that are not ignored.

    hidden (..., D), weight (V, D), targets (...) long, bias (V,) -> (). With `weights` (...), at least 0, it is their
    weighted mean. At most `chunk` logits exist at a time, in the
    forward pass, which computes the gradients as well: the backward pass only scales them (as in Liger Kernel,
    arXiv:2410.10989). Products are computed in autocast's type, the softmax in fp32. Without a target that counts the
    loss is zero, where PyTorch's is NaN.
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states, {targets.shape[0]} targets")
    weights = None if weights is None else weights.reshape(-1)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"{weights.numel()} weights, {targets.shape[0]} targets")
    rows = max(1, chunk // weight.shape[0])
    learn = torch.is_grad_enabled()
    loss: Tensor = _ChunkedLoss.apply(
        hidden, weight, bias, targets, weights, ignore_index, label_smoothing, rows, learn
    )
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        ignore_index: int,
        smoothing: float,
        rows: int,
        learn: bool,
    ) -> Tensor:
        wanted = [learn and need for need in ctx.needs_input_grad[:3]]
        kind = hidden.device.type
        product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        exact = torch.promote_types(product, torch.float32)
        real = targets != ignore_index
        if weights is not None:
            weights = weights.to(exact)
            real = real & (weights > 0)
            weights = weights * real
        share = real if weights is None else weights
        grads = [
            hidden.new_empty(hidden.shape) if wanted[0] else None,
            weight.new_zeros(weight.shape, dtype=exact) if wanted[1] else None,
            weight.new_zeros(weight.shape[0], dtype=exact) if wanted[2] else None,
        ]
        total = hidden.new_zeros((), dtype=exact)
        with torch.autocast(kind, enabled=False):
            matrix, shift = weight.to(product), None if bias is None else bias.to(product)
            for start in range(0, hidden.shape[0], rows):
                part = slice(start, start + rows)
                h = hidden[part].to(product)
                loss, gradient = _loss_and_gradient(F.linear(h, matrix, shift), targets[part], real[part], smoothing)
                total += (loss if weights is None else loss * weights[part]).sum()
                if any(wanted):
                    counts = share[part, None].to(product if weights is None else exact)
                    _collect(grads, part, gradient, h, matrix, counts)
        count = share.sum()
        count = torch.where(count > 0, count, 1)
        ctx.save_for_backward(count, *grads)
        ctx.types = (hidden.dtype, weight.dtype, bias.dtype if bias is not None else None)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        count, *grads = ctx.saved_tensors
        scaled = [
            None if grad is None else (grad * (scale / count)).to(dtype)
            for grad, dtype in zip(grads, ctx.types, strict=True)
        ]
        return (*scaled, *[None] * 6)


def _loss_and_gradient(logits: Tensor, targets: Tensor, real: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the loss of each real row, and the gradient of every row's, in the memory of the logits.

    Few passes over the memory, for it is these that take the time.
    """
    index = torch.where(real, targets, 0)[:, None]
    log_p = logits.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    right = log_p.gather(1, index)
    loss = -(1 - smoothing) * right[:, 0]
    gradient = torch.exp(log_p, out=logits)
    rest = smoothing / logits.shape[1]  # what smoothing gives to every class
    if smoothing:
        loss = loss - smoothing * log_p.mean(1)
        gradient -= rest
    # p - 1 of the right class before it is rounded to half precision, in which no p is near 1
    gradient.scatter_(1, index, (right.expm1() + smoothing - rest).to(gradient.dtype))
    return torch.where(real, loss, 0), gradient


def _collect(
    grads: list[Tensor | None], part: slice, gradient: Tensor, hidden: Tensor, weight: Tensor, share: Tensor
) -> None:
    """Add one chunk's share to the gradients of the hidden states, the weight and the bias that are wanted.

    `share` (rows, 1) is what a row counts, 0 where it is ignored, in full precision: 0.3 is 0.3008 in bfloat16. The
    gradients are those of the sum, not of the mean.
    """
    if grads[0] is not None:
        grads[0][part] = (gradient @ weight) * share
    if grads[1] is not None:
        grads[1] += gradient.T @ (hidden * share).to(hidden.dtype)
    if grads[2] is not None:
        rounded = share.to(gradient.dtype)
        grads[2] += (gradient.T @ rounded)[:, 0]
        if share.dtype != rounded.dtype:  # a copy of the gradient in full precision would be as large as the logits
            grads[2] += (gradient.T @ (share - rounded).to(gradient.dtype))[:, 0]
