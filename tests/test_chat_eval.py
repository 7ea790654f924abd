"""Conversations are measured by what they hold, with or without an input, on one process or several, by command too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mmhub.evaluation as evaluation
from mmhub.engine import train
from mmhub.engine.ranks import Ranks
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import Answered, EvalOptions, evaluate
from mmhub.generate.write import Written
from mmhub.model import Model
from tests.conftest import Cli
from tests.talk_tables import chat_recipe, conversation, said, write_talks
from tests.test_distributed import on_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and a barely trained model in run/model."""
    folder = tmp_path_factory.mktemp("chat")
    write_talks(folder / "train.jsonl")
    train(chat_recipe(folder), folder / "run")
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    from mmhub.checkpoint import load

    return load(run / "run/model")


KINDS = ["text", "image+text", "audio+text", "image+audio+text"]


def always(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every answer be this text."""

    def write(decoder: Any, bundle: Any, *settings: Any, **options: Any) -> list[list[Written]]:
        return [[Written((), answer, 0.0, "end")] for _ in range(len(bundle["fused"].mask))]

    monkeypatch.setattr(evaluation, "write_texts", write)


def test_each_conversation_is_in_the_subset_of_what_it_holds(
    run: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(" one ", monkeypatch)
    found = evaluate(model, run / "train.jsonl")
    assert list(found["subsets"]) and set(found["subsets"]) == set(KINDS)
    assert [found["subsets"][kind]["rows"] for kind in KINDS] == [4, 4, 4, 4] and found["rows"] == 16
    assert found["metrics"]["exact_match"] == 0.25, "of each kind one answer of four is one"
    parts = [found["subsets"][kind] for kind in KINDS]
    weights = [2, 2, 2, 4]  # tokens of the answers, with what ends them
    mean = sum(part["loss"] * weight for part, weight in zip(parts, weights, strict=True)) / sum(weights)
    assert found["metrics"]["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_picture_that_is_withheld_is_in_no_row(run: Path, model: Model) -> None:
    without = evaluate(model, run / "train.jsonl", options=EvalOptions(withhold=("image",), write=False))
    assert set(without["subsets"]) == {"text", "audio+text"} and without["withheld"] == ["image"]
    bare = [{"messages": _bare(conversation(number))} for number in range(16)]
    assert without["metrics"] == evaluate(model, _placed(bare, run), options=EvalOptions(write=False))["metrics"]
    assert without["metrics"] != evaluate(model, run / "train.jsonl", options=EvalOptions(write=False))["metrics"]
    silent = evaluate(model, run / "train.jsonl", options=EvalOptions(withhold=("text",), write=False))
    assert set(silent["subsets"]) == {"image", "audio", "image+audio"}
    assert sum(subset["rows"] for subset in silent["subsets"].values()) == silent["rows"] == 12
    assert silent["skipped"] == 4, "nothing is left of text alone"


def _bare(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one | {"content": [part for part in one["content"] if part["type"] != "image"]} for one in talk]


def _placed(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = json.loads(json.dumps(rows).replace('"media/', f'"{folder}/media/'))
    return placed


def test_any_other_task_is_measured_without_an_input_as_well(trained: Path, tables: Path) -> None:
    data = tables / "valid.parquet"
    found = evaluate(str(trained), data, options=EvalOptions(withhold=("audio",)))
    whole = evaluate(str(trained), data)
    assert set(found["subsets"]) == {"image"} and found["withheld"] == ["audio"] and found["rows"] == 16
    assert found["metrics"] == {key: whole["subsets"]["image"][key] for key in found["metrics"]}
    for names, problem in (("audio", "image"), "nothing is left"), (("video",), "no input 'video' to withhold"):
        with pytest.raises(UsageError, match=problem):
            evaluate(str(trained), data, options=EvalOptions(withhold=names))


def test_several_references_and_batches_change_no_result(run: Path, model: Model) -> None:
    found = [evaluate(model, run / "train.jsonl", options=EvalOptions(batch_size=size)) for size in (1, 16)]
    for kind in KINDS:
        assert found[0]["subsets"][kind]["loss"] == pytest.approx(found[1]["subsets"][kind]["loss"], abs=1e-5)
        assert found[0]["subsets"][kind]["exact_match"] == found[1]["subsets"][kind]["exact_match"]


def test_a_row_may_have_several_right_answers(run: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    always("two", monkeypatch)
    rows = [{"image": f"{run}/media/1.png", "q": "which picture", "a": answers} for answers in (["one", "two"], "one")]
    found = evaluate(model, rows, inputs={"image": "image", "text": "q"}, target="a")
    assert found["metrics"]["exact_match"] == 0.5 and set(found["subsets"]) == {"image+text"}


def test_the_oldest_turns_of_what_is_too_long_are_left_out_and_counted(
    run: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.decoder, "context", 26)
    found = evaluate(model, run / "train.jsonl", options=EvalOptions(write=False))
    assert 0 < found["shortened"] == 4 - found["subsets"].get("image+audio+text", {"rows": 0})["rows"]
    monkeypatch.setattr(model.decoder, "context", 8)
    with pytest.raises(InputError, match=r"row \d+, column 'messages': the .* of 8 that are read at once"):
        evaluate(model, run / "train.jsonl")


def test_unreadable_rows_are_skipped_or_named_and_answers_are_kept(run: Path, model: Model) -> None:
    rows = [{"messages": conversation(0)}, {"messages": [said("user", "gone.png"), said("assistant", "one")]}]
    with pytest.raises(InputError, match=r"row 2, column 'messages': no file 'gone\.png'"):
        evaluate(model, rows)
    kept: list[Answered] = []
    found = evaluate(model, rows, options=EvalOptions(skip=True, keep=kept.append))
    assert found["rows"] == 1 and found["skipped"] == 1 and "gone.png" in kept[0].skipped[0]
    ((row, answer, truth),) = kept[0].answers
    assert row == 0 and truth == "zero" and isinstance(answer["text"], str)


def test_the_command_names_the_column_and_withholds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmhub.cli.main import main

    lines = [
        json.dumps({"talk": json.loads(line)["messages"]}) for line in (run / "train.jsonl").read_text().split("\n")[:4]
    ]
    (run / "other.jsonl").write_text("\n".join(lines) + "\n")
    args = ["eval", str(run / "run/model"), "--data", str(run / "other.jsonl"), "--inputs", "messages=talk"]
    for more in (["--json"], ["--withhold", "image", "--withhold", "audio"]):
        with pytest.raises(SystemExit) as left:
            main([*args, *more])
        assert not left.value.code
        out = capsys.readouterr().out
        if more == ["--json"]:
            found = json.loads(out)
            assert found["task"] == "chat" and found["rows"] == 4 and set(found["subsets"]) == set(KINDS)
            assert set(found["metrics"]) == {"exact_match", "loss"}
        else:
            assert "withheld from all rows: image, audio" in out and "audio+text" not in out


def test_a_page_shows_the_worst_answers_with_their_media(run: Path, model: Model, tmp_path: Path) -> None:
    from mmhub.report import write_report

    kept: list[Answered] = []
    found = evaluate(model, run / "train.jsonl", options=EvalOptions(details=True, keep=kept.append))
    page = write_report(tmp_path / "report", model, found, kept[0], "train.jsonl")
    text = Path(page).read_text()
    assert "Worst answers" in text and "data:image/jpeg" in text and "data:audio" in text
    assert '<p class="said">user: ‹image› which picture</p>' in text  # noqa: RUF001
    numbers = (Path(page).parent / "report.json").read_text()
    assert "PosixPath" not in text + numbers and run.name not in text + numbers
    earlier = sum(one["row"] % 4 == 3 for one in json.loads(numbers)["mistakes"])  # of two turns, one to be answered
    assert text.count('<p class="said">assistant: ') == earlier > 0


def test_conversations_need_a_column_or_a_target(run: Path, model: Model) -> None:
    rows = [{"image": f"{run}/media/1.png", "q": "which picture", "a": "one"}]
    with pytest.raises(UsageError, match="no column of conversations is known") as told:
        evaluate(model, rows, inputs={"image": "image"})
    assert "--inputs messages=COL" in str(told.value.hint) and "--target-column" in str(told.value.hint)
    with pytest.raises(UsageError, match="image is in column 'image'") as told:
        evaluate(model, rows, inputs={"image": "image", "text": "q"})
    assert "target column" in str(told.value.hint)


class OneOfTwo(Ranks):
    """One of two processes, without the other."""

    def sum(self, *values: float) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("write", [False, True])
def test_a_process_that_has_not_read_any_row_yet_keeps_in_step(
    run: Path, model: Model, write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, fuse = [], model.fusion.forward

    def forward(*args: Any, **named: Any) -> Any:
        fused.append(1)
        return fuse(*args, **named)

    monkeypatch.setattr(model.fusion, "forward", forward)
    gone = {"messages": [said("user", "say", "gone.png"), said("assistant", "one")]}
    read, calls = [], []
    for rank in range(2):
        ranks = OneOfTwo(rank=rank, world=2)
        options = EvalOptions(batch_size=1, skip=True, write=write, ranks=ranks)
        fused.clear()
        rows = _placed([gone, {"messages": conversation(0)}, gone, gone], run)  # the longest row goes to the first
        try:
            read.append(evaluate(model, rows, options=options)["rows"])
        except InputError:
            read.append(0)
        calls.append(len(fused))
    assert read == [1, 0] and calls[0] == calls[1] == (4 if write else 2)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run: Path, tmp_path: Path) -> None:
    table = chat_recipe(run, valid=str(run / "train.jsonl"))
    first, _ = on_ranks(2, [{"recipe": table, "out": str(tmp_path / "two")}], tmp_path)
    found = json.loads((tmp_path / "two/model/eval/chat.json").read_text())
    whole = evaluate(str(tmp_path / "two/model"), run / "train.jsonl")
    assert first[0]["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-6)
    assert found["subsets"]["image+text"]["loss"] == pytest.approx(whole["subsets"]["image+text"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_train_and_eval_in_processes_of_their_own(cli: Cli, tmp_path: Path) -> None:
    from mmhub.config import check_recipe, dump_recipe

    write_talks(tmp_path / "train.jsonl")
    (tmp_path / "recipe.toml").write_text(
        dump_recipe(check_recipe(chat_recipe(tmp_path, valid=str(tmp_path / "train.jsonl"))))
    )
    done = cli("train", "recipe.toml", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    done = cli("eval", "./run/model", "--data", "train.jsonl", "--json", "--withhold", "image")
    found = json.loads(done.stdout)
    assert found["withheld"] == ["image"] and set(found["subsets"]) == {"text", "audio+text"}
