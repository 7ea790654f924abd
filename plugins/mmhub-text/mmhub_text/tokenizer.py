"""Tokenizers: the recipe's `[model.tokenizer]` table, and how a tokenizer is trained from it or read from a file.

Everything is a `tokenizers.Tokenizer`, whose whole state is one tokenizer.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmhub.errors import InputError, MmhubError, NotFoundError, TrustError, UsageError
from mmhub.interfaces import ComponentConfig, decode_config
from mmhub.reading import TOKENIZER_BYTES, read_plain
from mmhub_text.growth import check_growth

PAD, UNK, CLS, SEP = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # ids 0 to 3 of every encoder's, trained here
TEXT_SPECIALS = ("<pad>", "<unk>", "<s>", "</s>")  # the same of tokenizers of texts that are written
WORD = r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+"  # don't and state-of-the-art are words; runs of punctuation are one token
NO_BLANK = r"\n|\S+"  # what stands between blanks, and each line break by itself
SIZE = 8000
NO_LIMIT = 2**31 - 1

Kind = Literal["word", "bpe", "byte", "unigram", "pretrained"]


class TokenizerRecipe(ComponentConfig, frozen=True):
    """The table `[model.tokenizer]`.

    `kind`: words; byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909); single UTF-8 bytes; unigram
    language model (Kudo 2018, arXiv:1804.10959); or `pretrained`, read from `name`, a tokenizer.json or a folder that
    holds one, or without a name from the folder of `init`. `vocab_size` is an upper bound (byte-level kinds hold at
    least the 256 bytes; 0 = none, for words only); without it, it is 8,000, and none for words that are split at white
    space. `min_frequency` is the count from which a word or merge is kept. `split` says what a word is: what stands
    between `whitespace`, each line break being a word too, as in WikiText; or `words` and runs of punctuation. The
    first is the default for texts that are written, the second for encoders. `chat_template` is "plain", "chatml" or a
    file, for models that answer in a conversation.
    """

    kind: Kind
    vocab_size: int | None = None
    min_frequency: int = 1
    lowercase: bool = False
    split: Literal["whitespace", "words"] | None = None
    chat_template: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        least = len(SPECIALS)
        if self.vocab_size is not None and self.vocab_size <= least and (self.vocab_size, self.kind) != (0, "word"):
            raise ValueError(f"vocab_size must be above {least}, or 0 = no limit for kind word, got {self.vocab_size}")
        if self.split and self.kind != "word":
            raise ValueError(f'split is for kind = "word", got kind = "{self.kind}"')
        if self.name and self.kind != "pretrained":
            raise ValueError(f'only kind = "pretrained" needs name, a tokenizer.json or its folder, got "{self.kind}"')


def read_recipe(table: Mapping[str, Any] | None, default: Kind) -> TokenizerRecipe:
    """Decode the recipe's tokenizer table strictly; without one, take kind `default`."""
    return decode_config(TokenizerRecipe, {"kind": default} if table is None else table, "model.tokenizer")


def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str], *, wrap: bool = False) -> Tokenizer:
    """Learn an encoder's tokenizer from texts; the same texts give the same tokenizer.

    With `wrap`, every text becomes [CLS] text [SEP] and a pair [CLS] text [SEP] text [SEP], as BERT-like encoders
    expect; else a pair is text [SEP] text. Texts are brought into Unicode's composed form (NFC).
    """
    tokenizer = _train(recipe, texts, _Style(specials=SPECIALS, split="words", exact=False))
    single, pair = (f"{CLS} $A {SEP}", f"{CLS} $A {SEP} $B:1 {SEP}:1") if wrap else ("$A", f"$A {SEP} $B:1")
    ends = [(name, tokenizer.token_to_id(name)) for name in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, special_tokens=ends)
    return tokenizer


def train_text_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str], extra: Sequence[str] = ()) -> Tokenizer:
    """Learn a tokenizer of texts that are written; the same texts give the same tokenizer.

    Byte-level kinds (all but words) give back every text exactly, unless it is lowercased; no text is unknown to them.
    Words are brought into Unicode's composed form (NFC), and only line breaks are kept of the white space between them.
    `extra` are special tokens behind the usual ones.

    Raises:
        InputError: there is no text. UsageError: the recipe does not fit the texts.
    """
    return _train(recipe, _some(texts), _Style(specials=(*TEXT_SPECIALS, *extra), split="whitespace", exact=True))


def _some(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise InputError("there is no text to train a tokenizer on", "check data.train and data.inputs")


@dataclass(frozen=True)
class _Style:
    specials: tuple[str, ...]
    split: Literal["whitespace", "words"]
    exact: bool  # is every text to come back from its ids as it was?

    @property
    def unknown(self) -> str:
        return self.specials[1]


def _train(recipe: TokenizerRecipe, texts: Iterable[str], style: _Style) -> Tokenizer:
    tokenizer, trainer = _BUILDERS[recipe.kind](recipe, style)
    steps: list[Any] = [] if style.exact and recipe.kind != "word" else [normalizers.NFC()]
    steps += [normalizers.Lowercase()] if recipe.lowercase else []
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if trainer is None:
        tokenizer.add_special_tokens(list(style.specials))
    else:
        _learn(tokenizer, texts, trainer)
    if recipe.kind == "unigram":
        return _rounded(tokenizer, len(style.specials))
    return _numbered(tokenizer, style.specials) if recipe.kind == "word" else tokenizer


def parse_tokenizer(content: bytes | str, source: str = "tokenizer.json") -> Tokenizer:
    """Read a tokenizer.json, without any padding or truncation it may prescribe.

    Raises:
        TrustError: it is damaged, or may make a short text so long that it fills all memory.
    """
    try:
        tokenizer = Tokenizer.from_str(content if isinstance(content, str) else content.decode("utf-8"))
        check_growth(tokenizer)
    except BaseException as error:
        # The library panics on some damaged files, and a panic is not an Exception.
        if isinstance(error, Exception) or is_panic(error):
            raise TrustError(f"{source} is not a usable tokenizer: {error}", "download or save it again") from None
        raise
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Read the tokenizer.json at `name`, the file or the folder that holds it."""
    if not name:
        raise UsageError('kind = "pretrained" needs name, a tokenizer.json or its folder', "or begin with `init`")
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"no tokenizer at '{path}'", "model.tokenizer.name is a tokenizer.json or its folder")
    return parse_tokenizer(read_plain(path, TOKENIZER_BYTES), str(path))


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the tokenizers library, which derives from BaseException."""
    return type(error).__name__ == "PanicException"


def _learn(tokenizer: Tokenizer, texts: Iterable[str], trainer: trainers.Trainer) -> None:
    try:
        with _one_thread():
            tokenizer.train_from_iterator(texts, trainer)
    except MmhubError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):  # such as a vocab_size below the number of characters
            raise UsageError(f"the tokenizer cannot be trained: {error}", "check the texts and vocab_size") from None
        raise


def _word(recipe: TokenizerRecipe, style: _Style) -> tuple[Tokenizer, trainers.Trainer | None]:
    split = recipe.split or style.split
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=style.unknown))
    pattern = Regex(NO_BLANK if split == "whitespace" else WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    if split == "whitespace":
        tokenizer.decoder = _joined_words()
    default = 0 if split == "whitespace" else SIZE
    limits = _limits(recipe, style, default) | {"min_frequency": recipe.min_frequency}
    return tokenizer, trainers.WordLevelTrainer(**limits)


def _bpe(recipe: TokenizerRecipe, style: _Style) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    limits = _limits(recipe, style) | {"min_frequency": recipe.min_frequency}
    return tokenizer, trainers.BpeTrainer(**limits, initial_alphabet=_alphabet())


def _byte(recipe: TokenizerRecipe, style: _Style) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokens = (*style.specials, *_alphabet())
    return _byte_level(Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))), None


def _unigram(recipe: TokenizerRecipe, style: _Style) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokenizer, limits = Tokenizer(models.Unigram()), _limits(recipe, style) | {"unk_token": style.unknown}
    if style.exact:
        least = len(_alphabet()) + len(style.specials) + 1  # the trainer misses its limit if there is room for no piece
        limits["vocab_size"] = max(limits["vocab_size"], least)
        return _byte_level(tokenizer), trainers.UnigramTrainer(**limits, initial_alphabet=_alphabet())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(**limits)


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    """Let the model see a character for each byte of the text, word by word, each with the blank before it."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _joined_words() -> Any:
    """Put a blank between words, and none beside a line break."""
    blanks = decoders.WordPiece(prefix=" ", cleanup=False)  # no word begins with a blank, so each gets one
    return decoders.Sequence([blanks, decoders.Fuse(), decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")])


def _limits(recipe: TokenizerRecipe, style: _Style, default: int = SIZE) -> dict[str, Any]:
    size = default if recipe.vocab_size is None else recipe.vocab_size
    return {"vocab_size": size or NO_LIMIT, "special_tokens": list(style.specials), "show_progress": False}


def _numbered(tokenizer: Tokenizer, specials: Sequence[str]) -> Tokenizer:
    """Give special tokens the first ids again: the trainer numbers one that texts hold, such as <unk>, as a word."""
    data = json.loads(tokenizer.to_str())
    words = sorted(set(data["model"]["vocab"]) - set(specials), key=data["model"]["vocab"].__getitem__)
    data["model"]["vocab"] = {word: i for i, word in enumerate((*specials, *words))}
    for i, token in enumerate(data["added_tokens"]):
        token["id"] = i
    return Tokenizer.from_str(json.dumps(data))


def _rounded(tokenizer: Tokenizer, fixed: int) -> Tokenizer:
    """Take the chance out of a unigram model's scores.

    The trainer adds them up in a random order, which differs at 1e-14; and characters that it leaves out for their
    rareness come back in a random order, each 1e-4 above the one before: they all get the lowest score.
    """
    data = json.loads(tokenizer.to_str())
    scores = [(token, round(score, 9)) for token, score in data["model"]["vocab"]]
    learned = scores[fixed:]
    lowest = min((score for _, score in learned), default=0.0)
    margin = lowest + 1e-4 * (1 + sum(len(token) == 1 for token, _ in learned))
    learned = [(token, lowest if len(token) == 1 and score < margin else score) for token, score in learned]
    rest = sorted(learned, key=lambda pair: (-pair[1], pair[0]))
    data["model"]["vocab"] = [*scores[:fixed], *rest]
    return Tokenizer.from_str(json.dumps(data))


_BUILDERS = {"word": _word, "bpe": _bpe, "byte": _byte, "unigram": _unigram}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: sums come out in one order, and data-loading processes may fork afterwards."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
