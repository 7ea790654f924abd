"""How much of an evaluation set a model was trained on: rows that are the same, and texts that share runs of words.

Only hashes of the evaluation rows are held, and training rows pass by once, so that memory does not grow with them.
What is done about an overlap is left to `mmhub.hub.gate`.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmhub.data.corpus import documents
from mmhub.data.inputs import is_conversation, usable
from mmhub.data.sources import Rows
from mmhub.errors import InputError
from mmhub.interfaces import Policy, raw_bytes

Keys = NDArray[np.uint64]

LONG, SHORT = 13, 8  # words of a run; 13 as for GPT-3, which texts of a sentence or two seldom share by chance alone
MOST_BYTES = 2**28  # of texts and media that the end of a training waits for
MOST_ROWS = 20_000  # evaluation rows that are looked up; of more, evenly spaced ones
_MOST_WORDS = 2**22  # words of evaluation rows whose runs are looked up
_BLOCK_WORDS, _BLOCK_ROWS = 2**18, 2**12  # training rows that are looked up together
_THUMBNAIL = 2**15  # bytes of a picture whose pixels are compared: decoding larger ones takes long
_THUMBNAIL_PIXELS = 2**18
_STEP = 0x9E3779B97F4A7C15  # an odd number: run of words -> sum of word * _STEP ** place, modulo 2 ** 64
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")


def measure_overlap(
    train: Rows | Sequence[Rows],
    test: Rows,
    inputs: Mapping[str, str],
    *,
    document: str = "row",
    policy: Policy | None = None,
    pixels: bool = True,
    most_bytes: float = math.inf,
) -> dict[str, Any]:
    """Return how much of `test` is in `train`, in what `inputs` (modality -> column) names; targets do not count.

    Texts are the same where their letters are, whatever their case, width and white space (NFKC); media where their
    bytes are, and with `pixels` small pictures, of at most 32 KiB, where their pixels are, in whatever format they are
    kept. A row is in the training data if one there has all the same inputs.
    `document` says what a text is, see `mmhub.data.corpus.documents`.

    The result: "rows" of `test`, "checked_rows" of them that were looked up (those with an input, at most
    `MOST_ROWS`), "train_rows", "exact" and "exact_share" of those checked; "repeats", the share of them that occur more
    than once among themselves, which says how alike rows are anyway; "unread" inputs, if any; "modalities" {name:
    {"rows", "exact", "exact_share"}} where there are several, each input by itself. For texts also "n", the words of a
    run: 13 (Brown et al., arXiv:2005.14165) where half the texts have twice as many, else 8; "ngram_rows", those of at
    least n words; and of them "ngram" and "ngram_share", where any run is in the training data, and "ngram_half" and
    "ngram_half_share", where more than half of them are.

    Raises:
        UsageError: a column is missing. InputError: a document is not text. TooMuch: more than `most_bytes` of texts
        and media would have to be read.
    """
    trains = [train] if isinstance(train, Rows) else list(train)
    reader = _Reader(dict(inputs), document, policy or Policy(), pixels, most_bytes)
    wanted = _read_test(reader, test)
    asked = wanted.keys | {_ROW: wanted.row_keys()}
    met = {name: _Met(keys) for name, keys in asked.items()}
    n = _run_length(wanted)
    owners, runs = wanted.runs(n)
    met_runs = _Met(runs)
    count = 0
    for rows in trains:
        for block in reader.blocks(rows, lap=n - 1):
            for name, keys in (block.keys | {_ROW: block.row_keys()}).items():
                met[name].add(keys)
            if len(runs):
                met_runs.add(block.runs(n)[1])
            count += block.count
    hits = {name: met[name].of(keys) for name, keys in asked.items()}
    found: dict[str, Any] = {"rows": len(test), "checked_rows": wanted.rows, "train_rows": count}
    found |= _counted("exact", hits[_ROW], wanted.rows)
    found["repeats"] = _repeats(asked[_ROW])
    if len(inputs) > 1:
        found["modalities"] = {
            name: {"rows": there} | _counted("exact", hits[name], there)
            for name, keys in wanted.keys.items()
            if (there := int((keys != 0).sum()))
        }
    found |= {"unread": reader.unread} if reader.unread else {}
    return found | (_shared_runs(n, owners, met_runs.of(runs), wanted.rows) if "text" in inputs else {})


def training_overlap(
    trains: Iterable[Any], valid: Rows, inputs: Mapping[str, str], *, document: str, policy: Policy
) -> dict[str, Any]:
    """Return the overlap of what a model was trained on with its validation rows, as it stands in provenance.json.

    The end of a training must not wait long for it: where much would have to be read it is {"skipped": why}, and
    pictures are compared by their bytes alone.
    """
    policy, most = replace(policy, urls=False), MOST_BYTES  # nothing is fetched again
    try:
        every = list(trains)
        if not all(isinstance(rows, Rows) for rows in every):
            return {"skipped": "the training data is streamed"}
        return measure_overlap(every, valid, inputs, document=document, policy=policy, pixels=False, most_bytes=most)
    except TooMuch:
        return {"skipped": f"the data has more than {MOST_BYTES // 2**20} MiB"}
    except Exception as error:  # of whatever reads the data, or for want of memory: the training itself is done
        why = "it takes more memory than there is" if isinstance(error, MemoryError) else ""
        return {"skipped": why or "the data cannot be read as it was"}  # the error may tell a path of this machine


class TooMuch(Exception):
    """What would have to be read is more than was allowed."""


_NONE: Keys = np.zeros(0, np.uint64)
_ROW = ""  # instead of an input's name: all inputs of a row together


@dataclass
class _Block:
    """Rows as hashes: of each input, 0 where it is missing, and of the words of their texts.

    The first may be the rest of a long row, without its inputs: `count` are those that begin here.
    """

    keys: dict[str, Keys]
    words: Keys
    starts: NDArray[np.int64]  # of each row's words, and their end
    count: int = 0

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def row_keys(self) -> Keys:
        """The hash of all inputs of each row, whichever it lacks, and 0 of the rest of a row."""
        columns = list(self.keys.values())
        found = columns[0].copy()
        for column in columns[1:]:
            found = found * np.uint64(_STEP) + column
        return found

    def runs(self, n: int) -> tuple[NDArray[np.int64], Keys]:
        """The row and the hash of every `n` words that follow each other in a text."""
        count = len(self.words) - n + 1
        if count <= 0:
            return np.zeros(0, np.int64), _NONE
        hashes = np.zeros(count, np.uint64)
        for place in range(n):
            hashes += self.words[place : place + count] * np.uint64(pow(_STEP, place, 2**64))
        owner = np.repeat(np.arange(self.rows), np.diff(self.starts))
        whole = owner[:count] == owner[n - 1 :]
        return owner[:count][whole], hashes[whole]


class _Met:
    """Which of some keys have been met."""

    def __init__(self, keys: Keys) -> None:
        self.known = np.unique(keys[keys != 0])
        self.seen = np.zeros(len(self.known), bool)

    def add(self, keys: Keys) -> None:
        at, there = self._find(keys)
        self.seen[at[there]] = True

    def of(self, keys: Keys) -> NDArray[np.bool_]:
        at, there = self._find(keys)
        there[there] = self.seen[at[there]]
        return there

    def _find(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not len(self.known):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self.known, keys), len(self.known) - 1)
        return at, self.known[at] == keys


class _Words(dict[str, int]):
    """The hash of a word."""

    def __missing__(self, word: str) -> int:
        if len(self) > 2**20:
            self.clear()
        found = self[word] = _hash(word.encode("utf-8", "surrogatepass"))
        return found


class _Growing:
    """A block that is being filled."""

    def __init__(self, inputs: Iterable[str]) -> None:
        self.keys = {name: array("Q") for name in inputs}
        self.words, self.starts = array("Q"), array("q", [0])
        self.count = 0

    def add(self, keys: Mapping[str, int], words: array[int]) -> array[int]:
        """Add a row, or what is left of one, and return its words."""
        for name, key in keys.items():
            self.keys[name].append(key)
        self.words.extend(words)
        self.starts.append(len(self.words))
        return words

    @property
    def is_full(self) -> bool:
        return len(self.starts) > _BLOCK_ROWS or len(self.words) >= _BLOCK_WORDS

    def done(self) -> _Block:
        keys = {name: np.array(column, np.uint64) for name, column in self.keys.items()}
        return _Block(keys, np.array(self.words, np.uint64), np.array(self.starts, np.int64), self.count)


@dataclass
class _Reader:
    """Turns rows into hashes."""

    inputs: dict[str, str]
    document: str
    policy: Policy
    pixels: bool
    most_bytes: float
    words: _Words = field(default_factory=_Words)
    unread: int = 0
    read: int = 0

    def blocks(self, rows: Rows, *, lap: int | None = None) -> Iterator[_Block]:
        """Yield the rows that have any input, some at a time.

        The words of a long row go on in the next block, from the last `lap` on; without it, only the first ones count.
        """
        block = _Growing(self.inputs)
        for sample in self._samples(rows):
            text = _text_of(sample.get("text"))
            keys = {name: self._key(name, text if name == "text" else sample[name]) for name in self.inputs}
            words = map(self.words.__getitem__, _words_of(text or ""))
            more = block.add(keys, array("Q", islice(words, _BLOCK_WORDS)))
            block.count += 1
            while lap is not None and (part := array("Q", islice(words, _BLOCK_WORDS))):
                yield block.done()
                block, last = _Growing(self.inputs), more[-lap:]
                more = block.add(dict.fromkeys(self.inputs, 0), last + part)
            if block.is_full:
                yield block.done()
                block = _Growing(self.inputs)
        if block.count or block.words:
            yield block.done()

    def _samples(self, rows: Rows) -> Iterator[dict[str, Any]]:
        if self.document != "row" and {*self.inputs} == {"text"}:
            texts = documents(rows, self.inputs["text"], self.document, [])
            yield from ({"text": text} for _, text in texts)
            return
        alone = len(self.inputs) == 1
        columns = [rows.column(column) for column in self.inputs.values()]
        for i, cells in enumerate(zip(*columns, strict=True)):
            folder = rows.folder(i)
            sample = {name: usable(name, cell, folder, alone) for name, cell in zip(self.inputs, cells, strict=True)}
            if any(value is not None and not _is_blank(value) for value in sample.values()):
                yield sample

    def _key(self, modality: str, value: Any) -> int:
        """The hash of an input, 0 of none; what cannot be read is like nothing else."""
        if value is None or _is_blank(value):
            return 0
        if modality == "text":
            content = _normal(value).encode("utf-8", "surrogatepass")
            self._count(len(content))
            return _hash(content)
        try:
            several = isinstance(value, (list, tuple)) and not isinstance(value[0], (int, float))
            items = value if several else [value]
            return _hash(b"".join(self._digest(modality, item) for item in items))
        except InputError:
            self.unread += 1
            return _hash(f"unread {self.unread}".encode())

    def _digest(self, modality: str, item: Any) -> bytes:
        """The hash of what tells one input from another.

        Raises:
            InputError: it cannot be read.
        """
        bare = isinstance(item, Mapping) and item.get("array") is not None
        content = None if bare else raw_bytes(item, self.policy)
        if content is None:
            content = _array_bytes(item)
        elif self.pixels and modality == "image" and len(content) <= _THUMBNAIL:
            content = _pixels(content) or content
        self._count(len(content))
        return hashlib.sha256(content).digest()

    def _count(self, size: int) -> None:
        self.read += size
        if self.read > self.most_bytes:
            raise TooMuch


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _words_of(text: str) -> Iterator[str]:
    return (found[0] for found in _WORD.finditer(_normal(text)))


def _text_of(value: Any) -> str | None:
    """A text, the texts of a pair, or all that is said in a conversation."""
    if isinstance(value, Mapping):
        return "\n".join(str(part) for part in value.values() if part is not None)
    if is_conversation(value):
        return "\n".join(_said(message.get("content")) for message in value)
    return value if isinstance(value, str) else None if value is None else str(value)


def _said(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, (list, tuple)) else []
    return " ".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and part.get("text"))


def _array_bytes(item: Any) -> bytes:
    try:
        values = np.asarray(item["array"] if isinstance(item, Mapping) and "array" in item else item)
    except (TypeError, ValueError):
        values = np.array(None)
    if values.dtype == object:
        raise InputError(f"a {type(item).__name__} has no bytes to compare", "give paths, bytes or arrays")
    return f"{values.shape} {values.dtype} ".encode() + values.tobytes()


def _pixels(content: bytes) -> bytes | None:
    """The pixels of a small picture, None of anything else."""
    try:
        from PIL import Image

        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP", "GIF", "BMP")) as picture:
            if picture.width * picture.height > _THUMBNAIL_PIXELS:
                return None
            return f"{picture.size} ".encode() + picture.convert("RGBA").tobytes()
    except Exception:  # no picture, no library for it: its bytes are compared
        return None


def _read_test(reader: _Reader, test: Rows) -> _Block:
    """The evaluation rows that are looked up."""
    if len(test) > MOST_ROWS:
        test = test.select(np.linspace(0, len(test) - 1, MOST_ROWS).astype(int))
    blocks, words = [], 0
    for block in reader.blocks(test):
        if words > _MOST_WORDS:
            block = replace(block, words=_NONE, starts=np.zeros_like(block.starts))
        words += len(block.words)
        blocks.append(block)
    before = np.cumsum([0, *(len(block.words) for block in blocks)])
    starts = [block.starts[:-1] + start for block, start in zip(blocks, before, strict=False)]
    keys = {name: np.concatenate([*(block.keys[name] for block in blocks), _NONE]) for name in reader.inputs}
    ends = np.array([before[-1]], np.int64)
    every = np.concatenate([*(block.words for block in blocks), _NONE])
    return _Block(keys, every, np.concatenate([*starts, ends]))


def _run_length(block: _Block) -> int:
    lengths = np.diff(block.starts)
    lengths = lengths[lengths > 0]
    return LONG if len(lengths) and np.median(lengths) >= 2 * LONG else SHORT


def _repeats(keys: Keys) -> float:
    """The share of rows that occur more than once."""
    _, places, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return round(float((counts[places] > 1).mean()), 6) if len(keys) else 0.0


def _shared_runs(n: int, owners: NDArray[np.int64], hit: NDArray[np.bool_], rows: int) -> dict[str, Any]:
    """How many texts share any run of words, and how many most of theirs."""
    every, shared = np.bincount(owners, minlength=rows), np.bincount(owners[hit], minlength=rows)
    count = int((every > 0).sum())
    found = {"n": n, "ngram_rows": count} | _counted("ngram", shared > 0, count)
    return found | _counted("ngram_half", shared * 2 > every, count)


def _counted(name: str, which: NDArray[np.bool_], rows: int) -> dict[str, Any]:
    count = int(which.sum())
    return {name: count, f"{name}_share": round(count / rows, 6) if rows else 0.0}
