"""Training runs as the Training tab reads and draws them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mmhub_ui.curves import Line, figure
from mmhub_ui.monitor import charts, overview, recipes
from mmhub_ui.runs import RunLog, Runs

START = {"time": "2026-01-01 00:00:00 UTC", "step": 0, "total_steps": 100, "task": "classification"}
MONITOR = {"monitor": "accuracy", "higher_is_better": True}
END = {"time": "2026-01-01 00:01:00 UTC", "step": 100, "end": "finished"}


def line(step: int, **values: Any) -> str:
    known = {"step": step, "epoch": step / 50, "loss": 1 / (step or 1), "learning_rate": 0.1, "seconds": step / 10}
    return json.dumps(known | {"speed": {"tokens_per_second": 5.0, "memory_gb": 1.5}} | values) + "\n"


def evaluation(step: int, accuracy: float) -> str:
    return json.dumps({"step": step, "valid": {"accuracy": accuracy, "loss": 0.5}}) + "\n"


def make_run(folder: Path, *lines: str, sessions: tuple[dict[str, Any], ...] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text('task = "classification"\n[data]\ntrain = "/somewhere/private/train.csv"\n')
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "sessions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in sessions))
    return folder


def read(folder: Path) -> RunLog:
    log = RunLog(folder.name, folder)
    log.read()
    return log


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def losses(log: RunLog) -> list[float]:
    return [step for step, _ in log.series["loss"]]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_and_nothing_is_read_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", line(10), line(20))
    log = read(run)
    assert losses(log) == [10, 20]
    assert not log.read()
    append(run, line(30))
    assert log.read()
    assert losses(log) == [10, 20, 30]


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    run, whole = make_run(tmp_path / "run", line(10)), line(20)
    log = read(run)
    append(run, whole[:30])
    assert not log.read()
    append(run, whole[30:])
    assert log.read()
    assert losses(log) == [10, 20]


@pytest.mark.parametrize(
    "bad", ["\n", "{\n", "[1]\n", "null\n", '{"step": "ten"}\n', '{"step": 1e999}\n', "\x00\x00\n"]
)
def test_a_bad_line_is_passed_over(tmp_path: Path, bad: str) -> None:
    assert losses(read(make_run(tmp_path / "run", line(10), bad, line(20)))) == [10, 20]


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    log = read(make_run(tmp_path / "run", line(10), line(20, loss=float("nan")), line(30, loss=float("inf"))))
    assert losses(log) == [10]


def test_a_run_that_resumes_from_an_earlier_step_is_read_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", line(10), line(20), line(30))
    log = read(run)
    (run / "metrics.jsonl").write_text(line(10) + line(20, loss=7.0) + line(30, loss=8.0) + line(40))
    assert log.read()
    assert log.series["loss"][1:3] == [(20, 7.0), (30, 8.0)]
    (run / "metrics.jsonl").write_text(line(10))
    assert log.read()
    assert losses(log) == [10]


def test_an_empty_run_a_missing_one_and_one_that_is_deleted_meanwhile_are_no_problem(tmp_path: Path) -> None:
    assert list(Runs(tmp_path / "nothing").look()) == []
    empty = make_run(tmp_path / "runs" / "empty")
    run = make_run(tmp_path / "runs" / "full", line(10))
    runs = Runs(tmp_path / "runs")
    logs = runs.look()
    assert set(logs) == {"empty", "full"}
    assert "Nothing is measured yet" in charts([logs["empty"]], "steps")
    shutil.rmtree(run)
    assert set(runs.look()) == {"empty"}
    assert logs["full"].read()  # who still holds it sees it empty
    assert overview([logs["full"]], [logs["full"]], tmp_path)
    shutil.rmtree(empty)


def test_runs_are_found_in_folders_but_not_in_runs_and_not_behind_links(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a" / "first", line(1))
    make_run(tmp_path / "runs" / "a" / "first" / "inner", line(1))
    make_run(tmp_path / "runs" / ".hidden", line(1))
    make_run(tmp_path / "elsewhere", line(1))
    (tmp_path / "runs" / "link").symlink_to(tmp_path)
    (tmp_path / "runs" / "linked-run").symlink_to(tmp_path / "elsewhere")
    assert list(Runs(tmp_path / "runs").look()) == ["a/first"]
    assert list(Runs(tmp_path / "elsewhere").look()) == ["elsewhere"]


def test_a_folder_whose_name_is_no_text_has_one_that_can_be_sent(tmp_path: Path) -> None:
    try:
        make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")), line(1))
    except OSError:
        pytest.skip("this file system takes no such names")
    (log,) = Runs(tmp_path).look().values()
    assert log.name.encode() and log.name.startswith("odd") and losses(log) == [1]


def test_the_newest_run_is_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        run = make_run(tmp_path / name, line(1))
        for path in run.iterdir():
            os.utime(path, (time.time() - 100 * age,) * 2)
    assert list(Runs(tmp_path).look()) == ["new", "old"]


def test_a_run_is_running_finished_or_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", line(10), line(20), sessions=(START,))
    log, now = read(run), time.time()
    assert log.state(now) == ("running", "")
    assert log.state(now + 3600) == ("stopped", "without a word")
    append(run, line(30, seconds=10_000.0))  # its lines are hours apart
    log.read()
    assert log.state(now + 3600) == ("running", "")
    for end in ("no space left", "finished"):
        with (run / "sessions.jsonl").open("a") as file:
            file.write(json.dumps(END | {"end": end}) + "\n")
        log.read()
        assert log.state() == (("finished", "") if end == "finished" else ("stopped", end))


def test_the_best_value_of_the_main_metric_is_named_also_where_less_is_better(tmp_path: Path) -> None:
    lines = (line(10), evaluation(10, 0.5), evaluation(20, 0.9), evaluation(30, 0.7))
    log = read(make_run(tmp_path / "more", *lines, sessions=(START | MONITOR,)))
    assert log.best() == ("accuracy", 0.9, 20)
    log = read(make_run(tmp_path / "less", *lines, sessions=(START | MONITOR | {"higher_is_better": False},)))
    assert log.best() == ("accuracy", 0.5, 10)
    assert read(make_run(tmp_path / "none", line(10))).best() == ("loss", 0.1, 10)


def test_stages_follow_one_another(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.toml").write_text(
        'task = "chat"\n[[train.stages]]\nparts = ["a"]\n[[train.stages]]\nparts = ["b"]\n'
    )
    for name in ("metrics.jsonl", "sessions.jsonl"):
        (run / name).unlink()
    first = make_run(run / "stages" / "1-one", line(10), line(20), sessions=(START, END))
    log = read(run)
    assert log.state() == ("running", "")  # the second is to come
    (first / "done.json").write_text('{"steps": 25}')
    make_run(run / "stages" / "2-two", line(10), line(20), sessions=(START, END))
    assert log.read()
    assert losses(log) == [10, 20, 35, 45]
    assert [seconds for _, seconds in log.series["seconds"]] == [1, 2, 3, 4]
    assert (log.stage, log.step, log.total, log.marks) == ("2/2 two", 45, 125, [25])
    assert log.state() == ("finished", "")


def test_a_long_file_is_sampled_with_all_its_evaluations_and_its_end(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmhub_ui.runs._LARGE", 100_000)
    monkeypatch.setattr("mmhub_ui.runs._SAMPLES", 100)
    lines = [line(step) for step in range(5000)]
    lines.insert(1234, evaluation(1233, 0.75))
    run = make_run(tmp_path / "run", *lines, '{"cut')
    log = read(run)
    assert 90 <= len(log.series["loss"]) <= 110
    assert log.series["valid/accuracy"] == [(1233, 0.75)]
    assert losses(log)[0] == 0
    assert losses(log)[-1] == 4999
    append(run, " off\n" + line(5000))
    assert log.read()
    assert losses(log)[-1] == 5000


def test_no_evaluation_of_a_long_file_is_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmhub_ui.runs._LARGE", 50_000)
    monkeypatch.setattr("mmhub_ui.runs._SAMPLES", 20)
    lines = [line(step) if step % 20 else evaluation(step, 0.9 if step == 1980 else 0.1) for step in range(4000)]
    log = read(make_run(tmp_path / "run", *lines, sessions=(START | MONITOR,)))
    assert len(log.series["valid/accuracy"]) == 200
    assert log.best() == ("accuracy", 0.9, 1980)
    assert losses(log)[-1] == 3999


def test_the_best_value_of_all_stages_is_exact(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmhub_ui.runs._MOST_POINTS", 50)
    run = make_run(tmp_path / "run")
    first = make_run(run / "stages" / "1-one", *(evaluation(step, 0.9 if step == 333 else 0.1) for step in range(500)))
    (first / "done.json").write_text('{"steps": 500}')
    stage = make_run(run / "stages" / "2-two", evaluation(1, 0.5), sessions=(START | MONITOR,))
    log = read(run)
    assert log.best() == ("accuracy", 0.9, 333)
    append(stage, evaluation(2, 0.95))
    assert log.read()
    assert log.best() == ("accuracy", 0.95, 502)


@pytest.mark.parametrize("name", ["1a-q", "1²-q", "٣-q", "x-q"])
def test_a_folder_that_is_no_stage_is_passed_over(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", line(10))
    make_run(run / "stages" / name, line(99))
    log = read(run)
    assert losses(log) == [10]
    assert "running" in overview([log], [log], tmp_path)


@pytest.mark.parametrize("values", [(1e308, -1e308), (5e-324, 0.0), (1e-320, 2e-320), (1e300, 1e-300), (1e29, -1e29)])
def test_odd_numbers_break_no_chart(tmp_path: Path, values: tuple[float, float]) -> None:
    log = read(make_run(tmp_path / "run", line(10), *(line(20 + n, loss=value) for n, value in enumerate(values))))
    for scale in (False, True):
        text = charts([log], "steps", log=scale, smooth=0.6) + overview([log], [log], tmp_path)
        assert not re.search(r"\b(nan|inf)\b", text)


def test_an_odd_run_costs_the_others_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    deep = make_run(tmp_path / "deep", line(10))
    (deep / "recipe.toml").write_text("a = " + "[" * 3000 + "]" * 3000)
    logs = [read(deep), read(make_run(tmp_path / "good", line(10))), read(make_run(tmp_path / "bad", line(10)))]
    monkeypatch.setattr(RunLog, "best", lambda log: 1 / 0 if log.name == "bad" else None)
    rows = overview(logs, logs, tmp_path).split("<tr>")
    assert [("cannot be read" in row) for row in rows[2:]] == [False, False, True]
    assert recipes(logs)


def test_a_recipe_is_read_again_where_it_changed_alone(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "run", line(10))
    log = read(run)
    with monkeypatch.context() as patch:
        patch.setattr("tomllib.loads", lambda text: pytest.fail("read again"))
        assert not log.read()
    (run / "recipe.toml").write_text('task = "regression"\n')
    assert log.read()
    assert log.task == "regression"


def test_a_series_that_grows_on_is_thinned_evenly_and_keeps_its_best(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmhub_ui.runs._MOST_POINTS", 50)
    values = [evaluation(step, 0.9 if step == 333 else 0.1) for step in range(1000)]
    log = read(make_run(tmp_path / "run", *values, sessions=(START | MONITOR,)))
    steps = [step for step, _ in log.series["valid/accuracy"]]
    gaps = {later - earlier for earlier, later in pairwise(steps[:-1])}
    assert len(steps) <= 51
    assert len(gaps) == 1
    assert steps[-1] == 999
    assert log.best() == ("accuracy", 0.9, 333)


# -- drawing ----------------------------------------------------------------------------------------------------------


class _Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.lines: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "polyline":
            self.lines.append(str(dict(attrs)["class"]))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "figcaption" and data.strip():
            self.titles.append(data)


def test_there_is_a_chart_for_everything_that_was_measured(tmp_path: Path) -> None:
    log = read(make_run(tmp_path / "run", line(10, novelty=3.0), line(20), evaluation(20, 0.5)))
    seen = _Seen(charts([log], "steps", smooth=0.5))
    assert seen.titles[:3] == ["loss", "validation accuracy", "learning rate"]
    assert set(seen.titles[3:]) == {"tokens per second", "memory, GB", "novelty"}
    assert seen.lines[:3] == ["line k0 faint", "line k0", "line k0 dashed"]


def test_runs_share_charts_in_colours_of_their_own(tmp_path: Path) -> None:
    logs = [read(make_run(tmp_path / name, line(10), line(20), evaluation(20, 0.5))) for name in "ab"]
    text = charts(logs, "steps")
    assert {"line k0", "line k1"} <= set(_Seen(text).lines)
    table = overview(logs, logs[:1], tmp_path)
    assert 'class="key k0"' in table
    assert 'class="key k1"' not in table


@pytest.mark.parametrize(("axis", "last"), [("steps", "step 20"), ("seconds", "second 2"), ("epochs", "epoch 0.4")])
def test_the_x_axis_counts_steps_seconds_or_epochs(tmp_path: Path, axis: str, last: str) -> None:
    text = charts([read(make_run(tmp_path / "run", line(10), line(20), evaluation(20, 0.5)))], axis)
    assert f">{last}<" in text
    assert text.count(f">{last}<") == text.count("<figure>")


def test_a_logarithmic_scale_has_powers_of_ten_and_needs_positive_numbers() -> None:
    falling = [(float(step), 10.0**-step) for step in range(5)]
    assert ">0.01<" in figure("loss", [Line("a", falling)], "step", log=True)
    assert ">0.01<" not in figure("loss", [Line("a", falling)], "step")
    assert figure("loss", [Line("a", [(0, 0.0), (1, 1.0)])], "step", log=True)


def test_one_point_and_equal_values_can_be_drawn() -> None:
    for points in ([(0.0, 0.0)], [(5.0, -2.0), (6.0, -2.0)], [(1.0, 1e-300), (2.0, 1e300)]):
        for log in (False, True):
            assert "nan" not in figure("x", [Line("a", points)], "step", log=log)
    assert figure("x", [Line("a", [])], "step") == ""


def test_names_and_recipes_of_strangers_are_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>${1+1}"
    run = make_run(tmp_path / "run", line(10, **{evil: 1.0}), sessions=(START | {"task": evil}, END | {"end": evil}))
    (run / "recipe.toml").write_text(f"task = '{evil}'\n")
    log = read(run)
    text = charts([log], "steps") + overview([log], [log], tmp_path) + recipes([log])
    assert "onerror=alert(1)" in text
    assert "<img" not in text
    assert "${" not in text


def test_a_recipe_is_shown_without_folders(tmp_path: Path) -> None:
    text = recipes([read(make_run(tmp_path / "run", line(10)))])
    assert "train.csv" in text
    assert "private" not in text


def test_a_folder_without_runs_says_how_to_start_one(tmp_path: Path) -> None:
    assert f"mmhub train recipe.toml --out {tmp_path / 'first'}" in overview([], [], tmp_path)


@pytest.mark.slow
def test_a_million_lines_are_read_and_drawn_within_a_second(tmp_path: Path) -> None:
    run, rest = make_run(tmp_path / "run"), line(1).partition(",")[2]
    append(run, "".join(f'{{"step": {step},{rest}' for step in range(1_000_000)))
    begin = time.perf_counter()
    log = read(run)
    text = charts([log], "steps", smooth=0.9)
    seconds = time.perf_counter() - begin
    assert len(log.series["loss"]) >= 2900
    assert len(text) < 500_000
    assert seconds < 1
