"""Attribution by taking pieces out, and how faithful attributions are: what taking out the best ones does."""

from __future__ import annotations

import torch
from torch import Tensor

from mmhub.explain.pieces import Pieces
from mmhub.explain.probe import Probe
from mmhub.explain.records import Faithfulness

POINTS = 11  # of each curve
_RANDOM = 3  # orders that are drawn for comparison


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

    What was written stays. None where there is a single piece.
    """
    own = torch.tensor(pieces.prompt, dtype=torch.long, device=scores.device)
    if len(own) < 2:
        return None
    best = own[scores[own].argsort(descending=True, stable=True)]
    draw = torch.Generator().manual_seed(seed)
    orders = [best, *(own[torch.randperm(len(own), generator=draw).to(own.device)] for _ in range(_RANDOM))]
    keep = torch.cat([_steps(order, pieces.total, inserting) for order in orders for inserting in (False, True)])
    curves = values_without(probe, pieces, keep).sum(1).view(len(orders), 2, POINTS).double().cpu()
    areas = curves.mean(2)
    return Faithfulness(
        deletion=tuple(curves[0, 0].tolist()),
        insertion=tuple(curves[0, 1].tolist()),
        deletion_area=float(areas[0, 0]),
        insertion_area=float(areas[0, 1]),
        random_deletion_area=float(areas[1:, 0].mean()),
        random_insertion_area=float(areas[1:, 1].mean()),
    )


def _steps(order: Tensor, total: int, inserting: bool) -> Tensor:
    """What is kept at each point of a curve, (POINTS, P)."""
    keep = torch.ones(POINTS, total, device=order.device)
    for point in range(POINTS):
        taken = round(len(order) * point / (POINTS - 1))
        keep[point, order[taken:] if inserting else order[:taken]] = 0
    return keep
