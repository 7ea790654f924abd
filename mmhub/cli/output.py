"""What every command shares: results on stdout, everything else on stderr; one JSON document under --json."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class LazyCommands(click.Group):
    """A group whose `lazy` commands are imported only when they run: {name: (module:attribute, what help says)}."""

    lazy: ClassVar[Mapping[str, tuple[str, str]]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _import(self.lazy[cmd_name][0]) if cmd_name in self.lazy else super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*own, *((name, summary) for name, (_, summary) in self.lazy.items())])


def _import(target: str) -> click.Command:
    module, _, attribute = target.partition(":")
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command), target
    return command


def json_option(command: F) -> F:
    """Add `--json`, passed on as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def quiet_option(command: F) -> F:
    """Add `-q/--quiet`, passed on as `quiet`: no progress and no notes on stderr."""
    option = click.option("-q", "--quiet", is_flag=True, callback=_silence, help="No progress, no notes.")
    return option(command)


def result_options(command: F) -> F:
    """Add `--json`, and a `-q` that changes nothing, for commands that print a result alone."""
    silent = click.option("-q", "--quiet", is_flag=True, expose_value=False, help="No notes.")
    return json_option(silent(command))


def _silence(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    """Downloads show a bar on a terminal only; huggingface_hub reads this variable when it is imported."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


def emit(data: Any, as_json: bool, human_text: str) -> None:
    """Print a command's result to stdout: `data` as one JSON document, or the text for people (nothing if empty)."""
    if as_json:
        human_text = json.dumps(_plain(data), indent=2, ensure_ascii=not _is_unicode(sys.stdout), allow_nan=False)
    if human_text:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(human_text.encode(encoding, "backslashreplace").decode(encoding))  # file names may be no valid text


def note(text: str, quiet: bool = False) -> None:
    """Print a line that is not a result to stderr, unless `quiet`."""
    if not quiet:
        print(text, file=sys.stderr)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows out in columns under an upper-case header; '' if there are none."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    cells.insert(0, [title.upper() for title in header])
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _is_unicode(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def _plain(value: Any) -> Any:
    """Return JSON data: NaN and infinity become null, paths strings, and array scalars numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} is not JSON data")
