"""The processor of texts that are written: texts and conversations become token ids, and ids text again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from mmhub.errors import InputError, UsageError
from mmhub.interfaces import LanguageProcessor, Policy, Script
from mmhub_text.chat import BUILT_IN, CHATML_TOKENS, ROLES, checked, find_template, no_template
from mmhub_text.frame import Frame, read_frame
from mmhub_text.script import Reader, Style, Talk
from mmhub_text.store import TokenizerStore, checked_text, stored_content, training_texts
from mmhub_text.tokenizer import (
    TEXT_SPECIALS,
    Kind,
    TokenizerRecipe,
    is_panic,
    load_tokenizer,
    read_recipe,
    train_text_tokenizer,
)

_NAMES = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), TEXT_SPECIALS, strict=True))


class LanguageTextProcessor(LanguageProcessor):
    """Tokenize documents, prompts and conversations; ids are (S,) long.

    Special tokens that a text spells stay text: only the frame and the chat template write real ones. A text that is
    one word for the tokenizer, as "</s>" is for words, becomes the unknown token.

    Attributes:
        begins: do prompts begin with `begin_id`, as documents do where there is one? An empty one does in any case.
        unknown_id: what stands for words that the tokenizer does not know, None where it knows all.
        chat_template: a jinja2 template, "" for none.
        media_tokens: by modality, what the chat template writes by itself in the place of an item, where it does.
        media_around: by modality, texts that the model was trained with before and behind an item there.
    """

    keeps_read = True

    def __init__(self, frame: Frame | None = None) -> None:
        self._store = TokenizerStore(self._learn)
        self._recipe: TokenizerRecipe | None = None
        self._reader: Reader | None = None  # of what chat templates write
        self._styles: dict[Any, Style] = {}  # of the chat template
        self._special: frozenset[int] = frozenset()
        self._hidden: frozenset[int] = frozenset()
        self.unknown_id: int | None = None
        self.needs_fit = True
        self._use(frame or Frame())

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any] | None, *, default: Kind) -> Self:
        """Build from the recipe's `[model.tokenizer]` table; trained kinds then need `fit`.

        Raises:
            UsageError: the table is wrong. NotFoundError, TrustError: what it names is not there, or damaged.
        """
        recipe = read_recipe(table, default)
        if recipe.kind == "pretrained":
            tokenizer, path = load_tokenizer(recipe.name), Path(recipe.name).expanduser()
            frame = read_frame(path if path.is_dir() else path.parent, tokenizer)
            processor = cls.of_frame(tokenizer, _completed(frame, tokenizer))
            if recipe.chat_template:
                processor.take_template(recipe.chat_template)
            return processor
        processor = cls(Frame(chat_template=find_template(recipe.chat_template) if recipe.chat_template else ""))
        processor._recipe = recipe
        if recipe.kind == "byte":
            processor.fit(())
        return processor

    @classmethod
    def of_tokenizer(
        cls,
        tokenizer: Tokenizer,
        *,
        begin_id: int | None,
        end_id: int | None,
        ends: bool,
        begins: bool = True,
        stop_ids: Sequence[int] = (),
        chat_template: str = "",
        names: Mapping[str, str] | None = None,
    ) -> Self:
        """Wrap a finished tokenizer. `end_id` always stops a generated text; `names` are those templates know."""
        return cls.of_frame(
            tokenizer,
            Frame(
                begin_id=begin_id,
                end_id=end_id,
                begins=begins,
                ends=ends,
                stop_ids=tuple(stop_ids),
                chat_template=chat_template,
                names=names or {},
            ),
        )

    @classmethod
    def of_frame(cls, tokenizer: Tokenizer, frame: Frame) -> Self:
        """Wrap a finished tokenizer with what `read_frame` found, or part of it."""
        processor = cls(frame)
        processor._put(tokenizer)
        return processor

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None, "_styles": {}}  # made again where it is unpickled

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None until `fit`."""
        return self._store.tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._store.vocab_size

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer in a conversation, where the chat template has no token for it."""
        return ("\nUser:",) if self.chat_template == BUILT_IN["plain"] else ()

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return the ids of a document, (S,) long: the begin token, the text, and the end token where `ends`."""
        ids = self._framed(raw, policy, begins=True)
        if self.ends and self.end_id is not None:
            ids.append(self.end_id)
        return torch.tensor(ids, dtype=torch.long)

    def prompt(self, raw: Any, policy: Policy) -> Tensor:
        return torch.tensor(self._framed(raw, policy, begins=self.begins), dtype=torch.long)

    def chat(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Tensor:
        ids = Talk(checked(messages), self._style(), asks=True).ids(self._read(), _checker(policy))
        self._store.check_ids(ids)
        return torch.tensor(ids, dtype=torch.long)

    def converse(self, messages: Sequence[Mapping[str, Any]], policy: Policy) -> Script:
        script = Talk(messages, self._style()).script(self._read(), self.stop_ids, _checker(policy))
        self._store.check_ids(script.ids.tolist())
        return script

    def layout(self, messages: Sequence[Mapping[str, Any]]) -> str:
        style = Style(template=self.chat_template, names=self.names, controls=dict.fromkeys(ROLES, frozenset()))
        return Talk(messages, style).plain_text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out; of half a character, which may be the end, U+FFFD.

        Byte-level kinds give back the exact text. Words are joined by blanks, but for line breaks.
        """
        tokenizer = self._store.ready()
        text: str = tokenizer.decode([i for i in ids if i not in self._hidden], skip_special_tokens=False)
        return text

    def spell(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included, for people to look at."""
        text: str = self._store.ready().decode(list(ids), skip_special_tokens=False)
        return text

    def fit(self, raws: Iterable[Any]) -> None:
        """Train the tokenizer on texts, lists of texts, pairs and None, as they stand in the training rows."""
        recipe = self._recipe
        assert recipe is not None, "fit is for processors made by from_recipe"
        extra = CHATML_TOKENS if self.chat_template == BUILT_IN["chatml"] else ()
        tokenizer = train_text_tokenizer(recipe, training_texts(raws), extra)
        begin, end = (tokenizer.token_to_id(name) for name in TEXT_SPECIALS[2:])
        stops = [tokenizer.token_to_id(name) for name in extra[1:]]
        stop_ids = tuple(i for i in stops if i is not None)
        self._use(Frame(begin_id=begin, end_id=end, stop_ids=stop_ids, chat_template=self.chat_template, names=_NAMES))
        self._put(tokenizer)

    def take_template(self, name: str) -> None:
        """Take another chat template than the tokenizer's own: "plain", "chatml" or a file.

        Raises:
            UsageError: the tokenizer lacks its tokens. NotFoundError, TrustError: the file is missing, or damaged.
        """
        template = find_template(name)
        if self.needs_fit:
            self.chat_template = template
            return
        tokenizer = self._store.ready()
        if template == BUILT_IN["chatml"] and any(tokenizer.token_to_id(token) is None for token in CHATML_TOKENS):
            raise UsageError(
                f'the tokenizer has no {" and ".join(CHATML_TOKENS)}, which the chat template "chatml" is made of',
                'take chat_template = "plain", or a file that fits the tokenizer',
            )
        self.chat_template = template
        if template == BUILT_IN["chatml"]:
            turn = tokenizer.token_to_id(CHATML_TOKENS[1])
            self.stop_ids = self.stop_ids if turn is None or turn in self.stop_ids else (*self.stop_ids, turn)

    def state(self) -> dict[str, Any]:
        self._store.ready()
        ids = {"begin_id": self.begin_id, "end_id": self.end_id, "stop_ids": list(self.stop_ids)}
        ids |= {"unknown_id": self.unknown_id, "vocab_size": self.vocab_size}
        media = {"tokens": dict(self.media_tokens), "around": {k: list(v) for k, v in self.media_around.items()}}
        known = {"media": media} if self.media_tokens else {}
        return ids | {"begins": self.begins, "ends": self.ends, "names": dict(self.names)} | known

    def files(self) -> dict[str, bytes]:
        found = {"tokenizer.json": self._store.content()}
        return found | ({"chat_template.jinja": self.chat_template.encode("utf-8")} if self.chat_template else {})

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        frame = Frame(
            begin_id=state["begin_id"],
            end_id=state["end_id"],
            begins=bool(state["begins"]),
            ends=bool(state["ends"]),
            stop_ids=tuple(state["stop_ids"]),
            chat_template=files.get("chat_template.jinja", b"").decode("utf-8"),
            names=state["names"],
            media_tokens=state.get("media", {}).get("tokens", {}),
            media_around=state.get("media", {}).get("around", {}),
        )
        processor = cls(frame)
        processor._store.put_content(stored_content(files), int(state["vocab_size"]))
        processor.unknown_id, processor.needs_fit = state["unknown_id"], False
        return processor

    def _use(self, frame: Frame) -> None:
        self.begin_id, self.end_id, self.chat_template = frame.begin_id, frame.end_id, frame.chat_template
        self.begins, self.ends, self.names = frame.begins, frame.ends, dict(frame.names)
        self.media_tokens, self.media_around = dict(frame.media_tokens), dict(frame.media_around)
        stops = [*([] if frame.end_id is None else [frame.end_id]), *frame.stop_ids]
        self.stop_ids = tuple(dict.fromkeys(stops))

    def _put(self, tokenizer: Tokenizer) -> None:
        self._store.put(tokenizer)
        self.needs_fit, self._reader, self._styles = False, None, {}

    def _learn(self, tokenizer: Tokenizer) -> None:
        """Find out which tokens are special, and which stands for unknown words."""
        self.unknown_id = _unknown_id(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | {self.begin_id, self.end_id}
        self._special = frozenset(i for i in special if i is not None and i != self.unknown_id)
        shown = isinstance(tokenizer.model, models.WordLevel)  # texts such as WikiText spell it as a word
        self._hidden = self._special | ({self.unknown_id} if self.unknown_id is not None and not shown else set())

    def _style(self) -> Style:
        """How conversations are written, with the tokens that messages must not spell."""
        template = self.chat_template
        if not template:
            raise no_template()
        key = (template, *self.media_tokens.items())
        if key not in self._styles:
            tokenizer = self._store.ready()
            added = tokenizer.get_added_tokens_decoder()
            stops = {added[i].content for i in self.stop_ids if i in added}
            special = {token.content for token in added.values() if token.special} | stops
            media = set(self.media_tokens.values())
            written = {token.content for token in added.values() if token.content in template and token.content.strip()}
            # what the model itself has said may hold ordinary tokens of the template, such as </think>
            controls = dict.fromkeys(ROLES, frozenset(special | media | written))
            controls["assistant"] = frozenset(special | media)
            self._styles = {
                key: Style(
                    template=template,
                    names=self.names,
                    controls=controls,
                    normalise=_normaliser(tokenizer),
                    media=self.media_tokens,
                    around=self.media_around,
                )
            }
        return self._styles[key]

    def _read(self) -> Reader:
        if self._reader is None:
            self._reader = Reader(self._store.ready(), lambda text: self._store.encode(text, plain=True))
        return self._reader

    def _framed(self, raw: Any, policy: Policy, *, begins: bool) -> list[int]:
        ids = self._store.encode_plain(checked_text(raw, policy))
        if not self._special.isdisjoint(ids):
            ids = [self._plain(i) for i in ids]
        return [self.begin_id, *ids] if self.begin_id is not None and (begins or not ids) else ids

    def _plain(self, token: int) -> int:
        """What a token is in a text: a special one is unknown there."""
        if token not in self._special:
            return token
        if self.unknown_id is None:
            name = self._store.ready().id_to_token(token)
            raise InputError(f"the text spells {name!r}, which this tokenizer can only read as its special token")
        return self.unknown_id


def _checker(policy: Policy) -> Callable[[str], str]:
    return lambda text: checked_text(text, policy)


def _completed(frame: Frame, tokenizer: Tokenizer) -> Frame:
    """The frame of a tokenizer that was trained here, where the files beside it say nothing of one."""
    begin, end = (tokenizer.token_to_id(name) for name in TEXT_SPECIALS[2:])
    if frame.begin_id is not None or frame.end_id is not None or begin is end is None:
        return frame
    known = {role: name for role, name in _NAMES.items() if tokenizer.token_to_id(name) is not None}
    return replace(frame, begin_id=begin, end_id=end, begins=True, ends=True, names=known | dict(frame.names))


def _normaliser(tokenizer: Tokenizer) -> Callable[[str], str]:
    """What the tokenizer makes of a text before it looks for words in it."""
    normal = tokenizer.normalizer

    def normalised(text: str) -> str:
        try:
            return text if normal is None else str(normal.normalize_str(text))
        except BaseException as error:  # what the tokenizer cannot read it refuses itself
            if isinstance(error, Exception) or is_panic(error):
                return text
            raise

    return normalised


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of words a tokenizer does not know, None if it knows every byte."""
    model = tokenizer.model
    if isinstance(model, models.Unigram):
        table = json.loads(tokenizer.to_str())["model"]
        return None if table.get("byte_fallback") or _knows_bytes(tokenizer) else table.get("unk_id")
    if isinstance(model, models.BPE) and (model.byte_fallback or _knows_bytes(tokenizer)):
        return None
    return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)


def _knows_bytes(tokenizer: Tokenizer) -> bool:
    return all(tokenizer.token_to_id(char) is not None for char in pre_tokenizers.ByteLevel.alphabet())
