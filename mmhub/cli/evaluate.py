"""`mmhub eval`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mmhub.cli.labels import labels_options, read_labels
from mmhub.cli.options import columns_options, device_option, parse_mapping, parse_names, quantize_option, urls_option
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
@click.option("--withhold", multiple=True, metavar="MODALITY", help="Leave an input out of all rows (repeatable).")
@click.option(
    "--top-k", type=click.IntRange(min=2), default=5, show_default=True, help="Best labels that count as one."
)
@click.option("--details", is_flag=True, help="Each label's scores and the confusion matrix; in --json.")
@click.option("--report", "folder", metavar="DIR", help="Write a page with pictures and the worst mistakes.")
@click.option("--against", metavar="DATA", help="Training data: say how many of the rows are in it, too.")
@click.option("--verification", is_flag=True, help="How well vectors tell rows of one label from others: EER.")
@labels_options
@device_option
@quantize_option
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
    withhold: tuple[str, ...],
    top_k: int,
    details: bool,
    folder: str | None,
    against: str | None,
    verification: bool,
    labels: str | None,
    templates: tuple[str, ...],
    device: str,
    quantize: str | None,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure the model NAME on held-out data, with all inputs and with every subset of them.

    Conversations are counted by what each of them holds; their column is named by `--inputs messages=COL`.

    With --labels, a model for retrieval tells them apart, and the column of --target-column holds the truth; of
    `--labels auto` it names them, too.
    """
    mapping = parse_mapping(inputs, "--inputs")
    names = read_labels(labels, templates)
    if names and not target_column:
        raise UsageError("--labels needs the column that holds the truth", "add --target-column NAME")
    if verification:
        _check_verification()
    from mmhub.evaluation import EvalOptions
    from mmhub.evaluation import evaluate as run
    from mmhub.hub import load
    from mmhub.interfaces import Policy
    from mmhub.verification import verify

    if folder is not None:
        from mmhub.report import check_report

        check_report(folder)
    kept: list[Any] = []
    options = EvalOptions(
        batch_size=batch_size,
        subsets=not no_subsets,
        document=document or "",
        window=window or 0,
        stride=stride or 0,
        skip=on_error == "skip",
        policy=Policy(urls=allow_urls),
        progress=_watch(quiet),
        withhold=withhold,
        top=top_k,
        details=details or folder is not None,
        keep=kept.append if folder is not None else None,
    )
    source: Any = _several(data)
    model = load(name, device=device, quantize=quantize)
    if target is not None:
        source = _parallel(model, data, target)
    if names:
        model, source = _zero_shot(model, source, names, templates, parse_names(columns), target_column or "")
    if folder is not None:
        check_report(folder, model.task.name)
    overlap = _overlap(model, source, against, mapping, parse_names(columns), options) if against else {}
    report = (verify if verification else run)(
        model, source, inputs=mapping, target=target_column or "", columns=parse_names(columns), options=options
    )
    report |= {"overlap": overlap} if overlap else {}
    for text in [report["definition"]] if "definition" in report else _signatures(report["metrics"]):
        note(text, quiet)
    emit(report, as_json, _text(report))  # whatever becomes of the page, the numbers are out
    if folder is not None:
        from mmhub.evaluation import data_name
        from mmhub.report import write_report

        page = write_report(folder, model, report, kept[0] if kept else None, data_name(source))
        note(f"report: {page}", quiet)


def _several(data: str) -> Any:
    """A data set, or several files of it."""
    return sorted(data.split(",")) if "," in data and not Path(data).exists() else data


def _overlap(
    model: Any, source: Any, against: str, inputs: dict[str, str] | None, names: list[str], options: Any
) -> dict[str, Any]:
    """How many rows are in the data that a model was trained on; both are read before it is measured."""
    from mmhub.data.sources import Rows, open_rows, require_columns
    from mmhub.evaluation import input_columns
    from mmhub.overlap import measure_overlap

    known = names or list(model.columns.names) or None
    rows = source if isinstance(source, Rows) else open_rows(source, columns=known)
    wanted = input_columns(model, rows, inputs)
    train: Any = _several(against)
    if isinstance(source, dict) and isinstance(train, str):  # one side of parallel text is compared
        train = dict.fromkeys(wanted.values(), train)
    trained = open_rows(train, columns=known)
    require_columns(trained, wanted.values(), "name the columns with --inputs")
    document = (options.document or model.columns.document) if model.task.reads_text else "row"
    return measure_overlap(trained, rows, wanted, document=document, policy=options.policy)


def _check_verification() -> None:
    """Raise UsageError for options that --verification has no use for."""
    source = click.get_current_context().get_parameter_source
    given = [option for name, option in _NOT_VERIFIED.items() if source(name) is not ParameterSource.DEFAULT]
    if given:
        raise UsageError(f"--verification takes no {' or '.join(given)}", "leave it out")


_NOT_VERIFIED = {
    "labels": "--labels",
    "templates": "--template",
    "folder": "--report",
    "target": "--target",
    "document": "--document",
    "window": "--window",
    "stride": "--stride",
    "details": "--details",
    "top_k": "--top-k",
    "no_subsets": "--no-subsets",
    "withhold": "--withhold",
}


def _zero_shot(
    model: Any, source: Any, labels: list[str], templates: tuple[str, ...], columns: list[str], target: str
) -> tuple[Any, Any]:
    """A classifier of these labels, or of those in the column, and the rows."""
    from mmhub.data.sources import open_rows, require_columns
    from mmhub.zero_shot import classifier, labels_in

    rows = open_rows(source, columns=columns or list(model.columns.names) or None)
    require_columns(rows, [target], "name the column with --target-column")
    return classifier(model, list(labels_in(rows.column(target))) if labels == ["auto"] else labels, templates), rows


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
    """A line for all rows and for each subset; where that would be too wide, a line for each metric."""
    from mmhub.metrics import flat

    rows = [("all rows", report["rows"], report["metrics"])]
    rows += [(name, values["rows"], values) for name, values in report["subsets"].items()]
    if len(rows) == 2:  # one modality: its subset is everything
        rows.pop()
    known = [(name, count, flat(values)) for name, count, values in rows]
    names, more = _few(list(known[0][2]))
    text = table(["inputs", "rows", *names], [[k, n, *(_cell(v.get(x)) for x in names)] for k, n, v in known])
    if max(map(len, text.splitlines())) > _WIDTH:
        lines = [["rows", *(str(n) for _, n, _ in known)]]
        lines += [[x, *(_cell(v.get(x)) for *_, v in known)] for x in names]
        text = table(["metric", *(k for k, *_ in known)], lines)
    text += f"\n{more} more numbers by label: see --json or --report" if more else ""
    text += f"\nwithheld from all rows: {', '.join(report['withheld'])}" if report.get("withheld") else ""
    text += f"\n{_overlap_line(report['overlap'])}" if report.get("overlap") else ""
    text += f"\n{report['shortened']} conversations lost their oldest turns" if report.get("shortened") else ""
    why = "unreadable rows" if not report.get("withheld") else "rows, unreadable or with nothing left to answer,"
    return text + (f"\n{report['skipped']} {why} were skipped" if report["skipped"] else "")


def _overlap_line(overlap: dict[str, Any]) -> str:
    from mmhub.hub.statements import overlap_line

    return f"overlap: {overlap_line(overlap)}"


def _few(names: list[str]) -> tuple[list[str], int]:
    """The metrics to print, and how many are not: those of each label where there are many labels."""
    by_label = [name for name in names if "_by_label." in name]
    if len(by_label) <= _MAX_LABELS:
        return names, 0
    return [name for name in names if name not in by_label], len(by_label)


_WIDTH = 110  # characters of a line that can be read in a terminal
_MAX_LABELS = 12
