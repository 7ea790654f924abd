"""`mmhub data`: look at a data set, and at what of it a model is trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmhub.cli.options import columns_options, parse_mapping, parse_names
from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.errors import InputError, UsageError

if TYPE_CHECKING:
    from mmhub.cli.spans import Shown, Teller
    from mmhub.config import Recipe

_OPEN, _CLOSE = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
_WIDTH = 60  # characters of a value that are shown


@click.group()
def data() -> None:
    """Look at data, and at what of it is trained."""


@data.command()
@click.argument("source")
@click.option("--loss", is_flag=True, help="Show what of each row is trained; of a recipe, or with --model.")
@click.option("--model", "name", metavar="NAME", help="The model that reads the data, where SOURCE is no recipe.")
@click.option("--rows", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many rows.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe.")
@click.option("--stage", type=click.IntRange(min=1), help="Whose data is shown, of a recipe with stages. Default: 1.")
@columns_options
@click.option("--target-column", metavar="COL", help="The column that holds the truth.")
@quiet_option
@json_option
def show(
    source: str,
    loss: bool,
    name: str | None,
    count: int,
    overrides: tuple[str, ...],
    stage: int | None,
    inputs: str | None,
    columns: str | None,
    target_column: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Show the first rows of SOURCE: a table, a folder, a Hub data set, or a recipe, whose training data it is then.

    With --loss, texts are shown as the model reads them. What counts in the loss is green, or stands in [[ ]]; what a
    message counts other than 1 is said behind it. A recipe's tokenizer is made as training makes it, of the data of all
    its stages; nothing is trained.
    """
    recipe = name is None and source.endswith(".toml") and Path(source).is_file()
    for option, value in (("--set", overrides), ("--stage", stage)):
        if value and not recipe:
            what = "with --model no recipe is read" if name is not None else f"'{source}' is no recipe"
            raise UsageError(f"{option} is about a recipe, and {what}", "name a recipe alone, or leave it out")
    if loss and name is None and not recipe:
        raise UsageError("--loss needs a recipe, or a model that reads the data", "name a recipe, or give --model")
    if not loss:
        rows, wanted = _open(source, overrides, stage or 1) if recipe else _table(source, columns)
        _show_rows(rows, wanted, count, as_json)
        return
    given = parse_mapping(inputs, "--inputs")
    if recipe:
        sample = _of_recipe(source, overrides, stage or 1)
    else:
        sample = _of_model(name or "", source, given, columns, target_column or "")
    skipped: list[str] = []
    shown = list(islice(sample.rows(skipped), count))
    for text in skipped:
        note(f"skipped: {text}", quiet)
    emit(_as_data(source, shown), as_json, _as_text(shown))


@dataclass(frozen=True)
class _Sample:
    """Rows with what tells what of them is trained. Texts of `document`s are trained whole, "" = rows of a table."""

    teller: Teller
    data: Any
    document: str = ""
    skip: bool = False
    source: str = field(default="")

    def rows(self, skipped: list[str]) -> Iterator[Shown]:
        from mmhub.data.corpus import documents
        from mmhub.data.stream import Stream

        if self.document:
            texts = documents(self.data, self.teller.inputs["text"], self.document, skipped if self.skip else None)
            yield from (self.teller.text(number, text) for number, text in texts)
            return
        numbered = self.data.numbered() if isinstance(self.data, Stream) else enumerate(self.data)
        for number, row in numbered:
            try:
                yield self.teller.tell(number, row)
            except InputError as error:
                problem = f"{self.data.where(number)}: {error.message}"
                if not self.skip:
                    raise InputError(problem, error.hint) from None
                skipped.append(problem)


def _of_recipe(path: str, overrides: tuple[str, ...], stage: int) -> _Sample:
    """What a recipe trains in a stage, by the model as it is built: of what all of them read."""
    from mmhub.build import build_model
    from mmhub.cli.spans import Teller
    from mmhub.engine.data import TrainingData
    from mmhub.engine.language_feed import block_size
    from mmhub.interfaces import Policy, find_task

    folder = Path(path).resolve().parent
    recipes = _recipes(path, overrides, stage)
    recipe, task = recipes[stage - 1], find_task(recipes[0].task)
    known: list[Any] = []
    parts: list[TrainingData] = []
    for one in recipes:
        if one.data not in known:
            known.append(one.data)
            parts.append(TrainingData(one, task, folder))
    given = parts[known.index(recipe.data)]

    def values(name: str) -> Iterable[Any]:
        return chain(*(data.values(name) for data in parts))

    joined = values if len(parts) > 1 else given.values
    model = build_model(task, recipe.model, joined, columns=parts[0].columns, folder=folder, seed=recipe.seed)
    decoder: Any = model.decoder
    limit = int(getattr(decoder, "context", 0) or 0)
    if recipe.train.block_size and decoder.reads_text:
        limit = block_size(recipe.train.block_size, decoder)
    policy = Policy(urls=recipe.data.allow_urls)
    teller = Teller(model, given.rows, dict(model.columns.inputs), given.target, policy, limit)
    return _Sample(teller, given.rows, given.document if task.reads_text else "", recipe.data.on_error == "skip")


def _recipes(path: str, overrides: tuple[str, ...], stage: int) -> list[Recipe]:
    """The recipes of all stages, or the recipe alone where it has none; there is one of that number."""
    from mmhub.config import read_recipe, stage_recipe
    from mmhub.engine.data import with_base_columns
    from mmhub.engine.stages import whole_recipe

    folder = Path(path).resolve().parent
    recipe = read_recipe(Path(path), overrides)
    count = len(recipe.train.stages)
    if stage > max(count, 1):
        raise UsageError(f"there is no stage {stage}: the recipe has {count or 'no'} stages", "leave --stage out")
    if not count:
        return [with_base_columns(recipe, folder, folder, resume=False)]
    recipe = whole_recipe(recipe, folder, folder, resume=False)
    return [stage_recipe(recipe, number) for number in range(1, count + 1)]


def _of_model(name: str, source: str, inputs: dict[str, str], columns: str | None, target: str) -> _Sample:
    from mmhub.cli.spans import Teller
    from mmhub.data.sources import open_rows
    from mmhub.evaluation import find_columns
    from mmhub.hub import load

    model = load(name, device="cpu")
    rows = open_rows(source, columns=parse_names(columns) or list(model.columns.names) or None)
    wanted, target = find_columns(model, rows, inputs, target)
    limit = int(getattr(model.decoder, "context", 0) or 0)
    teller = Teller(model, rows, wanted, target, limit=limit)
    return _Sample(teller, rows, (model.columns.document or "row") if model.task.reads_text else "")


def _open(path: str, overrides: tuple[str, ...], stage: int) -> tuple[Any, list[str]]:
    """The training rows of a recipe, and the columns that are read."""
    from mmhub.engine.data import TrainingData
    from mmhub.interfaces import find_task

    recipe = _recipes(path, overrides, stage)[stage - 1]
    given = TrainingData(recipe, find_task(recipe.task), Path(path).resolve().parent)
    return given.rows, list(dict.fromkeys([*given.inputs.values(), *([given.target] if given.target else [])]))


def _table(source: str, columns: str | None) -> tuple[Any, list[str]]:
    from mmhub.data.sources import open_rows

    rows = open_rows(source, columns=parse_names(columns) or None)
    return rows, list(rows.columns)


def _show_rows(rows: Any, wanted: list[str], count: int, as_json: bool) -> None:
    from mmhub.data.cells import cell
    from mmhub.data.stream import Stream

    numbered = rows.numbered() if isinstance(rows, Stream) else enumerate(rows)
    first = [(rows.where(number), row) for number, row in islice(numbered, count)]
    total = rows.rows if isinstance(rows, Stream) else len(rows)
    found = [{"where": where, "values": {name: _plain(cell(row, name)) for name in wanted}} for where, row in first]
    text = table(["row", *wanted], [[where, *(_short(cell(row, name)) for name in wanted)] for where, row in first])
    known = "" if total is None else f"{total} rows\n"
    emit({"rows": total, "columns": wanted, "first": found}, as_json, known + text)


def _plain(value: Any) -> Any:
    """A value as JSON has it; of bytes their number."""
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _short(value: Any) -> str:
    from mmhub.cli.writing import shown

    text = " ".join(shown(str(_plain(value))).split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _as_data(source: str, rows: list[Shown]) -> dict[str, Any]:
    found = [
        {
            "row": one.row,
            "where": one.where,
            "tokens": one.tokens,
            "trained": one.trained,
            "media_tokens": one.media_tokens,
            "left_out": one.left_out,
            "spans": one.spans,
        }
        for one in rows
    ]
    return {"source": source, "rows": found} | _totals(rows)


def _totals(rows: list[Shown]) -> dict[str, int]:
    return {
        "tokens": sum(one.tokens for one in rows),
        "trained": sum(one.trained for one in rows),
        "media_tokens": sum(one.media_tokens for one in rows),
    }


def _as_text(rows: list[Shown]) -> str:
    if not rows:
        return "no rows"
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    parts = []
    for one in rows:
        head = f"{one.where}: {_counted(one.tokens, one.trained, one.media_tokens)}"
        head += f", {one.left_out} messages left out: too long" if one.left_out else ""
        parts.append(f"{head}\n{''.join(_as_written(span, coloured) for span in one.spans).rstrip()}\n")
    totals = _totals(rows)
    share = f" ({100 * totals['trained'] / max(totals['tokens'], 1):.0f} %)"
    parts.append(f"{len(rows)} rows: {_counted(totals['tokens'], totals['trained'], totals['media_tokens'], share)}")
    return "\n".join(parts)


def _counted(tokens: int, trained: int, media: int, share: str = "") -> str:
    return f"{tokens} tokens, {trained} trained{share}" + (f", {media} of media" if media else "")


def _as_written(span: dict[str, Any], coloured: bool) -> str:
    from mmhub.cli.writing import shown

    if span["media"]:
        said = [shown(str(span["media"][key])) for key in ("type", "size", "name") if span["media"][key]]
        return f"{_OPEN}{' '.join(said)}{_CLOSE}"
    text = shown(span["text"])
    if not span["trained"]:
        return text
    weight = "" if span["weight"] == 1 else f" x{span['weight']:g}"
    return f"\x1b[1;32m{text}\x1b[0m{weight}" if coloured else f"[[{text}]]{weight}"
