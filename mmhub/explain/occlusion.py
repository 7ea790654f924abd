"""Attribution by taking pieces out, and how faithful attributions are: what taking out the best ones does."""

from __future__ import annotations

import torch
from torch import Tensor

from mmhub.explain.pieces import Pieces
from mmhub.explain.probe import Probe
from mmhub.explain.records import Faithfulness

POINTS = 11  # of each curve
_RANDOM = 19  # orders that are drawn for comparison: one order in twenty is better than all of them by chance


def occlusion(probe: Probe, pieces: Pieces) -> Tensor:
    """Cover each piece, together with its neighbours where it has some, and see how much is lost: (K, P).

    What several windows say of a piece is averaged (Zeiler and Fergus, arXiv:1311.2901).
    """
    windows = [window for group in pieces.groups for window in group.windows]
    covers = torch.zeros(len(windows), pieces.total, device=probe.inputs[0].device)
    for row, window in enumerate(windows):
        covers[row, list(window)] = 1
    whole = probe.each(probe.inputs)
    losses = whole - values_without(probe, pieces, 1 - covers)
    counts = covers.sum(0).clamp(min=1)
    return (covers.T @ losses / counts[:, None]).T


def values_without(probe: Probe, pieces: Pieces, keep: Tensor) -> Tensor:
    """Return the question's numbers where pieces are kept, (R, P) -> (R, K)."""
    found = [probe.each(pieces.without(probe.surfaces, part)) for part in keep.split(probe.rows)]
    return torch.cat(found)


def faithfulness(probe: Probe, pieces: Pieces, scores: Tensor, seed: int = 0) -> Faithfulness | None:
    """Take pieces out, and put them in, in the order of their scores (P,), beside random orders of a fixed seed.

    What was written stays. None where there is a single piece. To put pieces in is to take them out in reverse order,
    read backwards, so that random orders are tried one way alone.
    """
    own = torch.tensor(pieces.prompt, dtype=torch.long, device=scores.device)
    if len(own) < 2:
        return None
    best = own[scores[own].argsort(descending=True, stable=True)]
    draw = torch.Generator().manual_seed(seed)
    orders = [
        best,
        best.flip(0),
        *(own[torch.randperm(len(own), generator=draw).to(own.device)] for _ in range(_RANDOM)),
    ]
    keep, rows = torch.cat([_steps(order, pieces.total) for order in orders]).unique(dim=0, return_inverse=True)
    curves = values_without(probe, pieces, keep).sum(1)[rows].view(len(orders), POINTS).double().cpu()
    deletion, insertion = curves[0], curves[1].flip(0)
    areas = curves.mean(1)
    out, back, chance = areas[0], areas[1], areas[2:]
    return Faithfulness(
        deletion=tuple(deletion.tolist()),
        insertion=tuple(insertion.tolist()),
        deletion_area=float(out),
        insertion_area=float(back),
        random_deletion_area=float(chance.mean()),
        random_insertion_area=float(chance.mean()),
        orders=_RANDOM,
        deletion_beaten=int((chance > out).sum()),
        insertion_beaten=int((chance < back).sum()),
    )


def _steps(order: Tensor, total: int) -> Tensor:
    """What is kept at each point of a curve, (POINTS, P)."""
    keep = torch.ones(POINTS, total, device=order.device)
    for point in range(POINTS):
        keep[point, order[: round(len(order) * point / (POINTS - 1))]] = 0
    return keep
