"""Train a Transformer encoder on texts of log-normal length, padded and packed.

    python benchmarks/gpu_packing.py [--rows 64] [--longest 512] [--steps 20] [--toy]

The encoder is `mmhub.layers.TransformerEncoder` of BERT-base's shape (12 layers x 768, 12 heads, no dropout) under
bf16 autocast, forward and backward. Lengths have a median of 60 tokens and a log-normal spread of 0.9, cut to 5 and
`longest`. "padded" is the same encoder with packing switched off: every position is computed, and padding masked. Both
see the same batches: rows in random order, and rows of like length together. Only real tokens count.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from unittest import mock

import gpu_table
import numpy as np
import torch
from torch import Tensor

from mmhub.engine.compute import autocast
from mmhub.layers import TransformerEncoder

BATCHES = 10


def batches(together: bool, dim: int, chosen: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """(B, T, D) inputs with their (B, T) masks."""
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(np.log(60), 0.9, BATCHES * chosen.rows).astype(int).clip(5, chosen.longest)
    lengths = np.sort(lengths) if together else lengths
    found = []
    for part in np.split(lengths, BATCHES):
        mask = torch.arange(int(part.max())) < torch.from_numpy(part)[:, None]
        found.append((torch.randn(*mask.shape, dim, device=chosen.device), mask.to(chosen.device)))
    return found


def measure(packed: bool, together: bool, chosen: argparse.Namespace) -> tuple[float, float]:
    """Real tokens a second, and the share of positions that are real."""
    torch.manual_seed(0)
    layers, dim, heads = (2, 32, 2) if chosen.toy else (12, 768, 12)
    encoder = TransformerEncoder(dim, layers, heads).to(chosen.device)
    given = batches(together, dim, chosen)
    turn = cycle(given)

    def step() -> None:
        x, mask = next(turn)
        with autocast(chosen.device, torch.float32 if chosen.toy else torch.bfloat16):
            loss = encoder(x, mask).float().square().mean()
        loss.backward()
        encoder.zero_grad()

    with mock.patch("mmhub.layers.transformer._may_pack", return_value=packed):
        seconds = gpu_table.seconds_a_step(step, chosen)
    real = sum(int(mask.sum()) for _, mask in given)
    return real / len(given) / seconds, real / sum(mask.numel() for _, mask in given)


def main() -> None:
    chosen = gpu_table.options(__doc__, rows=64, longest=512)
    if chosen.toy:
        chosen.rows, chosen.longest = 8, 64
    else:
        chosen.steps = -(-chosen.steps // BATCHES) * BATCHES  # every way sees every batch equally often
        chosen.warm = BATCHES
    rows = []
    for together in (False, True):
        rates = {packed: measure(packed, together, chosen) for packed in (False, True)}
        for packed, (rate, real) in rates.items():
            order, way = "like lengths together" if together else "random", "packed" if packed else "padded"
            rows.append([order, f"{100 * real:.0f} %", way, f"{rate:,.0f}", f"{rate / rates[False][0]:.2f}x"])
    columns = ("order of rows", "real positions", "way", "real tokens/s", "of padded")
    gpu_table.write(f"Packed and padded sequences, {chosen.rows} rows a batch", columns, rows, chosen)


if __name__ == "__main__":
    main()
