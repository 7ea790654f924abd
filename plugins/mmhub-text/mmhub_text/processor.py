"""The processor of all text encoders: a text becomes token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmhub.errors import InputError, TrustError, UsageError
from mmhub.interfaces import Policy, Processor, describe_raw
from mmhub_text.tokenizer import (
    CLS,
    PAD,
    UNK,
    Kind,
    TokenizerRecipe,
    is_panic,
    load_tokenizer,
    parse_tokenizer,
    read_recipe,
    train_tokenizer,
)


class TextProcessor(Processor):
    """Tokenize texts; ids are (S,) long with S >= 1, because an empty text becomes one `empty_id`.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`, None until `fit`.
        max_length: texts are cut to this many tokens, special ones included; None for no limit.
        pad_id: the id that padding gets inside an encoder. empty_id: the id that stands for an empty text.
    """

    modality: ClassVar[str] = "text"
    keeps_read = True

    def __init__(
        self, tokenizer: Tokenizer | None, *, max_length: int | None = None, pad_id: int = 0, empty_id: int = 1
    ) -> None:
        self.max_length, self.pad_id, self.empty_id = max_length, pad_id, empty_id
        self._recipe: TokenizerRecipe | None = None
        self._wrap = False
        self._stored: tuple[bytes, int] | None = None  # a tokenizer.json that is not parsed yet, and its vocab_size
        self._limit: int | None = None  # no id of a stored tokenizer may reach it, even if it leaves others out
        self._use(tokenizer)

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
            pad_id = _first_id(tokenizer, PAD, "<pad>")
        empty_id = _first_id(tokenizer, UNK, "<unk>", CLS, "<s>", "</s>", "<|endoftext|>")
        return cls(tokenizer, max_length=max_length, pad_id=pad_id, empty_id=empty_id)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        if self._stored is not None:
            return self._stored[1]
        return _count_ids(self._ready())

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; one of a checkpoint is parsed when first needed, for that takes most of a load's time."""
        if self._stored is not None:
            content, limit = self._stored
            tokenizer = parse_tokenizer(content)
            if tokenizer.get_vocab_size(with_added_tokens=True) > limit:
                raise _too_many_ids()
            self._limit = limit
            self._use(tokenizer)
        return self._tokenizer

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Tensor:
        """Return the token ids of a text, (S,) long."""
        if not isinstance(raw, str):
            raise InputError(f"a text is expected, got {describe_raw(raw)}", "give a string")
        if len(raw) > policy.max_bytes:
            raise InputError(f"the text has {len(raw)} characters, more than the limit of {policy.max_bytes}")
        return torch.tensor(self._encode(raw) or [self.empty_id], dtype=torch.long)

    def fit(self, raws: Iterable[Any]) -> None:
        """Train the tokenizer on texts, lists of texts and None, as they stand in the training rows."""
        assert self._recipe is not None, "fit is for processors made by from_recipe"
        self._use(train_tokenizer(self._recipe, _texts(raws), wrap=self._wrap))

    def state(self) -> dict[str, Any]:
        ids = {"pad_id": self.pad_id, "empty_id": self.empty_id, "vocab_size": self.vocab_size}
        return ids | {"max_length": self.max_length}

    def files(self) -> dict[str, bytes]:
        """Return tokenizer.json, without the truncation that `max_length` stands for."""
        plain = parse_tokenizer(self._ready().to_str())
        return {"tokenizer.json": plain.to_str(pretty=True).encode("utf-8")}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        if "tokenizer.json" not in files:
            raise UsageError("the checkpoint holds no tokenizer.json", "pull or save it again")
        content, vocab_size = files["tokenizer.json"], state.get("vocab_size")
        ids = {"pad_id": int(state["pad_id"]), "empty_id": int(state["empty_id"])}
        if not isinstance(vocab_size, int) or vocab_size < 1:  # older checkpoints do not say
            return cls(parse_tokenizer(content), max_length=state.get("max_length"), **ids)
        processor = cls(None, max_length=state.get("max_length"), **ids)
        processor._stored, processor.needs_fit = (content, vocab_size), False
        return processor

    def _use(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None and self.max_length is not None:
            tokenizer.enable_truncation(self.max_length)
        self._tokenizer = tokenizer  # before the next line, for other threads
        self._stored = None
        self.needs_fit = tokenizer is None

    def _ready(self) -> Tokenizer:
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UsageError("the tokenizer has not been trained", "call fit with the training texts first")
        return tokenizer

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._ready().encode(text).ids
        except (UnicodeEncodeError, TypeError):  # how lone surrogates come out of the library
            raise InputError("the text holds characters that are not valid Unicode", "decode it as UTF-8") from None
        except BaseException as error:
            if is_panic(error):  # a runaway pattern in tokenizer.json
                raise InputError(f"the tokenizer failed on this text: {error}") from None
            raise
        if self._limit is not None and max(ids, default=0) >= self._limit:
            raise _too_many_ids()
        return ids


def _too_many_ids() -> TrustError:
    return TrustError("tokenizer.json has more ids than the checkpoint says", "pull or save it again")


def _count_ids(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _first_id(tokenizer: Tokenizer, *names: str) -> int:
    """The id of the first special token that exists, else 0."""
    return next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), 0)


def _texts(raws: Iterable[Any]) -> Iterator[str]:
    for row, raw in enumerate(raws):
        for text in raw if isinstance(raw, (list, tuple)) else [raw]:
            if isinstance(text, str):
                yield text
            elif text is not None:
                error = InputError(f"a text is expected, got {describe_raw(text)}", "check data.inputs")
                error.row, error.modality = row, "text"
                raise error
