"""Tables of any size: `mmhub.bulk` answers them in windows, by length, in order, and goes on after a stop."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmhub.bulk.batches
import mmhub.bulk.job
import mmhub.bulk.rows
import mmhub.bulk.run
import mmhub.bulk.windows
import mmhub.cli.predict
import mmhub.data.loader
import mmhub.files
import mmhub.hub
from mmhub.bulk import Done, Options, file_identity, model_identity, open_table, predict_table, write_file_of
from mmhub.bulk.formats import write_answers
from mmhub.bulk.job import Job, copy_part
from mmhub.bulk.progress import Progress
from mmhub.bulk.rows import Place, Row
from mmhub.bulk.windows import Pace, Window
from mmhub.data.loader import load_batches
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


@pytest.mark.parametrize("more", [{}, {"batch_tokens": 20}, {"batch_size": 3}])
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


def test_workers_decode_what_is_not_read_yet_with_few_open_files(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    started: list[int] = []

    def noted(collate: Any, order: Any, workers: int, pinned: bool) -> Any:
        started.append(workers)
        return load_batches(collate, order, workers, pinned)

    monkeypatch.setattr(mmhub.data.loader, "_PATIENCE", 10)
    monkeypatch.setattr(mmhub.bulk.batches, "load_batches", noted)
    monkeypatch.setattr(mmhub.bulk.run, "Pace", lambda: Pace(128, 128))
    monkeypatch.setattr(mmhub.bulk.windows, "MOST_ROWS", 128)
    rows = {"text": TEXTS * 6, "image": [png(1)] * 132}
    pq.write_table(pa.table(rows), tmp_path / "in.parquet")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, limit[1]))
    try:
        inputs = {"text": "text", "image": "image"}
        both = run(model, tmp_path / "in.parquet", None, workers=1, batch_size=64, inputs=inputs).answers
        text = run(model, tmp_path / "in.parquet", None, workers=1, batch_size=64).answers
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    close(both[:22], model.predict([{"text": text, "image": png(1)} for text in TEXTS]))
    close(text[:22], alone(model))
    assert len(both) == 132 and started == [1, 0], "what is read already needs no workers"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
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


SLOW = ((".jsonl", 1), (".jsonl", 7), (".csv", 3), (".csv", 8))


@pytest.mark.parametrize(
    ("suffix", "step"),
    [(".jsonl", 3), (".parquet", 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_job_that_is_killed_at_any_write_loses_and_repeats_no_row(
    model: Model, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, step: int
) -> None:
    out, count, own = tmp_path / f"out{suffix}", [0], mmhub.files.write_file

    def dies(path: Path, content: Any) -> None:
        count[0] += 1
        if count[0] == step:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise Killed
        own(path, content)

    def last(one: Any, other: Any) -> None:
        assert other == out and step == 8
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mmhub.bulk.job, "write_file", dies)
        patch.setattr(os, "link", last)
        with pytest.raises(Killed):
            run(model, table, out, keep=["id"])
    assert not out.exists()
    run(model, table, out, keep=["id"])
    run(model, table, tmp_path / f"whole{suffix}", keep=["id"])
    found, wanted = ([row["id"] for row in read(tmp_path / f"{name}{suffix}")] for name in ("out", "whole"))
    assert found == wanted == [f"n{i}" for i in range(22)]
    assert not (tmp_path / f"out{suffix}.parts").exists()


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the process end at a change of the file system: that one and all that come after do not happen."""
    seen: list[str] = []

    def dying(what: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            seen.append(what)
            if len(seen) >= step:
                raise Killed
            return own(*args, **more)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", dying("open", io.open))
        for what in ("mkdir", "replace", "rename", "link", "unlink", "remove", "rmdir"):
            patch.setattr(os, what, dying(what, getattr(os, what)))
        yield seen


def work(out: Path) -> None:
    """Three windows of two rows, without a model."""

    def join(file: IO[bytes], parts: Sequence[Path]) -> None:
        for part in parts:
            copy_part(part, file)

    with Job(out, {"model": "m"}) as job:
        for first in range(job.rows, 6, 2):
            rows = [Row(Place(number, 0, number), {}) for number in (first, first + 1)]
            job.add(Window(rows, Place(first + 2, 0, first + 2)), [{"n": row.place.number} for row in rows])
        job.finish(join)


def test_a_job_that_is_killed_at_any_change_of_the_file_system_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    whole, step, died = [{"n": number} for number in range(6)], 0, True
    while died:
        step += 1
        out = tmp_path / f"{step}.jsonl"
        with killed_at(step, monkeypatch) as seen:
            with suppress(Killed):
                work(out)
            died = len(seen) >= step
        if out.exists():
            assert lines(out) == whole, step
            out.unlink()
        work(out)
        assert lines(out) == whole, (step, seen[-1])
        assert not Path(f"{out}.parts").exists(), (step, seen[-1])
    assert step > 20 and set(seen) >= {"mkdir", "open", "replace", "link", "unlink", "rmdir"}


def test_no_thread_is_left_when_a_job_ends_early(model: Model, tmp_path: Path) -> None:
    """A process that ends while one computes may be aborted."""
    rows = [json.dumps({"text": text}) for text in TEXTS] * 4
    rows[5] = "{"
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    before = set(threading.enumerate())
    more: dict[str, Any]
    for more in ({}, {"skip": True, "stop": lambda: 2}):
        with pytest.raises(MmhubError):
            run(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", restart=True, **more)
        assert set(threading.enumerate()) <= before


def test_what_has_the_name_meanwhile_is_left_alone(model: Model, table: Path, tmp_path: Path) -> None:
    out, asked, said = tmp_path / "out.jsonl", [0], list[str]()

    def other() -> int:
        asked[0] += 1
        if asked[0] == 2:
            out.write_text("precious")
        return 0

    for stop in (other, int):
        with pytest.raises(UsageError, match="exists") as caught:
            run(model, table, out, stop=stop, say=said.append)
        assert "the same command goes on" in str(caught.value.hint) and out.read_text() == "precious"
    assert not said, "nothing is begun where it is there from the first"
    with pytest.raises(UsageError, match="exists"):
        run(model, table, table)
    assert not table.with_name("in.parquet.parts").exists()
    out.unlink()
    run(model, table, out, say=said.append)
    assert len(lines(out)) == 22 and said[0].startswith("going on after 22 rows")


def test_a_job_is_written_once_at_a_time_in_a_process_too(tmp_path: Path) -> None:
    with (
        Job(tmp_path / "out.jsonl", {}),
        pytest.raises(UsageError, match="this process is writing"),
        Job(tmp_path / "out.jsonl", {}),
    ):
        pass
    work(tmp_path / "out.jsonl")
    assert len(lines(tmp_path / "out.jsonl")) == 6


def test_a_job_whose_description_is_damaged_is_not_thrown_away(model: Model, table: Path, tmp_path: Path) -> None:
    parts = stopped(model, table, tmp_path / "out.jsonl")
    (parts / "job.json").write_text("{")
    (parts / "mine").mkdir()
    with pytest.raises(UsageError, match=r"job\.json' cannot be read") as caught:
        run(model, table, tmp_path / "out.jsonl")
    assert "--restart" in str(caught.value.hint) and len(list(parts.glob("0*.jsonl"))) == 3
    run(model, table, tmp_path / "out.jsonl", restart=True)
    assert len(lines(tmp_path / "out.jsonl")) == 22
    assert [path.name for path in parts.iterdir()] == ["mine"], "what is not ours stays"


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
    said = str(caught.value.hint)
    assert "4 rows are kept" in said and "--on-error skip goes on" in said and "--restart" in said
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


def wrote(*parts: Sequence[Any]) -> Any:
    """A parquet table of answers {"v": value} in parts."""
    file = io.BytesIO()
    write_answers(file, [lambda part=part: [{"v": value} for value in part] for part in parts], ".parquet")  # type: ignore[misc]
    return pq.read_table(file)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ([[1], [2**63]], ["1", str(2**63)]),
        ([[1, 2**63]], ["1", str(2**63)]),
        ([[True, 1]], ["true", "1"]),
        ([[1], [True]], ["1", "true"]),
        ([[2**60 + 1], [0.5]], [str(2**60 + 1), "0.5"]),
        ([[0.5], [[2**60 + 1]]], ["0.5", f"[{2**60 + 1}]"]),
        ([[{"a": 2**60 + 1}], [{"a": 0.5}]], [f'{{"a": {2**60 + 1}}}', '{"a": 0.5}']),
        ([[[{}]]], ["[{}]"]),
        ([[{"a": {}}]], ['{"a": {}}']),
        ([[{"a": None}], [{"a": []}]], [{"a": None}, {"a": []}]),
        ([[1], [0.5]], [1.0, 0.5]),
        ([[[]], [None]], [[], None]),
        ([[{"a": float("nan")}]], [{"a": None}]),
    ],
)
def test_any_values_fit_into_a_table(parts: list[list[Any]], wanted: list[Any], tmp_path: Path) -> None:
    plain = json.loads(mmhub.bulk.formats.to_json(parts))  # as a job keeps them
    assert wrote(*plain).column("v").to_pylist() == wanted


def test_a_table_of_many_parts_has_few_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmhub.bulk.formats, "_SLICE", 2)
    file = io.BytesIO()
    write_answers(file, [lambda: [{"v": n} for n in range(7)]] * 3, ".parquet")
    assert pq.read_metadata(file).num_row_groups == 1
    assert pq.read_table(file).to_pydict()["v"] == [*range(7)] * 3


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    write_file_of(tmp_path / "a.jsonl", [{"value": float("nan"), "scores": [float("inf"), 1.0]}])
    assert (tmp_path / "a.jsonl").read_text() == '{"value": null, "scores": [null, 1.0]}\n'
    with Job(tmp_path / "out.jsonl", {}) as job:
        job.add(Window([Row(Place(), {})], Place(1, 0, 1)), [{"value": float("nan")}])
        assert list(job.answers()) == [{"value": None}]


def test_kept_columns_never_hide_an_answer_nor_each_other(model: Model, tmp_path: Path) -> None:
    row = {"text": "yes", "label": "a", "entities": "b", "extra": "c", "input_label": "d", "input_extra": "e"}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = run(model, tmp_path / "in.jsonl", None, keep=["label", "entities", "extra"]).answers
    assert found["label"] in ("no", "yes")
    assert (found["input_label"], found["input_entities"], found["extra"]) == ("a", "b", "c")
    with pytest.raises(UsageError, match="two columns would be named 'input_label'"):
        run(model, tmp_path / "in.jsonl", None, keep=["label", "input_label"])
    with pytest.raises(UsageError, match=r"no column 'label\+extra' to keep"):
        run(model, tmp_path / "in.jsonl", None, keep=["label+extra"])
    writer = drawing(1)

    def answers(samples: list[Any], first: int) -> list[dict[str, Any]]:
        return [{"text": "x", "extra": 1} for _ in samples]

    (found,) = run(writer, tmp_path / "in.jsonl", None, keep=["extra"], answers=answers).answers
    assert (found["input_extra"], found["extra"]) == ("c", 1)
    with pytest.raises(UsageError, match="two columns would be named 'input_extra'"):
        run(writer, tmp_path / "in.jsonl", None, keep=["input_extra", "extra"], answers=answers)


def test_a_column_counts_wherever_it_first_appears(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec  # type: ignore[import-untyped]

    monkeypatch.setattr(mmhub.bulk.rows, "_PEEK", 3)
    rows = "".join(json.dumps({"text": "yes"} | ({"image": "a"} if n == 5 else {})) + "\n" for n in range(7))
    (tmp_path / "in.jsonl").write_text(rows)
    assert open_table(str(tmp_path / "in.jsonl")).columns == ("text", "image")
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for number in range(5):
            for kind in ("txt", *(["png"] if number == 4 else [])):
                info = tarfile.TarInfo(f"{number}.{kind}")
                info.size = 3
                archive.addfile(info, io.BytesIO(b"yes"))
    assert open_table(str(tmp_path / "in.tar")).columns == ("__key__", "txt", "png")
    with fsspec.open("memory://late.jsonl", "w") as file:
        file.write(rows)
    options = Options(inputs={"text": "text"}, quiet=True)
    with pytest.raises(UsageError, match=r"column 'image' comes first in .*late\.jsonl row 6"):
        predict_table(model, open_table("memory://late.jsonl"), None, options)


def test_what_reads_no_files_row_by_row_is_left_to_plugins(tmp_path: Path) -> None:
    for source in ("sql:select * from t", "sql:select a[1]"):
        with pytest.raises(MmhubError, match="no installed plugin's data source is called 'sql:'"):
            open_table(source)
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(MmhubError) as caught:
        open_table(str(tmp_path / "*.parquet.gz"))
    assert "is streamed" not in caught.value.message


def test_an_empty_file_among_several_is_named_at_once(tmp_path: Path) -> None:
    for name, content in (("a", "text\nyes\n"), ("b", "text\n")):
        (tmp_path / f"{name}.csv").write_text(content)
    with pytest.raises(InputError, match=r"'b\.csv' has no rows"):
        open_table(str(tmp_path / "*.csv"))


def test_a_model_is_all_its_files_but_what_is_said_of_it(tmp_path: Path) -> None:
    for name in ("config.json", "chat_template.jinja", "1_Pooling/config.json", "README.md", "eval/a.json", ".git/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = model_identity(str(tmp_path))
    assert list(found["files"]) == ["1_Pooling/config.json", "chat_template.jinja", "config.json"]
    (tmp_path / "chat_template.jinja").write_text("other")
    assert model_identity(str(tmp_path)) != found
    before = file_identity(str(tmp_path / "README.md"))
    (tmp_path / "README.md").write_text("other")
    assert file_identity(str(tmp_path / "README.md")) != before


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


def test_what_is_drawn_depends_on_the_seed_and_the_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "in.jsonl"
    prompts = [text[:9] for text in TEXTS]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    model = drawing(3)

    def answers(samples: list[Any], first: int) -> list[dict[str, Any]]:
        return model.generate(samples, first=first, batch_size=2)

    wanted = model.generate([{"text": text} for text in prompts])
    assert len({answer["text"] for answer in wanted}) > 15
    seen: list[Any] = []

    def noted(*given: int) -> Pace:
        seen.append(given)
        return Pace(4, 4)

    with monkeypatch.context() as patch:
        patch.setattr(mmhub.bulk.run, "Pace", noted)
        assert run(model, data, None, answers=answers, batch_size=2).answers == wanted
    assert seen == [(2, 2)], "a window may be as small as a batch"
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
    pace, sizes = Pace(first=256), list[int]()
    for seconds in (1, 1, 1, 4096, 10):
        now[0] += seconds
        pace.tell(pace.rows)
        sizes.append(pace.rows)
    assert sizes == [2048, 4096, 4096, 32, 96]
    monkeypatch.setattr(mmhub.bulk.windows, "MOST_BYTES", 6400)
    now[0] += 1
    pace.tell(96, size=9600)
    assert pace.rows == 64, "answers that hold much make small windows, too"
    window = Window([Row(Place(), {})] * 100, Place())
    window.answers = [{"scores": dict.fromkeys(map(str, range(100)), 0.5)}] * 100
    assert 400_000 < window.size() < 700_000


def test_rows_that_hold_much_make_small_windows(model: Model, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    close(said["predictions"], alone(model))
    assert said["predictions"][3]["id"] == "n3"
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
    for name in ("a" * 252, "a" * 300):
        error = command("--data", "in.parquet", "--out", name).exception
        assert isinstance(error, MmhubError) and "file name too long" in error.message
    error = command("--data", "in.parquet", "--keep", "idd").exception
    assert isinstance(error, UsageError) and "did you mean 'id'" in str(error.hint)


def test_the_command_lists_answers_up_to_a_number(
    command: Callable[..., Any], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmhub.cli.predict, "_LISTED", 21)
    done = command("--data", "in.parquet", "--out", "a.jsonl", "--json")
    assert "predictions" not in json.loads(done.stdout) and json.loads(done.stdout)["rows"] == 22
    assert "more than 21" in done.stderr


def test_the_command_refuses_what_a_model_that_writes_does_not_use(
    command: Callable[..., Any], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmhub.hub, "load", lambda name, **options: drawing(1))
    for option in (["--batch-tokens", "9"], ["--workers", "0"]):
        error = command("--data", "in.parquet", *option).exception
        assert isinstance(error, UsageError) and error.message.startswith(f"{option[0]} is for models that answer")
    assert command("--data", "in.parquet", "--max-new-tokens", "2").exception is None


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
