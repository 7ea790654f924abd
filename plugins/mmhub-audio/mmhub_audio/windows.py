"""Cutting a long recording into overlapping windows, of which one is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmhub.errors import UsageError
from mmhub.interfaces.roles import Window


def cut(blocks: Iterator[Tensor], rate: int, seconds: float, overlap: float, least: int = 1) -> Iterator[Window]:
    """Cut mono blocks, each (S,) at `rate` Hz, into windows of `seconds` that share `overlap` with their neighbours.

    The last window may be shorter, but never less than `least` samples where there are as many: it then shares more.

    Raises:
        UsageError: no windows can be cut that way.
    """
    size, share = round(seconds * rate), round(overlap * rate)
    if not 0 <= share < size or size < least:
        need = f" and windows of at least {least / rate:g} s" if size < least else ""
        raise UsageError(
            f"cannot cut audio into windows of {seconds:g} s that share {overlap:g} s",
            f"expected an overlap from 0 to less than a window{need}",
        )
    return _cut(blocks, rate, size, share, least)


def _cut(blocks: Iterator[Tensor], rate: int, size: int, share: int, least: int) -> Iterator[Window]:
    held, start, left = torch.zeros(0), 0, 0

    def window(samples: Tensor, at: int, left: int, right: int) -> Window:
        raw = {"array": samples.numpy(), "sampling_rate": rate, "mono": True}
        return Window(raw, at / rate, (at + len(samples)) / rate, left / rate, right / rate)

    step = size - share
    for block in blocks:
        held = torch.cat((held, block))
        while len(held) > size and len(held) >= step + least:
            yield window(held[:size].clone(), start, left, share)
            held, start, left = held[step:], start + step, share
    if len(held) > size:
        last = len(held) - least
        yield window(held[:size].clone(), start, left, size - last)
        held, start, left = held[last:], start + last, size - last
    yield window(held.clone(), start, left, 0)
