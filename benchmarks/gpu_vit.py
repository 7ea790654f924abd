"""Train timm's ViT-B/16 on 224 x 224 pictures in bf16: from pixels on the GPU, and from JPEG files through the loader.

    python benchmarks/gpu_vit.py [--rows 256] [--pictures 38400] [--workers 14] [--steps 20] [--toy]

- plain, synthetic: timm's model, compiled as a whole, under autocast, with fused AdamW, on one batch again and again;
- mmhub, synthetic: an image encoder and a classification head, blocks compiled, on one batch of uint8 pixels;
- mmhub, from JPEG: the same, each picture (500 x 375, quality 90) read, decoded, resized and cropped by mmhub's
  processor in `workers` processes, sent as uint8 on a stream of its own.

FLOPs a picture: 105.5 billion in training, 3 x 2 x 17.58 billion multiply-adds (timm's count).
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_table
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from mmhub.batch import Batch
from mmhub.build import compose
from mmhub.config import check_recipe
from mmhub.data.loader import Collate, batches_of, epoch_order, load_batches, on_device
from mmhub.data.sources import open_rows
from mmhub.engine.compute import autocast, prepare_model
from mmhub.engine.optimizer import make_optimizer

FLOPS = 105.5e9
LABELS = [f"c{i}" for i in range(1000)]


def plain(chosen: argparse.Namespace) -> float:
    model: Any = timm.create_model(_architecture(chosen), num_classes=len(LABELS)).to(chosen.device)
    size = model.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(chosen.rows, 3, size, size, device=chosen.device)
    labels = torch.randint(0, len(LABELS), (chosen.rows,), device=chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model = model if chosen.toy else torch.compile(model)

    def step() -> None:
        with autocast(chosen.device, _precision(chosen)):
            loss = F.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return chosen.rows / gpu_table.seconds_a_step(step, chosen)


def ours(chosen: argparse.Namespace) -> tuple[Any, Callable[[Batch], None]]:
    """The model, and what takes one step on a batch."""
    model = compose(
        encoders={"image": {"use": "timm", "config": {"architecture": _architecture(chosen)}}},
        decoder={"use": "classification", "config": {"labels": LABELS}},
    ).to(chosen.device)
    how = "off" if chosen.toy else "blocks"
    recipe = check_recipe({"task": "classification", "train": {"precision": "auto", "compile": how}})
    prepare_model(model, recipe.train, chosen.device, _precision(chosen))
    optimizer = make_optimizer(model, recipe, chosen.device)
    model.train()

    def step(batch: Batch) -> None:
        with autocast(chosen.device, _precision(chosen)):
            loss = model(batch).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def pictures(folder: Path, count: int) -> Path:
    """A table of JPEG files with a label each; 16 different pictures, smooth as photographs are, with some noise."""
    draw, files = np.random.default_rng(0), []
    for _ in range(16):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + draw.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    rows = [{"image": {"bytes": files[i % 16], "path": f"{i}.jpg"}, "label": LABELS[i % 1000]} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pictures.parquet", row_group_size=256)
    return folder / "pictures.parquet"


def from_files(model: Any, step: Callable[[Batch], None], table: Path, chosen: argparse.Namespace) -> float:
    """Pictures a second over an epoch, from the end of the warm-up on.

    Workers decode ahead: the clock starts once what was ready before the first step is used up, and four times as many
    pictures are counted.
    """
    rows = open_rows(str(table))
    collate = Collate(rows, model.processors, {"image": "image"}, decoder=model.decoder, target="label")
    warm = _warm(chosen)
    count, begin = 0, time.perf_counter()
    for number, batch in enumerate(_epoch(collate, len(rows), chosen)):
        step(batch)
        count += batch.size
        if number + 1 == warm:
            gpu_table.wait(chosen.device)
            count, begin = 0, time.perf_counter()
    gpu_table.wait(chosen.device)
    return count / (time.perf_counter() - begin)


def _warm(chosen: argparse.Namespace) -> int:
    """Batches before the clock starts."""
    return max(int(chosen.warm), 2 * chosen.workers + 2)


def _epoch(collate: Collate, count: int, chosen: argparse.Namespace) -> Iterator[Batch]:
    order = batches_of(epoch_order(count, 0, 0), chosen.rows)
    cuda = chosen.device.type == "cuda"
    for part in on_device(load_batches(collate, order, chosen.workers, pin_memory=cuda), chosen.device):
        if part.error:
            raise part.error
        if part.batch is not None and part.batch.size == chosen.rows:  # a smaller last one would be compiled anew
            yield part.batch


def _architecture(chosen: argparse.Namespace) -> str:
    return "test_vit" if chosen.toy else "vit_base_patch16_224"


def _precision(chosen: argparse.Namespace) -> torch.dtype:
    return torch.float32 if chosen.toy else torch.bfloat16


def main() -> None:
    chosen = gpu_table.options(__doc__, rows=256, pictures=38400, workers=14)
    if chosen.toy:
        chosen.rows, chosen.pictures, chosen.workers = 4, 16, 0
    chosen.pictures = max(chosen.pictures, 5 * _warm(chosen) * chosen.rows)
    rates = {"plain, synthetic": plain(chosen)}
    model, step = ours(chosen)
    with tempfile.TemporaryDirectory() as folder:
        table = pictures(Path(folder), chosen.pictures)
        collate = Collate(open_rows(str(table)), model.processors, {"image": "image"}, model.decoder, "label")
        batch = next(_epoch(collate, chosen.pictures, chosen))
        rates["mmhub, synthetic"] = chosen.rows / gpu_table.seconds_a_step(lambda: step(batch), chosen)
        rates["mmhub, from JPEG"] = from_files(model, step, table, chosen)
    rows = []
    for way, rate in rates.items():
        share = gpu_table.share_of_peak(rate * FLOPS, chosen.device)
        rows.append([way, f"{rate:,.0f}", share, f"{rate / rates['mmhub, synthetic']:.2f}x"])
    title = f"ViT-B/16 in bf16, {chosen.rows} pictures a step, {chosen.workers} decoding processes"
    gpu_table.write(title, ("way", "images/s", "MFU", "of mmhub, synthetic"), rows, chosen)


if __name__ == "__main__":
    main()
