"""Overlap of training and evaluation data: what counts as the same, how it is counted, and where it is recorded."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmhub
from mmhub import overlap
from mmhub.cli.main import main
from mmhub.data.sources import Rows, open_rows
from mmhub.interfaces import Policy
from mmhub.overlap import measure_overlap, training_overlap
from tests.conftest import SHARED, flac, png


def texts(*values: str | None) -> Rows:
    return open_rows([{"text": value} for value in values])


def measure(train: Rows, test: Rows, **options: Any) -> dict[str, Any]:
    return measure_overlap(train, test, {"text": "text"}, **options)


def saying(count: int, seed: int = 0) -> str:
    """So many random words."""
    return " ".join(random.Random(seed).choices([f"w{i}" for i in range(500)], k=count))


# -- texts ------------------------------------------------------------------------------------------------------


def test_texts_are_the_same_whatever_their_case_width_and_white_space() -> None:
    train = texts("A  good\tfilm", "\ufb01ne \uff21\uff22", "another")
    found = measure(train, texts("a good film", "Fine ab", "a good films", "", None))
    assert (found["rows"], found["checked_rows"], found["train_rows"]) == (5, 3, 3), "what says nothing is no row"
    assert (found["exact"], found["exact_share"]) == (2, 0.666667)


def naive(train: list[str], test: list[str], n: int) -> tuple[int, int, int]:
    """Texts with n words, those that share a run with training, and those that share most of theirs."""

    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    known = {run for text in train for run in runs(text)}
    shares = [sum(run in known for run in runs(text)) / len(runs(text)) for text in test if runs(text)]
    return len(shares), sum(share > 0 for share in shares), sum(share > 0.5 for share in shares)


@pytest.mark.parametrize(("low", "high", "n"), [(4, 20, 8), (25, 40, 13)])
def test_runs_of_words_are_counted_as_by_hand(low: int, high: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(n)
    train = [saying(draw.randrange(low, high), seed) for seed in range(60)]
    test = [saying(draw.randrange(low, high), seed) for seed in range(1000, 1040)]
    for i in range(0, 40, 2):  # a piece of a training text at the end of a new one, of any length
        kept, piece = (words[: draw.randrange(1, high)] for words in (test[i].split(), train[i].split()))
        test[i] = " ".join(kept + piece)
    monkeypatch.setattr(overlap, "_BLOCK_ROWS", 7)
    found = measure(texts(*train), texts(*test))
    assert found["n"] == n
    assert (found["ngram_rows"], found["ngram"], found["ngram_half"]) == naive(train, test, n)
    assert 0 < found["ngram_half"] < found["ngram"] < found["ngram_rows"]


def test_a_long_training_text_is_looked_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    words = saying(400).split()
    monkeypatch.setattr(overlap, "_BLOCK_WORDS", 30)
    pieces = [" ".join(words[at : at + 8]) for at in range(392)]
    found = measure(texts("a", " ".join(words), "b"), texts("z", *pieces))
    assert (found["train_rows"], found["ngram_rows"], found["ngram"]) == (3, 392, 392), "also over the ends of blocks"
    assert measure(texts(" ".join(words)), texts(" ".join(words[-4:] + words[:4])))["ngram"] == 0


def test_a_run_does_not_reach_over_the_end_of_a_text() -> None:
    words = saying(16).split()
    train = texts(" ".join(words[:7]), " ".join(words[7:]))
    assert measure(train, texts(" ".join(words)))["ngram"] == 1, "its last eight words are one run, and in training"
    assert measure(train, texts(" ".join(words[:14])))["ngram"] == 0


def test_languages_without_spaces_have_a_word_for_each_character() -> None:
    found = measure(texts("今日は天気がいいですね"), texts("昨日は天気がいいですよ"))
    assert (found["exact"], found["ngram"]) == (0, 1)


def test_a_pair_of_texts_is_the_same_if_both_are() -> None:
    train = open_rows([{"a": "one", "b": "two"}])
    test = open_rows([{"a": "one", "b": "two"}, {"a": "one", "b": "three"}, {"a": "two", "b": "one"}])
    assert measure_overlap(train, test, {"text": "a+b"})["exact"] == 1


def test_documents_of_lines_are_compared_as_wholes() -> None:
    train, test = texts("= a =", "same", "= b =", "more"), texts("= a =", "same", "= b =", "other", "same")
    assert measure(train, test)["exact"] == 4
    found = measure(train, test, document="^= ")
    assert (found["checked_rows"], found["exact"]) == (2, 1)


def test_conversations_are_compared_by_all_that_is_said_and_shown() -> None:
    def talk(question: str, picture: int) -> dict[str, Any]:
        asked = [{"type": "image", "image": png(picture)}, {"type": "text", "text": question}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]}

    train = open_rows([talk("is it?", 1), talk("was it?", 2)])
    test = open_rows([talk("Is it?", 1), talk("is it?", 3), talk("will it?", 2)])
    found = measure_overlap(train, test, {"text": "messages", "image": "messages"})
    assert found["exact"] == 1
    assert {name: one["exact"] for name, one in found["modalities"].items()} == {"text": 2, "image": 2}


# -- media ------------------------------------------------------------------------------------------------------


def recoded(content: bytes, kind: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).save(file, kind)
    return file.getvalue()


def test_pictures_are_compared_by_their_pixels_in_whatever_format() -> None:
    train = open_rows([{"image": png(i)} for i in range(4)])
    test = open_rows([{"image": recoded(png(1), "BMP")}, {"image": png(2)}, {"image": png(7)}])
    assert measure_overlap(train, test, {"image": "image"})["exact"] == 2
    assert measure_overlap(train, test, {"image": "image"}, pixels=False)["exact"] == 1


def test_large_pictures_and_what_is_none_are_compared_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_THUMBNAIL", 10)
    rows = open_rows([{"image": png(1)}, {"image": b"nothing"}])
    assert measure_overlap(rows, rows, {"image": "image"})["exact"] == 2


def test_a_row_is_the_same_if_each_of_its_inputs_is(tmp_path: Path) -> None:
    (tmp_path / "1.flac").write_bytes(flac(1))
    train = open_rows(
        [{"image": png(1), "audio": flac(1)}, {"image": png(2), "audio": None}, {"image": None, "audio": flac(2)}]
    )
    test = open_rows(
        [
            {"image": png(1), "audio": str(tmp_path / "1.flac")},
            {"image": png(2), "audio": {"bytes": flac(2), "path": "x.flac"}},
            {"image": png(1), "audio": flac(3)},
            {"image": None, "audio": flac(2)},
            {"image": None, "audio": None},
            {"image": png(1), "audio": flac(2)},
        ]
    )
    found = measure_overlap(train, test, {"image": "image", "audio": "audio"})
    assert (found["rows"], found["checked_rows"], found["exact"]) == (6, 5, 2), "each input may be, and the row not"
    assert found["modalities"] == {
        "image": {"rows": 4, "exact": 4, "exact_share": 1.0},
        "audio": {"rows": 5, "exact": 4, "exact_share": 0.8},
    }
    assert "n" not in found


def test_what_cannot_be_read_is_like_nothing_else_and_counted() -> None:
    values = ["gone.flac", "gone.flac", {"array": np.ones(3), "rate": 1}, [0.5, 1.0], [[1.0], [1.0, 2.0]], object()]
    rows = open_rows([{"audio": value} for value in values])
    found = measure_overlap(rows, rows, {"audio": "audio"})
    assert (found["checked_rows"], found["exact"], found["unread"]) == (6, 3, 6)


# -- bounds -----------------------------------------------------------------------------------------------------


def test_of_many_evaluation_rows_some_are_looked_up_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "MOST_ROWS", 10)
    train, test = texts(*map(str, range(0, 100, 2))), texts(*map(str, range(100)))
    found = measure(train, test)
    assert (found["rows"], found["checked_rows"]) == (100, 10)
    assert 0.3 <= found["exact_share"] <= 0.7


def test_evaluation_rows_that_repeat_are_told_and_training_rows_hide_nothing_by_it() -> None:
    found = measure(texts("yes", "no", "maybe"), texts("yes", "Yes", "perhaps", "no"))
    assert (found["exact_share"], found["repeats"]) == (0.75, 0.5)
    rows = texts("yes", "no")
    assert measure_overlap([texts("yes", "yes", "no", "no"), rows], rows, {"text": "text"})["repeats"] == 0.0


def failing(error: Exception) -> Any:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    return fail


def test_the_end_of_a_training_does_not_wait_for_much_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*trains: Any) -> dict[str, Any]:
        return training_overlap(trains, texts("a b"), {"text": "text"}, document="row", policy=Policy())

    assert ended(texts("a b"), texts("c"))["train_rows"] == 2, "the data of all stages"
    assert ended(texts("a b"), object()) == {"skipped": "the training data is streamed"}
    for error in (RuntimeError("/home/ann"), RecursionError(), KeyError("x"), OSError("/home/ann")):
        monkeypatch.setattr(overlap, "measure_overlap", failing(error))
        assert ended(texts("a b")) == {"skipped": "the data cannot be read as it was"}
    monkeypatch.setattr(overlap, "measure_overlap", failing(MemoryError()))
    assert ended(texts("a b")) == {"skipped": "it takes more memory than there is"}
    monkeypatch.undo()
    monkeypatch.setattr(overlap, "MOST_BYTES", 2**20)
    assert ended(texts("a" * 2**20)) == {"skipped": "the data has more than 1 MiB"}


def test_an_empty_training_set_overlaps_with_nothing() -> None:
    found = measure(texts(""), texts("a b c d e f g h"))
    assert (found["train_rows"], found["exact"], found["ngram"], found["repeats"]) == (0, 0, 0, 0.0)


# -- where it is recorded ---------------------------------------------------------------------------------------


@pytest.fixture
def talk_of_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Training and validation tables of which two in eight validation rows were trained on."""
    monkeypatch.chdir(tmp_path)
    words = ["good", "bad"]
    train = [{"text": f"a {words[i % 2]} film, the {i}.", "label": words[i % 2]} for i in range(16)]
    valid = train[:2] + [row | {"text": f"no {row['text']}"} for row in train[2:8]]
    for name, rows in (("train", train), ("valid", valid)):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(args)
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_eval_tells_how_many_rows_are_in_the_data_named_by_against(
    talk_of_films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders = {"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}}
    decoder = {"use": "classification", "config": {"labels": ["good", "bad"]}}
    mmhub.compose(encoders=encoders, decoder=decoder, texts=["a good bad film"]).save("model")
    call = ("eval", "./model", "--data", "valid.jsonl", "--target-column", "label", "--against")
    code, out, err = run(capsys, *call, "train.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["overlap"]["exact"] == 2
    code, out, err = run(capsys, *call, "train.jsonl")
    assert "\noverlap: 2 of 8 evaluation rows (25.0%) are in the training data as they are" in out
    Path("other.jsonl").write_text('{"words": "a"}\n')
    code, out, err = run(capsys, *call, "other.jsonl")
    assert code == 2 and "no column 'text' in 'other.jsonl'" in err
    assert run(capsys, *call, "gone.jsonl")[0] == 3


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs shared/data (MMHUB_SHARED)")
def test_real_sets_overlap_little() -> None:
    data = SHARED / "data"
    names = ["sentence", "label"]
    sst2 = [open_rows(data / "sst2" / f"{name}.tsv", columns=names) for name in ("train", "dev")]
    found = measure_overlap(sst2[0], sst2[1], {"text": "sentence"})
    assert found["checked_rows"] == 872 and found["exact"] == 0 and found["ngram_share"] < 0.02
    english = [open_rows({"en": data / "multi30k" / f"{name}.en.gz"}) for name in ("train", "val")]
    found = measure_overlap(english[0], english[1], {"text": "en"})
    assert found["exact"] == 1 and 0.01 < found["ngram_share"] < 0.05
    cifar = [open_rows(data / "cifar10-small" / f"{name}.parquet") for name in ("train", "valid")]
    assert measure_overlap(cifar[0], cifar[1], {"image": "image"})["exact_share"] < 0.01
