"""`mmhub bench`: how fast this machine trains standard cases, on data made on the fly."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.errors import Interrupted, MmhubError, UsageError
from mmhub.files import write_file
from mmhub.records import cause
from mmhub.registry import find_component

if TYPE_CHECKING:
    from mmhub.engine import TrainResult

Table = dict[str, Any]
_CLASSES = 4
_TEXT_TOY = {"dim": 32, "depth": 1, "heads": 2}
_TEXT = {"dim": 256, "depth": 4, "heads": 4}
_TEXT_GPU = {"dim": 768, "depth": 12, "heads": 12}


@dataclass(frozen=True)
class Case:
    """One thing to measure: a model and how much of what to train it on, by size."""

    name: str
    summary: str
    encoder: Callable[[str], tuple[str, Table]]  # size -> modality, its table in a recipe
    rows: dict[str, int]
    train: dict[str, Table]


def _text(size: str) -> tuple[str, Table]:
    config = {"toy": _TEXT_TOY, "small": _TEXT, "gpu": _TEXT_GPU}[size]
    return "text", {"use": "transformer", "config": config}


def _image(size: str) -> tuple[str, Table]:
    architecture, pixels = {
        "toy": ("test_resnet", 32),
        "small": ("resnet18", 96),
        "gpu": ("vit_base_patch16_224", 224),
    }[size]
    return "image", {"use": "timm", "config": {"architecture": architecture, "image_size": pixels}}


def _frozen(size: str) -> tuple[str, Table]:
    modality, part = _text(size)
    return modality, part | {"freeze": True}


CASES = {
    case.name: case
    for case in (
        Case(
            "text",
            "transformer on texts of 5 to 200 words",
            _text,
            {"toy": 64, "small": 256, "gpu": 32768},
            {"toy": {"batch_size": 16}, "small": {"batch_size": 32}, "gpu": {"batch_size": 256}},
        ),
        Case(
            "image",
            "convolutions (gpu: ViT-B/16) on JPEG files",
            _image,
            {"toy": 64, "small": 192, "gpu": 8192},
            {"toy": {"batch_size": 16}, "small": {"batch_size": 32}, "gpu": {"batch_size": 256}},
        ),
        Case(
            "frozen",
            "a head on a frozen text transformer, five epochs",
            _frozen,
            {"toy": 64, "small": 256, "gpu": 16384},
            {"toy": {"batch_size": 16}, "small": {"batch_size": 32}, "gpu": {"batch_size": 256}},
        ),
    )
}
_EPOCHS = {"frozen": 5}
_COLUMNS = {
    "samples_per_second": "samples/s",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "data_wait_share": "data wait",
    "padding_share": "padding",
    "memory_gb": "memory GB",
    "whole_samples_per_second": "whole run samples/s",
}


@click.command()
@click.option(
    "--size", type=click.Choice(["toy", "small", "gpu"]), help="[default: gpu where there is one, else small]"
)
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Only this case (repeatable).")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a recipe key in every case.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the table to this Markdown file.")
@quiet_option
@json_option
@click.pass_context
def bench(
    context: click.Context,
    size: str | None,
    names: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure how fast this machine trains standard models.

    The data is made here; nothing is downloaded or kept. Rates are medians over the run without its start; the rate of
    the whole run has everything in it: start, epochs, caching, saving. docs/watching.md explains the columns.
    """
    usable, results = _usable(names or tuple(CASES), size or "toy")
    if usable:
        from mmhub.device import find_device

        size = size or ("gpu" if find_device().type == "cuda" else "small")
    for name in usable:
        note(f"{name}: {CASES[name].summary} ...", quiet)
        results[name] = _measure(CASES[name], size or "small", overrides)
    rows = [results[name] for name in names or CASES]
    facts = _facts(size or "small", names, overrides, bool(usable))
    emit(facts | {"cases": rows}, as_json, _human(facts, rows))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_file(out, _markdown(facts, rows))
        except OSError as error:
            raise UsageError(f"'{out}' cannot be written: {cause(error)}", "name another file with --out") from None
    if all("problem" in row for row in rows):
        context.exit(1)


def _usable(names: tuple[str, ...], size: str) -> tuple[list[str], dict[str, Table]]:
    """Cases whose parts are installed, looked up before torch loads, and what the others lack."""
    usable, lacking = [], {}
    for name in names:
        modality, part = CASES[name].encoder(size)
        try:
            find_component(f"{modality}_encoder", part["use"])
            find_component("decoder", "classification")
            usable.append(name)
        except MmhubError as error:
            lacking[name] = _problem(name, error)
    return usable, lacking


def _problem(name: str, error: Exception) -> Table:
    if not isinstance(error, MmhubError):
        return {"case": name, "problem": cause(error)}
    return {"case": name, "problem": f"{error.message}{f'; {error.hint}' if error.hint else ''}"}


def _measure(case: Case, size: str, overrides: tuple[str, ...]) -> Table:
    import torch

    from mmhub.engine import train

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="mmhub-bench-") as temporary, _cache_in(temporary):
        folder = Path(temporary)
        try:
            recipe = _recipe(case, size, folder)
            start = time.perf_counter()
            result = train(recipe, folder / "run", overrides=overrides)
            seconds = time.perf_counter() - start
            return {"case": case.name} | _figures(result, case.rows[size], seconds)
        except Interrupted:
            raise
        except Exception as error:  # a compiler or a library, say; the other cases are still worth their time
            return _problem(case.name, error)


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Keep features in `folder`, so that none of an earlier run are found, and none stay."""
    before = os.environ.get("MMHUB_CACHE")
    os.environ["MMHUB_CACHE"] = os.path.join(folder, "cache")
    try:
        yield
    finally:
        del os.environ["MMHUB_CACHE"]
        if before is not None:
            os.environ["MMHUB_CACHE"] = before


def _recipe(case: Case, size: str, folder: Path) -> Table:
    """Write the data of a case and return what to train on it."""
    modality, part = case.encoder(size)
    rows, options = case.rows[size], case.train[size]
    write = _write_texts if modality == "text" else _write_images
    write(folder / "train.parquet", rows, part["config"].get("image_size", 0))
    epochs = _EPOCHS.get(case.name, 1)
    steps = math.ceil(rows / options["batch_size"]) * epochs
    return {
        "task": "classification",
        "model": {"encoders": {modality: part}, "tokenizer": {"kind": "word"}},
        "data": {"train": str(folder / "train.parquet"), "target": "label"},
        "train": options | {"epochs": epochs, "learning_rate": 1e-4, "log_every": max(1, steps // 12)},
    }


def _write_texts(path: Path, rows: int, _: int) -> None:
    """Texts of words from a vocabulary of 2,000, with log-normal lengths from 5 to 200 as real ones have."""
    draw = random.Random(0)
    found = []
    for row in range(rows):
        length = min(200, max(5, round(draw.lognormvariate(3.4, 0.8))))
        words = (f"w{int(2000 * draw.random() ** 3)}" for _ in range(length))
        found.append({"text": " ".join(words), "label": f"c{row % _CLASSES}"})
    _write(path, found)


def _write_images(path: Path, rows: int, pixels: int) -> None:
    """JPEG files of smooth noise; 64 different ones, for their content is of no matter."""
    import numpy as np
    from PIL import Image

    draw, files = np.random.default_rng(0), []
    for _ in range(64):
        coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((pixels * 5 // 4, pixels), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    _write(path, [{"image": files[row % 64], "label": f"c{row % _CLASSES}"} for row in range(rows)])


def _write(path: Path, rows: list[Table]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def _figures(result: TrainResult, rows: int, seconds: float) -> Table:
    lines = list(_lines(result.out))
    speeds = [line["speed"] for line in lines]
    speeds = speeds[1:] or speeds  # the first holds what happens once
    keys = [key for key in _COLUMNS if any(key in speed for speed in speeds)]
    found = {key: statistics.median(speed[key] for speed in speeds if key in speed) for key in keys}
    epochs = lines[-1]["epoch"] / lines[-1]["step"] * result.steps if lines else 0.0
    found["whole_samples_per_second"] = epochs * rows / seconds
    rounded: Table = {key: float(f"{value:.5g}") for key, value in found.items()}
    return rounded | {"steps": result.steps, "seconds": round(seconds, 2)}


def _lines(folder: Path) -> Iterator[Table]:
    """The log lines with a speed."""
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line.get("speed"):
            yield line


def _facts(size: str, names: tuple[str, ...], overrides: tuple[str, ...], measured: bool) -> Table:
    from datetime import UTC, datetime
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("mmhub", "torch", "timm", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    hardware = ""
    if measured:
        from mmhub.engine.provenance import hardware as describe

        hardware = describe()
    chosen = [("--size", size), *(("--case", name) for name in names), *(("--set", change) for change in overrides)]
    return {
        "size": size,
        "set": list(overrides),
        "command": shlex.join(["mmhub", "bench", *(word for pair in chosen for word in pair)]),
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "hardware": hardware,
        "versions": versions,
    }


def _commit() -> str:
    """The commit of mmhub's own checkout; '' where it is installed from a package."""
    from mmhub.lineage import code_state

    root = Path(__file__).parents[2]
    code = (code_state(root) if (root / ".git").exists() else None) or {}
    return code.get("commit", "")[:12] + ("-dirty" if code.get("dirty") else "")


def _human(facts: Table, rows: list[Table]) -> str:
    measured = [row for row in rows if "problem" not in row]
    lines = [table(["case", *_titles(measured)], [[row["case"], *_cells(row, measured)] for row in measured])]
    lines += [f"{row['case']}: not measured: {row['problem']}" for row in rows if "problem" in row]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines.append(f"size {facts['size']}; {facts['hardware'] or 'nothing measured'}; {versions}")
    return "\n".join(line for line in lines if line)


def _markdown(facts: Table, rows: list[Table]) -> str:
    measured = [row for row in rows if "problem" not in row]
    titles = ["case", *_titles(measured)]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# mmhub bench",
        "",
        f"- date: {facts['date']}; commit: {facts['commit'] or 'unknown'}",
        f"- command: `{facts['command']}`",
        f"- machine: {facts['hardware']}",
        f"- versions: {versions}",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
        *(f"| {' | '.join([row['case'], *_cells(row, measured)])} |" for row in measured),
    ]
    lines += ["", *(f"{row['case']}: not measured: {row['problem']}" for row in rows if "problem" in row)]
    return "\n".join(lines).rstrip() + "\n"


def _titles(rows: list[Table]) -> list[str]:
    return [title for key, title in _COLUMNS.items() if any(key in row for row in rows)]


def _cells(row: Table, rows: list[Table]) -> list[str]:
    keys = [key for key in _COLUMNS if any(key in other for other in rows)]
    return [_cell(key, row[key]) if key in row else "-" for key in keys]


def _cell(key: str, value: float) -> str:
    return (
        f"{value:.1%}"
        if key == "mfu" or key.endswith("_share")
        else f"{value:,.4g}"
        if value < 1e4
        else f"{value:,.0f}"
    )
