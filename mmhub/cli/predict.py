"""`mmhub predict`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mmhub.cli.labels import labels_options, read_labels
from mmhub.cli.options import columns_options, device_option, parse_mapping, parse_names, quantize_option, urls_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.speech import check_speech, check_writing, speech_options, take_search, wants_subtitles, write_subtitles
from mmhub.cli.writing import read_settings, writing_options
from mmhub.errors import InputError, NotFoundError, UsageError, did_you_mean

Answer = Callable[[list[dict[str, Any]], int], list[dict[str, Any]]]


@click.command()
@click.argument("name")
@click.option("--text", multiple=True, help="A text (repeatable).")
@click.option("--text-pair", "pairs", multiple=True, help="A second text beside each --text (repeatable).")
@click.option("--image", multiple=True, metavar="FILE", help="An image file (repeatable).")
@click.option("--audio", multiple=True, metavar="FILE", help="An audio file (repeatable).")
@click.option("--input", "others", multiple=True, metavar="MODALITY=VALUE", help="Any other modality (repeatable).")
@click.option("--data", help="A table or folder of samples instead.")
@columns_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write one JSON line a sample to this file; speech to a .srt or .vtt as subtitles.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@labels_options
@speech_options
@writing_options
@click.option("--truncate", is_flag=True, help="Cut what is too long for a model that writes, not refuse it.")
@device_option
@quantize_option
@urls_option
@quiet_option
@json_option
def predict(
    name: str,
    text: tuple[str, ...],
    pairs: tuple[str, ...],
    image: tuple[str, ...],
    audio: tuple[str, ...],
    others: tuple[str, ...],
    data: str | None,
    inputs: str | None,
    columns: str | None,
    out: Path | None,
    batch_size: int,
    labels: str | None,
    templates: tuple[str, ...],
    speech: dict[str, Any],
    writing: dict[str, Any],
    truncate: bool,
    device: str,
    quantize: str | None,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the model NAME on one or more samples.

    Several modalities given once each make one sample; options given several times make several samples, paired in
    order; one --text with several files is one question about all of them, to a model that chats. A modality left out
    is missing, and models that fuse modalities cope with that. The options of generation, from --max-new-tokens to
    --stop, are for models that write texts; in a table of conversations the last question is answered, whether or not
    an answer follows it. With --labels, a model for retrieval says which label a picture or a sound fits best.
    Recordings of speech may last up to 6 hours; --out FILE.srt or FILE.vtt makes subtitles of one.
    """
    given: dict[str, list[Any]] = {"text": _pairs(text, pairs), "image": list(image), "audio": list(audio)}
    for part in others:
        key, value = _pair(part)
        given.setdefault(key, []).append(value)
    given = {key: values for key, values in given.items() if values}
    if bool(given) == bool(data):
        raise UsageError("give samples with --text, --image, --audio, or a table with --data", "not both, not neither")
    if out and out.exists():
        raise UsageError(f"'{out}' exists", "name another file with --out")
    if out:
        _check_folder(out)
    check_files((*image, *audio))
    names = read_labels(labels, templates)
    one_question = len(text) == 1 and any(len(values) > 1 for values in given.values())
    samples = _zip(given) if given and not one_question else []
    from mmhub.hub import load
    from mmhub.interfaces import Policy, TextDecoder
    from mmhub.speech import LONGEST

    model = load(name, device=device, quantize=quantize)
    if names:
        from mmhub.zero_shot import classifier

        model = classifier(model, names, templates, batch_size=batch_size)
    if one_question:
        samples = [_one(given)] if model.converses else _zip(given)
    hears = model.task.name == "speech-recognition"
    policy = Policy(urls=allow_urls, max_seconds=LONGEST) if hears else Policy(urls=allow_urls)
    search = take_search(model, speech, writing)
    check_writing(model, writing)
    writes = bool(writing) or isinstance(model.decoder, TextDecoder)
    settings = read_settings(model, writing) if writes else None
    if truncate and (settings is None or hears):
        raise UsageError("--truncate is for models that go on with a text or answer one", "leave it out")

    check_speech(model, speech, out, len(samples))
    if wants_subtitles(out):
        speech = {"timestamps": "segment"} | speech

    def answer(samples: list[dict[str, Any]], first: int = 0) -> list[dict[str, Any]]:
        if hears:
            from mmhub.speech import transcribe

            how = {"settings": settings, "search": search} | speech
            return transcribe(model, samples, batch_size=batch_size, policy=policy, first=first, **how)
        found: list[dict[str, Any]] = (
            model.predict(samples, batch_size=batch_size, policy=policy)
            if settings is None
            else model.generate(samples, settings, batch_size=batch_size, policy=policy, first=first, truncate=truncate)
        )
        return found

    predictions = _predict_table(model, answer, data, inputs, columns, batch_size) if data else answer(samples)
    if out:
        (write_subtitles if wants_subtitles(out) else _write)(out, predictions)
        note(f"{len(predictions)} predictions in {out}", quiet)
    if not out or as_json:
        emit({"predictions": predictions}, as_json, "\n".join(_line(answer) for answer in predictions))


def _check_folder(out: Path) -> None:
    """Report that a file cannot be written before there is something to write."""
    from tempfile import TemporaryFile

    from mmhub.files import disk_errors

    above = next(path for path in out.parents if path.exists())
    if not above.is_dir():
        raise UsageError(f"'{above}' is a file", "name another file with --out")
    with disk_errors("the predictions", out.parent), TemporaryFile(dir=above):
        pass


def check_files(files: tuple[str, ...]) -> None:
    """Report a wrong path before a model is loaded for it."""
    for text in files:
        path = os.path.expanduser(text)  # pathlib raises for an unknown user, and for a name that is too long
        if not text.startswith(("http://", "https://")) and not os.path.exists(path):
            near: list[str] = []
            with suppress(OSError, ValueError):
                near = os.listdir(os.path.dirname(path) or ".")
            raise NotFoundError(f"no file '{text}'", did_you_mean(os.path.basename(path), near) or "check the path")


def _pair(part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals or not key:
        raise UsageError(f"--input {part!r} is not of the form modality=value", "e.g. --input tabular=row.json")
    return key, value


def _pairs(texts: tuple[str, ...], seconds: tuple[str, ...]) -> list[Any]:
    """The texts, each with its second one if there are any."""
    if not seconds:
        return list(texts)
    if len(texts) != len(seconds):
        raise UsageError(f"{len(texts)} --text and {len(seconds)} --text-pair do not pair up", "give both as often")
    return [{"text": a, "text_pair": b} for a, b in zip(texts, seconds, strict=True)]


def _zip(given: dict[str, list[Any]]) -> list[dict[str, Any]]:
    counts = {len(values) for values in given.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{len(values)} {key}" for key, values in given.items())
        raise UsageError(f"the options do not pair up: {shown}", "give each as often, or use --data with a table")
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _one(given: dict[str, list[Any]]) -> dict[str, Any]:
    """One question about several files."""
    return {name: values if len(values) > 1 else values[0] for name, values in given.items()}


def _predict_table(
    model: Any, answer: Answer, data: str, inputs: str | None, columns: str | None, batch_size: int
) -> list[dict[str, Any]]:
    from mmhub.data.sources import open_rows
    from mmhub.evaluation import input_columns

    rows = open_rows(data, columns=parse_names(columns) or list(model.columns.names) or None)
    wanted = input_columns(model, rows, parse_mapping(inputs, "--inputs"))
    answers: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch_size):
        stop = min(start + batch_size, len(rows))
        samples = [_sample(model, rows[i], wanted, rows.folder(i)) for i in range(start, stop)]
        try:
            answers += answer(samples, start)
        except InputError as error:
            place = rows.where(start + (error.row or 0))
            column = f", column '{wanted[error.modality]}'" if error.modality in wanted else ""
            raise InputError(f"{place}{column}: {error.message}", error.hint) from None
    return answers


def _sample(model: Any, row: Mapping[str, Any], columns: Mapping[str, str], folder: Path | None) -> dict[str, Any]:
    """A row's inputs as a sample; the column of the text may hold a conversation, which has the media in it."""
    from mmhub.conversation import of_json
    from mmhub.data.cells import cell
    from mmhub.data.loader import is_conversation, usable

    found = {m: usable(m, cell(row, column), folder, len(columns) == 1) for m, column in columns.items()}
    talk = cell(row, columns["text"]) if "text" in columns else None
    talk = of_json(talk) if model.converses else talk
    only = model.converses and len(columns) > 1 and len(set(columns.values())) == 1  # what it holds is a conversation
    if not only and not is_conversation(talk):
        return found
    beside = {m: raw for m, raw in found.items() if raw is not None and columns[m] != columns["text"]}
    return {"messages": usable("text", talk, folder)} | beside


def _write(out: Path, predictions: list[dict[str, Any]]) -> None:
    from mmhub.files import disk_errors, write_file

    with disk_errors("the predictions", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in predictions))


def _line(answer: dict[str, Any]) -> str:
    if "label" in answer:
        return f"{answer['label']}\t{answer['score']:.4f}"
    if "refused" in answer:
        return f"(refused by {answer['guard']}: {answer['refused']})"
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "(none)"
    return str(answer.get("value", answer.get("text", json.dumps(answer, ensure_ascii=False))))
