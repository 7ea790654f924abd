"""Recurrent layers over padded rows, with sizes that depend on no value: for graphs that are recorded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def read_padded(layers: nn.RNNBase, x: Tensor, mask: Tensor) -> Tensor:
    """Run an LSTM or tanh RNN over rows (N, T, D), real where `mask` (N, T) -> (N, T, H); what padding gives is noise.

    Real positions come out as from packed rows: forwards nothing reads what stands behind, and backwards each row is
    turned round within its own length first.
    """
    turn = _turned(mask)
    for depth in range(layers.num_layers):
        found = [_direction(layers, f"_l{depth}", x)]
        if layers.bidirectional:
            found.append(_take(_direction(layers, f"_l{depth}_reverse", _take(x, turn)), turn))
        x = torch.cat(found, -1)
    return x


def _turned(mask: Tensor) -> Tensor:
    """The place that each position takes when rows are turned round, (N, T); its own where there is padding."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)


def _take(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _direction(layers: nn.RNNBase, end: str, x: Tensor) -> Tensor:
    """One layer in one direction, step by step: (N, T, D) -> (N, T, H).

    torch's own kernels would be recorded for one length alone.
    """
    from torch._higher_order_ops.scan import scan  # only needed here, and slow to import

    bias = getattr(layers, f"bias_ih{end}") + getattr(layers, f"bias_hh{end}") if layers.bias else None
    given = F.linear(x, getattr(layers, f"weight_ih{end}"), bias).transpose(0, 1)
    weight = getattr(layers, f"weight_hh{end}").T
    start = x.new_zeros(x.shape[0], layers.hidden_size)

    def tanh_step(state: tuple[Tensor], part: Tensor) -> tuple[tuple[Tensor], Tensor]:
        hidden = (part + state[0] @ weight).tanh()
        return (hidden,), hidden.clone()

    def lstm_step(state: tuple[Tensor, Tensor], part: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        enter, forget, new, leave = (part + state[0] @ weight).chunk(4, -1)
        cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return (hidden, cell), hidden.clone()

    gated = isinstance(layers, nn.LSTM)
    _, found = scan(lstm_step, (start, start.clone()), given) if gated else scan(tanh_step, (start,), given)
    states: Tensor = found.transpose(0, 1)
    return states
