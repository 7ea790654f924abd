"""What is noted of guards' decisions: in Python's logging and, if MMHUB_GUARD_LOG says so, in a file. Never content."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from mmhub.errors import MmhubError
from mmhub.guard.texts import texts_of

Stage = Literal["input", "output"]
Action = Literal["refused", "changed", "abstained"]

logger = logging.getLogger("mmhub.guards")
WITHHELD = "(withheld: it repeats what was said)"
UNKNOWN = "(withheld: a guard's own words)"  # which may say anything


class Decisions:
    """Notes what guards decide about one model: a line of JSON each, in one write, so that processes may share a file.

    Raises:
        MmhubError: MMHUB_GUARD_LOG names a file that cannot be written.
    """

    def __init__(self, model: str) -> None:
        self._model, self._file = model, os.environ.get("MMHUB_GUARD_LOG", "")
        self._append(b"")

    def note(self, guard: str, stage: Stage, action: Action, *, rule: str = "", reason: str = "") -> None:
        """Note a decision; `rule` and `reason` must not repeat what was said."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": time, "model": self._model, "guard": guard, "rule": rule, "stage": stage}
        line = json.dumps(entry | {"action": action, "reason": reason}, ensure_ascii=False)
        logger.info("%s", line)
        self._append((line + "\n").encode("utf-8", "replace"))

    def _append(self, line: bytes) -> None:
        if not self._file:
            return
        try:
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if line:
                    os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            problem = f"cannot write the log of guards '{self._file}': {error.strerror}"
            raise MmhubError(problem, "MMHUB_GUARD_LOG names a file to append to") from None


def without_content(reason: str, *given: Mapping[str, Any]) -> str:
    """Return a reason that may be noted: one that has a longer word or number of the texts in common is withheld.

    >>> without_content("it names Mallory", {"text": "call Mallory now"})
    '(withheld: it repeats what was said)'
    >>> without_content("no names here", {"text": "call Mallory now"})
    'no names here'
    """
    said = set(_words(text for one in given for text in _every_text(one)))
    return WITHHELD if said.intersection(_words([reason])) else reason


def _words(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        yield from (word for word in re.findall(r"\w+", text.casefold()) if len(word) > 4 or word.isdecimal())


def _every_text(given: Mapping[str, Any]) -> Iterable[str]:
    yield from texts_of(given)
    yield from (value for key, value in given.items() if isinstance(value, str) and key != "text")
