"""Train GPT-2 124M in bf16 as a plain loop does, and with mmhub's compiled blocks and loss.

    python benchmarks/gpu_gpt2.py [--rows 32] [--length 1024] [--steps 20] [--toy]

The shape is GPT-2's: 12 layers x 768, 12 heads, vocabulary 50,257 padded to 50,304, tied head, no dropout; tokens are
random. All ways train the same module on the same batch of `rows` texts of `length` tokens, under autocast, with
torch's fused AdamW (mmhub's too), and clipped gradients:

- plain, eager; plain, the whole model compiled: the logits of all tokens, then `F.cross_entropy`;
- mmhub, blocks compiled: the same logits and loss; and with the loss in chunks, which never holds them.

FLOPs a token in training, 6 N + 12 L d T: N are the weights that tokens are multiplied with (the head once, the
embedding table not), and causal attention is not halved. 855 million at full size.
"""

from __future__ import annotations

import argparse
import gc

import gpu_table
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from mmhub.engine.blocks import find_blocks
from mmhub.engine.compute import autocast
from mmhub.layers import chunked_cross_entropy

VOCABULARY = 50_304


class Block(nn.Module):
    """Pre-norm causal attention and a GELU feed-forward layer over (B, T, D)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, layers: int, dim: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def loss(self, ids: Tensor, targets: Tensor, chunked: bool) -> Tensor:
        hidden = self(ids)
        if chunked:
            return chunked_cross_entropy(hidden, self.words.weight, targets)
        return F.cross_entropy(F.linear(hidden, self.words.weight).flatten(0, 1).float(), targets.flatten())

    def flops_a_token(self, length: int) -> float:
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + self.words.weight.numel()
        return 6 * weights + 12 * len(self.blocks) * self.words.embedding_dim * length


def measure(way: str, chosen: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds a step, FLOPs a token, and the loss after the last step; nothing of the way before is left."""
    torch._dynamo.reset()
    if chosen.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(chosen.device)
    torch.manual_seed(0)
    vocabulary = 512 if chosen.toy else VOCABULARY
    model = GPT(*((2, 64, 2) if chosen.toy else (12, 768, 12)), vocabulary, chosen.length).to(chosen.device)
    ids = torch.randint(0, vocabulary, (chosen.rows, chosen.length + 1), device=chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True)
    run = model.loss
    if "whole model compiled" in way:
        run = torch.compile(model.loss)
    elif "blocks compiled" in way:
        for _, block in find_blocks(model):
            block.compile()
    last = torch.zeros(())

    def step() -> None:
        nonlocal last
        with autocast(chosen.device, torch.bfloat16):
            loss = run(ids[:, :-1], ids[:, 1:], "chunks" in way)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.detach()

    return gpu_table.seconds_a_step(step, chosen), model.flops_a_token(chosen.length), float(last)


def main() -> None:
    chosen = gpu_table.options(__doc__, rows=32, length=1024)
    ways = [
        "plain, eager",
        "plain, whole model compiled",
        "mmhub, blocks compiled",
        "mmhub, blocks compiled, loss in chunks",
    ]
    if chosen.toy:
        chosen.rows, chosen.length = 2, 32
        ways = ["plain, eager", "mmhub, loss in chunks"]
    rows = []
    for way in ways:
        seconds, flops, loss = measure(way, chosen)
        rate = chosen.rows * chosen.length / seconds
        share = gpu_table.share_of_peak(rate * flops, chosen.device)
        rows.append(
            [way, f"{rate:,.0f}", f"{1000 * seconds:.1f}", share, gpu_table.memory(chosen.device), f"{loss:.3f}"]
        )
    columns = ("way", "tokens/s", "ms a step", "MFU", "peak memory, GiB", "last loss")
    gpu_table.write(
        f"{'A toy' if chosen.toy else 'GPT-2 124M'} in bf16, {chosen.rows} x {chosen.length} tokens a step",
        columns,
        rows,
        chosen,
    )


if __name__ == "__main__":
    main()
