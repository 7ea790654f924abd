"""What a CTC head writes with: characters, words or byte pairs, as pieces of text that are joined to a transcript.

The pieces of every kind are put together alike: a blank, at the front of a piece or as a piece of its own, begins a
new word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from mmhub.errors import InputError, PluginError
from mmhub.interfaces.labels import at_row, is_missing

Kind = Literal["character", "word", "bpe"]
_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for the blank before a word in the tokenizers library
_HINT = 'fix or leave out the row (data.on_error = "skip"), or use units = "bpe" or "character"'


class Units:
    """Pieces of text and their numbers; number 0 is CTC's blank, so the first piece is 1.

    `vocabulary` holds characters, words, or byte pairs with a blank before those that begin a word; `tokenizer` is the
    JSON of the tokenizers library that cuts a text into byte pairs.
    """

    def __init__(self, kind: Kind, vocabulary: Sequence[str], lowercase: bool = True, tokenizer: str = "") -> None:
        self.kind, self.lowercase, self._tokenizer_json = kind, lowercase, tokenizer
        self.pieces = ["", *(f" {word}" if kind == "word" else word for word in vocabulary)]
        self._case = "lower" if lowercase else _only_case(self.pieces)
        self._numbers = {piece: number for number, piece in enumerate(self.pieces) if number}

    def __len__(self) -> int:
        return len(self.pieces)

    def normal(self, raw: Any) -> str:
        """Return the text of a raw target: its words with one blank between, in the case of all letters it may have.

        Raises:
            InputError: it is missing or no text.
        """
        text = normal_text(raw, self._case == "lower")
        return text.upper() if self._case == "upper" else text

    def encode(self, text: str) -> list[int]:
        """Turn a text into numbers.

        Raises:
            InputError: it holds what is not in the vocabulary.
        """
        numbers = []
        for piece in self._cut(self.normal(text)):
            if piece not in self._numbers:
                known = sorted(self.pieces[1:])
                shown = ", ".join(repr(one.strip() or one) for one in known[:12]) + (", ..." if len(known) > 12 else "")
                raise InputError(f"the vocabulary lacks {piece.strip()!r}, it holds {shown}", _HINT)
            numbers.append(self._numbers[piece])
        return numbers

    def text(self, numbers: Iterable[int]) -> str:
        """Join pieces to a text.

        >>> Units("word", ["no", "yes"]).text([2, 1])
        'yes no'
        """
        return "".join(self.pieces[number] for number in numbers).strip()

    def begins_word(self, number: int) -> bool:
        return self.pieces[number].startswith(" ")

    def words(self, numbers: Sequence[int]) -> list[tuple[str, int, int]]:
        """Return the words of pieces, each with its first piece and the one behind its last.

        >>> Units("character", [" ", "a", "b"]).words([2, 3, 1, 2])
        [('ab', 0, 2), ('a', 3, 4)]
        """
        found: list[tuple[str, int, int]] = []
        word, first = "", 0
        for place, number in enumerate(numbers):
            piece = self.pieces[number]
            if piece.startswith(" "):
                if word:
                    found.append((word, first, place))
                word, first = "", place
            elif not word:
                first = place
            if piece != " ":
                word += piece.lstrip(" ")
        return [*found, (word, first, len(numbers))] if word else found

    def _cut(self, text: str) -> list[str]:
        if self.kind == "character":
            return list(text)
        if self.kind == "word":
            return [f" {word}" for word in text.split()]
        cut = [_readable(piece) for piece in self._tokenizer.encode(text).tokens] if text else []
        if "".join(cut).strip() != text:
            lost = sorted(set(text) - set("".join(cut)))
            raise InputError(f"the vocabulary lacks {lost[0] if lost else text!r}", _HINT)
        return cut

    @cached_property
    def _tokenizer(self) -> Any:
        return _library().Tokenizer.from_str(self._tokenizer_json)


def _only_case(pieces: Sequence[str]) -> Literal["lower", "upper", ""]:
    """The case of all letters, "" if they differ. Names of special tokens, such as <unk> and [UNK], do not count."""
    letters = "".join(piece for piece in pieces if (piece[:1], piece[-1:]) not in (("<", ">"), ("[", "]")))
    if letters.lower() == letters.upper():
        return ""
    return "lower" if letters == letters.lower() else "upper" if letters == letters.upper() else ""


def normal_text(raw: Any, lowercase: bool) -> str:
    """Return a transcript's words with one blank between; see `Units.normal`."""
    if is_missing(raw) and raw != "":
        raise InputError("the transcript is missing", 'give a text, "" where nothing is said')
    if not isinstance(raw, str):
        raise InputError(f"a transcript is a text, got a {type(raw).__name__}")
    text = " ".join(raw.split())
    return text.lower() if lowercase else text


def learn(kind: Kind, targets: Iterable[Any], lowercase: bool, size: int) -> tuple[tuple[str, ...], str]:
    """Return the vocabulary of training transcripts, in order of text, and the tokenizer's JSON for byte pairs.

    `size` bounds the number of byte pairs; characters and words are all that occur.

    Raises:
        InputError: a transcript is missing or no text (`row` is set).
    """
    if kind == "bpe":
        return _learn_pairs(_texts(targets, lowercase), size)
    counts: Counter[str] = Counter()
    for text in _texts(targets, lowercase):
        counts.update(text if kind == "character" else text.split())
    if kind == "character" and counts:
        counts[" "] += 1
    return tuple(sorted(counts)), ""


def _texts(targets: Iterable[Any], lowercase: bool) -> Iterator[str]:
    for row, raw in enumerate(targets):
        try:
            yield normal_text(raw, lowercase)
        except InputError as error:
            raise at_row(error, row) from None


def _learn_pairs(texts: Iterator[str], size: int) -> tuple[tuple[str, ...], str]:
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(replacement=_MARK, prepend_scheme="always")
    trainer = library.trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    numbered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return tuple(_readable(piece) for piece, _ in numbered), tokenizer.to_str()


def _readable(piece: str) -> str:
    return piece.replace(_MARK, " ")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        hint = "pip install 'mmhub-heads[ctc]', or pip install tokenizers"
        raise PluginError("units of byte pairs are cut by tokenizers, which is not installed", hint) from None
    return tokenizers
