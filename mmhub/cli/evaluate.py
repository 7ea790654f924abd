"""`mmhub eval`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mmhub.cli.options import columns_options, device_option, parse_mapping, parse_names, urls_option
from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.errors import UsageError


@click.command(name="eval")
@click.argument("name")
@click.option("--data", required=True, help="Held-out data: a table, a folder, or a Hub dataset id.")
@click.option("--target", metavar="FILE", help="The other side of parallel text, line by line.")
@columns_options
@click.option("--target-column", metavar="COL", help="The column that holds the truth.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--document", metavar="RULE", help="What one text is to a language model: row, file, blank-line, ^REGEX.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a language model sees at once; its context.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows over a long text. Default: half.")
@click.option("--no-subsets", is_flag=True, help="Only all inputs together, not each subset of them.")
@device_option
@urls_option
@quiet_option
@json_option
def evaluate(
    name: str,
    data: str,
    target: str | None,
    inputs: str | None,
    columns: str | None,
    target_column: str | None,
    batch_size: int,
    on_error: str,
    document: str | None,
    window: int | None,
    stride: int | None,
    no_subsets: bool,
    device: str,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the model NAME on held-out data, with all inputs and with every subset of them."""
    mapping = parse_mapping(inputs, "--inputs")
    from mmhub.evaluation import EvalOptions
    from mmhub.evaluation import evaluate as run
    from mmhub.hub import load
    from mmhub.interfaces import Policy

    options = EvalOptions(
        batch_size=batch_size,
        subsets=not no_subsets,
        document=document or "",
        window=window or 0,
        stride=stride or 0,
        skip=on_error == "skip",
        policy=Policy(urls=allow_urls),
        progress=_watch(quiet),
    )
    source: Any = sorted(data.split(",")) if "," in data and not Path(data).exists() else data
    model = load(name, device=device)
    if target is not None:
        source = _parallel(model, data, target)
    report = run(
        model, source, inputs=mapping, target=target_column or "", columns=parse_names(columns), options=options
    )
    for text in [report["definition"]] if "definition" in report else _signatures(report["metrics"]):
        note(text, quiet)
    emit(report, as_json, _text(report))


def _parallel(model: Any, source: str, target: str) -> dict[str, str]:
    """The two sides of parallel text, as a table with the columns that the model was trained with."""
    if not model.task.writes or model.task.reads_text:
        raise UsageError(
            f"--target is for models that turn a text into another, and this one is for {model.task.name}",
            "name a table with --data alone",
        )
    column = model.columns.inputs.get("text") or model.task.inputs.get("text")
    named = model.columns.target or model.task.target
    if not isinstance(column, str) or not named or column == named:
        raise UsageError("--target is for models that turn a text into another", "name a table with --data alone")
    return {column: source, named: target}


def _signatures(metrics: dict[str, Any]) -> list[str]:
    """How metrics were computed, where they say so."""
    return [f"{key.removesuffix('_signature')}: {text}" for key, text in metrics.items() if isinstance(text, str)]


def _watch(quiet: bool) -> Any:
    from tqdm import tqdm

    def watch(parts: Iterator[Any], total: int) -> Iterator[Any]:
        off = quiet or not sys.stderr.isatty()
        yield from tqdm(parts, total=total, desc="evaluating", unit="batch", leave=False, disable=off)

    return watch


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _text(report: dict[str, Any]) -> str:
    from mmhub.metrics import flat

    rows = [("all rows", report["rows"], report["metrics"])]
    rows += [(name, values["rows"], values) for name, values in report["subsets"].items()]
    if len(rows) == 2:  # one modality: its subset is everything
        rows.pop()
    names = list(flat(report["metrics"]))
    known = [(name, count, flat(values)) for name, count, values in rows]
    text = table(["inputs", "rows", *names], [[k, n, *(_cell(v.get(x)) for x in names)] for k, n, v in known])
    return text + (f"\n{report['skipped']} unreadable rows were skipped" if report["skipped"] else "")
