"""`mmhub chat`: a conversation on the terminal, or one read from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mmhub.cli.options import device_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.writing import read_settings, show, writing_options
from mmhub.errors import InputError, MmhubError, UsageError, did_you_mean

_COMMANDS = {
    "/help": "say what these commands do",
    "/reset": "forget the conversation, but not the system message",
    "/system": "TEXT  say how to answer; without TEXT show what was said",
    "/undo": "forget the last question and its answer",
    "/save": "FILE  write the conversation to a JSON file",
    "/quit": "leave, as Ctrl-D does",
}
_LEAVE = "Ctrl-D or /quit leaves"


@click.command()
@click.argument("name")
@click.option("--system", default="", help="How to answer.")
@click.option("--template", metavar="plain|chatml|FILE", help="A chat template, for models that have none.")
@writing_options
@device_option
@quiet_option
@json_option
def chat(
    name: str, system: str, template: str | None, writing: dict[str, Any], device: str, quiet: bool, as_json: bool
) -> None:
    """Talk with the model NAME.

    On a terminal Ctrl-C stops an answer, and /help lists commands. From a pipe each line is a question; the answers go
    to stdout, or with --json the whole conversation.
    """
    from mmhub.hub import load

    model = load(name, device=device)
    processor = model.language_model.processor
    if template is not None:
        _use_template(name, processor, template)
    settings = read_settings(model, writing)
    from mmhub.generate import Conversation

    try:
        talk = Conversation(model, system, settings)
    except UsageError as error:
        raise UsageError(error.message, "give one: --template plain, chatml or a file") from None
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    answers = _Terminal(talk, quiet).run() if terminal else _read_all(talk, as_json, quiet)
    if as_json:
        emit({"name": name, "messages": talk.messages, "answers": answers}, as_json, "")


def _use_template(name: str, processor: Any, template: str) -> None:
    """Lay out conversations by another template."""
    if not hasattr(processor, "take_template"):
        raise UsageError(f"the tokenizer of '{name}' takes no chat template", "use `mmhub generate`")
    processor.take_template(template)


def _read_all(talk: Any, as_json: bool, quiet: bool) -> list[dict[str, Any]]:
    """Answer each line of stdin."""
    answers = []
    for line in _lines():
        found = talk.ask(line)
        if found.get("finish") == "interrupted":
            raise KeyboardInterrupt
        answers.append(found)
        _explain(found, quiet)
        if not as_json and "text" in found:
            show(found["text"] + "\n")
    return answers


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of stdin is not UTF-8 text: byte {error.start + 1}") from None
        if text:
            yield text


def _explain(found: dict[str, Any], quiet: bool = False) -> None:
    """Say on stderr what an answer does not say itself."""
    if "refused" in found:
        note(f"(refused by {found['guard']}: {found['refused']})")
    if found.get("truncated"):
        turns = "turn was" if found["truncated"] == 1 else f"{found['truncated']} turns were"
        note(f"(the conversation no longer fits the model's context: the oldest {turns} left out)", quiet)
    if found.get("finish") == "length":
        note("(the answer was cut: it reached --max-new-tokens or the model's context)", quiet)


class _Terminal:
    """Questions typed on a terminal, answers that appear as they are written, and commands."""

    def __init__(self, talk: Any, quiet: bool) -> None:
        self._talk, self._quiet = talk, quiet
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/save": self._save,
        }

    def run(self) -> list[dict[str, Any]]:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history and editing
        note(f"/help lists commands, {_LEAVE}", self._quiet)
        while True:
            try:
                text = input("> ").strip()
                if text == "/quit":
                    return []
                if text:
                    self._do(text)
            except EOFError:
                print()
                return []
            except KeyboardInterrupt:
                print()
                note(_LEAVE)
            except MmhubError as error:
                note(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))

    def _do(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        if not text.startswith("/"):
            self._ask(text)
        elif command in self._commands:
            self._commands[command](rest.strip())
        else:
            raise UsageError(f"there is no command {command}", did_you_mean(command, _COMMANDS) or "/help lists them")

    def _ask(self, text: str) -> None:
        found = self._talk.ask(text, show)
        print(flush=True)
        if found.get("finish") == "interrupted":
            note("(interrupted)")
        _explain(found, self._quiet)

    def _help(self, rest: str) -> None:
        print("\n".join(f"{name}  {text}" for name, text in _COMMANDS.items()))

    def _reset(self, rest: str) -> None:
        self._talk.reset()
        note("the conversation is forgotten", self._quiet)

    def _system(self, rest: str) -> None:
        if rest:
            self._talk.system = rest
        print(f"system: {self._talk.system or '(none)'}")

    def _undo(self, rest: str) -> None:
        if not self._talk.undo():
            raise UsageError("there is nothing to forget")
        note("the last question and its answer are forgotten", self._quiet)

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("a file is missing", "/save FILE")
        path = Path(rest).expanduser()
        if path.exists():
            raise UsageError(f"'{path}' exists", "name another file")
        from mmhub.files import disk_errors, write_file

        with disk_errors("the conversation", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps({"messages": self._talk.messages}, indent=2, ensure_ascii=False) + "\n")
        note(f"{len(self._talk.messages)} messages in {path}", self._quiet)
