"""Where a processor keeps its tokenizer: not trained yet, ready, or a tokenizer.json to be parsed when needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Encoding, Tokenizer

from mmhub.errors import ExitCode, InputError, TrustError, UsageError
from mmhub.interfaces import Policy, describe_raw
from mmhub_text.tokenizer import is_panic, parse_tokenizer

PIECE = 2**16  # characters
PAIRS = (("text", "text_pair"), ("question", "context"))


class TokenizerStore:
    """A tokenizer, with every failure of its library told as one of our errors.

    One of a checkpoint is parsed when first needed, for that takes most of a load's time; until then it is known by its
    content and `vocab_size` alone. `prepare` is called with a tokenizer before it is used.
    """

    def __init__(self, prepare: Callable[[Tokenizer], None] = lambda _: None) -> None:
        self._prepare = prepare
        self._tokenizer: Tokenizer | None = None
        self._stored: tuple[bytes, int] | None = None
        self._limit: int | None = None  # no id of a stored tokenizer may reach it, even if it leaves others out

    def put(self, tokenizer: Tokenizer) -> None:
        """Keep a finished tokenizer."""
        self._prepare(tokenizer)
        self._tokenizer = tokenizer  # before the next line, for other threads
        self._stored = None

    def put_content(self, content: bytes, vocab_size: int) -> None:
        """Keep a tokenizer.json, to be parsed later."""
        self._stored = (content, vocab_size)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None until it is trained."""
        if self._stored is not None:
            content, limit = self._stored
            tokenizer = parse_tokenizer(content)
            if tokenizer.get_vocab_size(with_added_tokens=True) > limit:
                raise _too_many_ids()
            self._limit = limit
            self.put(tokenizer)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        if self._stored is not None:
            return self._stored[1]
        return max(self.ready().get_vocab(with_added_tokens=True).values()) + 1

    def ready(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            UsageError: it has not been trained.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise UsageError("the tokenizer has not been trained", "call fit with the training texts first")
        return tokenizer

    def encode(self, text: str, pair: str | None = None, *, plain: bool = False) -> Encoding:
        """Encode a text or a pair of texts.

        With `plain`, nothing is put around it, and special tokens that it spells are text like any other.
        """
        tokenizer = self.ready()
        tokenizer.encode_special_tokens = plain  # each time, for it is lost when a processor is pickled
        found = encode(tokenizer, text, pair, framed=not plain)
        self.check_ids(found.ids)
        return found

    def check_ids(self, ids: Iterable[int]) -> None:
        """Raise TrustError for an id that a checkpoint's tokenizer should not have."""
        if self._limit is not None and max(ids, default=0) >= self._limit:
            raise _too_many_ids()

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text of any length, as `encode` with `plain`.

        A long one is read in pieces, for the library needs hundreds of bytes a token while it works.
        """
        pieces = _pieces(text) if len(text) > 2 * PIECE and _reads_words(self.ready()) else (text,)
        return [i for piece in pieces for i in self.encode(piece, plain=True).ids]

    def content(self) -> bytes:
        """Return tokenizer.json, without any truncation."""
        plain = parse_tokenizer(self.ready().to_str())
        return plain.to_str(pretty=True).encode("utf-8")


def encode(tokenizer: Tokenizer, text: str, pair: str | None = None, *, framed: bool) -> Encoding:
    """Encode a text or a pair of texts, `framed` by the tokenizer's own special tokens or not.

    Raises:
        InputError: the text is not valid Unicode, or the tokenizer fails on it.
    """
    try:
        return tokenizer.encode(text, pair, add_special_tokens=framed)
    except (UnicodeEncodeError, TypeError):  # how lone surrogates come out of the library
        raise invalid_text(text if pair is None or _surrogate(text) is not None else pair) from None
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):  # such as a runaway pattern in tokenizer.json
            failed = InputError(f"the tokenizer failed on this text: {error}", "use another model, or leave it out")
            failed.exit_code = ExitCode.TRUST  # no text should make a tokenizer fail
            raise failed from None
        raise


def _pieces(text: str) -> Iterator[str]:
    """Cut a text before blanks that stand between two letters."""
    start = 0
    while len(text) - start > 2 * PIECE and (found := _BETWEEN_WORDS.search(text, start + PIECE)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def _reads_words(tokenizer: Tokenizer) -> bool:
    """Is a word and the blank before it read by itself, so that a text may be cut there?"""
    normal, split = tokenizer.normalizer, tokenizer.pre_tokenizer
    whole, *parts = texts = ("one two", "one", " two")
    if normal is not None:
        whole, *parts = (normal.normalize_str(text) for text in texts)
    if split is None or whole != "".join(parts):
        return False
    found, *pieces = ([word for word, _ in split.pre_tokenize_str(text)] for text in (whole, *parts))
    return bool(found == [*pieces[0], *pieces[1]])


def stored_content(files: Mapping[str, bytes]) -> bytes:
    """Return tokenizer.json of a checkpoint's files."""
    if "tokenizer.json" not in files:
        raise UsageError("the checkpoint holds no tokenizer.json", "pull or save it again")
    return files["tokenizer.json"]


def checked_text(raw: Any, policy: Policy) -> str:
    """Return `raw` if it is a text that the policy allows.

    Raises:
        InputError: it is not.
    """
    if not isinstance(raw, str):
        raise InputError(f"a text is expected, got {describe_raw(raw)}", "give a string")
    if len(raw) > policy.max_bytes:
        raise InputError(f"the text has {len(raw)} characters, more than the limit of {policy.max_bytes}")
    return raw


def pair_names(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the keys of the two texts of a pair, None if it is none."""
    return next((names for names in PAIRS if set(raw) == set(names)), None)


def training_texts(raws: Iterable[Any]) -> Iterator[str]:
    """Yield the texts of training rows, each one, a list, a pair of texts as a mapping, or None.

    Raises:
        InputError: something else, or invalid Unicode; `row` says where.
    """
    for row, raw in enumerate(raws):
        for value in raw if isinstance(raw, (list, tuple)) else [raw]:
            names = pair_names(value) if isinstance(value, Mapping) else None
            for text in [value] if names is None else [value[name] for name in names]:
                if isinstance(text, str) and _surrogate(text) is None:
                    yield text
                elif text is not None:
                    wrong = InputError(f"a text is expected, got {describe_raw(text)}", "check data.inputs")
                    error = invalid_text(text) if isinstance(text, str) else wrong
                    error.row, error.modality = row, "text"
                    raise error


def invalid_text(text: str) -> InputError:
    """Say where a text holds half a surrogate pair, which is no character."""
    place = _surrogate(text)
    where = "" if place is None else f": U+{ord(text[place]):04X} at position {place}"
    return InputError(f"the text holds characters that are not valid Unicode{where}", "decode it as UTF-8")


def _surrogate(text: str) -> int | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _too_many_ids() -> TrustError:
    return TrustError("tokenizer.json has more ids than the checkpoint says", "pull or save it again")
