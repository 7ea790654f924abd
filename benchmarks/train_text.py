"""Train a text classifier with Hugging Face's Trainer, with a plain loop and with mmhub, on the same data and model.

    python benchmarks/train_text.py [--rows 400,2000] [--rounds 3] [--epochs 1] [--out benchmarks/results/train_text.md]

The model is mmhub's own Transformer (4 layers x 256, 4 heads, vocabulary 8,000, no dropout) with its classification
head, in fp32; the texts have a log-normal number of words, 5 to 200. All train with fused AdamW, clipped gradients and
batches of 32, and start from the same weights. mmhub's encoder computes real tokens only; "padded" is the same encoder
without that, as any other model would be written, with the padding masked in the attention.

- `mmhub.train` on a recipe. Its training seconds are those of the loop, from first batch to last step; what comes
  before (reading the table, training the tokenizer, measuring) and after (saving) is in the total.
- A plain loop over mmhub's batches, tokenized beforehand, which is not counted.
- Trainer, with its default batching and with `group_by_length`, padded; tokenized beforehand as well.
- Trainer with the packed encoder: what is left for mmhub to gain where only the model is taken from it.
- Trainer with transformers' BertForSequenceClassification of that size.

Rounds are interleaved, and the table has medians. Before them, the losses of 50 steps of mmhub are compared with those
of the plain loops: the speed must not come from other mathematics.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmhub
from mmhub.batch import Batch, Features, Items, pad_sequences
from mmhub.build import build_model
from mmhub.config import check_recipe
from mmhub.data.lengths import Lengths, measure_rows
from mmhub.data.plan import plan_epoch
from mmhub.data.sources import open_rows
from mmhub.interfaces import Policy, find_task
from mmhub.layers import attention_mask as attention_mask_of
from mmhub.layers import sinusoidal_positions
from mmhub.model import Columns, Model
from mmhub.optim import learning_rate_factor

BATCH, SEED, LABELS, WORDS = 32, 0, 4, 8000
RATE, DECAY, CLIP = 3e-4, 0.01, 1.0
GAP = 1e-5  # between losses of the same mathematics, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows", default="2000", help="number of texts; several, with a comma between, make a table each"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--without", action="append", default=[], help="leave a way out, by the start of its name")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    report = _facts(options)
    for rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["MMHUB_CACHE"] = str(Path(temporary) / "cache")
            found = _measure(Work(Path(temporary), rows, options.epochs), options)
        report += ["", f"## {rows} texts", "", *found]
    text = "\n".join(report) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _facts(options: argparse.Namespace) -> list[str]:
    from importlib.metadata import version
    from importlib.util import find_spec

    libraries = filter(find_spec, ("mmhub", "torch", "transformers", "accelerate", "tokenizers"))
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    machine = f"{os.cpu_count()} cores of {cpu}, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}"
    command = shlex.join(["python", "benchmarks/train_text.py", *sys.argv[1:]])
    return [
        "# Training a text classifier",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_commit()}",
        f"- command: `{command}` (rounds: {options.rounds}, epochs: {options.epochs})",
        f"- machine: {machine} at the start; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in libraries)}",
    ]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Work:
    """The data, the initial model, and every way to train it. A way returns (seconds of training, seconds in all)."""

    def __init__(self, folder: Path, rows: int, epochs: int) -> None:
        self.folder, self.epochs = folder, epochs
        _write_table(folder / "train.jsonl", rows)
        self.rows = open_rows(str(folder / "train.jsonl"))
        self.recipe = check_recipe(self.table(log_every=1))
        self.model = _build(self.recipe, self.rows)
        self.lengths = measure_rows(self.rows, self.model.processors, self.model.encoders, {"text": "text"}, Policy())
        known = self.lengths.read["text"]
        self.ids = [(known.row(i) or [torch.zeros(0)])[0] for i in range(len(self.rows))]
        self.targets = self.model.decoder.encode_targets(list(self.rows.column("label")))
        self.runs = 0

    def table(self, log_every: int, **train: Any) -> dict[str, Any]:
        """A recipe: nothing in it but the model's size and what is the same for all."""
        return {
            "task": "classification",
            "seed": SEED,
            "model": {
                "encoders": {"text": {"use": "transformer", "config": {"dropout": 0.0, "word_dropout": 0.0}}},
                "decoder": {"use": "classification", "config": {"dropout": 0.0}},
                "tokenizer": {"kind": "word", "vocab_size": WORDS},
            },
            "data": {"train": str(self.folder / "train.jsonl"), "inputs": {"text": "text"}, "target": "label"},
            "train": {
                "epochs": self.epochs,
                "batch_size": BATCH,
                "learning_rate": RATE,
                "weight_decay": DECAY,
                "clip_norm": CLIP,
                "checkpoint_every": 10**6,
                "log_every": log_every,
            }
            | train,
        }

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(len(self.rows), lengths=self.lengths, batch_size=BATCH, seed=SEED, epoch=epoch)

    def padding(self) -> dict[str, float]:
        """Padded tokens for each real one: mmhub's batches, and batches at random."""
        sizes = np.array([len(ids) for ids in self.ids])
        shuffled = plan_epoch(len(sizes), batch_size=BATCH, seed=SEED, epoch=0)
        plans = {"by length": self.plan(0), "at random": shuffled}
        return {name: sum(len(b) * sizes[b].max() for b in plan) / sizes.sum() for name, plan in plans.items()}

    # -- mmhub

    def ours(self) -> tuple[float, float]:
        out = self.run_folder()
        begin = time.perf_counter()
        done = mmhub.train(self.table(log_every=self.total_steps()), out)
        total = time.perf_counter() - begin
        (line,) = _logged(done.out)
        return line["seconds"], total

    def our_losses(self, steps: int) -> list[float]:
        out = self.run_folder()
        mmhub.train(self.table(log_every=1, max_steps=steps), out)
        return [line["loss"] for line in _logged(out)]

    def run_folder(self) -> Path:
        self.runs += 1
        return self.folder / f"run-{self.runs}"

    # -- a plain loop

    def plain(self, model: torch.nn.Module) -> tuple[float, float]:
        begin = time.perf_counter()
        for _ in self.plain_losses(model, self.total_steps()):
            pass
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def total_steps(self) -> int:
        return math.ceil(len(self.rows) / BATCH) * self.epochs

    def plain_losses(self, model: torch.nn.Module, steps: int) -> Iterator[float]:
        """Train as anybody would by hand, on mmhub's batches; yield the loss of each step."""
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
        order = [batch for epoch in range(self.epochs) for batch in self.plan(epoch)]
        model.train()
        for step, rows in enumerate(order[:steps]):
            for group in optimizer.param_groups:
                group["lr"] = RATE * learning_rate_factor(step, steps, self.recipe)
            ids, mask = pad_sequences([self.ids[i] for i in rows])
            loss = model(ids, mask, self.targets[rows])["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())

    # -- Trainer

    def trainer(self, model: torch.nn.Module, sampling: str) -> tuple[float, float]:
        from transformers import Trainer, TrainingArguments

        out = self.run_folder()
        arguments = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=BATCH,
            num_train_epochs=self.epochs,
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
        data = [
            {"input_ids": ids, "labels": target, "length": len(ids)}
            for ids, target in zip(self.ids, self.targets, strict=True)
        ]
        begin = time.perf_counter()
        done = Trainer(model=model, args=arguments, train_dataset=data, data_collator=_collate).train()  # type: ignore[arg-type]
        return float(done.metrics["train_runtime"]), time.perf_counter() - begin

    def packed(self) -> torch.nn.Module:
        return _Packed(copy.deepcopy(self.model))

    def padded(self) -> torch.nn.Module:
        return _Padded(copy.deepcopy(self.model))

    def bert(self) -> torch.nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(SEED)
        config = BertConfig(
            vocab_size=self.model.processors["text"].vocab_size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: torch.nn.Module = BertForSequenceClassification(config)
        return model


class _Packed(torch.nn.Module):
    """The model, called as Trainer calls."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        count = len(input_ids)
        items = {"text": Items(input_ids, attention_mask.bool(), torch.arange(count), count)}
        output = self.model(Batch(items, count, labels))
        assert output.loss is not None
        return {"loss": output.loss, "logits": output.logits}


class _Padded(_Packed):
    """The same layers over all positions."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        encoder: Any = self.model.encoders["text"]
        mask = attention_mask.bool()
        attend = attention_mask_of(mask)
        x = encoder.embed(input_ids) * encoder.dim**0.5 + sinusoidal_positions(input_ids.shape[1], encoder.dim)
        for block in encoder.layers.blocks:
            x = block(x, attend)
        tokens = encoder.layers.norm(x) * mask.unsqueeze(-1)
        output = self.model.decode({"text": Features(tokens, mask)}, labels)
        assert output.loss is not None
        return {"loss": output.loss, "logits": output.logits}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What transformers' DataCollatorWithPadding does, which wants a tokenizer of its own."""
    ids, mask = pad_sequences([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.stack([row["labels"] for row in rows])}


def _build(recipe: Any, rows: Any) -> Model:
    columns = Columns({"text": "text"}, "label")
    values: Callable[[str], Any] = lambda name: rows.column("label" if name == "target" else "text")  # noqa: E731
    return build_model(find_task("classification"), recipe.model, values, columns=columns, seed=recipe.seed)


def _write_table(path: Path, rows: int) -> None:
    """Texts of made-up words, frequent ones first as in real text; a third of the words tell the label."""
    draw, numbers = random.Random(SEED), np.random.default_rng(SEED)
    counts = numbers.lognormal(3.5, 0.8, rows).clip(5, 200).astype(int)
    with path.open("w") as file:
        for count in counts:
            label = draw.randrange(LABELS)
            places = np.minimum(numbers.pareto(0.8, count) * 20, WORDS // 2 - 1).astype(int)
            words = [f"w{p}" if draw.random() < 0.67 else f"w{p % 400 * LABELS + label + WORDS}" for p in places]
            file.write(json.dumps({"text": " ".join(words), "label": f"c{label}"}) + "\n")


def _measure(work: Work, options: argparse.Namespace) -> list[str]:
    lengths: Lengths = work.lengths
    sizes, padding = lengths.tokens["text"], work.padding()
    steps = min(50, work.total_steps())
    ours = work.our_losses(steps)
    gaps = [_gap(ours, list(work.plain_losses(model, steps))) for model in (work.packed(), work.padded())]
    if not all(gap <= GAP for gap in gaps):
        raise SystemExit(f"the losses of mmhub and of the plain loops differ by {max(gaps):.1e}, more than {GAP:.0e}")
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "mmhub": work.ours,
        "plain loop, mmhub's batches": lambda: work.plain(work.packed()),
        "plain loop, mmhub's batches, padded": lambda: work.plain(work.padded()),
        "Trainer, default batching, padded": lambda: work.trainer(work.padded(), "random"),
        "Trainer, group_by_length, padded": lambda: work.trainer(work.padded(), "group_by_length"),
        "Trainer, default batching, packed encoder": lambda: work.trainer(work.packed(), "random"),
        "BERT with Trainer, default batching": lambda: work.trainer(work.bert(), "random"),
        "BERT with Trainer, group_by_length": lambda: work.trainer(work.bert(), "group_by_length"),
    }
    ways = {name: way for name, way in ways.items() if not name.startswith(tuple(options.without) or ("-",))}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name, way in ways.items():
            times[name].append(way())
            print(f"round {turn + 1}, {name}: {times[name][-1][0]:.2f} s", file=sys.stderr)
    medians = {name: statistics.median(seconds for seconds, _ in found) for name, found in times.items()}
    samples = len(work.rows) * options.epochs
    lines = [
        f"{len(work.rows)} texts of {sizes.min()} to {sizes.max()} tokens, {sizes.mean():.0f} on average.",
        f"Vocabulary {work.model.processors['text'].vocab_size}; {work.total_steps()} steps of {BATCH} texts.",
        "Padded tokens for each real one: " + ", ".join(f"{ratio:.3f} {name}" for name, ratio in padding.items()) + ".",
        f"Largest difference between the losses of mmhub and of the plain loop in {steps} steps: {gaps[0]:.1e};",
        f"and of the plain loop over padded tokens: {gaps[1]:.1e}.",
        "",
        "| | training, median s | texts/s | mmhub is faster by | start to end, median s | all rounds, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in times.items():
        total = statistics.median(seconds for _, seconds in found)
        all_of_them = " ".join(f"{seconds:.1f}" for seconds, _ in found)
        ratio = f"{medians[name] / medians['mmhub']:.2f}x" if "mmhub" in medians else ""
        lines.append(
            f"| {name} | {medians[name]:.2f} | {samples / medians[name]:.1f} | {ratio} | {total:.2f} | {all_of_them} |"
        )
    return lines


def _logged(out: Path) -> list[dict[str, Any]]:
    """The lines of training in metrics.jsonl."""
    return [line for line in map(json.loads, _lines(str(out / "metrics.jsonl"))) if "loss" in line]


def _gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
