"""Train a Transformer language model with Hugging Face's Trainer, with a plain loop and with mmhub, on the same text.

    python benchmarks/train_language.py [--documents 600] [--rounds 3] [--out benchmarks/results/train_language.md]

The model has 4 layers x 256, 4 heads, SwiGLU of 688, a vocabulary of 8,000 with tied embeddings, no dropout, in fp32;
LLaMA's architecture in every row. Documents have a log-normal number of tokens, 131 in the middle, as paragraphs of
Wikipedia have; blocks predict 256 tokens, and a step has 8 of them. All train with fused AdamW and clipped gradients.

- `mmhub.train` on a recipe: documents packed to full blocks, and none sees another. Its seconds are those of the loop.
- A plain loop over mmhub's module with the same batches: what the engine costs.
- A plain loop, written by hand: the same layers from torch's functions, on dense blocks cut from the joined documents
  (so that documents do see each other), logits and `F.cross_entropy` at once.
- Trainer with LlamaForCausalLM on the same dense blocks.
- Trainer with LlamaForCausalLM on the documents themselves, 16 a step (2,048 tokens in the middle), padded to the
  longest of a batch, with default batching and with `group_by_length`.

Rounds are interleaved, and the table has medians of predicted tokens a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmhub
from benchmarks.train_text import _facts, _logged
from mmhub.build import build_model
from mmhub.config import check_recipe
from mmhub.data.blocks import Plan, plan_blocks
from mmhub.data.corpus import Corpus, documents
from mmhub.data.sources import open_rows
from mmhub.interfaces import find_task
from mmhub.model import Columns
from mmhub.optim import learning_rate_factor

BLOCK, BATCH, SEED, WORDS = 256, 8, 0, 7996
RATE, DECAY, CLIP = 3e-4, 0.01, 1.0
LONGEST = 1024  # tokens of a document


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    options.epochs = 1
    report = _facts(options)
    report[0] = "# Training a language model"
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MMHUB_CACHE"] = str(Path(temporary) / "cache")
        report += ["", *_measure(Work(Path(temporary), options.documents), options.rounds)]
    text = "\n".join(report).replace("benchmarks/train_text.py", "benchmarks/train_language.py") + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


class Work:
    """The text, and every way to train on it. A way returns (predicted tokens, seconds of training)."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.runs = folder, 0
        _write_documents(folder / "train.jsonl", count)
        rows = open_rows(str(folder / "train.jsonl"))
        self.recipe = check_recipe(self.table(log_every=1))
        values: Callable[[str], Any] = lambda name: rows.column("text")  # noqa: E731
        columns = Columns({"text": "text"})
        self.model = build_model(find_task("language-modelling"), self.recipe.model, values, columns=columns, seed=SEED)
        self.corpus = Corpus.read(documents(rows, "text"), self.model.language_model.processor, where=rows.where)
        self.steps = len(self.plan())

    def table(self, log_every: int) -> dict[str, Any]:
        config = {"dim": 256, "depth": 4, "heads": 4, "dropout": 0.0, "max_length": LONGEST}
        return {
            "task": "language-modelling",
            "seed": SEED,
            "model": {
                "decoder": {"use": "transformer-lm", "config": config},
                "tokenizer": {"kind": "word", "vocab_size": WORDS + 4},
            },
            "data": {"train": str(self.folder / "train.jsonl")},
            "train": {
                "epochs": 1,
                "batch_size": BATCH,
                "block_size": BLOCK,
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "clip_norm": CLIP,
                "checkpoint_every": 10**6,
                "log_every": log_every,
            },
        }

    def plan(self) -> Plan:
        return plan_blocks(self.corpus, block=BLOCK, batch=BATCH, seed=SEED, epoch=0)

    def ours(self) -> tuple[int, float]:
        self.runs += 1
        done = mmhub.train(self.table(log_every=self.steps), self.folder / f"run-{self.runs}")
        return self.corpus.predictions, _logged(done.out)[-1]["seconds"]

    def module(self) -> tuple[int, float]:
        """mmhub's module and batches in a plain loop."""
        import copy

        model, plan = copy.deepcopy(self.model), self.plan()
        batches: list[Any] = [plan.batch(number) for number in range(len(plan))]
        return self.corpus.predictions, self.loop(model, batches, lambda batch: model(batch).loss)

    def plain(self) -> tuple[int, float]:
        torch.manual_seed(SEED)
        model = Plain(self.model.language_model.processor.vocab_size)
        blocks = self.dense()
        return blocks.numel() // (BLOCK + 1) * BLOCK, self.loop(model, list(blocks.split(BATCH)), model)

    def dense(self) -> Tensor:
        """The joined documents cut into blocks, (blocks, BLOCK + 1)."""
        ids = torch.from_numpy(self.corpus.ids.astype(np.int64))
        count = (len(ids) - 1) // BLOCK
        return ids.unfold(0, BLOCK + 1, BLOCK)[:count].contiguous()

    def loop(self, model: nn.Module, batches: list[Any], loss_of: Callable[[Any], Any]) -> float:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
        model.train()
        begin = time.perf_counter()
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = RATE * learning_rate_factor(step, len(batches), self.recipe)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            float(loss.detach())
        return time.perf_counter() - begin

    def trainer_packed(self) -> tuple[int, float]:
        blocks = self.dense()
        rows = [{"input_ids": block[:-1], "labels": block[:-1]} for block in blocks]  # the library shifts them
        return len(blocks) * (BLOCK - 1), self.trainer(rows, BATCH, "random", _stack)

    def trainer_documents(self, sampling: str) -> tuple[int, float]:
        found = [torch.from_numpy(self.corpus.document(i).astype(np.int64))[:LONGEST] for i in range(len(self.corpus))]
        rows = [{"input_ids": ids, "labels": ids, "length": len(ids)} for ids in found]
        return sum(len(ids) - 1 for ids in found), self.trainer(rows, 2 * BATCH, sampling, _pad)

    def trainer(self, rows: list[dict[str, Any]], batch: int, sampling: str, collate: Any) -> float:
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=self.model.language_model.processor.vocab_size,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.runs += 1
        arguments = TrainingArguments(
            output_dir=str(self.folder / f"run-{self.runs}"),
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=RATE,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            train_sampling_strategy=sampling,
            length_column_name="length",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        )
        model = LlamaForCausalLM(config)
        done = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()  # type: ignore[arg-type]
        return float(done.metrics["train_runtime"])


class Plain(nn.Module):
    """The architecture by hand, on blocks (B, BLOCK + 1)."""

    def __init__(self, vocabulary: int, dim: int = 256, depth: int = 4, heads: int = 4, hidden: int = 688) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, dim)
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(dim, eps=1e-6),
                    "qkv": linear(dim, 3 * dim),
                    "out": linear(dim, dim),
                    "norm2": nn.RMSNorm(dim, eps=1e-6),
                    "both": linear(dim, 2 * hidden),
                    "down": linear(hidden, dim),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, blocks: Tensor) -> Tensor:
        ids, goals = blocks[:, :-1], blocks[:, 1:]
        x = self.embedding(ids)
        width = x.shape[-1] // self.heads
        angle = torch.arange(ids.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        cos, sin = angle.cos(), angle.sin()
        for layer in self.layers:
            part: Any = layer
            q, k, v = part["qkv"](part["norm1"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + part["out"](y.transpose(1, 2).flatten(2))
            gate, value = part["both"](part["norm2"](x)).chunk(2, -1)
            x = x + part["down"](F.silu(gate) * value)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), goals.flatten())


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}


def _pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad(ids, batch_first=True, padding_value=-100),
    }


def _write_documents(path: Path, count: int) -> None:
    """Documents of made-up words, frequent ones first as in real text."""
    numbers = np.random.default_rng(SEED)
    lengths = numbers.lognormal(np.log(128), 0.8, count).clip(8, LONGEST - 2).astype(int)
    with path.open("w") as file:
        for length in lengths:
            places = np.minimum(numbers.pareto(0.8, length) * 20, WORDS - 1).astype(int)
            file.write(json.dumps({"text": " ".join(f"w{place}" for place in places)}) + "\n")


def _measure(work: Work, rounds: int) -> list[str]:
    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "mmhub": work.ours,
        "plain loop, mmhub's module and batches": work.module,
        "plain loop by hand, dense blocks": work.plain,
        "Trainer, LLaMA, dense blocks": work.trainer_packed,
        "Trainer, LLaMA, documents, default batching": lambda: work.trainer_documents("random"),
        "Trainer, LLaMA, documents, group_by_length": lambda: work.trainer_documents("group_by_length"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            tokens, seconds = way()
            speeds[name].append(tokens / seconds)
            print(f"round {turn + 1}, {name}: {speeds[name][-1]:.0f} tokens/s", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    sizes = np.diff(work.corpus.ends, prepend=0)
    lines = [
        f"{len(work.corpus)} documents of {sizes.min()} to {sizes.max()} tokens, {np.median(sizes):.0f} in the middle;",
        f"{work.corpus.predictions:,} predictions, {work.steps} steps of {BATCH} x {BLOCK}.",
        "",
        "| | tokens/s, median | mmhub is faster by | all rounds |",
        "|---|---|---|---|",
    ]
    for name, found in speeds.items():
        ratio, each = medians["mmhub"] / medians[name], " ".join(f"{speed:.0f}" for speed in found)
        lines.append(f"| {name} | {medians[name]:.0f} | {ratio:.2f}x | {each} |")
    return lines


if __name__ == "__main__":
    main()
