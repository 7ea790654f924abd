"""Conversations with media laid out by a chat template: where media stand, and what of the text is trained.

Characters that no text should hold, Unicode's noncharacters, mark the places of media in what the template writes. A
copy of the tokenizer takes them for special tokens, so that texts are cut there as they are at any other, and they are
left out of the ids. All else is encoded as a whole, so that a conversation has the ids that it has everywhere.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from tokenizers import AddedToken, Encoding, Tokenizer, processors

from mmhub.errors import InputError
from mmhub.interfaces import Script
from mmhub_text.chat import render
from mmhub_text.store import encode
from mmhub_text.tokenizer import parse_tokenizer

MEDIA = tuple(map(chr, range(0xFDD0, 0xFDD8)))  # one for each modality of a conversation
CUT = "\ufdd8"  # where a text is cut in two before it is encoded
FREE = tuple(map(chr, range(0xFDD9, 0xFDF0)))  # for what stands around that which must stay plain text
_RUNS = re.compile(b"\0+|\1+")  # of characters that need not, or must, stay plain


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a model's conversations are written.

    Attributes:
        template, names: as `render` takes them. controls: tokens that messages must not spell, by role; they become
            plain text, character by character, also those that a text spells after `normalise`.
        media: by modality, what the template writes by itself in the place of an item.
        around: by modality, texts to put before and behind the item there.
    """

    template: str
    names: Mapping[str, str]
    controls: Mapping[str, Set[str]]
    normalise: Callable[[str], str] = str
    media: Mapping[str, str] = field(default_factory=dict)
    around: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Reader:
    """Encodes what a template wrote: special tokens in it, and marks, become theirs, unless they are `plain`."""

    def __init__(self, tokenizer: Tokenizer, plain: Callable[[str], Encoding]) -> None:
        self.plain = plain
        self.tokenizer = parse_tokenizer(tokenizer.to_str())
        self.tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in (*MEDIA, CUT)])
        self.tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # or blanks would be in no token
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.marks = {i: token.content for i, token in added.items() if token.content in (*MEDIA, CUT)}


@dataclass
class _Tokens:
    """The tokens of a text, media among them, and where each begins and ends there."""

    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def behind(self, place: int) -> int:
        """The first token that ends behind a place."""
        return bisect_right(self.ends, place)


class Talk:
    """A conversation, laid out; if it `asks`, as it does by default after all but an answer, up to where one begins.

    Attributes:
        text: what the template writes, with marks. media: how many items of each modality there are.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], style: Style, asks: bool | None = None) -> None:
        self._messages, self._style = messages, style
        parts = [part for message in messages for part in _parts(message["content"])]
        kinds = [part["type"] for part in parts if part["type"] != "text"]
        self.media = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        if len(self.media) > len(MEDIA):
            raise InputError(f"a conversation holds {len(self.media)} modalities, more than {len(MEDIA)}")
        self._marks = dict(zip(self.media, MEDIA, strict=False))
        self._open, self._close = _free("".join(part["text"] for part in parts if part["type"] == "text"))
        self._takes_text, self._takes_parts = _forms(style.template, frozenset(style.names.items()))
        self._torn = _torn(messages, frozenset().union(*style.controls.values()), style.normalise)
        numbered = enumerate(messages)
        self._plain = [{"role": one["role"], "content": self._content(one, i in self._torn)} for i, one in numbered]
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        self._asks = not answered if asks is None else asks
        self.text = self._whole()
        self._check_media()

    @property
    def plain_text(self) -> str:
        """What the template writes, without marks."""
        return re.sub(f"[{''.join(MEDIA)}{self._open}{self._close}]", "", self.text)

    def ids(self, read: Reader, check: Callable[[str], str] = str) -> list[int]:
        """Return the ids of a conversation without media; `check` is called with all texts that are encoded."""
        return self._tokens(read, check).ids

    def script(self, read: Reader, stops: Collection[int], check: Callable[[str], str] = str) -> Script:
        """Return ids, weights, places and turns. Trained are answers, each up to the first of the `stops` behind it.

        An answer that the template writes otherwise once more is said after it is not. Where the conversation `asks`,
        nothing is trained, and no turns are told: they take a layout for each message.

        Raises:
            InputError: that is so of the last answer already.
        """
        answers, borders = ([], []) if self._asks else self._spans()
        tokens = self._tokens(read, check)
        if not self._asks:
            if not answers or answers[-1][0] != len(self._messages) - 1:
                what = "the chat template writes the last answer otherwise than it lets a model begin one"
                raise InputError(what, "take another template to train with")
            cuts = [start for _, start, _ in answers if not self._is_border(start, tokens, read)]
            tokens = self._tokens(read, check, cuts) if cuts else tokens
        weights = [0.0] * len(tokens.ids)
        for number, start, end in answers:
            for place in _trained(tokens, start, end, stops, read.special):
                weights[place] = float(self._messages[number].get("weight", 1))
        ends = [bisect_left(tokens.starts, border) for border in borders[:-1]]
        edges = [0, *ends, len(tokens.ids)]
        modality = {mark: kind for kind, mark in self._marks.items()}
        text = [place for place, token in enumerate(tokens.ids) if token not in read.marks]
        media = [place for place, token in enumerate(tokens.ids) if token in read.marks]
        prompt = len(tokens.ids) if self._asks else tokens.behind(answers[-1][1])
        return Script(
            ids=torch.tensor([tokens.ids[place] for place in text], dtype=torch.long),
            weights=torch.tensor([weights[place] for place in text]),
            places=tuple((modality[read.marks[tokens.ids[place]]], place) for place in media),
            prompt=bisect_left(text, prompt),
            turns=tuple(b - a for a, b in pairwise(edges)) if borders else (),
        )

    # -- laying out ---------------------------------------------------------------------------------------------

    def _content(self, message: Mapping[str, Any], torn: bool = False) -> Any:
        """What the template gets as a message's content: a text with marks, or parts if it takes no others.

        One that is `torn` goes on with a control token, which the messages before it began.
        """
        parts, controls = _parts(message["content"]), self._style.controls[message["role"]]
        own = set(self._style.media) if self._takes_parts else set()
        listed = self._takes_parts and (not self._takes_text or any(part["type"] in own for part in parts))
        found: list[dict[str, str]] = []
        for marked, group in groupby(parts, lambda part: part["type"] not in ("text", *own)):
            run = list(group)
            if marked:
                found += [{"type": "text", "text": self._marks[part["type"]]} for part in run]
                continue
            texts = [part["text"] for part in run if part["type"] == "text"]
            plain = iter(self._spelled(texts if listed else ["".join(texts)], controls, torn))
            kinds = [part["type"] for part in run] if listed else ["text"]
            found += [{"type": kind, kind: next(plain) if kind == "text" else ""} for kind in kinds]
        return found if listed else "".join(part["text"] for part in found)

    def _spelled(self, texts: list[str], controls: Set[str], torn: bool = False) -> list[str]:
        """Texts that may come to stand behind each other, with what must stay plain in them between two marks.

        That is also what they spell together. A text is normalised if that makes it spell more of it. The first
        character of what is `torn` is plain, too, and so it joins nothing before it.
        """
        text = "".join(texts)
        normal = self._style.normalise(text)
        known = {token for token in controls if token in text or token in normal} | {m for m in MEDIA if m in text}
        known |= {CUT} & set(text)
        if not known and not torn:
            return texts
        if any(normal.count(token) > text.count(token) for token in known):
            if len(texts) > 1:  # nobody knows where they end in what is normalised
                return [f"{self._open}{part}{self._close}" for part in texts]
            text, texts = normal, [normal]
        plain = bytearray(len(text))
        tokens = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        for found in re.finditer(tokens, text) if known else ():
            plain[found.start() : found.end()] = b"\1" * len(found[0])
        if torn and text.strip():
            plain[len(text) - len(text.lstrip())] = 1
        ends = accumulate(map(len, texts))
        return ["".join(self._marked(text, plain, end - len(part), end)) for part, end in zip(texts, ends, strict=True)]

    def _marked(self, text: str, plain: bytearray, start: int, end: int) -> Iterator[str]:
        """From one place to another the text, with marks around what is plain."""
        for run in _RUNS.finditer(plain, start, end):
            part = text[run.start() : run.end()]
            yield f"{self._open}{part}{self._close}" if plain[run.start()] else part

    def _whole(self) -> str:
        try:
            return self._lay(self._plain, self._asks)
        except InputError as error:
            others = [message for message in self._plain if message["role"] != "system"]
            if len(others) < len(self._plain) and self._tried(others, self._asks) is not None:
                hint = "it takes no message of the system: begin the first one of the user with that text"
                raise InputError(error.message, hint) from None
            raise

    def _lay(self, messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
        """Render, and put marks where the template writes its own tokens in the place of media."""
        text = render(messages, self._style.template, self._style.names, asks=asks)
        if not self._takes_parts:
            return text
        for kind, token in self._style.media.items():
            if kind in self._marks:
                before, behind = self._style.around.get(kind, ("", ""))
                marked = f"{before}{self._marks[kind]}{behind}"
                plain = [
                    f"{self._open}{part}{self._close}" if spelled else part.replace(token, marked)
                    for part, spelled, _ in self._pieces(text)
                ]
                text = "".join(plain)
        return text

    def _tried(self, messages: Sequence[Mapping[str, Any]], asks: bool) -> str | None:
        """The layout of a part of the conversation, None where the template refuses it."""
        try:
            return self._lay(messages, asks)
        except InputError:
            return None

    def _check_media(self) -> None:
        written = "".join(part for part, spelled, _ in self._pieces(self.text) if not spelled)
        for kind, mark in self._marks.items():
            if written.count(mark) != self.media[kind]:
                what = f"the chat template writes {written.count(mark)} of {self.media[kind]} items of {kind!r}"
                raise InputError(what, "take another template")

    def _spans(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Return (number, start, end) of the answers found in the text, and where each message ends.

        An answer begins where the model begins to write, which is the end of the message before it.
        """
        starts: dict[int, int] = {}
        for number, message in enumerate(self._plain):
            before = self._tried(self._plain[:number], True) if message["role"] == "assistant" else None
            if before is not None and self.text.startswith(before):
                starts[number] = len(before)
        answers: list[tuple[int, int, int]] = []
        borders: list[int] = []
        for number, message in enumerate(self._plain):
            start, border = starts.get(number), starts.get(number + 1)
            if start is not None or border is None:
                last = number == len(self._plain) - 1
                after = self.text if last else self._tried(self._plain[: number + 1], False) or ""
                end = _shared(after, self.text)
                border = end if border is None else border
                said = "".join(part.get("text", "") for part in _parts(message["content"])).strip()
                whole = end == len(after) or (said and said in self.text[start or 0 : end])
                if start is not None and start <= end and whole:
                    answers.append((number, start, end))
            borders.append(max([border, *borders[-1:]]))
        return answers, borders

    # -- encoding -----------------------------------------------------------------------------------------------

    def _pieces(self, text: str) -> Iterator[tuple[str, bool, int]]:
        """Yield what is encoded by itself: the text, whether all in it stays plain, and where it begins."""
        place = 0
        for piece in re.split(f"({self._open}[^{self._open}{self._close}]*{self._close})", text):
            spelled = piece[:1] == self._open
            if piece:
                yield (piece[1:-1] if spelled else piece), spelled, place + spelled
            place += len(piece)

    def _tokens(self, read: Reader, check: Callable[[str], str], cuts: Collection[int] = ()) -> _Tokens:
        tokens = _Tokens()
        for piece, spelled, place in self._pieces(self.text):
            check(piece)
            if spelled:
                for offset, char in enumerate(piece, place):
                    ids = read.plain(char).ids
                    tokens.ids += ids
                    tokens.starts += [offset] * len(ids)
                    tokens.ends += [offset + 1] * len(ids)
                continue
            edges = [0, *(cut - place for cut in cuts if place < cut < place + len(piece)), len(piece)]
            parted = CUT.join(piece[a:b] for a, b in pairwise(edges))
            found = encode(read.tokenizer, parted, framed=False)
            for token, (start, end) in zip(found.ids, found.offsets, strict=True):
                if read.marks.get(token) == CUT:
                    place -= 1
                else:
                    tokens.ids.append(token)
                    tokens.starts.append(place + start)
                    tokens.ends.append(place + end)
        return tokens

    def _is_border(self, place: int, tokens: _Tokens, read: Reader) -> bool:
        """Are the tokens before a place those that the text before it has alone, as when an answer is to be written?"""
        behind = tokens.behind(place)
        if behind < len(tokens.ids) and tokens.starts[behind] < place:
            return False
        begin = max(self.text.rfind(self._open, 0, place), self.text.rfind(self._close, 0, place)) + 1
        first = bisect_left(tokens.starts, begin)
        for number in range(behind - 1, first - 1, -1):  # what stands before a special token changes nothing behind it
            if tokens.ids[number] in read.special:
                begin, first = tokens.starts[number], number
                break
        return encode(read.tokenizer, self.text[begin:place], framed=False).ids == tokens.ids[first:behind]


def _trained(tokens: _Tokens, start: int, end: int, stops: Collection[int], special: Collection[int]) -> Iterator[int]:
    """The tokens from one place to another, up to a stop token; no special one that reaches over the end."""
    for place in range(tokens.behind(start), len(tokens.ids)):
        token = tokens.ids[place]
        if tokens.starts[place] >= end or (tokens.ends[place] > end and token in special):
            return
        yield place
        if token in stops:
            return


def _shared(text: str, other: str) -> int:
    """How many characters two texts have in common from the beginning."""
    if other.startswith(text):
        return len(text)
    return next((place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))


def _torn(messages: Sequence[Mapping[str, Any]], controls: Set[str], normalise: Callable[[str], str]) -> frozenset[int]:
    """The messages in which a control token ends that begins in one before: a template may write nothing between."""
    contents = [_parts(message["content"]) for message in messages]
    texts = ["".join(part["text"] for part in parts if part["type"] == "text").strip() for parts in contents]
    inside: set[int] = set()
    for read in (texts, list(map(normalise, texts))):
        borders, whole = list(accumulate(map(len, read))), "".join(read)
        for number, border in enumerate(borders[:-1], 1):
            around = ((token, max(0, border - len(token) + 1), border + len(token) - 1) for token in controls)
            if any(whole.find(token, start, end) >= 0 for token, start, end in around if token):
                inside.add(number)
    return frozenset(inside)


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _free(text: str) -> tuple[str, str]:
    """Two marks that the text does not hold."""
    free = [mark for mark in FREE if mark not in text]
    if len(free) < 2:
        raise InputError("the conversation holds nearly all of Unicode's noncharacters", "remove U+FDD0 to U+FDEF")
    return free[0], free[1]


@functools.lru_cache(maxsize=8)
def _forms(template: str, names: frozenset[tuple[str, str]]) -> tuple[bool, bool]:
    """Find out whether a template takes contents that are texts, and such that are lists of parts."""
    probe = "\u02a0"
    found = []
    for content in (probe, [{"type": "text", "text": probe}]):
        try:
            text = render([{"role": "user", "content": content}], template, dict(names))
        except InputError:
            text = ""
        found.append(probe in text and "'text'" not in text and '"text"' not in text)
    return (found[0], found[1]) if any(found) else (True, False)
