"""Attribution by gradients: integrated gradients, and gradient times input.

Both ask for the gradient by how much of a piece is there, from 0 to 1, so that all positions of a piece are added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmhub.errors import PluginError
from mmhub.explain.pieces import Pieces
from mmhub.explain.probe import Probe

_PASSES = 256  # forward and backward passes of one sample that are made at most, unless each number gets `_FEWEST`
_FEWEST = 8
_POINTS, _FAINT = 16, 0.0625  # where the gradient is taken that is multiplied by the input


def integrated_gradients(probe: Probe, pieces: Pieces, numbers: int, steps: int) -> tuple[Tensor, float]:
    """Integrate gradients on the way from nothing to the sample (Sundararajan et al., arXiv:1703.01365).

    -> scores (K, P), and how far they are from adding up to what the sample changes, in all K numbers together. Sound
    comes up from silence in equal steps of loudness, not of amplitude: front ends take logarithms. Where there are many
    numbers each gets fewer steps.

    Raises:
        PluginError: captum is not installed.
    """
    method = _captum().IntegratedGradients(
        lambda keep: probe.values(pieces.without(probe.surfaces, keep, fading=True)), multiply_by_inputs=True
    )
    steps = max(_FEWEST, min(steps, _PASSES // numbers))
    whole = torch.ones(1, pieces.total, device=probe.inputs[0].device)
    worth, gap = [], 0.0
    for number in range(numbers):
        found, delta = method.attribute(
            whole,
            torch.zeros_like(whole),
            target=number,
            n_steps=steps,
            internal_batch_size=probe.rows,
            return_convergence_delta=True,
        )
        worth.append(found.detach().float())
        gap += float(delta.sum())
    return torch.cat(worth), abs(gap)


def gradient_x_input(probe: Probe, pieces: Pieces, numbers: int) -> Tensor:
    """Multiply the gradient by how far the sample is from nothing (Shrikumar et al., arXiv:1605.01713): (K, P).

    A gradient at the sample alone is blind where the model is saturated, and missed planted evidence in half of the
    cases: it is the mean of the sample's and those of fainter copies, the faintest at `_FAINT` of it.
    """
    keep = torch.linspace(1, _FAINT, _POINTS, device=probe.inputs[0].device)[:, None].repeat(1, pieces.total)
    keep.requires_grad_()
    values = probe.values(pieces.without(probe.surfaces, keep, fading=True)).mean(0)
    found = [torch.autograd.grad(values[number], keep, retain_graph=True)[0].sum(0) for number in range(numbers)]
    return torch.stack(found)


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError:
        raise PluginError(
            "integrated gradients need captum", 'pip install "mmhub[explain]", or use --method gradient-x-input'
        ) from None
    return captum.attr
