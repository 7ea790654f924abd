"""`mmhub export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.options import columns_options, parse_mapping, parse_names
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.errors import UsageError, did_you_mean
from mmhub_export.formats import FORMATS, LOADABLE

if TYPE_CHECKING:
    from mmhub.model import Model
    from mmhub_export.record import Export

_COMPARED = 16  # rows of --data that formats are compared on


def _known(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value not in FORMATS:
        hint = did_you_mean(value, list(FORMATS)) or f"there are {', '.join(FORMATS)}"
        raise UsageError(f"there is no format {value!r}", hint)
    return value


@click.command()
@click.argument("name")
@click.option("--format", "format", required=True, callback=_known, metavar="|".join(FORMATS), help="What to write.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write [default: NAME-FORMAT].")
@click.option("--data", help="A table or folder of rows to compare on; int8 and fp16 are measured on all of it.")
@columns_options
@click.option("--target-column", metavar="COL", help="Column of the truth in --data.")
@quiet_option
@json_option
def export(
    name: str,
    format: str,
    out: Path | None,
    data: str | None,
    inputs: str | None,
    columns: str | None,
    target_column: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the model NAME for other programs, and check that what was written answers as the model does.

    onnx and torch-export hold graphs that run without mmhub, transformers a folder for that library and for vLLM;
    safetensors-fp16 and int8 are checkpoints that mmhub loads as ever, of half and about a quarter of the size. The
    folder appears only when all is written and compared; export.json in it says what was found.
    """
    out = _free(out or Path(f"{_plain(name)}-{format}"))
    if not data and (inputs or columns or target_column):
        raise UsageError("--inputs, --columns and --target-column are about --data", "add --data, or leave them out")
    from mmhub.files import disk_errors, new_folder
    from mmhub.hub import load
    from mmhub_export.formats import write_format

    with disk_errors("the export", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as folder:
            model = load(name)
            source = {"inputs": parse_mapping(inputs, "--inputs"), "columns": parse_names(columns)}
            samples = _samples(model, data, source) if data else []
            note(f"writing {name} as {format}", quiet)
            found = write_format(format, model, folder, samples)
            if data and format in LOADABLE:
                _measure(found, model, folder, data, source | {"target": target_column or ""}, quiet)
            if model.guards and format not in LOADABLE:
                note(_leave_out_guards(found, model, folder), quiet)
            record = found.write(folder)
            _free(out)  # another may have written it meanwhile
    for line in _lines(record):
        note(line, quiet)
    emit({"out": str(out), **record}, as_json, str(out))


def _free(out: Path) -> Path:
    if out.exists() or out.is_symlink():
        raise UsageError(f"'{out}' exists", "name another folder with --out")
    for parent in out.parents:
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"'{parent}' is no folder", "name another folder with --out")
    return out


def _plain(name: str) -> str:
    from mmhub_export.record import plain_name

    return plain_name(name)


def _samples(model: Model, data: str, source: dict[str, Any]) -> list[dict[str, Any]]:
    """The first rows of the data as samples."""
    from mmhub.data.sources import open_rows
    from mmhub.evaluation import input_columns

    rows = open_rows(data, columns=source["columns"] or list(model.columns.names) or None)
    wanted = input_columns(model, rows, source["inputs"])
    return [_sample(model, rows[i], wanted, rows.folder(i)) for i in range(min(len(rows), _COMPARED))]


def _sample(model: Model, row: Mapping[str, Any], columns: Mapping[str, str], folder: Path | None) -> dict[str, Any]:
    """A row's inputs; the column of the text may hold a conversation, which has the media in it."""
    from mmhub.conversation import of_json
    from mmhub.data.cells import cell
    from mmhub.data.loader import is_conversation, usable

    talk = of_json(cell(row, columns["text"])) if model.converses and "text" in columns else None
    if is_conversation(talk):
        return {"messages": usable("text", talk, folder)}
    return {name: usable(name, cell(row, column), folder, len(columns) == 1) for name, column in columns.items()}


def _measure(found: Export, model: Model, folder: Path, data: str, source: dict[str, Any], quiet: bool) -> None:
    """Measure the model and what was written on the data, and record both."""
    from mmhub.checkpoint import load
    from mmhub.evaluation import EvalOptions, data_name, evaluate

    reports = []
    for one, what in ((model, "the original"), (load(folder), "what was written")):
        note(f"measuring {what} on {data_name(data)}", quiet)
        reports.append(evaluate(one, data, options=EvalOptions(subsets=False), **source))
    before, after = reports
    found.facts["measured"] = {
        "data": data_name(data),
        "rows": before["rows"],
        "original": before["metrics"],
        "export": after["metrics"],
    }


def _leave_out_guards(found: Export, model: Model, folder: Path) -> str:
    """Say in the record, and in README.md, that guards stay behind; return the same for people."""
    names = [source.component.id for source in model.guards]
    found.facts["guards_left_out"] = names
    readme = folder / "README.md"
    if readme.exists():
        listed = ", ".join(f"`{name}`" for name in names)
        line = f"\nThe model that this was made of is guarded by {listed}; nothing here is.\n"
        readme.write_text(readme.read_text("utf-8").rstrip("\n") + "\n" + line, "utf-8")
    return f"what is written has no guards; the model has {', '.join(names)}"


def _lines(record: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    found = []
    if record["format"] in LOADABLE:
        weights = record["weights"]
        times = weights["bytes_before"] / max(1, weights["bytes"])
        found.append(f"weights: {weights['bytes']:,} bytes, {times:.2f} times less than {weights['bytes_before']:,}")
    for check in record["checks"]:
        limit = check["tolerance"]
        fine = "" if limit is None else f" (up to {limit:.2g} is fine)"
        found.append(f"{check['what']}: differ by {check['max_error']:.2g}{fine}")
    measured = record.get("measured")
    if measured:
        from mmhub.metrics import flat

        before, after = flat(measured["original"]), flat(measured["export"])
        same = [key for key in before if "_by_label." not in key and isinstance(before[key], float)]
        found += [f"{key} on {measured['rows']} rows: {before[key]:.4f} -> {after[key]:.4f}" for key in same]
    return found
