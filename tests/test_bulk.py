"""Tables of any size: `mmhub.bulk` answers them in windows, by length, in order, and goes on after a stop."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmhub.bulk.job
import mmhub.bulk.run
import mmhub.bulk.windows
import mmhub.files
from mmhub.bulk import Done, Options, open_table, predict_table, write_file_of
from mmhub.bulk.progress import Progress
from mmhub.bulk.windows import Pace
from mmhub.errors import InputError, Interrupted, MmhubError, UsageError
from mmhub.interfaces import Generation
from mmhub.model import Model
from tests.conftest import Cli, png, three_modalities
from tests.text_decoders import LETTERS, Scripted, model_of

TEXTS = [" ".join(["no", "yes", "maybe", "so"][(i * k) % 4] for k in range(1 + i * 7 % 19)) for i in range(22)]


@pytest.fixture(scope="module")
def model() -> Model:
    return three_modalities(*TEXTS)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": [f"n{i}" for i in range(len(TEXTS))], "text": TEXTS}), path, row_group_size=8)
    return path


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four rows."""
    monkeypatch.setattr(mmhub.bulk.windows, "MOST_ROWS", 4)
    monkeypatch.setattr(mmhub.bulk.run, "Pace", lambda *_: Pace(4, 4))


def run(model: Model, data: Path, out: Path | None, **more: Any) -> Done:
    options = Options(inputs={"text": "text"}, quiet=True, say=lambda text: None)
    return predict_table(model, open_table(str(data)), out, replace(options, **more))


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    assert [answer["label"] for answer in found] == [answer["label"] for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


@lru_cache(maxsize=1)
def alone(model: Model) -> list[Any]:
    return [model.predict({"text": text})[0] for text in TEXTS]


@pytest.mark.parametrize("more", [{}, {"batch_tokens": 20}, {"batch_size": 3}, {"workers": 1, "batch_tokens": 12}])
def test_answers_are_those_of_each_row_alone_in_the_order_of_the_rows(
    model: Model, table: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    done = run(model, table, tmp_path / "out.jsonl", **more)
    assert (done.rows, done.skipped) == (22, 0)
    close(lines(tmp_path / "out.jsonl"), alone(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.jsonl"]
    close(run(model, table, None, **more).answers, alone(model))


def test_rows_of_like_length_are_computed_together_within_the_budget(
    model: Model, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmhub.bulk.run, "Pace", lambda: Pace(22, 22))
    shapes: list[tuple[int, int]] = []
    encoder: Any = model.encoders["text"]
    seen = encoder.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    try:
        run(model, table, None, batch_tokens=40)
    finally:
        seen.remove()
    assert sum(rows for rows, _ in shapes) == 22 and all(rows * width <= 40 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    real = sum(len(text.split()) for text in TEXTS)
    assert sum(rows * width for rows, width in shapes) < 1.4 * real


def test_a_text_is_read_once(model: Model, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    processor = model.processors["text"]
    own = processor.read

    def noted(raw: Any, *more: Any) -> Any:
        read.append(raw)
        return own(raw, *more)

    monkeypatch.setattr(processor, "read", noted)
    run(model, table, None)
    assert sorted(read) == sorted(TEXTS)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_job_goes_on_where_it_was(model: Model, table: Path, tmp_path: Path, number: int, code: int) -> None:
    out, said, asked = tmp_path / "out.jsonl", list[str](), [0]

    def stop() -> int:
        asked[0] += 1
        return number if asked[0] > 2 else 0

    with pytest.raises(Interrupted) as caught:
        run(model, table, out, stop=stop)
    assert caught.value.exit_code == code
    assert "12 rows are kept" in str(caught.value.hint) and "same command" in str(caught.value.hint)
    assert not out.exists()
    counted: list[int] = []
    encoder: Any = model.encoders["text"]
    seen = encoder.register_forward_pre_hook(lambda _, given: counted.append(len(given[0])))
    run(model, table, out, say=said.append)
    seen.remove()
    assert sum(counted) == 10, "only what was left is computed"
    assert said == [f"going on after 12 rows, which are in '{out}.parts'"]
    run(model, table, tmp_path / "whole.jsonl")
    close(lines(out), lines(tmp_path / "whole.jsonl"))


class Killed(BaseException):
    """As if the process had ended there."""


@pytest.mark.parametrize(
    ("suffix", "step"), [(".jsonl", 1), (".jsonl", 2), (".parquet", 3), (".jsonl", 7), (".csv", 8), (".parquet", 8)]
)
def test_a_job_that_is_killed_at_any_write_loses_and_repeats_no_row(
    model: Model, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, step: int
) -> None:
    out, count, own, swap = tmp_path / f"out{suffix}", [0], mmhub.files.write_file, os.replace

    def dies(path: Path, content: Any) -> None:
        count[0] += 1
        if count[0] == step:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise Killed
        own(path, content)

    def last(one: Any, other: Any) -> None:
        if other == out and step == 8:
            raise Killed
        swap(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(mmhub.bulk.job, "write_file", dies)
        patch.setattr(os, "replace", last)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            run(model, table, out, keep=["id"])
    assert not out.exists()
    run(model, table, out, keep=["id"])
    run(model, table, tmp_path / f"whole{suffix}", keep=["id"])
    found, wanted = ([row["id"] for row in read(tmp_path / f"{name}{suffix}")] for name in ("out", "whole"))
    assert found == wanted == [f"n{i}" for i in range(22)]
    assert not (tmp_path / f"out{suffix}.parts").exists()


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    if path.suffix != ".csv":
        return lines(path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stopped(model: Model, table: Path, out: Path, windows: int = 3, **more: Any) -> Path:
    """A job that was stopped after some windows; its parts."""
    left = iter([0] * (windows - 1) + [2] * 99)
    with pytest.raises(Interrupted):
        run(model, table, out, stop=lambda: next(left), **more)
    return out.with_name(out.name + ".parts")


def test_what_comes_after_a_part_that_is_lost_is_done_again(model: Model, table: Path, tmp_path: Path) -> None:
    parts = stopped(model, table, tmp_path / "out.jsonl")
    assert len(list(parts.glob("*.jsonl"))) == 3
    (parts / "000000000004.jsonl").unlink()
    run(model, table, tmp_path / "out.jsonl")
    close(lines(tmp_path / "out.jsonl"), alone(model))


def test_parts_of_another_job_are_refused_and_restart_forgets_them(model: Model, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    stopped(model, table, out, of={"model": "a", "temperature": 1.0})
    with pytest.raises(UsageError, match="a job of another model and another --temperature than this one") as caught:
        run(model, table, out, of={"model": "b"})
    assert "--restart" in str(caught.value.hint)
    pq.write_table(pa.table({"text": TEXTS[:5]}), table)
    with pytest.raises(UsageError, match="of other data than this one"):
        run(model, table, out, of={"model": "a", "temperature": 1.0})
    run(model, table, out, restart=True)
    assert len(lines(out)) == 5


def test_a_folder_that_is_no_job_is_left_alone(model: Model, table: Path, tmp_path: Path) -> None:
    own = tmp_path / "out.jsonl.parts" / "mine.txt"
    own.parent.mkdir()
    own.write_text("dear diary")
    for restart in (False, True):
        with pytest.raises(UsageError, match="holds no job"):
            run(model, table, tmp_path / "out.jsonl", restart=restart)
    assert own.read_text() == "dear diary"


def test_two_processes_do_not_write_the_same_file(model: Model, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    parts = stopped(model, table, out)
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, 2); print(1, flush=True); input()"
    holds = [sys.executable, "-S", "-c", code, str(parts / "lock")]
    with subprocess.Popen(holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UsageError, match="another process is writing"):
            run(model, table, out)
        other.communicate("\n")
    run(model, table, out)
    assert len(lines(out)) == 22


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(
    model: Model, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, count, own = tmp_path / "out.jsonl", [0], mmhub.files.write_file

    def full(path: Path, content: Any) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(mmhub.bulk.job, "write_file", full)
        with pytest.raises(MmhubError, match="no space left") as caught:
            run(model, table, out)
    assert "8 rows are kept" in str(caught.value.hint)
    run(model, table, out)
    close(lines(out), alone(model))


def test_a_row_that_cannot_be_read_ends_the_job_or_is_answered_why(model: Model, tmp_path: Path) -> None:
    data, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[5], rows[13], rows[14] = "{oops", json.dumps({"text": 7}), json.dumps({"other": 1})
    data.write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"t\.jsonl' line 6 is not valid JSON") as caught:
        run(model, data, out)
    assert "4 rows are kept" in str(caught.value.hint)
    done = run(model, data, out, skip=True)
    assert (done.rows, done.skipped) == (22, 3)
    found = lines(out)
    assert [row for row, answer in enumerate(found) if "error" in answer] == [5, 13, 14]
    assert found[13]["error"].startswith("t.jsonl row 14, column 'text': ")
    assert found[14]["error"] == "t.jsonl row 15: the sample is empty"
    close(
        [answer for answer in found if "label" in answer],
        [answer for row, answer in enumerate(alone(model)) if row not in (5, 13, 14)],
    )


def test_pictures_that_are_damaged_are_skipped_and_only_those(model: Model, tmp_path: Path) -> None:
    pictures = [{"bytes": png(i % 4) if i != 2 else b"not a picture", "path": None} for i in range(6)]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "in.parquet")
    inputs = {"image": "image"}
    with pytest.raises(InputError, match=r"in\.parquet row 3, column 'image': ") as caught:
        run(model, tmp_path / "in.parquet", None, inputs=inputs)
    assert "--on-error skip" in str(caught.value.hint)
    found = run(model, tmp_path / "in.parquet", None, inputs=inputs, skip=True).answers
    assert [row for row, answer in enumerate(found) if "error" in answer] == [2]
    close([found[5]], model.predict({"image": png(1)}))


def test_a_table_of_answers_has_the_same_columns_whatever_came_first(model: Model, tmp_path: Path) -> None:
    data, out = tmp_path / "t.csv", tmp_path / "out.parquet"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label", "n"], *([text, "no", 1] for text in TEXTS)])
    run(model, data, out, keep=["label", "n"])
    table = pq.read_table(out)
    assert table.column_names == ["row", "input_label", "n", "label", "score", "scores", "error"]
    assert table.schema.field("scores").type == pa.struct([("no", pa.float64()), ("yes", pa.float64())])
    assert table.column("row").to_pylist() == list(range(22))
    assert table.column("error").to_pylist() == [None] * 22
    close(table.to_pylist(), alone(model))
    data.write_text("text,label,n\n" + "x\n" * 6 + f"{TEXTS[0]},no,1\n")
    run(model, data, tmp_path / "bad.parquet", keep=["label", "n"], skip=True)
    bad = pq.read_table(tmp_path / "bad.parquet")
    assert set(bad.column_names) == set(table.column_names)
    assert [row["label"] is None for row in bad.to_pylist()] == [True] * 6 + [False]


def test_answers_of_several_types_and_shapes_fit_into_tables(tmp_path: Path) -> None:
    answers = [
        {"labels": [], "value": 1, "odd": "a", "none": None, "words": [{"word": "a", "start": 0.0}], "text": "\ud800"},
        {"labels": ["b"], "value": 1.5, "odd": ["c"], "none": None, "words": [], "text": 'a "b"\n'},
    ]
    write_file_of(tmp_path / "a.parquet", answers)
    first, second = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert first["labels"] == [] and second["labels"] == ["b"]
    assert (first["value"], second["value"]) == (1.0, 1.5)
    assert (first["odd"], second["odd"]) == ("a", '["c"]')
    assert (first["words"], second["words"]) == ([{"word": "a", "start": 0.0}], [])
    assert (first["none"], first["text"], second["text"]) == (None, "?", 'a "b"\n')
    write_file_of(tmp_path / "a.csv", answers)
    found = read(tmp_path / "a.csv")
    assert json.loads(found[0]["words"]) == answers[0]["words"] and found[1]["text"] == 'a "b"\n'
    write_file_of(tmp_path / "wide.parquet", [{"scores": {f"k{i}": 0.5 for i in range(1001)}}])
    assert pq.read_table(tmp_path / "wide.parquet").schema.field("scores").type == pa.string()


def test_dates_are_kept_as_text_and_bytes_are_refused(model: Model, tmp_path: Path) -> None:
    days = pa.array([0, 1], pa.date32())
    pq.write_table(pa.table({"text": TEXTS[:2], "day": days, "raw": [b"x", b"y"]}), tmp_path / "in.parquet")
    found = run(model, tmp_path / "in.parquet", None, keep=["day"]).answers
    assert [answer["day"] for answer in found] == ["1970-01-01", "1970-01-02"]
    with pytest.raises(UsageError, match="'raw' holds bytes"):
        run(model, tmp_path / "in.parquet", None, keep=["raw"])


def drawing(first: int) -> Model:
    """A model that writes letters at random."""
    import torch

    scores = torch.zeros(4 + len(LETTERS)).index_fill(0, torch.arange(4), -50.0)
    return model_of(Scripted(scores=scores, generation=Generation(temperature=1.0, max_new_tokens=5, seed=first)))


def test_what_is_drawn_depends_on_the_seed_and_the_row_alone(tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    prompts = [text[:9] for text in TEXTS]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    model = drawing(3)

    def answers(samples: list[Any], first: int) -> list[dict[str, Any]]:
        return model.generate(samples, first=first, batch_size=2)

    wanted = model.generate([{"text": text} for text in prompts])
    assert len({answer["text"] for answer in wanted}) > 15
    assert run(model, data, None, answers=answers).answers == wanted
    stopped(model, data, tmp_path / "out.jsonl", 2, answers=answers)
    run(model, data, tmp_path / "out.jsonl", answers=answers)
    assert lines(tmp_path / "out.jsonl") == wanted


def test_a_prompt_that_cannot_be_read_changes_no_other_text(tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text(
        "".join(json.dumps({"text": text[:9]} if row != 6 else {}) + "\n" for row, text in enumerate(TEXTS))
    )
    model = drawing(4)
    wanted = model.generate([{"text": text[:9]} for text in TEXTS])
    found = run(model, data, None, answers=lambda s, first: model.generate(s, first=first), skip=True).answers
    assert [answer == other for answer, other in zip(found, wanted, strict=True)].count(False) == 1
    assert found[6] == {"error": "in.jsonl row 7: the sample is empty"}


def test_windows_grow_with_the_speed_and_shrink_when_rows_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmhub.bulk.windows, "MOST_ROWS", 4096)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace, sizes = Pace(), list[int]()
    for seconds in (1, 1, 1, 4096, 10):
        now[0] += seconds
        pace.tell(pace.rows)
        sizes.append(pace.rows)
    assert sizes == [2048, 4096, 4096, 32, 96]


def test_rows_that_hold_much_make_small_windows(model: Model, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.bulk.rows import Place
    from mmhub.bulk.windows import windows

    monkeypatch.setattr(mmhub.bulk.windows, "MOST_BYTES", 2000)
    sizes = [len(window.rows) for window in windows(open_table(str(table)).read(Place(), ["text"]), Pace(22, 22))]
    assert sum(sizes) == 22 and max(sizes) < 9


def test_progress_is_said_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Progress(100_000, 1000, said.append, False) as progress:
        for _ in range(4):
            now[0] += 6
            progress.add(6000)
    assert said == [
        "13,000 of 100,000 rows, 1,000 rows/s, 87 s left",
        "25,000 of 100,000 rows, 1,000 rows/s, 75 s left",
    ]
    with Progress(None, 0, said.append, True) as progress:
        progress.add(1)
    assert len(said) == 2


def test_files_of_rows_are_read_one_after_the_other(model: Model, tmp_path: Path) -> None:
    for number in range(2):
        part = TEXTS[11 * number :][:11]
        (tmp_path / f"part-{number}.csv").write_text("text\n" + "\n".join(part) + "\n")
    done = stopped(model, tmp_path / "part-*.csv", tmp_path / "out.jsonl", 4)
    assert json.loads((done / "000000000012.jsonl").read_text().split("\n")[0])["next"] == {
        "number": 16,
        "file": 1,
        "row": 5,
    }
    run(model, tmp_path / "part-*.csv", tmp_path / "out.jsonl")
    close(lines(tmp_path / "out.jsonl"), alone(model))
    (tmp_path / "part-2.csv").write_text("txt\nx\n")
    with pytest.raises(UsageError, match="shards disagree"):
        open_table(str(tmp_path / "part-*.csv"))


def test_folders_and_empty_files_are_what_they_are_without_streaming(model: Model, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
    found = run(model, tmp_path / "pictures", None, inputs={"image": "image"}).answers
    close(found, model.predict([{"image": png(number)} for number in range(3)]))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "none.csv").write_text("text\n")
    for name in ("none.parquet", "none.csv"):
        with pytest.raises(InputError, match=f"'{name}' has no rows"):
            run(model, tmp_path / name, None)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run `mmhub predict` in this process and in `tmp_path`."""
    from click.testing import CliRunner

    import mmhub.hub
    from mmhub.cli.main import cli

    monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: model)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli, ["predict", "m", *args], standalone_mode=False)


def test_the_command_writes_tables_and_says_so(command: Callable[..., Any], table: Path, model: Model) -> None:
    done = command("--data", "in.parquet", "--out", "a.parquet", "--keep", "id", "--json")
    assert done.exception is None, done.exception
    said = json.loads(done.stdout)
    assert said["out"] == "a.parquet" and (said["rows"], said["skipped"]) == (22, 0) and said["seconds"] > 0
    assert done.stderr == "22 predictions in a.parquet\n"
    assert pq.read_table("a.parquet").column_names == ["row", "id", "label", "score", "scores", "error"]
    again = command("--data", "in.parquet", "--out", "a.parquet")
    assert isinstance(again.exception, UsageError) and "exists" in again.exception.message
    printed = command("--data", "in.parquet", "--json", "-q")
    close(json.loads(printed.stdout)["predictions"], alone(model))
    assert printed.stderr == ""


def test_the_command_refuses_what_only_tables_have(command: Callable[..., Any], table: Path) -> None:
    for option in (
        ["--keep", "id"],
        ["--restart"],
        ["--on-error", "skip"],
        ["--workers", "0"],
        ["--batch-tokens", "9"],
    ):
        error = command("--text", "yes", *option).exception
        assert isinstance(error, UsageError) and error.message == f"{option[0]} is for tables"
    error = command("--data", "in.parquet", "--keep", "idd").exception
    assert isinstance(error, UsageError) and "did you mean 'id'" in str(error.hint)


def test_a_few_samples_become_a_table_too(command: Callable[..., Any]) -> None:
    assert command("--text", "yes", "--text", "no", "--out", "a.csv").exception is None
    assert [row["row"] for row in read(Path("a.csv"))] == ["0", "1"]


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(trained: Path, tables: Path, cli: Cli, tmp_path: Path) -> None:
    rows = pq.read_table(tables / "valid.parquet")
    pq.write_table(pa.concat_tables([rows] * 40), tmp_path / "big.parquet")  # 640 rows
    command = ["predict", str(trained), "--data", "big.parquet", "--out", "out.parquet"]
    with subprocess.Popen([sys.executable, "-m", "mmhub", *command], cwd=tmp_path) as process:
        until = time.monotonic() + 240
        while not list((tmp_path / "out.parquet.parts").glob("0*.jsonl")) and time.monotonic() < until:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out.parquet").exists()
    done = cli(*command)
    assert done.returncode == 0 and "going on after" in done.stderr, done.stderr
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column("row").to_pylist() == list(range(640))
    whole = cli(*command[:-1], "whole.parquet")
    assert whole.returncode == 0, whole.stderr
    other = pq.read_table(tmp_path / "whole.parquet")
    assert found.column("label").equals(other.column("label"))
    assert found.column("score").to_numpy() == pytest.approx(other.column("score").to_numpy(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_asked_to_stop_says_how_to_go_on(
    trained: Path, tables: Path, tmp_path: Path, number: int, code: int
) -> None:
    pq.write_table(pa.concat_tables([pq.read_table(tables / "valid.parquet")] * 400), tmp_path / "big.parquet")
    command = [sys.executable, "-m", "mmhub", "predict", str(trained), "--data", "big.parquet", "--out", "out.jsonl"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 240
        while not list((tmp_path / "out.jsonl.parts").glob("0*.jsonl")) and time.monotonic() < until:
            time.sleep(0.01)
        assert list((tmp_path / "out.jsonl.parts").glob("0*.jsonl")), "it never began"
        process.send_signal(number)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "error: stopped" in said and "the same command goes on" in said and "Traceback" not in said


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """The peak of 200,000 rows is that of 20,000 and no more than a few megabytes."""
    code = """
import resource, sys
from pathlib import Path
from mmhub.bulk import Options, open_table, predict_table
from tests.colours import colour_model
from mmhub.zero_shot import classifier
model = classifier(colour_model("text"), ["red", "blue"])
options = Options(inputs={"text": "text"}, quiet=True)
print(predict_table(model, open_table(sys.argv[1]), Path(sys.argv[2]), options).rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = []
    for rows in (20_000, 200_000):
        data, out = tmp_path / f"{rows}.parquet", tmp_path / f"{rows}-out.parquet"
        pq.write_table(pa.table({"text": ["red or blue"] * rows}), data)
        done = subprocess.run(
            [sys.executable, "-c", code, str(data), str(out)],
            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        counted, peak = done.stdout.split()
        assert int(counted) == rows == pq.read_metadata(out).num_rows
        peaks.append(float(peak))
    assert peaks[1] < peaks[0] + 30, peaks
