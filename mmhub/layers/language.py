"""Losses of single tokens over large vocabularies, for scoring texts: nothing here has a gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.layers.loss import CHUNK


@torch.no_grad()
def chunked_token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk: int = CHUNK,
) -> Tensor:
    """Return `F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")` in fp32, without a gradient.

    hidden (..., D), weight (V, D), targets (...) long, bias (V,) -> (...); 0 where the target is ignored. At most
    `chunk` logits exist at a time.
    """
    rows = max(1, chunk // weight.shape[0])
    found = [
        _losses(F.linear(h, weight, bias), t, ignore_index)
        for h, t in zip(hidden.reshape(-1, hidden.shape[-1]).split(rows), targets.reshape(-1).split(rows), strict=True)
    ]
    return torch.cat(found).view(targets.shape)


def _losses(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, reduction="none", ignore_index=ignore_index)
