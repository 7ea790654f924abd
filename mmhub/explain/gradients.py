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

_NEAR, _FINER = 0.05, (1, 2, 4, 8)  # of what the sample changes, and how many times the steps are tried
_POINTS, _FAINT = 16, 0.0625  # where the gradient is taken that is multiplied by the input


def integrated_gradients(probe: Probe, pieces: Pieces, numbers: int, steps: int) -> tuple[Tensor, int]:
    """Integrate gradients on the way from nothing to the sample (Sundararajan et al., arXiv:1703.01365).

    -> scores (K, P), and the most steps that one of the K numbers took. Sound comes up from silence in equal steps of
    loudness, not of amplitude: front ends take logarithms. As the paper advises, a single number gets more steps, as
    `_FINER` says, where its scores do not add up to what the sample changes to within `_NEAR`: where an answer tips
    over within a small part of the way, few steps miss it, or count it too often.

    Raises:
        PluginError: captum is not installed.
    """
    method = _captum().IntegratedGradients(
        lambda keep: probe.values(pieces.without(probe.surfaces, keep, fading=True)), multiply_by_inputs=True
    )
    whole = torch.ones(1, pieces.total, device=probe.inputs[0].device)
    worth, most = [], steps
    for number in range(numbers):
        for times in _FINER if numbers == 1 else _FINER[:1]:
            found, delta = method.attribute(
                whole,
                torch.zeros_like(whole),
                target=number,
                n_steps=steps * times,
                internal_batch_size=probe.rows,
                return_convergence_delta=True,
            )
            missed, most = float(delta.sum()), steps * times
            if abs(missed) <= _NEAR * abs(float(found.sum()) - missed):
                break
        worth.append(found.detach().float())
    return torch.cat(worth), most


def gradient_x_input(probe: Probe, pieces: Pieces, numbers: int) -> Tensor:
    """Multiply the gradient by how far the sample is from nothing (Shrikumar et al., arXiv:1605.01713): (K, P).

    A gradient at the sample alone is blind where the model is saturated, and missed planted evidence in half of the
    cases: it is the mean of the sample's and those of fainter copies, the faintest at `_FAINT` of it, which are the
    interior gradients of Sundararajan et al., arXiv:1611.02639.
    """
    found = torch.zeros(numbers, pieces.total, device=probe.inputs[0].device)
    for strengths in torch.linspace(1, _FAINT, _POINTS, device=found.device).split(probe.rows):
        keep = strengths[:, None].repeat(1, pieces.total).requires_grad_()
        values = probe.values(pieces.without(probe.surfaces, keep, fading=True)).sum(0) / _POINTS
        for number in range(numbers):
            more = number < numbers - 1
            found[number] += torch.autograd.grad(values[number], keep, retain_graph=more)[0].sum(0)
    return found


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError:
        raise PluginError(
            "integrated gradients need captum", 'pip install "mmhub[explain]", or use --method gradient-x-input'
        ) from None
    return captum.attr
