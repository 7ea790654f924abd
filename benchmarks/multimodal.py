"""Train a picture encoder and a language model together: packed and padded rows, a frozen encoder, kept features.

    python benchmarks/multimodal.py [--rows 16] [--steps 20] [--small]

On a GPU ViT-L/14 at 224 pixels and a Llama of 1.1 billion parameters in bf16; with --small, which is for CPUs, a ViT of
4 layers x 128 and a Llama of 4 layers x 128 in fp32. All weights are random. A row is a conversation with no, one or
two pictures and an answer whose length is log-normal. The peer is a plain loop over transformers in the manner of
Llava: the same picture encoder and Llama, features written to the places of a placeholder token, rows padded to the
longest. A step is forward, backward and AdamW. Tokens are those that the language model reads, padding left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from typing import Any

import gpu_table
import numpy as np
import torch
from torch import Tensor, nn

from mmhub.batch import Batch, Encoded, Items, Plan
from mmhub.build import compose
from mmhub.device import find_device, keep_memory, use_fast_matmul
from mmhub.engine.compute import autocast
from mmhub.engine.flops import Sizes, TrainingCost
from mmhub.interfaces import Policy
from mmhub.model import Model

BATCHES = 4


def llama(small: bool) -> dict[str, Any]:
    width, layers, heads, hidden, words = (128, 4, 4, 384, 2000) if small else (2048, 22, 32, 5632, 32000)
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 4, "intermediate_size": hidden, "vocab_size": words,
        "max_position_embeddings": 4096,
    }  # fmt: skip


def vision(small: bool) -> dict[str, Any]:
    if not small:
        return {"architecture": "vit_large_patch14_clip_224"}
    return {"architecture": "test_vit", "image_size": 96}


def build(small: bool, pack: bool) -> Model:
    torch.manual_seed(0)
    return compose(
        task="chat",
        encoders={"image": {"use": "timm", "config": vision(small)}},
        fusion={"use": "interleave", "config": {"pack": pack}},
        decoder={"use": "transformers-lm", "config": {"config": llama(small)}},
        tokenizer={"kind": "word"},
        texts=["a question and an answer"] * 3,
    )


def make_batches(model: Model, chosen: argparse.Namespace) -> list[Batch]:
    """Rows of a picture or two, or none, before a question of 16 tokens and its answer."""
    draw = np.random.default_rng(0)
    words = llama(chosen.small)["vocab_size"]
    encoder: Any = model.encoders["image"]
    pixels = encoder.processor([np.zeros((224, 224, 3), np.uint8)], Policy()).data
    found = []
    for _ in range(BATCHES):
        lengths = 16 + draw.lognormal(np.log(48), 0.9, chosen.rows).astype(int).clip(4, 512)
        pictures = draw.integers(0, 3, chosen.rows)
        mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
        ids = torch.from_numpy(draw.integers(0, words, mask.shape)) * mask
        rows = torch.repeat_interleave(torch.arange(chosen.rows), torch.from_numpy(pictures))
        marks = mask & (torch.arange(mask.shape[1]) >= 16)
        text = Items(ids, mask, torch.arange(chosen.rows), chosen.rows, marks)
        shape = (len(rows), *pixels.shape[1:])
        shown = Items((torch.rand(shape) * 255).to(pixels.dtype), torch.ones(len(rows), 1).bool(), rows, chosen.rows)
        plan = Plan.of([[("image", place) for place in range(count)] for count in pictures], ["image"])
        batch = Batch({"image": shown, "text": text}, chosen.rows, plan=plan)
        batch.targets = model.language_model.count_targets(text)
        found.append(batch.to(chosen.device))
    return found


def keep_features(model: Model, batch: Batch) -> Batch:
    pictures = batch.items.pop("image")
    with torch.no_grad():
        features = model.encode_items("image", pictures)
    batch.features["image"] = Encoded(features, pictures.rows)
    return batch


def sizes_of(batch: Batch) -> Sizes:
    return Sizes(
        batch.size,
        {name: (items.lengths, items.rows) for name, items in batch.items.items()},
        {name: (part.features.lengths, part.rows) for name, part in batch.features.items()},
    )


def measure(way: str, chosen: argparse.Namespace) -> tuple[float, float, float, str]:
    """Real tokens a second, FLOP/s, the first loss, and the peak of memory of a way to train."""
    model = build(chosen.small, pack="packed" in way).to(chosen.device)
    precision = torch.float32 if chosen.small else torch.bfloat16
    batches = make_batches(model, chosen)
    if way != "peer" and "trained" not in way:
        model.freeze("image")
    cost = TrainingCost(model, precision)
    if "kept" in way:
        batches = [keep_features(model.eval(), batch) for batch in batches]
    cost.measure(batches[0])
    flops = sum(cost.of(sizes_of(batch)) for batch in batches) / BATCHES
    forward: Callable[[Batch], Tensor] = peer(model) if way == "peer" else lambda batch: model(batch).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    turn, losses = cycle(batches), []
    gpu_table.memory(chosen.device)

    def step() -> None:
        with autocast(chosen.device, precision):
            loss = forward(next(turn))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    model.train()
    seconds = gpu_table.seconds_a_step(step, chosen)
    each = tokens_of_picture(model, chosen)
    real = sum(int(b.items["text"].mask.sum()) + each * count_pictures(b) for b in batches) / BATCHES
    return real / seconds, flops / seconds, float(losses[0]), gpu_table.memory(chosen.device)


def count_pictures(batch: Batch) -> int:
    return len(batch.features["image"]) if batch.features else len(batch.items["image"])


def tokens_of_picture(model: Model, chosen: argparse.Namespace) -> int:
    one = make_batches(model, argparse.Namespace(**vars(chosen) | {"rows": 2}))[0].items["image"]
    with torch.no_grad():
        return int(model.encode_items("image", one).mask[0].sum()) if len(one) else 0


def peer(model: Model) -> Callable[[Batch], Tensor]:
    """The loop that one would write by hand on the same modules: a placeholder id, masked_scatter, padding."""
    vit: Any = model.encoders["image"]
    language: Any = model.decoder
    projector = next(m for m in model.fusion.modules() if isinstance(m, nn.Linear))

    def forward(batch: Batch) -> Tensor:
        text, pictures = batch.items["text"], batch.items["image"]
        features = vit(pictures.data, pictures.mask).tokens
        each = features.shape[1]
        counts = torch.bincount(pictures.rows, minlength=batch.size)
        width = int((counts * each + text.lengths).max())
        ids = text.data.new_full((batch.size, width), 0)
        mask, holders, labels = ids.bool(), ids.bool(), ids - 100
        for row, (count, length) in enumerate(zip(counts.tolist(), text.lengths.tolist(), strict=True)):
            start, end = count * each, count * each + length
            holders[row, :start], mask[row, :end] = True, True
            ids[row, start:end] = text.data[row, :length]
            labels[row, start + 16 : end] = text.data[row, 16:length]
        tokens = language.model.get_input_embeddings()(ids)
        tokens = tokens.masked_scatter(holders[..., None], projector(features).to(tokens.dtype))
        loss: Tensor = language.model(inputs_embeds=tokens, attention_mask=mask.long(), labels=labels).loss
        return loss

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a size for CPUs, and no GPU")
    parser.add_argument("--rows", type=int, default=16, help="conversations a batch")
    parser.add_argument("--steps", type=int, default=20, help="steps to time, three times")
    chosen = parser.parse_args()
    if not chosen.small and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --small runs on any CPU")
    chosen.device, chosen.toy, chosen.warm = find_device("cpu" if chosen.small else "cuda"), False, BATCHES
    use_fast_matmul(chosen.device)
    keep_memory(chosen.device)
    ways = {
        "peer": "transformers, padded, all trained",
        "padded, trained": "mmhub, padded, all trained",
        "packed, trained": "mmhub, packed, all trained",
        "packed, frozen": "mmhub, packed, encoder frozen",
        "packed, kept": "mmhub, packed, encoder frozen, features kept",
    }
    found = {way: measure(way, chosen) for way in ways}
    rows = [
        [ways[way], f"{rate:,.0f}", f"{rate / found['peer'][0]:.2f}x", f"{flops / 1e9:,.1f}",
         gpu_table.share_of_peak(flops, chosen.device), memory, f"{loss:.4f}"]
        for way, (rate, flops, loss, memory) in found.items()
    ]  # fmt: skip
    columns = ("way", "real tokens/s", "of transformers", "GFLOP/s, all towers", "MFU", "peak GiB", "first loss")
    gpu_table.write(
        f"A picture encoder and a language model, {chosen.rows} conversations a batch", columns, rows, chosen
    )


if __name__ == "__main__":
    main()
