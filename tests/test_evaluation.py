"""Evaluation: the report's schema, subsets of modalities, and errors that name row and column."""

from __future__ import annotations

import copy
import gzip
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmhub.build import compose
from mmhub.checkpoint import load
from mmhub.cli.evaluate import _parallel
from mmhub.cli.main import main
from mmhub.config import check_recipe
from mmhub.data.sources import open_rows
from mmhub.engine import train
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions, EvaluationStopped, data_name, evaluate
from mmhub.generate import write
from mmhub.interfaces import find_task
from mmhub.model import Columns, Model
from tests.conftest import make_table
from tests.text_decoders import Scripted, model_of


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return load(trained, name="shapes")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows: 8 with both inputs, 8 without an image, 8 without audio."""
    return make_table(tmp_path_factory.mktemp("table") / "test.parquet", 24, missing=True)


def rewrite(source: Path, target: Path, change: Any) -> Path:
    rows = pq.read_table(source).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), target)
    return target


def test_the_report_has_the_documented_schema(model: Model, table: Path) -> None:
    report = evaluate(model, str(table))
    assert (report["name"], report["task"], report["rows"], report["skipped"]) == ("shapes", "classification", 24, 0)
    assert set(report) == {"name", "task", "rows", "skipped", "metrics", "subsets"}
    assert set(report["metrics"]) == {"accuracy", "f1", "ece", "loss"}
    assert {name: values["rows"] for name, values in report["subsets"].items()} == {
        "image": 16, "audio": 16, "image+audio": 8,
    }  # fmt: skip
    json.dumps(report)


def test_a_subset_is_what_a_table_without_the_other_columns_gives(model: Model, table: Path, tmp_path: Path) -> None:
    report = evaluate(model, str(table))
    for name, others in (("image", ["audio"]), ("audio", ["image"]), ("image+audio", [])):
        wanted = name.split("+")

        def change(rows: list[Any], wanted: list[str] = wanted, others: list[str] = others) -> list[Any]:
            kept = [row for row in rows if all(row[key] is not None for key in wanted)]
            return [{key: value for key, value in row.items() if key not in others} for row in kept]

        alone = evaluate(model, str(rewrite(table, tmp_path / f"{name}.parquet", change)))
        expected = report["subsets"][name]
        assert alone["rows"] == expected["rows"]
        for key, value in alone["metrics"].items():
            assert value == pytest.approx(expected[key], abs=1e-5), (name, key)


def test_the_batch_size_changes_no_number(model: Model, table: Path) -> None:
    one, many = (evaluate(model, str(table), options=EvalOptions(batch_size=size)) for size in (1, 24))
    assert one["metrics"] == pytest.approx(many["metrics"], abs=1e-5)
    for name, values in one["subsets"].items():
        assert values == pytest.approx(many["subsets"][name], abs=1e-5)


def test_batches_up_to_a_number_of_tokens_change_no_number(model: Model, table: Path) -> None:
    sizes: list[int] = []
    note = model.decoder.register_forward_pre_hook(lambda decoder, args: sizes.append(len(args[0]["fused"].mask)))
    one = evaluate(model, str(table), options=EvalOptions(batch_size=0, batch_tokens=60, subsets=False))
    note.remove()
    assert sum(sizes) == 24
    assert len(set(sizes)) > 1, "a batch holds as many rows as fit"
    many = evaluate(model, str(table), options=EvalOptions(batch_size=24, subsets=False))
    assert one["metrics"] == pytest.approx(many["metrics"], abs=1e-5)


def test_answers_are_compared_in_the_order_of_the_rows(
    model: Model, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def note(names: Any, predictions: Any, references: Any) -> dict[str, float]:
        found.append((predictions, references))
        return {}

    monkeypatch.setattr("mmhub.evaluation.measure", note)
    evaluate(model, str(table), options=EvalOptions(batch_size=5, subsets=False))
    rows = list(open_rows(str(table)))
    answers = model.predict([{"image": row["image"], "audio": row["audio"]} for row in rows], details=False)
    ((predictions, references),) = found
    assert references == [row["label"] for row in rows]
    assert [one["label"] for one in predictions] == [one["label"] for one in answers]


class Group:
    """Ranks as threads of this process that wait for each other."""

    several = True

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.world, self._barrier, self._board = rank, barrier.parties, barrier, board

    def gather(self, data: Any) -> list[Any]:
        self._board[self.rank] = data
        self._barrier.wait(30)
        found = list(self._board)
        self._barrier.wait(30)
        return found

    def sum(self, *values: float) -> list[float]:
        return [sum(part) for part in zip(*self.gather(values), strict=True)]


def on_ranks(world: int, work: Callable[[Any], Any]) -> list[Any]:
    """What `work` returns or raises on every rank."""
    barrier, board = threading.Barrier(world), [None] * world
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = work(Group(rank, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize(("world", "rows"), [(2, 24), (3, 24), (4, 2)])
def test_every_rank_gets_the_report_of_a_single_process(
    model: Model, table: Path, tmp_path: Path, world: int, rows: int
) -> None:
    part = rewrite(table, tmp_path / "part.parquet", lambda all_rows: all_rows[:rows])
    alone = evaluate(model, str(part), options=EvalOptions(batch_size=5))
    calls = [0] * world

    def work(group: Any) -> Any:
        own = copy.deepcopy(model)

        def count(*args: Any) -> None:
            calls[group.rank] += 1

        own.decoder.register_forward_hook(count)
        return evaluate(own, str(part), options=EvalOptions(batch_size=5, ranks=group))

    reports = on_ranks(world, work)
    assert reports == [alone] * world
    assert len(set(calls)) == 1, "sharded weights need the same number of calls everywhere"


def test_what_one_rank_cannot_read_ends_all(model: Model, table: Path, tmp_path: Path) -> None:
    bad = rewrite(table, tmp_path / "bad.parquet", lambda rows: [*rows[:-1], {**rows[-1], "label": "c9"}])

    def work(group: Any, skip: bool = False) -> Any:
        options = EvalOptions(batch_size=5, ranks=group, skip=skip)
        return evaluate(copy.deepcopy(model), str(bad), options=options)

    errors = on_ranks(3, work)
    assert len({str(error) for error in errors}) == 1
    assert "bad.parquet row 24, column 'label': label 'c9'" in errors[0].message
    reports = on_ranks(3, lambda group: work(group, skip=True))
    assert [(report["rows"], report["skipped"]) for report in reports] == [(23, 1)] * 3


def test_an_evaluation_can_be_stopped_between_batches(model: Model, table: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(EvaluationStopped):
        evaluate(model, str(table), options=EvalOptions(batch_size=5, stop=lambda: next(asked)))
    assert next(asked, None) is None

    def work(group: Any) -> Any:
        turns = iter(range(9))
        stop = EvalOptions(batch_size=5, ranks=group, stop=lambda: group.rank == 1 and next(turns) == 1)
        return evaluate(copy.deepcopy(model), str(table), options=stop)

    assert [type(result) for result in on_ranks(2, work)] == [EvaluationStopped] * 2


def test_a_loss_that_is_no_number_is_told_by_every_rank(model: Model, table: Path) -> None:
    def work(group: Any) -> Any:
        own = copy.deepcopy(model)
        with torch.no_grad():
            next(own.decoder.parameters()).fill_(math.nan)
        return evaluate(own, str(table), options=EvalOptions(batch_size=5, ranks=group, subsets=False))

    assert all(math.isnan(report["metrics"]["loss"]) for report in on_ranks(2, work))


def test_the_loss_is_the_mean_over_rows(model: Model, table: Path) -> None:
    report = evaluate(model, str(table), options=EvalOptions(batch_size=7))
    rows = open_rows(str(table))
    samples = [{key: row[key] for key in ("image", "audio")} for row in rows]
    scores = [answer["scores"][row["label"]] for answer, row in zip(model.predict(samples), rows, strict=True)]
    expected = -torch.tensor(scores, dtype=torch.float64).log().mean().item()
    assert report["metrics"]["loss"] == pytest.approx(expected, abs=1e-5)


def test_accuracy_counts_the_answers_of_predict(model: Model, table: Path) -> None:
    rows = list(open_rows(str(table)))
    answers = model.predict([{"image": row["image"], "audio": row["audio"]} for row in rows])
    hits = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
    assert evaluate(model, str(table))["metrics"]["accuracy"] == hits / 24


def test_evaluating_leaves_the_model_as_it_was(model: Model, table: Path) -> None:
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    evaluate(model, str(table))
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.eval()


def test_a_missing_target_column_suggests_the_nearest(model: Model, table: Path, tmp_path: Path) -> None:
    def change(rows: list[Any]) -> list[Any]:
        return [{"labels" if key == "label" else key: value for key, value in row.items()} for row in rows]

    other = rewrite(table, tmp_path / "o.parquet", change)
    with pytest.raises(UsageError, match="did you mean 'labels'"):
        evaluate(model, str(other))
    assert evaluate(model, str(other), target="labels")["rows"] == 24


def test_columns_of_another_name_can_be_given(model: Model, table: Path, tmp_path: Path) -> None:
    def change(rows: list[Any]) -> list[Any]:
        return [{"photo": row["image"], "is": row["label"]} for row in rows if row["image"]]

    other = rewrite(table, tmp_path / "o.parquet", change)
    with pytest.raises(UsageError, match="no column"):
        evaluate(model, str(other), target="is")
    report = evaluate(model, str(other), inputs={"image": "photo"}, target="is")
    assert list(report["subsets"]) == ["image"]
    with pytest.raises(UsageError, match="no input 'text'"):
        evaluate(model, str(other), inputs={"text": "photo"}, target="is")
    with pytest.raises(UsageError, match="did you mean 'photo'"):
        evaluate(model, str(other), inputs={"image": "foto"}, target="is")


def test_an_unseen_label_is_named_with_its_row_or_skipped(model: Model, table: Path, tmp_path: Path) -> None:
    def change(rows: list[Any]) -> list[Any]:
        rows[4]["label"] = "c9"
        return rows

    bad = rewrite(table, tmp_path / "bad.parquet", change)
    with pytest.raises(InputError) as caught:
        evaluate(model, str(bad))
    assert "bad.parquet row 5, column 'label': label 'c9' was not seen in training" in caught.value.message
    report = evaluate(model, str(bad), options=EvalOptions(skip=True))
    assert (report["rows"], report["skipped"]) == (23, 1)


def test_a_table_with_nothing_to_measure_is_an_error(model: Model, table: Path, tmp_path: Path) -> None:
    bad = rewrite(table, tmp_path / "bad.parquet", lambda rows: [{**row, "label": "c9"} for row in rows])
    with pytest.raises(InputError, match="none of the 24 rows"):
        evaluate(model, str(bad), options=EvalOptions(skip=True))


def test_a_table_without_a_header_needs_no_flags_on_the_trained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{'good' if i % 2 else 'bad'} film {i % 3}\tx\t{'pos' if i % 2 else 'neg'}" for i in range(24)]
    for name in ("train.tsv.gz", "test.tsv.gz"):
        (tmp_path / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    recipe = {
        "task": "classification",
        "model": {
            "encoders": {"text": {"use": "lstm", "config": {"dim": 16}}},
            "tokenizer": {"kind": "word"},
        },
        "data": {
            "train": str(tmp_path / "train.tsv.gz"),
            "columns": ["review", "junk", "mood"],
            "inputs": {"text": "review"},
            "target": "mood",
        },
        "train": {"epochs": 2, "batch_size": 8},
    }
    check_recipe(recipe)
    folder = train(recipe, tmp_path / "run").model
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(folder), "--data", str(tmp_path / "test.tsv.gz"), "--json"])
    output = capsys.readouterr()
    assert caught.value.code == 0, output.err
    report = json.loads(output.out)
    assert (report["rows"], list(report["subsets"])) == (24, ["text"])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hub:org/data", "hub:org/data"),
        ("org/data", "org/data"),
        (["/x/a.csv", "/x/b.csv"], "a.csv, b.csv"),
        ({"source": "/x/a.en", "target": "/x/a.de"}, "a.en, a.de"),
    ],
)
def test_a_card_names_data_without_folders(source: Any, name: str) -> None:
    assert data_name(source) == name


def test_a_folder_may_be_a_path_and_the_data_rows_in_memory(model: Model, trained: Path, table: Path) -> None:
    rows = list(open_rows(table))
    assert evaluate(trained, rows)["metrics"] == evaluate(model, table)["metrics"]
    with pytest.raises(UsageError, match="mixes rows and files"):
        evaluate(model, [rows[0], str(table)])


def test_naming_one_input_column_keeps_the_others(tables: Path, trained: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from mmhub.evaluation import evaluate

    table = pq.read_table(tables / "valid.parquet").rename_columns({"image": "photo"})
    pq.write_table(table, tmp_path / "renamed.parquet")
    report = evaluate(str(trained), tmp_path / "renamed.parquet", inputs={"image": "photo"})
    assert set(report["subsets"]) == {"image", "audio", "image+audio"}


# -- models that write texts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator() -> Model:
    """An untrained model that draws what it writes, and whose encoder takes 24 tokens."""
    small = {"dim": 16, "depth": 1, "heads": 2}
    return compose(
        "translation",
        encoders={"text": {"use": "transformer", "config": small | {"max_length": 24}}},
        decoder={"use": "seq2seq", "config": small | {"generation": {"temperature": 1.0, "max_new_tokens": 6}}},
        tokenizer={"kind": "byte"},
    ).eval()


PAIRS = [{"source": source, "target": "ein hund"} for source in ("a dog", "a", "a dog", "two dogs run", "a dog")]


def test_one_modality_is_measured_once_and_each_row_draws_its_own_numbers(
    translator: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sacrebleu")
    calls: list[list[int]] = []
    written: dict[int, str] = {}

    def watched(decoder: Any, bundle: Any, *, rows: list[int]) -> Any:
        found = write(decoder, bundle, rows=rows)
        calls.append(rows)
        written.update(zip(rows, (texts[0].text for texts in found), strict=True))
        return found

    monkeypatch.setattr("mmhub.evaluation.write_texts", watched)
    reports, texts = [], []
    for size in (2, 5):
        calls.clear()
        options = EvalOptions(batch_size=size)
        reports.append(evaluate(translator, PAIRS, inputs={"text": "source"}, target="target", options=options))
        assert sorted(row for rows in calls for row in rows) == [0, 1, 2, 3, 4]
        texts.append(dict(written))
    assert texts[0] == texts[1]
    assert len({texts[0][row] for row in (0, 2, 4)}) == 3
    assert reports[0]["metrics"]["bleu"] == reports[1]["metrics"]["bleu"]
    assert reports[0]["subsets"] == {"text": reports[0]["metrics"] | {"rows": 5}}


def test_what_is_for_another_kind_of_model_is_refused(translator: Model) -> None:
    for options in (EvalOptions(document="row"), EvalOptions(window=8), EvalOptions(stride=2)):
        with pytest.raises(UsageError, match=r"'\w+' is for language models, and this one is for translation"):
            evaluate(translator, PAIRS, inputs={"text": "source"}, options=options)
    with pytest.raises(UsageError, match="a language model has no target column, and 'label' was named"):
        evaluate(model_of(Scripted("a")), [{"text": "a"}], inputs={"text": "text"}, target="label")
    judge: Any = SimpleNamespace(task=find_task("classification"), columns=Columns({"text": "review"}, "label"))
    with pytest.raises(UsageError, match="--target is for models that turn a text into another, and this one is for c"):
        _parallel(judge, "a.txt", "b.txt")


def test_a_text_to_be_translated_is_cut_only_where_that_is_asked_for_and_said(translator: Model) -> None:
    samples = [{"text": "a dog"}, {"text": "a dog " * 9}]
    with pytest.raises(InputError, match="the encoder takes at most 24") as caught:
        translator.generate(samples)
    assert caught.value.row == 1
    processor: Any = translator.processors["text"]
    short, long = translator.generate(samples, truncate=True)
    assert "truncated" not in short
    assert long["truncated"] == processor.count(samples[1]["text"]) - 24
    assert processor.whole
