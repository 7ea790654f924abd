"""`mmhub detect`."""

from __future__ import annotations

from pathlib import Path

import click

from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.cli.text import short
from mmhub.cli.writing import at_prompt, read_key, read_lines, read_stdin
from mmhub.errors import InputError, NotFoundError, UsageError

_FEW = 50  # tokens below which many marked texts are not found


@click.command()
@click.argument("name")
@click.argument("texts", nargs=-1)
@click.option("--text", "more", multiple=True, help="A text (repeatable).")
@click.option("--file", type=click.Path(path_type=Path), help="Read texts from a file, one a line.")
@click.option("--whole", is_flag=True, help="The file is one text.")
@click.option(
    "--watermark",
    metavar="KEY",
    help="The key; @FILE reads it from a file, - takes MMHUB_WATERMARK_KEY.  [default: the model's own]",
)
@click.option(
    "--false-positives",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of texts without a mark that may be taken for marked.",
)
@quiet_option
@json_option
def detect(
    name: str,
    texts: tuple[str, ...],
    more: tuple[str, ...],
    file: Path | None,
    whole: bool,
    watermark: str | None,
    false_positives: float,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say whether TEXTS were written by the model NAME with a watermark; "-" is stdin.

    The mark is in the choice of words (`mmhub generate --watermark KEY`). Only who has its key finds it, and it takes
    some length: p is the probability that a text without a mark would seem as much marked. Many changes of words
    remove it, so that none found means little.
    """
    given = [read_stdin() if text == "-" else text for text in (*texts, *more)]
    if bool(given) == bool(file):
        raise UsageError("give texts, or a file of them with --file", "not both, not neither")
    if whole and file is None:
        raise UsageError("--whole is for --file", "leave it out")
    if file is not None:
        given = [_read(file)] if whole else read_lines(file)
    key = None if watermark is None else read_key(watermark)
    from msgspec.structs import replace

    from mmhub.generate import detect as run
    from mmhub.generate.samples import text_decoder
    from mmhub.hub import load
    from mmhub.interfaces import Watermark

    model = load(name)
    own = text_decoder(model).generation.watermark or Watermark()
    try:
        found = run(model, given, own if key is None else replace(own, key=key), false_positives=false_positives)
    except InputError as error:
        raise at_prompt(error, "text") if len(given) > 1 else error from None
    few = sum(one.scored < _FEW and not one.marked for one in found)
    note(f"{few} of {len(found)} texts are short: below {_FEW} tokens a mark is often missed", quiet or not few)
    answers = [
        {"marked": one.marked, "p": one.p, "z": one.z, "tokens": one.tokens, "scored": one.scored} for one in found
    ]
    rows = [
        ("marked" if one.marked else "no mark found", f"{one.p:.2g}", one.tokens, short(text, 60))
        for text, one in zip(given, found, strict=True)
    ]
    shown = table(["verdict", "p", "tokens", "text"], rows)
    emit({"name": name, "false_positives": false_positives, "texts": answers}, as_json, shown)


def _read(file: Path) -> str:
    if not file.is_file():
        raise NotFoundError(f"no file '{file}'", "check the path")
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is not UTF-8 text: byte {error.start}", "convert it") from None
    if not text:
        raise InputError(f"'{file}' holds no text", "name another file")
    return text
