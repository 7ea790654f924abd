"""Conversations with media laid out by a chat template: where media stand, and what of the text is trained.

Two characters that no text may hold, Unicode's noncharacters, mark these places in what the template writes. A copy of
the tokenizer takes them for special tokens, so that texts are cut there as they are at any other, and they are left out
of the ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from mmhub.errors import InputError
from mmhub.interfaces import Script
from mmhub_text.chat import answers_of, render
from mmhub_text.tokenizer import parse_tokenizer

MEDIUM, CUT, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARKS = re.compile(f"[{MEDIUM}{CUT}{OPEN}{CLOSE}]")


def marked(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that knows the marks, and makes real special tokens of what templates spell."""
    copy = parse_tokenizer(tokenizer.to_str())
    copy.add_special_tokens([AddedToken(mark, normalized=False) for mark in (MEDIUM, CUT)])
    return copy


class Talk:
    """A conversation, laid out.

    `controls` are tokens that messages must not spell: they become plain text, character by character. `pieces` are
    the parts of the text that are encoded one by one.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        template: str,
        names: Mapping[str, str],
        controls: Set[str],
        normalise: Callable[[str], str],
    ) -> None:
        self.media: list[str] = []
        self.messages = messages
        self._controls, self._normalise = controls, normalise
        plain = [{"role": one["role"], "content": self._content(one["content"])} for one in messages]
        asks = bool(plain) and plain[-1]["role"] == "user"
        laid = render(plain, template, names, asks=asks)
        if laid.count(MEDIUM) != len(self.media):
            what = f"the chat template writes {laid.count(MEDIUM)} of {len(self.media)} pictures, sounds and the like"
            raise InputError(what, "take another template")
        self.answers = answers_of(plain, template, names, laid)
        self._laid = laid

    @property
    def text(self) -> str:
        return _MARKS.sub("", self._laid)

    @property
    def pieces(self) -> list[str]:
        cuts = sorted({place for _, start, end in self.answers for place in (start, end)})
        parts = [self._laid[a:b] for a, b in zip([0, *cuts], [*cuts, len(self._laid)], strict=True)]
        found: list[str] = []
        for piece in re.split(f"({OPEN}[^{OPEN}{CLOSE}]*{CLOSE})", CUT.join(parts)):
            found += list(piece[1:-1]) if piece[:1] == OPEN else [piece] if piece else []
        return found

    def script(
        self, encoded: Sequence[Sequence[int]], tokenizer: Tokenizer, stops: Sequence[int], check: Callable[..., Any]
    ) -> Script:
        """Return ids, weights and places, given the ids of the pieces."""
        medium, cut = (tokenizer.token_to_id(mark) for mark in (MEDIUM, CUT))
        edges = {place for _, start, end in self.answers for place in (start, end)}
        cuts = sorted(edges)
        begins = {cuts.index(start): self.messages[number]["weight"] for number, start, _ in self.answers}
        ends = {cuts.index(end) for _, _, end in self.answers}
        ids: list[int] = []
        weights: list[float] = []
        places: list[tuple[str, int]] = []
        weight, passed, prompt, media = 0.0, 0, -1, iter(self.media)
        for token in (token for piece in encoded for token in piece):
            if token == cut:
                weight = 0.0 if passed in ends else weight
                if passed in begins:
                    weight, prompt = begins[passed], len(ids)
                passed += 1
            elif token == medium:
                places.append((next(media), len(ids) + len(places)))
            else:
                ids.append(token)
                weights.append(weight)
                weight = 0.0 if token in stops else weight
        check(ids)
        answered = self.messages[-1]["role"] == "assistant"
        return Script(
            ids=torch.tensor(ids, dtype=torch.long),
            weights=torch.tensor(weights),
            places=tuple(places),
            prompt=prompt if answered else len(ids),
        )

    def _content(self, content: Any) -> str:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found = ""
        for part in parts:
            if part["type"] == "text":
                found += self._plain(part["text"])
            else:
                self.media.append(part["type"])
                found += MEDIUM
        return found

    def _plain(self, text: str) -> str:
        text = _MARKS.sub("\ufffd", text)
        normal = self._normalise(text)
        tokens = [token for token in self._controls if token in normal]
        text = normal if any(normal.count(token) > text.count(token) for token in tokens) else text
        spelled = [token for token in self._controls if token in text]
        if not spelled:
            return text
        longest_first = "|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))
        return re.sub(longest_first, lambda found: f"{OPEN}{found[0]}{CLOSE}", text)
