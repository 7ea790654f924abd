"""`mmhub eval`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from mmhub.cli.options import columns_options, device_option, parse_mapping, parse_names, urls_option
from mmhub.cli.output import emit, json_option, quiet_option, table


@click.command(name="eval")
@click.argument("name")
@click.option("--data", required=True, help="Held-out data: a table, a folder, or a Hub dataset id.")
@columns_options
@click.option("--target-column", metavar="COL", help="The column that holds the truth.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--no-subsets", is_flag=True, help="Only all inputs together, not each subset of them.")
@device_option
@urls_option
@quiet_option
@json_option
def evaluate(
    name: str,
    data: str,
    inputs: str | None,
    columns: str | None,
    target_column: str | None,
    batch_size: int,
    on_error: str,
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
        skip=on_error == "skip",
        policy=Policy(urls=allow_urls),
        progress=_watch(quiet),
    )
    source: Any = sorted(data.split(",")) if "," in data and not Path(data).exists() else data
    model = load(name, device=device)
    report = run(
        model, source, inputs=mapping, target=target_column or "", columns=parse_names(columns), options=options
    )
    emit(report, as_json, _text(report))


def _watch(quiet: bool) -> Any:
    from tqdm import tqdm

    def watch(parts: Iterator[Any], total: int) -> Iterator[Any]:
        off = quiet or not sys.stderr.isatty()
        yield from tqdm(parts, total=total, desc="evaluating", unit="batch", leave=False, disable=off)

    return watch


def _text(report: dict[str, Any]) -> str:
    rows = [("all rows", report["rows"], report["metrics"])]
    rows += [(name, values["rows"], values) for name, values in report["subsets"].items()]
    if len(rows) == 2:  # one modality: its subset is everything
        rows.pop()
    names = list(report["metrics"])
    text = table(["inputs", "rows", *names], [[k, n, *(f"{v[x]:.4f}" for x in names)] for k, n, v in rows])
    return text + (f"\n{report['skipped']} unreadable rows were skipped" if report["skipped"] else "")
