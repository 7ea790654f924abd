"""What is kept from one turn of a conversation to the next: media, and what the language model has read already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmhub.batch import Bundle, Features
from mmhub.conversation import Message
from mmhub.errors import MmhubError
from mmhub.generate.media import Media
from mmhub.interfaces import Policy, Script, own_stream

if TYPE_CHECKING:
    from mmhub.model import Model


@dataclass(frozen=True)
class _Mark:
    """A conversation up to some place: its token ids and keys of media, how many tokens these are, and the state."""

    atoms: tuple[Any, ...]
    length: int
    state: Any


class Memory:
    """A language model's `begin`, `step` and `select` for one conversation, of which nothing is read twice.

    `begin` goes on from the state in which the last answer was, or its question, whichever the new conversation begins
    with; where it begins with neither, or the decoder cannot `extend`, all is read anew. One state is kept.
    """

    def __init__(self, model: Model, policy: Policy) -> None:
        self.media = Media(model, policy)
        self._decoder = model.language_model
        self._asked: _Mark | None = None  # after the question, or later
        self._written: list[int] = []  # what was read of the answer since
        self._latest: tuple[int, Any] | None = None  # how much of that, and the state after it
        self._next: tuple[Any, ...] = ()
        self._shown: Sequence[Message] = ()  # what was laid out last

    def bundle(self, talk: Sequence[Message], script: Script) -> Bundle:
        """Return what `begin` is given for a conversation that ends where the answer begins."""
        bundle = self.media.bundle([talk], [script])
        self._next, self._shown = self.media.atoms(talk, script), talk
        return bundle

    def begin(self, bundle: Bundle) -> tuple[Tensor, Any]:
        stream = own_stream(bundle)
        known = self._begun_with(self._next) if self._decoder.extends else None
        self._asked, self._written, self._latest = None, [], None  # an old state is not kept beside the new one
        if known is None:
            logits, state = self._decoder.begin(bundle)
        else:
            logits, state = self._decoder.extend({"fused": _behind(stream, known.length)}, known.state)
        self._asked = _Mark(self._next, int(stream.lengths[0]), state)
        return logits, state

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self._decoder.step(ids, state)
        if len(ids) == 1:  # of several hypotheses nobody knows which will be the answer
            self._written.append(int(ids))
            self._latest = len(self._written), state
        return logits, state

    def select(self, state: Any, rows: Tensor) -> Any:
        return self._decoder.select(state, rows)

    def settle(self, lay: Any, talk: Sequence[Message]) -> None:
        """Keep of both states the one that `talk`, the conversation with its answer, goes on from."""
        atoms: tuple[Any, ...] = ()
        with suppress(MmhubError):  # a template may refuse what does not end with a question
            atoms = self.media.atoms(talk, lay(talk))
        self._asked, self._written, self._latest = self._begun_with(atoms) or self._asked, [], None
        self.media.keep(self._shown, talk)

    def forget(self) -> None:
        """Keep nothing."""
        self._asked, self._written, self._latest, self._shown = None, [], None, ()
        self.media.keep((), ())

    def _begun_with(self, atoms: tuple[Any, ...]) -> _Mark | None:
        """What was read and is the longest beginning of something, but not all of it."""
        marks = [] if self._asked is None else [self._asked]
        if self._asked is not None and self._latest is not None:
            count, state = self._latest
            written = self._written[:count]
            marks.append(_Mark((*self._asked.atoms, *written), self._asked.length + count, state))
        found = [mark for mark in marks if len(mark.atoms) < len(atoms) and atoms[: len(mark.atoms)] == mark.atoms]
        return found[-1] if found else None


def _behind(stream: Features, length: int) -> Features:
    """A stream without its first tokens."""
    ids = None if stream.ids is None else stream.ids[:, length:]
    return Features(stream.tokens[:, length:], stream.mask[:, length:], ids=ids)
