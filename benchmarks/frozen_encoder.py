"""Train a head on a frozen text encoder for 5 epochs: mmhub, and beside it the Trainer of transformers.

    python benchmarks/frozen_encoder.py [--encoder FOLDER] [--rows 2000] [--rounds 3] [--out table.md]

The encoder is a BERT of 4 layers x 256 with random weights, or the transformers folder given. Texts are made up: their
lengths are log-normal from 5 to 200 words, and one word in three tells the class. All ways do the same work: the
encoder without dropout, the mean of its tokens, dropout 0.1 and one linear layer; AdamW at a constant rate, batches of
32, fp32, an evaluation after each epoch. The Trainer pads each batch to its longest text, as it does by default.

Each run is a process of its own; ways take turns. Seconds are from the first line of data to the last accuracy, without
the import of the libraries. mmhub starts without kept features, save where the table says so. Needs `accelerate`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

EPOCHS, BATCH, RATE, DECAY, DROPOUT = 5, 32, 2e-2, 0.01, 0.1
CLASSES = 4
WAYS = {
    "trainer": "Trainer",
    "mmhub": "mmhub",
    "again": "mmhub, features kept by an earlier run",
    "uncached": "mmhub, `cache_features = false`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", type=Path, help="a transformers folder, such as all-MiniLM-L6-v2")
    parser.add_argument("--rows", type=int, default=2000, help="training texts; a fifth as many are held out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(_train(options.way, options.work)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        _make_data(work, options.rows)
        _make_encoder(work / "encoder", options.encoder)
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            shutil.rmtree(work / "cache", ignore_errors=True)
            for way in WAYS:
                found[way].append(_run(way, work))
    text = "\n".join([*_facts(options), "", *_table(found)]) + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _run(way: str, work: Path) -> dict[str, float]:
    shutil.rmtree(work / "run", ignore_errors=True)
    command = [sys.executable, __file__, "--way", way, "--work", str(work)]
    environment = os.environ | {"MMHUB_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _train(way: str, work: Path) -> dict[str, float]:
    for module in ("transformers.models.bert.modeling_bert", "transformers.trainer", "accelerate"):
        import_module(module)
    return _trainer(work) if way == "trainer" else _mmhub(work, cached=way != "uncached")


def _mmhub(work: Path, *, cached: bool) -> dict[str, float]:
    for module in ("mmhub.engine", "mmhub_text.pretrained"):
        import_module(module)
    import mmhub

    recipe = {
        "task": "classification",
        "model": {
            "encoders": {"text": {"use": "transformers", "init": str(work / "encoder"), "freeze": True}},
            "fusion": {"use": "streams"},
            "decoder": {"use": "classification", "config": {"dropout": DROPOUT}},
        },
        "data": {"train": str(work / "train.jsonl"), "valid": str(work / "valid.jsonl"), "target": "label"},
        "train": {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "weight_decay": DECAY,
            "schedule": "constant",
            "warmup": 0.0,
            "precision": "fp32",
            "cache_features": cached,
        },
    }
    begin = time.perf_counter()
    result = mmhub.train(recipe, work / "run")
    return {"seconds": time.perf_counter() - begin, "accuracy": result.metrics["accuracy"]}


def _trainer(work: Path) -> dict[str, float]:
    import torch
    from torch import nn
    from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(work / "encoder", dtype=torch.float32).requires_grad_(False)
            self.drop = nn.Dropout(DROPOUT)
            self.layer = nn.Linear(self.encoder.config.hidden_size, CLASSES)

        def train(self, mode: bool = True) -> Head:
            super().train(mode)
            self.encoder.eval()
            return self

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
            with torch.no_grad():
                states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(states.dtype)
            logits = self.layer(self.drop((states * mask).sum(1) / mask.sum(1)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(work / "encoder")
    limit = min(tokenizer.model_max_length, 512)
    tables = {}
    for name in ("train", "valid"):
        rows = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=limit)
        tables[name] = [
            {"input_ids": ids, "attention_mask": mask, "labels": int(row["label"][1:])}
            for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], rows, strict=True)
        ]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(work / "run"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        learning_rate=RATE,
        weight_decay=DECAY,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=Head(),
        args=arguments,
        train_dataset=tables["train"],
        eval_dataset=tables["valid"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    trainer.train()
    last = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1]
    return {"seconds": time.perf_counter() - begin, "accuracy": last}


def _make_data(work: Path, rows: int) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    common, own = [f"word{i}" for i in range(2000)], 20
    for name, count in (("train", rows), ("valid", rows // 5)):
        lengths = np.clip(np.exp(rng.normal(3.4, 0.8, count)).round(), 5, 200).astype(int)
        with (work / f"{name}.jsonl").open("w") as file:
            for i, length in enumerate(lengths):
                label = i % CLASSES
                telling = rng.random(length) < 1 / 3
                words = np.where(
                    telling, rng.integers(label * own, (label + 1) * own, length), rng.integers(0, 2000, length)
                )
                text = " ".join(common[word] for word in words)
                file.write(json.dumps({"text": text, "label": f"c{label}"}) + "\n")


def _make_encoder(folder: Path, given: Path | None) -> None:
    if given is not None:
        shutil.copytree(given, folder)
        return
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    words = special | {f"word{i}": i + len(special) for i in range(2000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=256,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def _facts(options: argparse.Namespace) -> list[str]:
    from importlib.metadata import version

    libraries = ("mmhub", "torch", "transformers", "accelerate")
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    machine = f"{os.cpu_count()} x {_cpu_model()}, OMP_NUM_THREADS={threads}"
    given = " --encoder FOLDER" if options.encoder else ""
    encoder = options.encoder.name if options.encoder else "BERT of 4 layers x 256, random weights"
    return [
        "# A head on a frozen encoder",
        "",
        f"- date: {datetime.now(UTC):%Y-%m-%d}; commit: {_commit()}",
        f"- command: `python benchmarks/frozen_encoder.py{given} --rows {options.rows} --rounds {options.rounds}`",
        f"- machine: {machine}; load {os.getloadavg()[0]:.1f} at the end; {_gpu()}; Python {platform.python_version()}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in libraries)}",
        f"- encoder: {encoder}; {options.rows} training texts, {options.rows // 5} held out, {EPOCHS} epochs",
    ]


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    def middle(way: str, key: str) -> float:
        return statistics.median(run[key] for run in found[way])

    lines = ["| way | s, median | min | faster than Trainer | accuracy, median |", "|---|---|---|---|---|"]
    for way, title in WAYS.items():
        seconds = middle(way, "seconds")
        fastest = min(run["seconds"] for run in found[way])
        ratio = middle("trainer", "seconds") / seconds
        lines.append(f"| {title} | {seconds:.2f} | {fastest:.2f} | {ratio:.1f}x | {middle(way, 'accuracy'):.3f} |")
    return lines


if __name__ == "__main__":
    main()
