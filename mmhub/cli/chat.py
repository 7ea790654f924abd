"""`mmhub chat`: a conversation on the terminal, or one read from a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mmhub.cli.attachments import Attachments, Part
from mmhub.cli.attachments import shown as attached
from mmhub.cli.options import device_option, quantize_option, urls_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.predict import check_files
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
_ATTACHING = {
    "/media": "list what the next message comes with; files may be dropped here, too",
    "/drop": "attach nothing to it",
}
_ONE = {"image": "a picture", "audio": "a recording"}
_LEAVE = "Ctrl-D or /quit leaves"


@click.command()
@click.argument("name")
@click.option("--system", default="", help="How to answer.")
@click.option("--template", metavar="plain|chatml|FILE", help="A chat template, for models that have none.")
@click.option("--image", multiple=True, metavar="FILE", help="A picture for the first message (repeatable).")
@click.option("--audio", multiple=True, metavar="FILE", help="A recording for the first message (repeatable).")
@writing_options
@device_option
@quantize_option
@urls_option
@quiet_option
@json_option
def chat(
    name: str,
    system: str,
    template: str | None,
    image: tuple[str, ...],
    audio: tuple[str, ...],
    writing: dict[str, Any],
    device: str,
    quantize: str | None,
    allow_urls: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Talk with the model NAME.

    On a terminal Ctrl-C stops an answer, and /help lists commands. From a pipe each line is a question; the answers go
    to stdout, or with --json the whole conversation. A line "/image PATH" or "/audio PATH" adds a file to the next
    question; on a terminal it may be dropped there as well.
    """
    check_files((*image, *audio))
    from mmhub.hub import load
    from mmhub.interfaces import Policy

    model = load(name, device=device, quantize=quantize)
    processor = model.language_model.processor
    if template is not None:
        _use_template(name, processor, template)
    settings = read_settings(model, writing)
    from mmhub.generate import Conversation

    policy = Policy(urls=allow_urls)
    attachments = Attachments(model, policy)
    for kind, paths in (("image", image), ("audio", audio)):
        for path in paths:
            attachments.add(kind, path)
    try:
        talk = Conversation(model, system, settings, policy)
    except UsageError as error:
        raise UsageError(error.message, "give one: --template plain, chatml or a file") from None
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    answers = _Terminal(talk, attachments, quiet).run() if terminal else _read_all(talk, attachments, as_json, quiet)
    if as_json:
        emit({"name": name, "messages": talk.messages, "answers": answers}, as_json, "")


def _use_template(name: str, processor: Any, template: str) -> None:
    """Lay out conversations by another template."""
    if not hasattr(processor, "take_template"):
        raise UsageError(f"the tokenizer of '{name}' takes no chat template", "use `mmhub generate`")
    processor.take_template(template)


def _read_all(talk: Any, attachments: Attachments, as_json: bool, quiet: bool) -> list[dict[str, Any]]:
    """Answer each line of stdin that attaches no file."""
    answers = []
    for line in _lines():
        if attachments.command(line):
            continue
        found = talk.ask(attachments.content(line))
        attachments.parts = []
        if found.get("finish") == "interrupted":
            raise KeyboardInterrupt
        answers.append(found)
        _explain(found, quiet)
        if not as_json and "text" in found:
            show(found["text"] + "\n")
    if attachments.parts:
        note(f"no question followed {' '.join(map(attached, attachments.parts))}", quiet)
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

    def __init__(self, talk: Any, attachments: Attachments, quiet: bool) -> None:
        self._talk, self._attachments, self._quiet = talk, attachments, quiet
        own = {f"/{kind}": f"PATH  add {_ONE.get(kind, kind)} to the next message" for kind in attachments.kinds}
        self._texts = _COMMANDS | (own | _ATTACHING if own else {})
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/save": self._save,
        }
        if own:
            self._commands |= {"/media": self._media, "/drop": self._drop}

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
        if command in self._commands:
            self._commands[command](rest.strip())
        elif part := self._attachments.command(text):
            note(attached(part), self._quiet)
        elif parts := self._attachments.dropped(text):
            self._take(parts)
        elif text.startswith("/"):
            raise UsageError(f"there is no command {command}", did_you_mean(command, self._texts) or "/help lists them")
        else:
            self._ask(self._attachments.content(text))

    def _take(self, parts: list[Part]) -> None:
        """Attach files that were dropped, and ask what stands beside them."""
        files = [part for part in parts if part["type"] != "text"]
        for part in files:
            note(attached(part), self._quiet)
        content = [*self._attachments.parts, *parts]
        self._attachments.parts += files  # before the question, which may fail
        if len(files) < len(parts):
            self._ask(content)

    def _ask(self, content: Any) -> None:
        before = len(self._talk.messages)
        found = self._talk.ask(content, show)
        print(flush=True)
        if found.get("finish") == "interrupted":
            note("(interrupted)")
        _explain(found, self._quiet)
        if len(self._talk.messages) > before:
            self._attachments.parts = []
        elif self._attachments.parts:
            note(f"still attached: {' '.join(map(attached, self._attachments.parts))}; /drop forgets it", self._quiet)

    def _help(self, rest: str) -> None:
        print("\n".join(f"{name}  {text}" for name, text in self._texts.items()))

    def _media(self, rest: str) -> None:
        print("\n".join(f"{part['type']}: {part[part['type']]}" for part in self._attachments.parts) or "(none)")

    def _drop(self, rest: str) -> None:
        self._attachments.parts = []
        note("nothing is attached now", self._quiet)

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
        path = Path(os.path.expanduser(rest))
        if os.path.exists(path):
            raise UsageError(f"'{path}' exists", "name another file")
        from mmhub.files import disk_errors, write_file

        with disk_errors("the conversation", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            messages = [message | {"content": _rooted(message["content"])} for message in self._talk.messages]
            write_file(path, json.dumps({"messages": messages}, indent=2, ensure_ascii=False) + "\n")
        note(f"{len(self._talk.messages)} messages in {path}", self._quiet)


def _rooted(content: Any) -> Any:
    """A content in which the paths of files hold from any folder."""
    if isinstance(content, str):
        return content
    return [
        {key: _path(value) if key == part["type"] != "text" else value for key, value in part.items()}
        for part in content
    ]


def _path(value: str) -> str:
    return value if value.startswith(("http://", "https://")) else os.path.abspath(value)
