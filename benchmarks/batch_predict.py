"""Classify the texts of a parquet file into another one with transformers' pipeline and with `mmhub predict`.

    python benchmarks/batch_predict.py [--rows 4000] [--rounds 3] [--out benchmarks/results/batch_predict.md]

The model is a BERT of 6 layers x 384 (all-MiniLM's shape) with random weights and two labels, in transformers' layout,
in fp32, read by both from the same folder; its WordPiece vocabulary is learned from the texts. These are words of
WikiText-2 in `MMHUB_SHARED` (made-up ones without it), log-normal in number, 5 to 200.

- transformers' `pipeline("text-classification")` over a `KeyDataset`, with several batch sizes, the rows as they come.
- The same, with the rows sorted by length before and put back into order after: what a user does who knows how.
- `mmhub predict FOLDER --data texts.parquet --out scores.parquet`, without further options.

Each is a process of its own. "work" is from the first row read to the last one written, models loaded and libraries
imported before; "in all" is from the start of the process to its end. Rounds are interleaved; the table has medians.
The scores of all ways must be the same to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEED, GAP = 0, 1e-4
LAYERS, WIDTH = 6, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000, help="number of texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,8,32,64", help="of the pipeline")
    parser.add_argument("--tokens", default="", help="also run mmhub with these --batch-tokens")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--child", nargs=5, metavar=("FOLDER", "DATA", "SCORES", "BATCH", "SORTED"), help="internal")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_pipeline(*options.child)))
        return
    from benchmarks.train_text import _facts

    options.epochs = 1
    report = _facts(options)
    report[0] = "# Predicting a table of texts"
    with tempfile.TemporaryDirectory() as temporary:
        report += ["", *_measure(Path(temporary), options)]
    text = "\n".join(report).replace("benchmarks/train_text.py", "benchmarks/batch_predict.py")
    text = text.replace(", epochs: 1)", ")") + "\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def _texts(rows: int) -> list[str]:
    """Neighbouring words of WikiText-2, as many as a log-normal draw says."""
    draw, numbers = random.Random(SEED), np.random.default_rng(SEED)
    shared = Path(os.environ.get("MMHUB_SHARED", Path(__file__).parents[2] / "shared"))
    source = shared / "data" / "wikitext2-small" / "train.txt"
    words = source.read_text().split() if source.exists() else [f"w{draw.randrange(5000)}" for _ in range(100_000)]
    counts = numbers.lognormal(3.5, 0.8, rows).clip(5, 200).astype(int).tolist()
    starts = [draw.randrange(len(words) - count) for count in counts]
    return [" ".join(words[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _write_model(folder: Path, texts: Sequence[str]) -> None:
    """A BERT for two labels with random weights, wide enough that scores differ, and its tokenizer."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    learned = BertWordPieceTokenizer()
    learned.train_from_iterator(texts, vocab_size=8000, show_progress=False)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    learned.enable_truncation(512)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, model_max_length=512, **names)
    torch.manual_seed(SEED)
    size = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 12, "intermediate_size": 1536}
    config = BertConfig(vocab_size=learned.get_vocab_size(), initializer_range=0.1, num_labels=2, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pipeline(folder: str, data: str, scores: str, batch: str, by_length: str) -> dict[str, float]:
    """What a user writes around transformers' pipeline; returns the seconds of the work."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import pipeline
    from transformers.pipelines.pt_utils import KeyDataset

    classify = pipeline("text-classification", model=folder, device="cpu", top_k=None, truncation=True)
    begin = time.perf_counter()
    texts = pq.read_table(data).column("text").to_pylist()
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row])) if by_length == "sorted" else range(len(texts))
    rows = KeyDataset(Dataset.from_dict({"text": [texts[row] for row in order]}), "text")
    found: list[Any] = [None] * len(texts)
    for row, answer in zip(order, classify(rows, batch_size=int(batch)), strict=True):
        found[row] = {part["label"]: part["score"] for part in answer}
    labels = [max(answer, key=answer.__getitem__) for answer in found]
    pq.write_table(pa.table({"label": labels, "scores": found}), scores)
    return {"seconds": time.perf_counter() - begin}


def _ways(folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, list[str], Path]]:
    """Yield name, command and output of each way."""
    model, data = str(folder / "model"), str(folder / "texts.parquet")
    for tokens in ["", *filter(None, options.tokens.split(","))]:
        out = folder / f"mmhub-{tokens}.parquet"
        extra = ["--batch-tokens", tokens] if tokens else []
        command = ["-m", "mmhub", "predict", model, "--data", data, "--out", str(out), "--json", "-q", *extra]
        yield "mmhub predict" + (f" --batch-tokens {tokens}" if tokens else ""), command, out
    for order in ("as they come", "sorted"):
        for batch in options.batch_sizes.split(","):
            out = folder / f"pipeline-{batch}-{order}.parquet"
            command = [__file__, "--child", model, data, str(out), batch, order]
            yield f"pipeline, batches of {batch}, rows {order}", command, out


def _measure(folder: Path, options: argparse.Namespace) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = _texts(options.rows)
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    _write_model(folder / "model", texts)
    ways = list(_ways(folder, options))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in ways}
    for turn in range(options.rounds):
        for name, command, out in ways:
            out.unlink(missing_ok=True)
            times[name].append(_run(command))
            print(f"round {turn + 1}, {name}: {options.rows / times[name][-1][0]:.1f} rows/s", file=sys.stderr)
    gap = _gap([out for _, _, out in ways])
    if not gap <= GAP:
        raise SystemExit(f"the scores differ by {gap:.1e}, more than {GAP:.0e}")
    return [f"{options.rows} texts. Largest difference between scores: {gap:.1e}.", "", *_table(times, options.rows)]


def _run(command: list[str]) -> tuple[float, float]:
    """Return the seconds of the work, and those of the whole process."""
    begin = time.perf_counter()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(json.loads(done.stdout)["seconds"]), seconds


def _gap(files: Sequence[Path]) -> float:
    import pyarrow.parquet as pq

    tables = [pq.read_table(file).column("scores").to_pylist() for file in files]
    return max(
        abs(score - other[label])
        for table in tables[1:]
        for answer, other in zip(tables[0], table, strict=True)
        for label, score in answer.items()
    )


def _table(times: dict[str, list[tuple[float, float]]], rows: int) -> list[str]:
    medians = {name: [statistics.median(part) for part in zip(*found, strict=True)] for name, found in times.items()}
    ours = medians["mmhub predict"]
    lines = [
        "| | work, rows/s | mmhub is faster by | in all, rows/s | mmhub is faster by | work of all rounds, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, (work, whole) in medians.items():
        each = " ".join(f"{seconds:.1f}" for seconds, _ in times[name])
        speeds = f"{rows / work:.1f} | {work / ours[0]:.2f}x | {rows / whole:.1f} | {whole / ours[1]:.2f}x"
        lines.append(f"| {name} | {speeds} | {each} |")
    return lines


if __name__ == "__main__":
    main()
