"""Files that belong to the next message of a conversation on the terminal: pictures, recordings and so on."""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mmhub.cli.predict import check_files
from mmhub.errors import InputError, UsageError

Part = dict[str, str]
COMMON = ("image", "audio")
_WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""")  # as shells and terminals write a path that was dropped


class Attachments:
    """What is attached to the next message, as parts {"type": kind, kind: path}."""

    def __init__(self, model: Any, policy: Any) -> None:
        self.kinds: tuple[str, ...] = tuple(model.encoders) if model.converses else ()
        self.parts: list[Part] = []
        self._processors, self._policy = model.processors, policy

    def add(self, kind: str, given: str) -> Part:
        """Attach a file.

        Raises:
            UsageError: the model takes none of this kind. NotFoundError: there is no such file. InputError: it is
                unreadable.
        """
        if kind not in self.kinds:
            raise UsageError(f"this model takes no {kind}", f"it takes {', '.join((*self.kinds, 'text'))}")
        if not given:
            raise UsageError("a file is missing", f"/{kind} PATH")
        path = _plain(given)
        check_files((path,))
        self._look(kind, path)
        self.parts.append({"type": kind, kind: path})
        return self.parts[-1]

    def command(self, line: str) -> Part | None:
        """Do what a line such as "/image PATH" asks for; None if it is no such line."""
        command, _, rest = line.partition(" ")
        kind = command.removeprefix("/")
        known = command.startswith("/") and kind in {*COMMON, *self.kinds}
        return self.add(kind, rest.strip()) if known else None

    def content(self, text: str) -> Any:
        """Return the content of a message: what is attached, and the text."""
        return [*self.parts, {"type": "text", "text": text}] if self.parts else text

    def dropped(self, line: str) -> list[Part] | None:
        """Return a line as parts, if it names files that were dropped on the terminal; None if it names none.

        In front of a message these are all files of a kind that the model takes, behind its first word only those named
        from the root on, or in quotes.

        Raises:
            UsageError, NotFoundError, InputError: the whole line is files, and one is not of use, or the line begins
                with a folder.
        """
        words = list(_WORD.finditer(line))
        files = [_file(word[0]) for word in words]
        if line.startswith(("/", "'/", '"/', "file:")) and None in files[:1] and "/" in words[0][0].strip("'\"/"):
            path = _plain(words[0][0])
            check_files((path,))
            if os.path.isdir(path):
                raise UsageError(f"'{path}' is a folder", "drop the files that are in it")
        alone = None not in files
        found, text, begun = [], 0, False
        for word, file in zip(words, files, strict=True):
            kind = self._kind(file, sure=alone) if file and (not begun or _is_dropped(word[0])) else ""
            if kind and file:
                found += [*_text(line[text : word.start()]), {"type": kind, kind: file}]
                text = word.end()
            else:
                begun = True
        return [*found, *_text(line[text:])] if found else None

    def _look(self, kind: str, path: str) -> None:
        """Raise InputError if a file is not of a kind; where its length is not all the same, that shows it."""
        processor = self._processors[kind]
        (processor.read if processor.fixed_length else processor.length)(path, self._policy)

    def _kind(self, path: str, sure: bool) -> str:
        """What a file is, '' for nothing that the model takes; if it is `sure` to be meant, that is an error."""
        likely = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
        for kind in sorted(self.kinds, key=lambda kind: kind != likely):
            with suppress(InputError):
                self._look(kind, path)
                return kind
        if sure:
            raise UsageError(
                f"'{path}' is nothing that this model takes", f"it takes {', '.join((*self.kinds, 'text'))}"
            )
        return ""


def shown(part: Part) -> str:
    """Return how an attached file is shown, "(image: cat.png)"."""
    return f"({part['type']}: {Path(part[part['type']]).name})"


def _text(text: str) -> Iterator[Part]:
    if text.strip():
        yield {"type": "text", "text": text.strip()}


def _is_dropped(word: str) -> bool:
    return word.startswith(("'", '"', "file://")) or Path(_plain(word)).is_absolute()


def _file(word: str) -> str | None:
    """The path of the file that a word names, None for no file."""
    path = _plain(word)
    with suppress(OSError, ValueError):  # what is too long for a path, or holds a zero byte
        return path if path and Path(path).is_file() else None
    return None


def _plain(word: str) -> str:
    """A path as it is, without the marks of shells and terminals."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    elif os.name == "posix" and not os.path.exists(word):
        word = re.sub(r"\\(.)", r"\1", word)
    word = unquote(word.removeprefix("file://")) if word.startswith("file://") else word
    return os.path.expanduser(word)
