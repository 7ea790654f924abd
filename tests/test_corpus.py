"""Documents, the corpus made of them, and the blocks that training takes from it."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mmhub.data.corpus
from mmhub.config import DataRecipe
from mmhub.data.blocks import Plan, count_batches, plan_blocks
from mmhub.data.corpus import Corpus, documents
from mmhub.data.sources import Rows, open_rows
from mmhub.data.stream import open_stream
from mmhub.errors import InputError, MmhubError, UsageError
from mmhub.interfaces import Policy

WIKI = " \n = Lobster = \n \n It is blue . \n = = Food = = \n Eaten . \n = Crab = \n It walks . \n"


class Letters:
    """Reads a text as <s>, its characters and </s>."""

    unknown_id = 1

    def read(self, raw: str, policy: Policy, rng: Any = None) -> torch.Tensor:
        if "\ud800" in raw:
            raise InputError("the text holds characters that are not valid Unicode")
        return torch.tensor([2, *(1 if c == "?" else ord(c) for c in raw), 3])


class ManyLetters(Letters):
    """The same, many texts at once."""

    def read_many(self, texts: Sequence[str], policy: Policy) -> list[list[int]]:
        return [self.read(text, policy).tolist() for text in texts]


def rows_of(folder: Path, **files: str) -> Rows:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return open_rows([f"{name}.txt" for name in files], base=folder)


def texts_of(rows: Rows, document: str) -> list[tuple[int, str]]:
    return list(documents(rows, "text", document))


def corpus_of(*texts: str, processor: Any = None) -> Corpus:
    return Corpus.read(enumerate(texts), processor or Letters(), where="row {}".format)


def random_corpus(count: int = 40, seed: int = 0) -> Corpus:
    """Documents in which every token occurs once."""
    sizes = np.random.default_rng(seed).integers(2, 30, count)
    ends = np.cumsum(sizes)
    ids = np.arange(ends[-1], dtype=np.int32)
    return Corpus(ids, ends, np.arange(count) * 10, words=1, utf8=1, unknown=0)


def pieces_of(plan: Plan, number: int) -> list[tuple[int, list[int]]]:
    """The row and the ids of each piece of a batch."""
    batch = plan.batch(number)
    assert batch is not None
    text = batch.items["text"]
    return [(int(r), d[m].tolist()) for r, d, m in zip(text.rows, text.data, text.mask, strict=True)]


def predicted(plan: Plan) -> list[tuple[int, int]]:
    """Each (token before, token that is predicted) of an epoch, in order."""
    pieces = [piece for k in range(len(plan)) for _, piece in pieces_of(plan, k)]
    return [pair for piece in pieces for pair in pairwise(piece)]


def pairs_of(corpus: Corpus) -> list[tuple[int, int]]:
    texts = [corpus.document(k).tolist() for k in range(len(corpus))]
    return [pair for text in texts for pair in pairwise(text)]


def test_every_row_is_a_document_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a="one\n\n  \ntwo\n")
    assert texts_of(rows, "row") == [(0, "one"), (3, "two")]


def test_the_rows_of_each_file_make_one_document(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a="one\n\ntwo\n", b="three\n")
    assert texts_of(rows, "file") == [(0, "one\n\ntwo"), (3, "three")]


def test_files_of_one_name_and_files_that_begin_with_a_gap_are_documents_of_their_own(tmp_path: Path) -> None:
    for folder, cells in (("a", ["one"]), ("b", [None, "two"]), ("c", [7, "three"])):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"text": cell}) for cell in cells]
        (tmp_path / folder / "x.jsonl").write_text("\n".join(lines))
    rows = open_rows([f"{folder}/x.jsonl" for folder in "abc"], base=tmp_path)
    assert list(documents(rows, "text", "file", [])) == [(0, "one"), (2, "two"), (4, "three")]
    for folder in "abc":
        (tmp_path / folder / "x.txt").write_text(folder)
    same = open_rows("*/x.txt", base=tmp_path)
    assert texts_of(same, "file") == [(0, "a"), (1, "b"), (2, "c")]


def test_a_missing_row_ends_a_document_as_an_empty_one_does() -> None:
    rows = open_rows([{"text": text} for text in ("one", "two", None, "three")])
    assert texts_of(rows, "blank-line") == [(0, "one\ntwo"), (3, "three")]


def test_an_empty_row_ends_a_document(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a="\none\ntwo\n\n\nthree\n\n")
    assert texts_of(rows, "blank-line") == [(1, "one\ntwo"), (5, "three")]


def test_a_regular_expression_finds_where_documents_begin(tmp_path: Path) -> None:
    found = texts_of(rows_of(tmp_path, wiki=WIKI), "^ = [^=]")
    assert found == [
        (1, " = Lobster = \n \n It is blue . \n = = Food = = \n Eaten . "),
        (6, " = Crab = \n It walks . "),
    ]


def test_rows_that_keep_their_line_break_make_the_same_documents() -> None:
    rows = open_rows([{"text": line + "\n"} for line in WIKI.split("\n")[:-1]])
    assert [text for _, text in texts_of(rows, "^ = [^=]")][1] == " = Crab = \n It walks . "


def test_an_unknown_kind_of_document_is_named(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a="one\n")
    with pytest.raises(UsageError, match=r"data.document is 'chapter'; it is \"row\", \"file\", \"blank-line\""):
        texts_of(rows, "chapter")
    with pytest.raises(UsageError, match=r"data.document '\^\(' is not a regular expression"):
        texts_of(rows, "^(")


@pytest.mark.parametrize("document", ["row", "file"])
def test_a_row_that_is_not_text_is_named_or_skipped(document: str) -> None:
    rows = open_rows([{"text": "one"}, {"text": 7}, {"text": None}, {"text": "two"}])
    with pytest.raises(InputError, match="row 2, column 'text': a text is expected, got a int"):
        texts_of(rows, document)
    skipped: list[str] = []
    texts = [text for _, text in documents(rows, "text", document, skipped)]
    assert "\n".join(texts) == "one\ntwo" and len(skipped) == 1


def test_a_row_of_a_stream_that_is_not_text_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": [1]}\n{"text": "\\ud800"}\n{"text": NaN}\n')
    rows = open_stream(DataRecipe(train="a.jsonl"), tmp_path)
    with pytest.raises(InputError, match=r"a.jsonl row 2, column 'text': a text is expected"):
        list(documents(rows, "text"))
    skipped: list[str] = []
    assert [text for _, text in documents(rows, "text", "row", skipped)] == ["one"]
    assert len(skipped) == 2 and skipped[1] == (
        "a.jsonl row 3, column 'text': the text holds characters that are not valid Unicode"
    )


def test_bytes_that_are_not_utf8_are_named_with_their_line_and_place(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\nbad \xff here\n")
    with pytest.raises(InputError, match=r"'bad.txt' line 2 is not UTF-8 \(byte 0xff at 5\)"):
        open_rows("bad.txt", base=tmp_path)


@pytest.mark.parametrize("processor", [Letters(), ManyLetters()])
def test_a_corpus_holds_the_ids_of_all_documents_and_counts(processor: Any) -> None:
    corpus = corpus_of("a b?", "ü", processor=processor)
    assert corpus.document(0).tolist() == [2, 97, 32, 98, 1, 3] and corpus.document(1).tolist() == [2, 252, 3]
    assert (corpus.words, corpus.utf8, corpus.unknown, corpus.predictions) == (3, 6, 1, 7)
    assert corpus.describe() == "2 documents, 9 tokens, 11.11 % unknown, 3 words, 6 bytes"


@pytest.mark.parametrize("processor", [Letters(), ManyLetters()])
def test_an_unreadable_text_is_named_or_skipped(processor: Any) -> None:
    with pytest.raises(InputError, match="row 1: the text holds characters that are not valid Unicode; fix the row"):
        corpus_of("a", "\ud800", processor=processor)
    corpus = Corpus.read(enumerate(["a", "\ud800", "b"]), processor, where="row {}".format, skip=True)
    assert corpus.rows.tolist() == [0, 2] and corpus.skipped[0].startswith("row 1: ")


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    texts = documents(rows_of(tmp_path, a="\n \n"), "text")
    with pytest.raises(InputError, match="there is no text in the corpus"):
        Corpus.read(texts, Letters(), where="row {}".format)


def test_a_large_corpus_is_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mmhub.data.corpus, "_IN_MEMORY", 20)
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path))
    corpus = corpus_of("abc", "def", "ghi")
    assert isinstance(corpus.ids, np.memmap) and corpus.document(2).tolist() == [2, 103, 104, 105, 3]
    batch = plan_blocks(corpus, block=4, batch=3, seed=0, epoch=0).batch(0)
    assert batch is not None and int(batch.targets.sum()) == 12


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pieces: int) -> None:
    class Full:
        left = pieces

        def write(self, content: bytes) -> None:
            self.left -= 1
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mmhub.data.corpus, "_IN_MEMORY", 4)
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(MmhubError, match=r"cannot write the corpus .* no space left on the device"):
        corpus_of("abc", "def", "ghi")


def test_texts_of_which_the_tokenizer_makes_nothing_are_no_documents() -> None:
    bare = SimpleNamespace(read=lambda raw, policy: torch.tensor([ord(c) for c in raw if c != "-"]))
    corpus = corpus_of("ab", "---", "c", processor=bare)
    assert corpus.rows.tolist() == [0, 2] and corpus.predictions == 1
    ends = np.array([2, 2, 2])
    assert Corpus(np.arange(2, dtype=np.int32), ends, ends, words=0, utf8=0, unknown=0).predictions == 1


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("block", "batch"), [(7, 4), (16, 1), (400, 3), (1, 5)])
def test_blocks_predict_every_token_of_a_document_from_the_one_before(stateful: bool, block: int, batch: int) -> None:
    corpus = random_corpus()
    plan = plan_blocks(corpus, block=block, batch=batch, seed=1, epoch=2, stateful=stateful)
    found, wanted = Counter(predicted(plan)), Counter(pairs_of(corpus))
    assert not found - wanted
    assert sum((wanted - found).values()) == (corpus.predictions % batch if stateful else 0)
    assert len(plan) == count_batches(corpus.predictions, block=block, batch=batch, stateful=stateful)
    assert sum(plan.predictions(k) for k in range(len(plan))) == len(predicted(plan))


@pytest.mark.parametrize("stateful", [False, True])
def test_all_rows_but_those_at_the_end_are_full(stateful: bool) -> None:
    plan = plan_blocks(random_corpus(), block=11, batch=4, seed=0, epoch=0, stateful=stateful)
    batches = [batch for k in range(len(plan)) if (batch := plan.batch(k)) is not None]
    counts = [batch.targets.tolist() for batch in batches]
    assert all(row == [11] * 4 for row in counts[:-1])
    assert len(set(counts[-1])) == 1 if stateful else all(count == 11 for count in counts[-1][:-1])
    assert all(batch.weights is batch.targets and batch.size == len(batch.index) for batch in batches)


def test_a_row_of_a_stateful_plan_goes_on_where_it_stopped() -> None:
    corpus = random_corpus()
    plan = plan_blocks(corpus, block=9, batch=4, seed=0, epoch=0, stateful=True)
    begins = set(corpus.starts.tolist())
    last: dict[int, int] = {}
    seen = set()
    for k in range(len(plan)):
        batch, pieces = plan.batch(k), pieces_of(plan, k)
        assert batch is not None
        goes_on = batch.items["text"].continues
        assert goes_on is not None
        for row in range(batch.size):
            own = [piece for r, piece in pieces if r == row]
            assert bool(goes_on[row]) == (k > 0 and own[0][0] not in begins)
            if goes_on[row]:
                assert own[0][0] == last[row]
            assert all(piece[0] in begins for piece in own[1:])
            last[row] = own[-1][-1]
            seen.add(bool(goes_on[row]))
    assert seen == {True, False}


def test_a_plan_depends_on_seed_and_epoch_alone() -> None:
    corpus = random_corpus()

    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        return predicted(plan_blocks(corpus, block=10, batch=4, seed=seed, epoch=number))

    assert epoch(0, 0) == epoch(0, 0)
    assert epoch(0, 0) != epoch(0, 1) and epoch(0, 0) != epoch(1, 0)


@pytest.mark.parametrize("stateful", [False, True])
def test_processes_share_the_rows_of_each_batch(stateful: bool) -> None:
    plan = plan_blocks(random_corpus(), block=7, batch=5, seed=0, epoch=0, stateful=stateful)
    for k in range(len(plan)):
        shares = [plan.batch(k, rank, 3) for rank in range(3)]
        whole = pieces_of(plan, k)
        for rank, share in enumerate(shares):
            if share is None:
                assert not any(row % 3 == rank for row, _ in whole)
                continue
            text = share.items["text"]
            found = [
                (int(r) * 3 + rank, d[m].tolist()) for r, d, m in zip(text.rows, text.data, text.mask, strict=True)
            ]
            assert found == [piece for piece in whole if piece[0] % 3 == rank]


def test_documents_without_a_prediction_are_passed_over() -> None:
    alone = SimpleNamespace(read=lambda raw, policy: torch.tensor([ord(c) for c in raw]))
    corpus = corpus_of("a", "bcd", "e", "fg", "h", processor=alone)
    for seed in range(5):
        pairs = sorted(predicted(plan_blocks(corpus, block=2, batch=2, seed=seed, epoch=0)))
        assert pairs == [(98, 99), (99, 100), (102, 103)]


def test_a_corpus_shorter_than_a_block_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        UsageError, match=r"predicts 64 tokens, but the whole corpus has only 6; set train.block_size to 6"
    ):
        plan_blocks(corpus_of("abc", "d"), block=64, batch=1, seed=0, epoch=0)
    with pytest.raises(UsageError, match="8 rows share 6 tokens"):
        plan_blocks(corpus_of("abc", "d"), block=2, batch=8, seed=0, epoch=0, stateful=True)


def test_blocks_of_one_long_document_come_in_random_order() -> None:
    corpus = corpus_of("".join(map(chr, range(200, 440))))
    plan = plan_blocks(corpus, block=8, batch=1, seed=0, epoch=0)
    firsts = [pieces_of(plan, k)[0][1][0] for k in range(len(plan))]
    assert sorted(firsts[:-1]) != firsts[:-1] and len(set(firsts)) == 31
