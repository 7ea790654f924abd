"""Rows of a table as conversations: read, fitted into what a language model reads at once, and kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from mmhub.conversation import Message, compose, fit_talk, media_of, read_script, text_of
from mmhub.data.cells import cell
from mmhub.data.inputs import placed_messages, usable
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Policy, Script, describe_raw


class EmptyRow(InputError):
    """A row without any input; unlike other errors without a modality it is not about the target."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class NothingLeft(EmptyRow):
    """A row that holds nothing but what is withheld: no mistake in the data."""


class LongTalk(InputError):
    """A conversation whose only turn is longer than what the model reads at once."""


@dataclass(frozen=True)
class Talk:
    """A row's conversation. `references` are what its last answer is compared with, `script` how it is laid out.

    Where messages were `left_out`, `items` holds by modality the numbers of the row's items that still stand in it.
    """

    messages: list[Message]
    script: Script
    references: Any
    items: Mapping[str, Sequence[int]] | None = None
    left_out: int = 0

    @property
    def asks(self) -> str:
        """The texts of all but the assistant."""
        return "".join(text_of(message) for message in self.messages if message["role"] != "assistant")


def read_talk(
    row: Mapping[str, Any],
    inputs: Mapping[str, str],
    target: str,
    processors: Mapping[str, Any],
    folder: Path | None,
) -> tuple[list[Message], Any]:
    """Return the conversation of a table's row, which ends with an answer, and what answers are compared with.

    Without a `target` the column of the text holds whole conversations; else one is made of the inputs and the target,
    a text or a list of several, of which the most frequent one is said.

    Raises:
        InputError: the row holds none, or no answer; its `modality` is "text" unless it is about the target.
    """
    if target:
        answer = row.get(target)
        texts = target_texts(answer)
        sample = {name: usable(name, cell(row, column), folder, len(inputs) == 1) for name, column in inputs.items()}
        return compose(sample, processors, Counter(texts).most_common(1)[0][0]), answer
    try:
        talk = placed_messages(cell(row, inputs["text"]), processors, folder)
        if talk[-1]["role"] != "assistant":
            raise InputError("the conversation does not end with an answer", "add a message of the assistant")
    except InputError as error:
        error.modality = error.modality or "text"
        raise
    return talk, text_of(talk[-1])


def talk_column(inputs: Mapping[str, str], usual: str) -> str:
    """Return the column of conversations, the `usual` one where `inputs` (modality -> column) name none.

    Raises:
        UsageError: they name another column beside it, which nothing would read.
    """
    column = inputs.get("messages") or inputs.get("text") or usual
    for name, other in inputs.items():
        if other != column:
            raise UsageError(
                f"{name} is in column {other!r}, and conversations, with the media in them, are in column {column!r}",
                "name the column of messages alone, or a target column where each input has a column of its own",
            )
    return column


def target_texts(answer: Any) -> list[str]:
    """Return the texts of a target, one or several.

    Raises:
        InputError: it holds none, or anything else.
    """
    texts = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"the target is {describe_raw(answer)}, not a text", "give every row a target text")
    return texts


@dataclass(frozen=True)
class TalkReader:
    """Reads rows as conversations that end with an answer.

    `inputs` (modality -> column) and `target` say where they stand, see `read_talk`; `readers` and `fusion` how many
    tokens media become. Of a conversation of more than `limit` tokens, media included, the oldest turns are left out,
    or the `newest`; 0 = no limit. Of what is in `withhold` no row has any.
    """

    inputs: Mapping[str, str]
    target: str
    processors: Mapping[str, Any]
    readers: Mapping[str, Any]
    fusion: Any
    policy: Policy = field(default_factory=Policy)
    limit: int = 0
    newest: bool = False
    withhold: tuple[str, ...] = ()
    _fixed: dict[str, int] = field(default_factory=dict)  # positions of any item of a modality of fixed length

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, str], target: str, policy: Policy, **options: Any) -> Self:
        """Build for the parts of a model."""
        return cls(inputs, target, model.processors, model.readers, model.fusion, policy, **options)

    @property
    def media(self) -> list[str]:
        """The modalities that a conversation may hold beside text."""
        return [name for name in self.processors if name != "text" and name not in self.withhold]

    def read(self, row: Mapping[str, Any], folder: Path | None, known: ReadTalk | None = None) -> Talk:
        """Return the conversation of a row; `known` is what was made of it before.

        Raises:
            InputError: it holds none, or none that can be laid out. LongTalk: its only turn is too long.
            NothingLeft: all that is asked is withheld.
        """
        messages, references = read_talk(row, self.inputs, self.target, self.processors, folder)
        if self.target and not any(message["content"] for message in messages[:-1]):
            raise EmptyRow(f"none of {', '.join(self.inputs.values())} is given")
        messages = self._without(messages)
        if known is not None:
            kept = self._kept(messages, known.left_out)
            return self._talk(kept, known.script, references, messages)
        script = read_script(self.processors["text"], messages, self.policy)
        kept, script = self._fitted(messages, script) if self.limit else (messages, script)
        if self.withhold and not any(message["content"] for message in kept if message["role"] != "assistant"):
            raise NothingLeft(f"without {' and '.join(self.withhold)} nothing is left to answer")
        return self._talk(kept, script, references, messages)

    def positions(self, messages: Sequence[Message]) -> dict[str, list[int]]:
        """Return by modality how many raw positions each item has, from its header alone.

        Raises:
            InputError: one cannot be read.
        """
        return {name: [self._length(name, raw) for raw in media_of(messages, name)] for name in self.media}

    def tokens(self, name: str, positions: int) -> int:
        """Return how many tokens the language model reads of an item of so many positions."""
        return int(self.fusion.token_count(name, self.readers[name].token_count(positions)))

    def _length(self, name: str, raw: Any) -> int:
        processor = self.processors[name]
        if not processor.fixed_length:
            return int(processor.length(raw, self.policy))
        if name not in self._fixed:
            self._fixed[name] = int(processor.length(raw, self.policy))
        return self._fixed[name]

    def _without(self, messages: list[Message]) -> list[Message]:
        """The conversation without what is withheld; answers stay."""
        if not self.withhold:
            return messages
        return [
            message
            if message["role"] == "assistant"
            else message | {"content": [part for part in message["content"] if part["type"] not in self.withhold]}
            for message in messages
        ]

    def _kept(self, messages: list[Message], left_out: int) -> list[Message]:
        if self.newest or not left_out:
            return messages[: len(messages) - left_out]
        begin = _begin(messages)
        return [*messages[:begin], *messages[begin + left_out :]]

    def _talk(self, kept: list[Message], script: Script, references: Any, messages: list[Message]) -> Talk:
        if len(kept) == len(messages):
            return Talk(kept, script, references)
        references = text_of(kept[-1]) if self.newest and not self.target else references
        stays = {id(message) for message in kept}
        items: dict[str, list[int]] = {name: [] for name in self.media}
        for name, found in items.items():
            owners = [message for message in messages for part in message["content"] if part["type"] == name]
            found += [number for number, owner in enumerate(owners) if id(owner) in stays]
        return Talk(kept, script, references, items, len(messages) - len(kept))

    def _fitted(self, messages: list[Message], script: Script) -> tuple[list[Message], Script]:
        """Leave out turns until the conversation is within the limit."""
        whole = {name: [self.tokens(name, size) for size in sizes] for name, sizes in self.positions(messages).items()}
        first = {name: len(media_of(messages[: _begin(messages)], name)) for name in self.media}  # of the system

        def size(script: Script) -> int:
            count = Counter(name for name, _ in script.places)
            total = len(script.ids)
            for name, sizes in whole.items():
                rest = count[name] - first[name]
                behind = sizes[first[name] :]
                total += sum(sizes[: first[name]]) + sum(behind[:rest] if self.newest else behind[len(behind) - rest :])
            return total

        if size(script) <= self.limit:
            return messages, script
        processor = self.processors["text"]
        kept, left_out = fit_talk(processor, messages, self.policy, size, self.limit, newest=self.newest)
        if left_out:
            script = read_script(processor, kept, self.policy)
        if size(script) > self.limit:
            what = (
                f"the {'first' if self.newest else 'last'} turn of the conversation" if left_out else "the conversation"
            )
            problem = f"{what} has {size(script)} tokens, media included, of {self.limit} that are read at once"
            error = LongTalk(problem, "shorten it, take a model with a longer context, or skip such rows")
            error.modality = "text"
            raise error
        return kept, script


def _begin(messages: Sequence[Message]) -> int:
    """How many messages of the system stand in front."""
    return next((number for number, one in enumerate(messages) if one["role"] != "system"), len(messages))


@dataclass(frozen=True)
class ReadTalk:
    """What was made of a row: its script, and how many messages were left out of it."""

    script: Script
    left_out: int = 0


@dataclass(frozen=True)
class ReadTalks:
    """What was made of the rows of a table, so that none is laid out twice; flat, to be shared by workers.

    Of row i, `ends[i]` is where its ids and weights end, and `place_ends[i]` where its places do. `shortened` rows have
    left some of their turns out, and those in `too_long` are so with a single one: `problem` is the first one's message
    and hint.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    ends: NDArray[np.int64]
    kinds: NDArray[np.int32]  # of media, numbers into `names`
    places: NDArray[np.int32]
    place_ends: NDArray[np.int64]
    prompts: NDArray[np.int32]
    left_out: NDArray[np.int32]
    known: NDArray[np.bool_]
    names: tuple[str, ...]
    shortened: int = 0
    too_long: tuple[int, ...] = ()
    problem: tuple[str, str | None] = ("", None)

    def row(self, number: int) -> ReadTalk | None:
        """Return what was made of a row, None if it is not known."""
        if not self.known[number]:
            return None
        text, media = (
            slice(int(ends[number - 1]) if number else 0, int(ends[number])) for ends in (self.ends, self.place_ends)
        )
        kinds, places = self.kinds[media].tolist(), self.places[media].tolist()
        script = Script(
            ids=torch.from_numpy(self.ids[text].astype(np.int64)),
            weights=torch.from_numpy(self.weights[text].copy()),
            places=tuple((self.names[kind], place) for kind, place in zip(kinds, places, strict=True)),
            prompt=int(self.prompts[number]),
        )
        return ReadTalk(script, int(self.left_out[number]))


class TalkStore:
    """Keeps what is made of rows, one after the other, while there is `space`, in bytes."""

    def __init__(self, names: Sequence[str], space: int) -> None:
        self.names, self.space = tuple(names), space
        self._ids, self._weights, self._kinds, self._places = array("i"), array("f"), array("i"), array("i")
        self._ends, self._place_ends = array("q"), array("q")
        self._prompts, self._left_out, self._known = array("i"), array("i"), array("b")
        self._shortened, self._too_long = 0, list[int]()
        self._problem: tuple[str, str | None] | None = None

    def add(self, talk: Talk | None) -> None:
        """Keep the next row, None for one that cannot be read."""
        left_out = talk.left_out if talk is not None else 0
        self._shortened += left_out > 0
        size = 33 + (8 * len(talk.script.ids) + 8 * len(talk.script.places) if talk else 0)
        fits = talk is not None and size <= self.space
        if talk is not None and fits:
            self.space -= size
            self._ids.frombytes(talk.script.ids.numpy().astype(np.int32).tobytes())
            self._weights.frombytes(talk.script.weights.numpy().astype(np.float32).tobytes())
            self._kinds.extend(self.names.index(name) for name, _ in talk.script.places)
            self._places.extend(place for _, place in talk.script.places)
        self._ends.append(len(self._ids))
        self._place_ends.append(len(self._places))
        self._prompts.append(talk.script.prompt if talk is not None and fits else 0)
        self._left_out.append(left_out)
        self._known.append(fits)

    def add_long(self, error: LongTalk) -> None:
        """Note that the next row is too long."""
        self._problem = self._problem or (error.message, error.hint)
        self._too_long.append(len(self._ends))
        self.add(None)

    def rows(self) -> ReadTalks:
        def flat(part: array[Any]) -> Any:
            return np.asarray(part, part.typecode)

        return ReadTalks(
            ids=flat(self._ids),
            weights=flat(self._weights),
            ends=flat(self._ends),
            kinds=flat(self._kinds),
            places=flat(self._places),
            place_ends=flat(self._place_ends),
            prompts=flat(self._prompts),
            left_out=flat(self._left_out),
            known=flat(self._known).view(np.bool_),
            names=self.names,
            shortened=self._shortened,
            too_long=tuple(self._too_long),
            problem=self._problem or ("", None),
        )
