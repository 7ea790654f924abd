"""The processor of all text encoders: a text, a pair of texts, or a list of words becomes token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy, Processor, describe_raw
from mmhub_text.store import TokenizerStore, checked_text, pair_names, stored_content, training_texts
from mmhub_text.tokenizer import (
    CLS,
    PAD,
    SEP,
    UNK,
    Kind,
    TokenizerRecipe,
    load_tokenizer,
    parse_tokenizer,
    read_recipe,
    train_tokenizer,
)


class Pair(NamedTuple):
    """Two texts that are read as one. Of a `context`, which answers point into, nothing may be cut off."""

    first: str
    second: str
    context: bool


class TextProcessor(Processor):
    """Tokenize texts; ids are (S,) long with S >= 1, because an empty text becomes one `empty_id`.

    A raw input is a text, or a pair of texts: {"text": ..., "text_pair": ...} or {"question": ..., "context": ...}.
    With `words` it is a list of words, or a text that is split at white space, and the first token of each word is
    marked: its id is ~id, a negative number. Of a pair all tokens of the second text are marked then.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`, None until `fit`.
        max_length: texts are cut to this many tokens, special ones included, and pairs by the longer text first; None
            for no limit. Words and contexts are never cut: too many are an InputError.
        whole: is a text that is too long an InputError, not cut? Set where texts are rewritten; not saved.
        pad_id: the id that padding gets inside an encoder. empty_id: the id that stands for an empty text or word.
    """

    modality: ClassVar[str] = "text"
    keeps_read = True

    def __init__(
        self, tokenizer: Tokenizer | None, *, max_length: int | None = None, pad_id: int = 0, empty_id: int = 1
    ) -> None:
        self.max_length, self.pad_id, self.empty_id = max_length, pad_id, empty_id
        self.whole = False
        self._recipe: TokenizerRecipe | None = None
        self._wrap = False
        self._sep: tuple[int | None] | None = None  # what a checkpoint says, so that its tokenizer is not parsed
        self._store = TokenizerStore(self._cut)
        self.needs_fit = tokenizer is None
        if tokenizer is not None:
            self._store.put(tokenizer)

    @classmethod
    def from_recipe(
        cls, table: Mapping[str, Any] | None, *, default: Kind, max_length: int | None, wrap: bool = False
    ) -> Self:
        """Build from the recipe's `[model.tokenizer]` table; trained kinds then need `fit`.

        `wrap` puts [CLS] and [SEP] around every text, if the tokenizer is trained here.
        """
        recipe = read_recipe(table, default)
        if recipe.kind == "pretrained":
            return cls.of_tokenizer(load_tokenizer(recipe.name), max_length=max_length)
        processor = cls(None, max_length=max_length)
        processor._recipe, processor._wrap = recipe, wrap
        if recipe.kind == "byte":
            processor.fit(())
        return processor

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer, *, max_length: int | None, pad_id: int | None = None) -> Self:
        """Wrap a finished tokenizer; ids not given are found by the usual names of special tokens."""
        if pad_id is None:
            pad_id = _first_id(tokenizer, PAD, "<pad>") or 0
        empty_id = _first_id(tokenizer, UNK, "<unk>", CLS, "<s>", "</s>", "<|endoftext|>") or 0
        return cls(tokenizer, max_length=max_length, pad_id=pad_id, empty_id=empty_id)

    @property
    def words(self) -> bool:
        """Are raw inputs lists of words, of which the first tokens are marked?"""
        return self.marks

    @words.setter
    def words(self, value: bool) -> None:
        self.marks = value

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None until `fit`."""
        return self._store.tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._store.vocab_size

    @property
    def sep_id(self) -> int | None:
        """The id of [SEP], behind the first text of a pair; None if the tokenizer has none."""
        return self._sep[0] if self._sep else self._store.ready().token_to_id(SEP)

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return the token ids of a text, a pair or words, (S,) long."""
        if isinstance(raw, Mapping):
            ids = self._read_pair(_pair(raw, policy), raw)
        elif self.words:
            ids = self._read_words(raw, policy)
        else:
            encoding = self._store.encode(checked_text(raw, policy))
            self._check_whole(encoding, raw)
            ids = encoding.ids or [self.empty_id]
        return torch.tensor(ids, dtype=torch.long)

    def count(self, raw: Any, policy: Policy | None = None) -> int:
        """Return how many tokens a text or a pair has, special ones included, before anything is cut off."""
        policy = policy or Policy()
        texts = _pair(raw, policy)[:2] if isinstance(raw, Mapping) else (checked_text(raw, policy),)
        framed = sum(self._store.encode(*texts).special_tokens_mask)
        return max(1, framed + sum(map(self._own_tokens, texts)))

    def _own_tokens(self, text: str) -> int:
        encoding = self._store.encode(text)
        return sum(len(part) - sum(part.special_tokens_mask) for part in (encoding, *encoding.overflowing))

    def _check_whole(self, encoding: Encoding, raw: Any) -> None:
        if self.whole and encoding.overflowing:
            what = f"the text has {self.count(raw)} tokens, the encoder takes at most {self.max_length}"
            raise InputError(what, "shorten it, or raise max_length")

    def offsets(self, raw: Mapping[str, Any], policy: Policy | None = None) -> list[tuple[int, int] | None]:
        """Return which characters of the second text of a pair each position that `read` gives stands for.

        A span is (start, end), without white space around it; None for special tokens, those of the first text, and
        those of white space alone.
        """
        pair = _pair(raw, policy or Policy())
        return self._spans(self._encode_pair(pair), pair.second) or [None]

    def is_item(self, raw: Sequence[Any]) -> bool:
        """A list of texts is one raw input if it holds the words of one."""
        return self.words and all(isinstance(word, str) for word in raw)

    def fit(self, raws: Iterable[Any]) -> None:
        """Train the tokenizer on texts, lists of texts, pairs and None, as they stand in the training rows."""
        assert self._recipe is not None, "fit is for processors made by from_recipe"
        raws = map(_joined, raws) if self.words else raws
        self._store.put(train_tokenizer(self._recipe, training_texts(raws), wrap=self._wrap))
        self.needs_fit = False

    def state(self) -> dict[str, Any]:
        ids = {"pad_id": self.pad_id, "empty_id": self.empty_id, "vocab_size": self.vocab_size}
        return ids | {"sep_id": self.sep_id, "max_length": self.max_length} | ({"words": True} if self.words else {})

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json, without the truncation that `max_length` stands for."""
        return {"tokenizer.json": self._store.content()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        content, vocab_size = stored_content(files), state.get("vocab_size")
        ids = {"pad_id": int(state["pad_id"]), "empty_id": int(state["empty_id"])}
        if not all(0 <= i < (vocab_size or 2**31) for i in ids.values()):
            raise ValueError(f"{ids} are no ids of {vocab_size} words")
        processor = cls(None, max_length=state.get("max_length"), **ids)
        processor.needs_fit, processor.words = False, bool(state.get("words"))
        processor._sep = (state["sep_id"],) if "sep_id" in state else None
        if isinstance(vocab_size, int) and vocab_size >= 1:
            processor._store.put_content(content, vocab_size)
        else:  # older checkpoints do not say
            processor._store.put(parse_tokenizer(content))
        return processor

    def _cut(self, tokenizer: Tokenizer) -> None:
        if self.max_length is not None:
            tokenizer.enable_truncation(self.max_length)

    def _read_pair(self, pair: Pair, raw: Mapping[str, Any]) -> list[int]:
        encoding = self._encode_pair(pair)
        self._check_whole(encoding, raw)
        ids: list[int] = encoding.ids
        if self.words:
            ids = [i if span is None else ~i for i, span in zip(ids, self._spans(encoding, pair.second), strict=True)]
        return ids or [self.empty_id]

    def _encode_pair(self, pair: Pair) -> Encoding:
        encoding = self._store.encode(pair.first, pair.second)
        if encoding.overflowing and (pair.context or self.words):
            raise self._too_long("the question and its context are", "shorten the context, or answer in parts of it")
        return encoding

    def _spans(self, encoding: Encoding, second: str) -> list[tuple[int, int] | None]:
        spans = zip(encoding.sequence_ids, encoding.offsets, strict=True)
        return [_trimmed(span, second) if sequence == 1 else None for sequence, span in spans]

    def _read_words(self, raw: Any, policy: Policy) -> list[int]:
        words = raw.split() if isinstance(raw, str) else raw
        if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
            raise InputError(f"a list of words is expected, got {describe_raw(raw)}", "give a list of strings")
        encoding = self._store.encode(checked_text(" ".join(words), policy))
        ids = self._marked(encoding, words)
        if encoding.overflowing or (self.max_length is not None and len(ids) > self.max_length):
            raise self._too_long(f"the {len(words)} words are", "split the text into shorter ones")
        return ids or [self.empty_id]

    def _marked(self, encoding: Encoding, words: Sequence[str]) -> list[int]:
        """Return ids, of each word the first one as ~id; a word without a token of its own becomes `empty_id`."""
        text, ids = " ".join(words), encoding.ids
        owners = [number for number, word in enumerate(words) for _ in range(len(word) + 1)]  # of each character
        inside = [place for place, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        start, end = (inside[0], inside[-1] + 1) if inside else (len(ids) // 2, len(ids) // 2)
        tokens: list[list[int]] = [[] for _ in words]
        number = 0
        for place in range(start, end):
            span = _trimmed(encoding.offsets[place], text)
            number = max(number, owners[span[0]]) if span else number
            tokens[number].append(ids[place])
        marked = [i for word in tokens for i in (~(word or [self.empty_id])[0], *word[1:])]
        return [*ids[:start], *marked, *ids[end:]]

    def _too_long(self, what: str, hint: str) -> InputError:
        return InputError(f"{what} more than the {self.max_length} tokens the model reads at once", hint)


def segments(ids: Tensor, mask: Tensor, sep_id: int) -> Tensor:
    """Say which text of a pair each token belongs to: ids, mask (N, S) -> (N, S) long.

    That is 0 up to the first separator, 1 behind it, and 0 at padding, as BERT's token types.
    """
    found = ((ids == sep_id) & mask).long().cumsum(1)
    found = torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], dim=1)
    return found.clamp(max=1) * mask.long()


def _pair(raw: Mapping[str, Any], policy: Policy) -> Pair:
    names = pair_names(raw)
    if names is None:
        raise InputError(
            f"a text is expected, got a mapping with the keys {sorted(map(str, raw))}",
            "give a string, or a pair as {text, text_pair} or {question, context}",
        )
    first, second = (checked_text(raw[name], policy) for name in names)
    return Pair(first, second, context=names[1] == "context")


def _trimmed(span: tuple[int, int], text: str) -> tuple[int, int] | None:
    """A span without the white space around it, None if nothing else is in it."""
    start, end = span
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    end -= len(part) - len(part.rstrip())
    return (start, end) if start < end else None


def _joined(raw: Any) -> Any:
    """The text of words, if they are; else what was given."""
    words = isinstance(raw, (list, tuple)) and all(isinstance(word, str) for word in raw)
    return " ".join(raw) if words else raw


def _first_id(tokenizer: Tokenizer, *names: str) -> int | None:
    """The id of the first special token that exists."""
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)
