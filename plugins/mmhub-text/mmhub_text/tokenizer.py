"""Tokenizers: the recipe's `[model.tokenizer]` table, and how a tokenizer is trained from it or read from a file.

Everything is a `tokenizers.Tokenizer`, whose whole state is one tokenizer.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmhub.errors import NotFoundError, TrustError
from mmhub.interfaces import ComponentConfig, decode_config

PAD, UNK, CLS, SEP = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # ids 0 to 3 of every tokenizer trained here
WORD = r"\w+(?:['\u2019\-]\w+)*|[^\w\s]+"  # don't and state-of-the-art are words; runs of punctuation are one token

Kind = Literal["word", "bpe", "byte", "unigram", "pretrained"]


class TokenizerRecipe(ComponentConfig, frozen=True):
    """The table `[model.tokenizer]`.

    `kind`: words and punctuation; byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909); single
    UTF-8 bytes; unigram language model (Kudo 2018, arXiv:1804.10959); or `pretrained`, read from `name`, a
    tokenizer.json or a folder that holds one. `vocab_size` is an upper bound (byte-level kinds hold at least the 256
    bytes), `min_frequency` the count from which a word or merge is kept.
    """

    kind: Kind
    vocab_size: int = 8000
    min_frequency: int = 1
    lowercase: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.vocab_size <= len(SPECIALS):
            raise ValueError(f"vocab_size must be above {len(SPECIALS)}, got {self.vocab_size}")
        if (self.kind == "pretrained") != bool(self.name):
            raise ValueError('kind = "pretrained" needs name, a tokenizer.json or its folder, and no other kind does')


def read_recipe(table: Mapping[str, Any] | None, default: Kind) -> TokenizerRecipe:
    """Decode the recipe's tokenizer table strictly; without one, take kind `default`."""
    return decode_config(TokenizerRecipe, {"kind": default} if table is None else table, "model.tokenizer")


def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str], *, wrap: bool = False) -> Tokenizer:
    """Learn a tokenizer from texts; the same texts give the same tokenizer.

    With `wrap`, every text becomes [CLS] text [SEP], as BERT-like encoders expect.
    """
    tokenizer, trainer = _BUILDERS[recipe.kind](recipe)
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if recipe.lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    if trainer is None:
        tokenizer.add_special_tokens(list(SPECIALS))
    else:
        with _one_thread():
            tokenizer.train_from_iterator(texts, trainer)
    if recipe.kind == "unigram":
        tokenizer = _rounded(tokenizer)
    if wrap:
        ends = [(CLS, tokenizer.token_to_id(CLS)), (SEP, tokenizer.token_to_id(SEP))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{CLS} $A {SEP}", special_tokens=ends)
    return tokenizer


def parse_tokenizer(content: bytes | str, source: str = "tokenizer.json") -> Tokenizer:
    """Read a tokenizer.json, without any padding or truncation it may prescribe.

    Raises:
        TrustError: it is damaged.
    """
    try:
        tokenizer = Tokenizer.from_str(content if isinstance(content, str) else content.decode("utf-8"))
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
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"no tokenizer at '{path}'", "model.tokenizer.name is a tokenizer.json or its folder")
    return parse_tokenizer(path.read_bytes(), str(path))


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of the tokenizers library, which derives from BaseException."""
    return type(error).__name__ == "PanicException"


def _word(recipe: TokenizerRecipe) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    return tokenizer, trainers.WordLevelTrainer(**_limits(recipe), min_frequency=recipe.min_frequency)


def _bpe(recipe: TokenizerRecipe) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    limits = _limits(recipe) | {"min_frequency": recipe.min_frequency}
    return tokenizer, trainers.BpeTrainer(**limits, initial_alphabet=alphabet)


def _byte(recipe: TokenizerRecipe) -> tuple[Tokenizer, trainers.Trainer | None]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate((*SPECIALS, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, None


def _unigram(recipe: TokenizerRecipe) -> tuple[Tokenizer, trainers.Trainer | None]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(**_limits(recipe), unk_token=UNK)


def _limits(recipe: TokenizerRecipe) -> dict[str, Any]:
    return {"vocab_size": recipe.vocab_size, "special_tokens": list(SPECIALS), "show_progress": False}


def _rounded(tokenizer: Tokenizer) -> Tokenizer:
    """Round a unigram model's scores: the trainer adds them up in a random order and differs at 1e-14."""
    data = json.loads(tokenizer.to_str())
    scores = [(token, round(score, 9)) for token, score in data["model"]["vocab"]]
    rest = sorted(scores[len(SPECIALS) :], key=lambda pair: (-pair[1], pair[0]))
    data["model"]["vocab"] = [*scores[: len(SPECIALS)], *rest]
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
