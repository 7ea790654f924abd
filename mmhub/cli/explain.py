"""`mmhub explain`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mmhub.cli.options import device_option, quantize_option, urls_option
from mmhub.cli.output import _plain, emit, json_option, note, quiet_option
from mmhub.cli.predict import check_files
from mmhub.cli.writing import read_settings, writing_options
from mmhub.errors import UsageError

_METHODS = ("integrated-gradients", "gradient-x-input", "occlusion", "attention-rollout")
_KINDS = (".html", ".png", ".json")


@click.command()
@click.argument("name")
@click.option("--text", multiple=True, help="A text.")
@click.option("--text-pair", "pairs", multiple=True, help="A second text beside --text.")
@click.option("--image", multiple=True, metavar="FILE", help="An image file (repeatable).")
@click.option("--audio", multiple=True, metavar="FILE", help="An audio file (repeatable).")
@click.option("--input", "others", multiple=True, metavar="MODALITY=VALUE", help="Any other modality (repeatable).")
@click.option("--method", type=click.Choice(_METHODS), default=_METHODS[0], show_default=True)
@click.option("--target", help="The label, or the text, to explain.  [default: what the model answers]")
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    help="Points of integrated gradients.  [default: 32, fewer for each of many written tokens]",
)
@click.option("--no-faithfulness", is_flag=True, help="Do not measure whether the pieces matter to the model.")
@click.option("--no-shares", is_flag=True, help="Do not measure what each input contributes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Write a page (.html), a picture (.png) or the numbers (.json) (repeatable).",
)
@writing_options
@device_option
@quantize_option
@urls_option
@quiet_option
@json_option
def explain(
    name: str,
    text: tuple[str, ...],
    pairs: tuple[str, ...],
    image: tuple[str, ...],
    audio: tuple[str, ...],
    others: tuple[str, ...],
    method: str,
    target: str | None,
    steps: int | None,
    no_faithfulness: bool,
    no_shares: bool,
    out: tuple[Path, ...],
    writing: dict[str, Any],
    device: str,
    quantize: str | None,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say which part of an input made the model NAME answer so.

    One sample is explained: what speaks for the answer is red, what speaks against it blue. Where the output is no
    terminal, or NO_COLOR is set, the pieces stand in a table. A model that writes is explained token by token.
    """
    given = _given(text, pairs, image, audio, others)
    _check_out(out, bool(image or audio))
    check_files((*image, *audio))
    from mmhub.explain import explain as compute
    from mmhub.explain.fetched import fetched
    from mmhub.hub import load
    from mmhub.interfaces import Policy

    model: Any = load(name, device=device, quantize=quantize)
    settings, policy = read_settings(model, writing) if writing else None, Policy(urls=allow_urls)
    sample = fetched(model, _sample(model, given), policy)  # what is shown is what the model has seen
    measured: dict[str, Any] = {"method": method, "faithfulness": not no_faithfulness, "shares": not no_shares}
    found = compute(model, sample, target=target, steps=steps, policy=policy, settings=settings, **measured)
    document = {"name": name, "explanation": found.as_dict()}
    for file in out:
        _write(file, document, found, sample, policy)
        note(f"the explanation is in {file}", quiet)
    if as_json or not out:
        emit(document, as_json, "" if as_json else _shown(found, sample))


def _given(
    text: tuple[str, ...],
    pairs: tuple[str, ...],
    image: tuple[str, ...],
    audio: tuple[str, ...],
    others: tuple[str, ...],
) -> dict[str, list[Any]]:
    """What the options say, by modality; `text_pair` is beside them until the model is known."""
    given: dict[str, list[Any]] = {"text": list(text), "text_pair": list(pairs), "image": list(image)}
    given["audio"] = list(audio)
    for part in others:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"--input {part!r} is not of the form modality=value", "e.g. --input tabular=row.json")
        given.setdefault(key, []).append(value)
    given = {key: values for key, values in given.items() if values}
    if not given:
        raise UsageError("there is nothing to explain", "give a sample with --text, --image, --audio or --input")
    if len(text) > 1 or len(pairs) > 1:
        what = f"one sample is explained, and there are {max(len(text), len(pairs))} texts"
        raise UsageError(what, "give one --text at a time; a second text of the same sample is --text-pair")
    if pairs and not text:
        raise UsageError("--text-pair stands beside a --text", "give both")
    return given


def _sample(model: Any, given: dict[str, list[Any]]) -> dict[str, Any]:
    sample = {name: values if len(values) > 1 else values[0] for name, values in given.items()}
    if "text_pair" in sample:
        both = {"text": sample["text"], "text_pair": sample.pop("text_pair")}
        alone = model.decoder.paired and list(model.encoders) == ["text"]
        sample["text"] = list(both.values()) if alone else both
    return sample


def _check_out(files: tuple[Path, ...], media: bool) -> None:
    """Report what cannot be written before there is something to write."""
    from tempfile import TemporaryFile

    from mmhub.files import disk_errors

    for number, file in enumerate(files):
        kind = file.suffix.lower()
        if kind not in _KINDS:
            raise UsageError(f"'{file}' is no kind of explanation", f"end its name with {', '.join(_KINDS)}")
        if kind == ".png" and not media:
            raise UsageError(f"'{file}': a PNG shows pictures and sounds, and none is given", "write an .html file")
        with disk_errors("the explanation", file.parent):
            if file.exists() or file in files[:number]:
                raise UsageError(f"'{file}' exists" if file.exists() else f"'{file}' is named twice", "name another")
            above = next(path for path in file.parents if path.exists())
            if not above.is_dir():
                raise UsageError(f"'{above}' is a file", "name another file with --out")
            with TemporaryFile(dir=above):
                pass


def _write(file: Path, document: dict[str, Any], found: Any, sample: Mapping[str, Any], policy: Any) -> None:
    from mmhub.files import disk_errors, write_file

    content: str | bytes
    if file.suffix.lower() == ".html":
        from mmhub.explain.page import page, short_name, versions

        content = page(found, sample, name=short_name(document["name"]), facts=versions(), policy=policy)
    elif file.suffix.lower() == ".png":
        from mmhub.explain.overlay import overlay

        content = overlay(found, sample, policy)
    else:
        content = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors("the explanation", file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, content)


def _shown(found: Any, sample: Mapping[str, Any]) -> str:
    from mmhub.explain.terminal import render

    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 100
    return render(found, sample, width=width, colours=_colours())


def _colours() -> Any:
    """Which colours the terminal shows; none where it asks for none, or cannot draw blocks."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    if not sys.stdout.isatty() or not unicode or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return "none"
    return "24-bit" if os.environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") else "256"
