"""`mmhub predict`."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mmhub.cli.labels import labels_options, read_labels
from mmhub.cli.options import columns_options, device_option, parse_mapping, parse_names, quantize_option, urls_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.speech import check_speech, check_writing, speech_options, take_search, wants_subtitles, write_subtitles
from mmhub.cli.writing import read_settings, writing_options
from mmhub.errors import NotFoundError, UsageError, did_you_mean

_LISTED = 10_000  # rows up to which --json has the answers that stand in a file, too


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
    help="Write to this file: a table to .parquet or .csv, subtitles of speech to .srt or .vtt, else JSON lines.",
)
@click.option("--keep", metavar="A,B,…", help="Columns of the table that stand beside the answers.")
@click.option("--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True)
@click.option("--restart", is_flag=True, help="Forget what an unfinished run with this --out has done.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Rows of a batch, at most.  [default: 32, of texts more]"
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens of a batch, padding included, at most.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode the table.  [default: by device]")
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
    keep: str | None,
    on_error: str,
    restart: bool,
    batch_size: int | None,
    batch_tokens: int | None,
    workers: int | None,
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

    A table of any size goes through --data to --out in little memory. What was done is kept in OUT.parts until OUT is
    whole: after Ctrl-C or a crash the same command goes on. With --on-error skip a row that cannot be read has an
    `error` in place of an answer. --json has the answers of up to 10,000 rows, whose file may have more.
    """
    given: dict[str, list[Any]] = {"text": _pairs(text, pairs), "image": list(image), "audio": list(audio)}
    for part in others:
        key, value = _pair(part)
        given.setdefault(key, []).append(value)
    given = {key: values for key, values in given.items() if values}
    if bool(given) == bool(data):
        raise UsageError("give samples with --text, --image, --audio, or a table with --data", "not both, not neither")
    table = {"--keep": keep, "--restart": restart, "--on-error": on_error == "skip", "--batch-tokens": batch_tokens}
    given_for_table = [option for option, value in (table | {"--workers": workers is not None}).items() if value]
    if given_for_table and not data:
        raise UsageError(f"{given_for_table[0]} is for tables", "leave it out, or give one with --data")
    if out:
        _check_free(out)
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

        model = classifier(model, names, templates, batch_size=batch_size or 32)
    if one_question:
        samples = [_one(given)] if model.converses else _zip(given)
    same = {"labels": names, "template": templates, "truncate": truncate, "quantize": quantize} | speech | writing
    if "watermark" in same:  # a secret, and `same` is kept beside OUT
        same["watermark"] = hashlib.sha256(str(same["watermark"]).encode()).hexdigest()
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
            return transcribe(model, samples, batch_size=batch_size or 32, policy=policy, first=first, **how)
        options: dict[str, Any] = {"batch_size": batch_size or 32, "policy": policy}
        found: list[dict[str, Any]] = (
            model.predict(samples, **options)
            if settings is None
            else model.generate(samples, settings, first=first, truncate=truncate, **options)
        )
        return found

    if data:
        mapping, kept = parse_mapping(inputs, "--inputs"), parse_names(keep)
        same |= {"inputs": mapping, "columns": parse_names(columns), "keep": kept, "model": name}
        how: dict[str, Any] = {
            "batch_size": batch_size or 0,
            "batch_tokens": batch_tokens or 0,
            "skip": on_error == "skip",
        }
        how |= {"policy": policy, "workers": workers, "restart": restart, "quiet": quiet, "answers": answer}
        predict_rows(model, data, out, same, how, as_json)
        return
    predictions = answer(samples)
    if out:
        (write_subtitles if wants_subtitles(out) else _write)(out, predictions)
        note(f"{len(predictions)} predictions in {out}", quiet)
    if not out or as_json:
        emit({"predictions": predictions}, as_json, "\n".join(_line(answer) for answer in predictions))


def predict_rows(
    model: Any, data: str, out: Path | None, same: dict[str, Any], how: dict[str, Any], as_json: bool
) -> None:
    """Answer a table as the options `how` say; `same` are those that a run that goes on has in common with this one."""
    from mmhub.bulk import Options, file_identity, in_batches, model_identity, open_table, predict_table
    from mmhub.data.loader import worker_count
    from mmhub.data.sources import require_columns
    from mmhub.engine.signals import StopSignal
    from mmhub.evaluation import input_columns

    given = {"--batch-tokens": how["batch_tokens"], "--workers": how["workers"] is not None}
    for option in [option for option, value in given.items() if value and not in_batches(model)]:
        what = f"{option} is for models that answer a batch in one pass"
        raise UsageError(f"{what}, and {model.name or 'this model'} writes, hears speech or is guarded", "leave it out")
    table: Any = open_table(data, same["columns"] or list(model.columns.names) or None)
    require_columns(table, same["keep"], "name columns to keep with --keep")
    wanted = input_columns(model, table, same["inputs"])
    if out:
        same = same | {"inputs": wanted, "model": model_identity(same["model"]) or same["model"]}
        same |= {key: file_identity(same[key]) for key in ("language_model",) if key in same}
    quiet, workers = how["quiet"], how["workers"]
    how = how | {"workers": worker_count("auto" if workers is None else workers, model.device)}
    stop = StopSignal(lambda text: note(text, quiet))
    options = Options(
        inputs=wanted,
        keep=same["keep"],
        of=same,
        stop=lambda: stop.number,
        say=lambda text: note(text, quiet),
        listed=_LISTED if as_json else 0,
        **how,
    )
    with stop.watched():
        done = predict_table(model, table, out, options)
    said = f"; {done.skipped} rows could not be read, their `error` says why" if done.skipped else ""
    if out:
        note(f"{done.rows} predictions in {out}{said}", quiet)
        left_out = as_json and done.rows > _LISTED
        note(f"they are more than {_LISTED:,}, and are not printed, too", quiet or not left_out)
        listed = {} if left_out else {"predictions": done.answers}
        facts = {"out": out, "rows": done.rows, "skipped": done.skipped, "seconds": round(done.seconds, 3)}
        emit(listed | facts, as_json, "")
    else:
        note(f"{done.skipped} rows could not be read", quiet or not done.skipped)
        emit({"predictions": done.answers}, as_json, "\n".join(map(_line, done.answers)))


def _check_free(out: Path) -> None:
    """Report that a file is there or cannot be written before there is something to write."""
    from tempfile import TemporaryFile

    from mmhub.files import disk_errors

    with disk_errors("the predictions", out.parent):
        if out.exists():
            raise UsageError(f"'{out}' exists", "name another file with --out")
        above = next(path for path in out.parents if path.exists())
        if not above.is_dir():
            raise UsageError(f"'{above}' is a file", "name another file with --out")
        with TemporaryFile(dir=above):
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


def _write(out: Path, predictions: list[dict[str, Any]]) -> None:
    from mmhub.bulk import write_file_of
    from mmhub.files import disk_errors

    with disk_errors("the predictions", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file_of(out, predictions)


def _line(answer: dict[str, Any]) -> str:
    if set(answer) == {"error"}:
        return f"({answer['error']})"
    if "label" in answer:
        return f"{answer['label']}\t{answer['score']:.4f}"
    if "refused" in answer:
        return f"(refused by {answer['guard']}: {answer['refused']})"
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "(none)"
    return str(answer.get("value", answer.get("text", json.dumps(answer, ensure_ascii=False))))
