"""What the commands that write texts share: options of generation, texts from files and stdin, terminal output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mmhub.errors import InputError, NotFoundError, UsageError

if TYPE_CHECKING:
    from mmhub.interfaces import Generation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    ("max_new_tokens", int, "Write at most so many tokens."),
    ("min_new_tokens", int, "Let no end token come before so many."),
    ("temperature", float, "0: always the most probable token; above: draw one."),
    ("top_k", int, "Draw from the so many most probable tokens."),
    ("top_p", float, "Draw from the most probable tokens that together have this probability."),
    ("min_p", float, "Draw from tokens at least so probable, as a share of the most probable one."),
    ("beams", int, "Keep so many hypotheses and answer with the best."),
    ("length_penalty", float, "Beams: divide log-probabilities by length to this power."),
    ("repetition_penalty", float, "Divide the scores of tokens that stand in the text already."),
    ("seed", int, "What random choices start from."),
)


_KEY_SOURCES = "@FILE reads it from a file, - takes MMHUB_WATERMARK_KEY"


def read_key(value: str) -> str:
    """Return the key of a watermark: `value` itself, what the file in "@FILE" holds, or "" for "-", the environment's.

    Raises:
        NotFoundError: there is no such file. UsageError: there is no key.
    """
    if value == "-":
        return ""
    key = value
    if value.startswith("@"):
        if not Path(value[1:]).is_file():
            raise NotFoundError(f"no file '{value[1:]}' with a key", "check the path")
        key = Path(value[1:]).read_text(encoding="utf-8", errors="surrogateescape").strip()
    if not key:
        raise UsageError("the key of the watermark is empty", f"give a secret text; {_KEY_SOURCES}")
    return key


def writing_options(command: F) -> F:
    """Add the options of `mmhub.interfaces.Generation`, passed on as one dict `writing` of those that were given."""
    for name, kind, text in reversed(_OPTIONS):
        option = click.option(
            f"--{name.replace('_', '-')}", name, type=kind, help=text, callback=_collect, expose_value=False
        )
        command = option(command)
    stop = "End the text before this one (repeatable); \\n is a line break."
    command = click.option("--stop", multiple=True, help=stop, callback=_collect, expose_value=False)(command)
    mark = f"Mark what is drawn with this key, for `mmhub detect`; {_KEY_SOURCES}."
    option = click.option("--watermark", metavar="KEY", help=mark, callback=_collect, expose_value=False)
    return option(command)


def _collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    given = context.params.setdefault("writing", {})
    if parameter.name == "stop":
        value = tuple(part.replace("\\n", "\n").replace("\\t", "\t") for part in value) or None
    if parameter.name == "watermark" and value is not None:
        value = read_key(value)
    if value is not None:
        given[parameter.name] = value


def read_settings(model: Any, writing: dict[str, Any], samples: int = 1) -> Generation:
    """Return how the model writes by itself, changed by the options that were given, for `samples` texts a prompt.

    Raises:
        UsageError: an option has a wrong value or no effect, or the model writes no text.
    """
    import msgspec

    from mmhub.generate.samples import text_decoder

    own = text_decoder(model).generation
    if "watermark" in writing:
        writing = writing | {"watermark": _marked(own, writing["watermark"])}
    if writing.get("temperature"):  # drawing and beams exclude each other: what was asked for wins
        writing = {"beams": 1} | writing
    elif writing.get("beams", 1) > 1:
        writing = {"temperature": 0.0} | writing
    if "max_new_tokens" in writing and "min_new_tokens" not in writing:
        writing = {"min_new_tokens": min(own.min_new_tokens, max(writing["max_new_tokens"], 0))} | writing
    try:
        settings: Generation = msgspec.structs.replace(own, **writing)
    except ValueError as error:
        hint = "draw tokens, e.g. with --temperature 1" if "watermark" in str(error) else "see --help"
        raise UsageError(str(error), hint) from None
    _check_effect(settings, writing, samples)
    return settings


def _marked(own: Generation, key: str) -> Any:
    """The model's own watermark, or the usual one, with another key."""
    import msgspec

    from mmhub.interfaces import Watermark

    return msgspec.structs.replace(own.watermark, key=key) if own.watermark else Watermark(key=key)


def _check_effect(settings: Generation, writing: dict[str, Any], samples: int) -> None:
    """Refuse options that would change nothing: whoever gives them expects something else."""
    from mmhub.interfaces import Generation

    off = Generation()
    given = [name for name, _, _ in _OPTIONS if name in writing and writing[name] != getattr(off, name)]
    if not settings.temperature:
        for name in given:
            if name in ("top_k", "top_p", "min_p", "seed"):
                what = f"--{name.replace('_', '-')} changes nothing where always the most probable token is taken"
                raise UsageError(what, "draw tokens, e.g. with --temperature 1, or leave it out")
        if samples > 1 and settings.beams == 1:
            what = f"all {samples} texts of a prompt would be the same: always the most probable token is taken"
            raise UsageError(what, f"draw tokens, e.g. with --temperature 1, or add --beams {samples}")
    if "length_penalty" in given and settings.beams == 1:
        raise UsageError("--length-penalty changes nothing without beams", "add --beams 4, or leave it out")


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty; a line break is LF or CR LF, and nothing else.

    Raises:
        NotFoundError: there is no such file. InputError: it is no UTF-8 text, or has no such line.
    """
    if not file.is_file():
        raise NotFoundError(f"no file '{file}'", "check the path")
    content = file.read_bytes()
    try:
        lines = [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
        lines = [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        at = f"byte {error.start} (line {content.count(10, 0, error.start) + 1})"
        raise InputError(f"'{file}' is not UTF-8 text: {at} is {content[error.start]:#04x}", "convert it") from None
    if not lines:
        raise InputError(f"'{file}' holds no text", "give one text a line")
    return lines


def read_stdin() -> str:
    """Return all that stdin holds, without the line break at its end.

    Raises:
        InputError: it is no UTF-8 text.
    """
    content = sys.stdin.buffer.read()
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None


def shown(text: str) -> str:
    """Return text as stdout can show it; on a terminal without control characters, which a model may write too."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(text: str) -> None:
    """Print a piece of text at once, without a line break."""
    print(shown(text), end="", flush=True)


def at_prompt(error: InputError, what: str = "prompt") -> InputError:
    """Say which of several texts an error is about."""
    return InputError(f"{what} {(error.row or 0) + 1}: {error.message}", error.hint)
