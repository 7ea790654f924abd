"""What `mmhub predict` offers for speech: times, languages, and subtitles out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from mmhub.errors import UsageError

_BEAMS = 16  # with a language model, which has no say along a single path
F = TypeVar("F", bound=Callable[..., Any])


def speech_options(command: F) -> F:
    """Add `--timestamps`, `--language`, `--translate` and `--language-model`.

    They are passed on as one dict `speech` of those that were given.
    """
    times = click.option(
        "--timestamps",
        type=click.Choice(["none", "segment", "word"]),
        help="Speech: say when each segment or word was heard.",
        callback=_collect,
        expose_value=False,
    )
    language = click.option(
        "--language", help="Speech: what is spoken, e.g. en.", callback=_collect, expose_value=False
    )
    into = "Speech: write it down in English."
    translate = click.option("--translate", is_flag=True, help=into, callback=_collect, expose_value=False)
    ngrams = click.option(
        "--language-model",
        metavar="FILE",
        help="Speech, CTC models: an ARPA file of words that has a say in the beam search.",
        callback=_collect,
        expose_value=False,
    )
    return times(language(translate(ngrams(command))))


def _collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    given = context.params.setdefault("speech", {})
    if value:
        given[parameter.name] = value


def take_search(model: Any, speech: dict[str, Any], writing: dict[str, Any]) -> dict[str, Any] | None:
    """Take out of the options how a CTC model looks for a text; None where nothing is said about it.

    Raises:
        UsageError: a language model was named for a model that has none beside it.
    """
    heard = hasattr(model.decoder, "emissions")
    if "language_model" in speech and not heard:
        what = f"--language-model is for CTC models, and {model.name or 'this model'} is none"
        raise UsageError(what, "leave it out")
    if not heard:
        return None
    search = {key: table.pop(key) for table, key in ((speech, "language_model"), (writing, "beams")) if key in table}
    if "language_model" in search:
        search.setdefault("beams", _BEAMS)
    return search or None


def check_writing(model: Any, writing: dict[str, Any]) -> None:
    """Refuse options of writing for models that hear frame by frame; `take_search` took theirs.

    Raises:
        UsageError: there are some.
    """
    if writing and hasattr(model.decoder, "emissions"):
        name = next(iter(writing)).replace("_", "-")
        what = f"--{name} is for models that write, and {model.name or 'this model'} hears frame by frame"
        raise UsageError(what, "leave it out; it takes --beams and --language-model")


def wants_subtitles(out: Path | None) -> bool:
    """Does the name of the file say that it is one of subtitles?"""
    return out is not None and out.suffix.lower() in (".srt", ".vtt")


def check_speech(model: Any, speech: dict[str, Any], out: Path | None, recordings: int) -> None:
    """Refuse options for speech where there is none, and subtitles of several recordings or without times.

    Raises:
        UsageError: the model is for another task, there is not one recording, or no times are asked for or known.
    """
    if wants_subtitles(out) and recordings != 1:
        raise UsageError(f"'{out}' takes the subtitles of one recording", "give one --audio at a time")
    if wants_subtitles(out) and speech.get("timestamps") == "none":
        raise UsageError("subtitles need times, and --timestamps none asks for none", "leave --timestamps out")
    if wants_subtitles(out) and hasattr(model.decoder, "emissions") and model.decoder.seconds is None:
        what = f"the encoder of {model.name or 'this model'} does not say what a token lasts: it has no times"
        raise UsageError(what, "name another file with --out, such as out.jsonl")
    if model.task.name == "speech-recognition":
        return
    given = [f"--{name}" for name in speech] or (["a file of subtitles"] if wants_subtitles(out) else [])
    if given:
        what = f"{given[0]} is for speech recognition, and {model.name or 'this model'} is for {model.task.name}"
        raise UsageError(what, "leave it out, or name a model for speech")


def write_subtitles(out: Path, answers: Sequence[dict[str, Any]]) -> None:
    """Write the transcript of one recording as subtitles.

    Raises:
        UsageError: it has no times. InputError: a guard refused it.
    """
    from mmhub.speech import subtitles

    subtitles.write(answers[0], out)
