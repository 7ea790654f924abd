"""Language models through the engine and the command line: corpora, blocks, states that are carried, and streams."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from mmhub.engine import train
from mmhub.engine.language_feed import LanguageFeed, block_size, group_by_size
from mmhub.engine.step import Stepper
from mmhub.errors import InputError, Interrupted, UsageError
from mmhub.evaluation import evaluate
from mmhub.hub import load
from mmhub.perplexity import read_corpus
from tests.conftest import Cli
from tests.test_distributed import curve, on_ranks
from tests.test_resume import stop_at, weights

KINDS = {
    "rnn-lm": {"dim": 16, "embedding_dim": 16},
    "lstm-lm": {"dim": 16, "embedding_dim": 16},
    "transformer-lm": {"dim": 16, "depth": 1, "heads": 2, "max_length": 64},
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences in which each word tells much about the next one."""
    rng = random.Random(seed)
    after = {"the": ["cat", "dog", "fox"], "cat": ["sleeps"], "dog": ["barks"], "fox": ["runs"], "sleeps": ["here"]}
    after |= {"barks": ["here", "there"], "runs": ["there"], "here": ["and", "."], "there": ["and", "."]}
    lines = []
    for _ in range(count):
        words = ["the"]
        while words[-1] != "." and len(words) < 24:
            words.append(rng.choice(after.get(words[-1], ["the"])))
        lines.append(" ".join(words))
    return lines


def language(folder: Path, use: str, **options: Any) -> dict[str, Any]:
    """A recipe for a small language model on sentences, one a line."""
    for name, seed in (("train", 0), ("valid", 1)):
        (folder / f"{name}.txt").write_text("\n".join(sentences(100, seed)) + "\n")
    return {
        "task": "language-modelling",
        "model": {"decoder": {"use": use, "config": dict(KINDS[use])}, "tokenizer": {"kind": "word"}},
        "data": {"train": str(folder / "train.txt"), "valid": str(folder / "valid.txt")},
        "train": {"epochs": 2, "batch_size": 4, "block_size": 16, "learning_rate": 1e-2, "log_every": 1} | options,
    }


def write_recipe(folder: Path, table: dict[str, Any]) -> Path:
    from mmhub.config import check_recipe, dump_recipe

    path = folder / "recipe.toml"
    path.write_text(dump_recipe(check_recipe(table)))
    return path


def check_report(report: dict[str, Any], model: Path) -> None:
    """Perplexities must follow from the mean loss, and from the scores of the same texts."""
    metrics, texts = report["metrics"], sentences(100, 1)
    scores = load(model).score(texts)
    words = sum(len(text.split()) for text in texts)
    assert metrics["perplexity"]["token"] == pytest.approx(math.exp(metrics["loss"]), rel=1e-6)
    assert metrics["perplexity"]["token"] == pytest.approx(math.exp(-sum(scores) / (words + 100)), rel=1e-4)
    assert metrics["perplexity"]["word"] == pytest.approx(math.exp(-sum(scores) / words), rel=1e-4)
    assert metrics["perplexity"]["token"] < 7, "a model that learned nothing has one of 14"
    assert metrics["tokens"] == words + 100 and f"{words + 100:,} tokens" in report["definition"]


@pytest.mark.parametrize("use", ["rnn-lm", "lstm-lm"])
def test_the_loss_the_perplexity_and_the_scores_of_texts_say_the_same(use: str, tmp_path: Path) -> None:
    done = train(language(tmp_path, use, epochs=6, learning_rate=3e-2), tmp_path / "run")
    check_report(evaluate(done.model, str(tmp_path / "valid.txt")), done.model)


@pytest.mark.slow
def test_they_do_on_the_command_line(tmp_path: Path, cli: Cli) -> None:
    path = write_recipe(tmp_path, language(tmp_path, "transformer-lm", epochs=6, learning_rate=3e-2))
    done = cli("train", path, "--out", "run", "-q", "--json")
    assert done.returncode == 0, done.stderr
    done = cli("eval", "./run/model", "--data", "valid.txt", "--json")
    assert done.returncode == 0, done.stderr
    check_report(json.loads(done.stdout), tmp_path / "run" / "model")


@pytest.mark.parametrize("use", ["lstm-lm", "transformer-lm"])
def test_an_interrupted_run_ends_in_the_same_bytes(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = language(tmp_path, use, epochs=1)
    table["model"]["decoder"]["config"]["dropout"] = 0.2
    train(table, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    assert len(curve(tmp_path / "run")) == 4
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("use", ["transformer-lm"])
def test_accumulating_two_batches_is_one_of_twice_the_size(use: str, tmp_path: Path) -> None:
    for name, options in {"one": {"batch_size": 8}, "two": {"batch_size": 4, "accumulate": 2}}.items():
        table = language(tmp_path, use, epochs=1, **options)
        table["model"]["decoder"]["config"] |= {"dropout": 0.0, "word_dropout": 0.0}
        train(table, tmp_path / name)
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "two"), rel=1e-4)


def test_a_stream_of_documents_trains_on_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = language(tmp_path, "transformer-lm", epochs=1, max_steps=50)
    lines = sentences(60)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines) + "\n")
    table["data"] |= {"train": str(tmp_path / "train.jsonl"), "stream": True, "shuffle_rows": 16}
    seen = 0.0
    real = Stepper._gradients

    def count(self: Stepper, pieces: Any, total: float) -> Any:
        nonlocal seen
        seen += sum(weight for _, weight in pieces)
        return real(self, pieces, total)

    monkeypatch.setattr(Stepper, "_gradients", count)
    assert train(table, tmp_path / "run").steps > 2
    assert seen == sum(len(text.split()) + 1 for text in lines)


def test_a_long_document_of_a_stream_is_computed_in_pieces_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = language(tmp_path, "transformer-lm", epochs=1, max_steps=3, eval_every=1)
    table["model"]["decoder"]["config"] |= {"dropout": 0.0, "word_dropout": 0.0}
    texts = [" ".join(sentences(40)), *sentences(10), "", " ", None, math.nan]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    table["data"] |= {"train": str(tmp_path / "train.jsonl"), "stream": True}
    sizes, read = list[int](), list[str]()
    real = Stepper._gradients

    def note(self: Stepper, pieces: Any, total: float) -> Any:
        sizes.extend(batch.size for batch, _ in pieces)
        return real(self, pieces, total)

    def count(*args: Any) -> Any:
        read.append("valid")
        return read_corpus(*args)

    monkeypatch.setattr(Stepper, "_gradients", note)
    monkeypatch.setattr("mmhub.engine.loop.read_corpus", count)
    train(table, tmp_path / "pieces")
    assert 4 < max(sizes) <= 2 * 4 and len(read) == 1, "validation texts are read once for all evaluations"
    sizes.clear()
    monkeypatch.setattr(LanguageFeed, "most_rows", 0)
    train(table, tmp_path / "whole")
    assert max(sizes) > 2 * 4
    assert curve(tmp_path / "pieces") == pytest.approx(curve(tmp_path / "whole"), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_share_a_stream_with_a_long_document(tmp_path: Path) -> None:
    table = language(tmp_path, "transformer-lm", epochs=1, max_steps=50)
    texts = [" ".join(sentences(40)), *sentences(30)]
    for number in range(2):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::2])
        (tmp_path / f"part-{number}.jsonl").write_text("".join(lines))
    table["data"] |= {"train": str(tmp_path / "part-*.jsonl"), "stream": True}
    on_ranks(2, [{"recipe": table, "out": str(tmp_path / "two")}], tmp_path)
    assert len(curve(tmp_path / "two")) > 3


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    cases = []
    for use in ("lstm-lm", "transformer-lm"):
        folder = tmp_path / use
        folder.mkdir()
        table = language(folder, use, epochs=1)
        dropouts = ("dropout", "word_dropout", "embedding_dropout", "weight_dropout", "input_dropout")
        fields = load_config_fields(use)
        table["model"]["decoder"]["config"] |= {name: 0.0 for name in dropouts if name in fields}
        train(table, folder / "one")
        cases.append({"recipe": table, "out": str(folder / "two")})
    on_ranks(2, cases, tmp_path)
    for use in ("lstm-lm", "transformer-lm"):
        assert curve(tmp_path / use / "two") == pytest.approx(curve(tmp_path / use / "one"), rel=1e-3)


def load_config_fields(use: str) -> tuple[str, ...]:
    from mmhub.registry import find_component

    return tuple(find_component("decoder", use).config_type().__struct_fields__)


# -- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"target": "label"}}, "language-modelling has no target column"),
        ({"data": {"document": "page"}}, "data.document is 'page'"),
        ({"train": {"block_size": 100}}, "train.block_size is 100, and the model has a context of 64 tokens"),
        ({"train": {"batch_size": "auto"}}, 'batch_size = "auto" is for rows'),
        ({"model": {"encoders": {"text": {"use": "lstm"}}}}, "text"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = language(tmp_path, "transformer-lm")
    for name, values in change.items():
        table[name] |= values
    with pytest.raises(UsageError) as caught:
        train(table, tmp_path / "run")
    assert message in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_corpus_without_text_or_shorter_than_a_block_is_named(tmp_path: Path) -> None:
    table = language(tmp_path, "transformer-lm", block_size=64)
    (tmp_path / "train.txt").write_text("the cat sleeps here .\n")
    with pytest.raises(UsageError, match="a block predicts 64 tokens, but the whole corpus has only 6"):
        train(table, tmp_path / "run")
    (tmp_path / "train.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no t"):
        train(table, tmp_path / "run")


def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path: Path) -> None:
    table = language(tmp_path, "transformer-lm")
    (tmp_path / "train.txt").write_bytes(b"the cat\nthe \xff dog\n")
    with pytest.raises(InputError, match=r"train.txt' line 2 is not UTF-8 \(byte 0xff at 5\)"):
        train(table, tmp_path / "run")


def test_block_sizes_follow_from_the_model_unless_they_are_given() -> None:
    class Decoder:
        context: int | None = 512
        stateful = False

    assert (block_size(0, Decoder()), block_size(32, Decoder())) == (512, 32)
    Decoder.context, Decoder.stateful = None, True
    assert block_size(0, Decoder()) == 64


def test_documents_are_grouped_until_they_fill_a_batch() -> None:
    assert group_by_size([3, 4, 9, 1], 6) == [[0, 1], [2], [3]]
    assert group_by_size([], 6) == []


def test_settings_of_writing_may_be_given_one_by_one(tmp_path: Path) -> None:
    model = load(train(language(tmp_path, "transformer-lm", epochs=1), tmp_path / "run").model)
    short = model.generate([{"text": "the"}], max_new_tokens=1, min_new_tokens=1)
    long = model.generate([{"text": "the"}])
    assert len(short[0]["text"].split()) == 1 < len(long[0]["text"].split())
    with pytest.raises(UsageError, match="temperature"):
        model.generate([{"text": "the"}], temperature="hot")
