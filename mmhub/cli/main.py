"""The `mmhub` command line: a table of commands that are imported only when they run, and errors as one line each."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

from mmhub import __version__
from mmhub.cli.output import LazyCommands
from mmhub.discovery import command_table, problem_lines
from mmhub.errors import ExitCode, MmhubError, PluginError

# name: (module:attribute, what help says)
COMMANDS = {
    "demo": ("mmhub.cli.demo:demo", "Train a small image + audio model and use it, offline"),
    "train": ("mmhub.cli.train:train", "Train a model from a recipe"),
    "eval": ("mmhub.cli.evaluate:evaluate", "Measure a model on a data set"),
    "bench": ("mmhub.cli.bench:bench", "Measure how fast this machine trains"),
    "predict": ("mmhub.cli.predict:predict", "Run a model on text, images and audio"),
    "generate": ("mmhub.cli.generate:generate", "Let a model write on from a text, or translate it"),
    "chat": ("mmhub.cli.chat:chat", "Talk with a language model"),
    "detect": ("mmhub.cli.detect:detect", "Find the watermark in texts that a model wrote"),
    "explain": ("mmhub.cli.explain:explain", "Say which part of an input made a model answer so"),
    "score": ("mmhub.cli.score:score", "Say how probable texts are to a language model"),
    "data": ("mmhub.cli.data:data", "Look at data, and at what of it is trained"),
    "index": ("mmhub.cli.index:index", "Search pictures, sounds and texts by what they show or say"),
    "push": ("mmhub.cli.push:push", "Publish a model to the Hub"),
    "pull": ("mmhub.cli.pull:pull", "Fetch a model from the Hub and check it"),
    "audit": ("mmhub.cli.audit:audit", "Look at what a model is made of before you trust it"),
    "keys": ("mmhub.cli.keys:keys", "Make the keys that models are signed with"),
    "models": ("mmhub.cli.models:models", "Find models, and say what their names mean"),
    "cache": ("mmhub.cli.cache:cache", "Look after the files of models that were pulled"),
    "plugins": ("mmhub.cli.plugins:plugins", "Find, install, write and check plugins"),
    "env": ("mmhub.cli.env:env", "Show versions and devices, for bug reports"),
    "version": ("mmhub.cli.env:version", "Show the version of mmhub"),
}


class Commands(LazyCommands):
    """The built-in commands and those of plugins, each imported only when it runs."""

    lazy = COMMANDS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *(name for name in sorted(command_table()) if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        return _plugin_command(cmd_name) if found is None and cmd_name in command_table() else found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            raise _unknown_command(name, ctx, self.list_commands(ctx))
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_commands(ctx, formatter)
        table = command_table()
        added = [(name, table[name][1]) for name in sorted(table) if name not in COMMANDS]
        if added:
            with formatter.section("Commands of plugins"):
                formatter.write_dl(added)

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)  # what a command returns is not an exit code
        except (KeyboardInterrupt, EOFError) as error:  # before click answers with an empty line of its own
            raise click.Abort from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmhub", message="%(prog)s %(version)s")
def cli() -> None:
    """Put models together from parts, train them, and share them by name."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with an `ExitCode`."""
    # PyTorch's OpenMP threads wait by spinning; beside other busy processes that made steps up to 16 times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = _run(args)
    except KeyboardInterrupt:
        code = _interrupted()
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    try:
        if "_MMHUB_COMPLETE" not in os.environ:
            for line in problem_lines():
                print(line, file=sys.stderr)
        code = cli.main(args, prog_name="mmhub", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else ExitCode.OK
    except Exception as error:
        if os.environ.get("MMHUB_DEBUG", "") not in ("", "0") and not isinstance(error, click.exceptions.Exit):
            import traceback

            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Say in a line or two what went wrong and what to do, and return the exit code."""
    if isinstance(error, click.Abort):
        cause = error.__cause__ or error.__context__
        return _interrupted() if isinstance(cause, KeyboardInterrupt) else _fail("aborted", None)
    if isinstance(error, MmhubError):
        return _fail(error.message, error.hint, error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":  # older click has no such class
        print(error, file=sys.stderr)
        return ExitCode.USAGE
    if isinstance(error, click.UsageError):
        hint = f"see `{error.ctx.command_path} --help`" if error.ctx else None
        return _fail(error.format_message(), hint, ExitCode.USAGE)
    if isinstance(error, click.ClickException):
        return _fail(error.format_message(), None, error.exit_code)
    if isinstance(error, OSError) and error.errno in _OS_ERRORS:
        return _fail_os(error)
    text = f"{type(error).__name__}: {_one_line(str(error))}"
    print(f"unexpected error: {text} (set MMHUB_DEBUG=1 for the traceback; please report it)", file=sys.stderr)
    return ExitCode.FAILURE


_OS_ERRORS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EPIPE: "",
}


def _fail_os(error: OSError) -> int:
    if error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None:
        _drop_stdout()  # or the interpreter tries again, and complains, when it exits
    if error.errno == errno.EPIPE:
        return ExitCode.FAILURE
    where = f": '{os.fsdecode(error.filename)}'" if isinstance(error.filename, (str, bytes)) else ""
    return _fail(f"{_OS_ERRORS[error.errno or 0]}{where}", None)


def _drop_stdout() -> None:
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str | None, code: int = ExitCode.FAILURE) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {_one_line(hint)}", file=sys.stderr)
    return int(code)


def _one_line(text: str) -> str:
    """Messages quote names from checkpoints and servers, which may hold terminal control sequences."""
    words = " ".join(text.split())
    return (
        words if words.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    )


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return ExitCode.INTERRUPTED


def _plugin_command(name: str) -> click.Command:
    from mmhub.plugins import load_target

    factory, _, distribution, version = command_table()[name]
    if not factory:
        raise PluginError(
            f"the command '{name}' is provided by {distribution}",
            f"switch one off: MMHUB_DISABLE_PLUGINS={distribution.split()[0]}",
        )
    command: Any = load_target(factory, f"the command '{name}'", distribution, version)
    if not isinstance(command, click.Command):
        raise PluginError(f"plugin {distribution} {version}: {factory!r} is not a click command")
    return command


def _unknown_command(name: str, ctx: click.Context, known: Sequence[str]) -> Exception:
    if name.startswith("-"):
        return click.NoSuchOption(name, ctx=ctx)
    from mmhub.errors import UsageError, did_you_mean
    from mmhub.plugins import get_index, install_line
    from mmhub.registry import read_registries

    requirement = read_registries().requirement(f"command:{name}")
    if requirement:
        for plugin in get_index().plugins:
            if plugin.status != "ok" and any(command.name == name for command in plugin.commands):
                hint = f"see `mmhub plugins show {plugin.distribution}`"
                return PluginError(
                    f"the command '{name}' is in {plugin}, which is {plugin.status}: {plugin.problem}", hint
                )
        return PluginError(f"the command '{name}' is in a plugin that is not installed", install_line([requirement]))
    return UsageError(f"there is no command '{name}'", did_you_mean(name, known) or "see `mmhub --help`")
