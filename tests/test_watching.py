"""What a run tells: speeds that are true, a page that stands alone, lines that show life, a trace when asked."""

from __future__ import annotations

import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomlkit
import torch

from mmhub.batch import Batch, Encoded, Items
from mmhub.data.sources import open_rows
from mmhub.engine import meter as metering
from mmhub.engine import report as reporting
from mmhub.engine import train
from mmhub.engine.chart import Curve, chart, short
from mmhub.engine.flops import TrainingCost
from mmhub.engine.meter import Meter
from mmhub.engine.page import write_page
from mmhub.engine.profiler import WARM_UP, Profiler
from mmhub.engine.provenance import public
from mmhub.engine.ranks import Ranks
from mmhub.engine.report import Reporter, TrainRun, run_facts
from mmhub.errors import Interrupted
from mmhub.model import Model
from tests.conftest import flac, png, recipe, three_modalities
from tests.fake_parts import fake_model
from tests.fake_plugins import ROOT

CPU = torch.device("cpu")
PEAK = 1e9
DOCUMENT = (ROOT / "docs" / "watching.md").read_text()


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metering, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture(scope="module")
def model() -> Model:
    return three_modalities("a b c d e f g h")


@pytest.fixture(scope="module")
def batch(model: Model) -> Batch:
    return model.collate(
        [
            {"text": "a b c", "image": [png(1), png(2)], "audio": flac(1, 0.5)},
            {"text": "a b c d e f"},
            {"image": png(3), "audio": flac(2, 0.25)},
        ]
    )


# The meter.


def test_rates_count_what_is_real_and_only_that(model: Model, batch: Batch, clock: Clock) -> None:
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    meter.count(batch)
    meter.step()
    clock.now += 4
    values = meter.values()
    assert (values["samples_per_second"], values["steps_per_second"]) == (6 / 4, 1 / 4)
    assert values["tokens_per_second"] == 2 * int(batch.items["text"].mask.sum()) / 4
    assert values["images_per_second"] == 2 * 3 / 4
    assert values["audio_seconds_per_second"] == pytest.approx(2 * 0.75 / 4)
    assert 0.05 < values["memory_gb"] < 100
    masks = batch.items["text"].mask, batch.items["audio"].mask
    assert values["padding_share"] == pytest.approx(sum(1 - float(m.float().mean()) for m in masks) / 2, rel=1e-4)
    assert not {"flops_per_second", "mfu"} & set(values), "nobody knows the peak of a processor"


def test_each_line_is_about_the_time_since_the_last(model: Model, batch: Batch, clock: Clock) -> None:
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    clock.now += 1
    meter.values()
    meter.count(batch)
    clock.now += 3
    assert meter.values()["samples_per_second"] == 1.0
    clock.now += 1
    assert meter.values()["samples_per_second"] == 0.0


def test_a_model_has_the_rates_of_its_own_modalities(clock: Clock) -> None:
    values = Meter(fake_model(), CPU, Ranks()).values()
    assert set(values) == {
        "samples_per_second", "steps_per_second", "padding_share", "data_wait_share", "memory_gb",
    }  # fmt: skip


@pytest.mark.usefixtures("known_peak")
def test_every_rate_is_documented(model: Model, batch: Batch) -> None:
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    assert [key for key in meter.values() if f"`{key}`" not in DOCUMENT] == []


def test_waiting_is_a_share_of_training_and_an_evaluation_is_no_training(
    model: Model, batch: Batch, clock: Clock
) -> None:
    meter = Meter(model, CPU, Ranks())
    with meter.waiting():
        clock.now += 1
    meter.count(batch)
    clock.now += 3
    with meter.pausing():
        clock.now += 100
    values = meter.values()
    assert values["data_wait_share"] == 0.25
    assert values["samples_per_second"] == 0.75


def test_rates_add_up_over_processes(model: Model, batch: Batch, clock: Clock) -> None:
    class Two(Ranks):
        def gather(self, data: Any) -> list[Any]:
            other, totals = data
            return [data, [other | {"waited": 2.0, "memory": 50.0, "padding": 0.5}, totals | {"samples": 5.0}]]

    meter = Meter(model, CPU, Two(0, 2))
    meter.count(batch)
    clock.now += 2
    values = meter.values()
    assert values["samples_per_second"] == (3 + 5) / 2
    assert values["tokens_per_second"] == 2 * int(batch.items["text"].mask.sum()) / 2
    assert values["data_wait_share"] == 0.5
    assert values["memory_gb"] == 50.0, "the fullest process is the one that may fail"


def test_cached_features_are_samples_too(model: Model, batch: Batch, clock: Clock) -> None:
    bundle = {
        name: Encoded(model.encoders[name](items.data, items.mask), items.rows)
        for name, items in batch.items.items()
        if name != "audio"
    }
    meter = Meter(model, CPU, Ranks())
    meter.count(Batch({"audio": batch.items["audio"]}, 3, features=bundle))
    clock.now += 1
    values = meter.values()
    assert (values["samples_per_second"], values["images_per_second"]) == (3, 3)
    assert values["audio_seconds_per_second"] == 0.75
    assert "tokens_per_second" not in values, "a summary does not tell how long its text was"


def test_counting_asks_nothing_of_a_device(model: Model, batch: Batch) -> None:
    """A tensor on the meta device has no values: whatever would wait for a GPU fails there."""
    meter = Meter(model, CPU, Ranks())
    with meter.waiting():
        meter.count(batch.to("meta"))
    meter.step()


def test_the_meter_costs_less_than_50_microseconds_a_step(model: Model) -> None:
    mask = torch.ones(32, 200, dtype=torch.bool)
    batch = Batch({"text": Items(torch.zeros(32, 200), mask, torch.arange(32), 32)}, 32)
    meter, least = Meter(model, CPU, Ranks()), 1.0
    for _ in range(300):
        start = time.perf_counter()
        with meter.waiting():
            pass
        meter.count(batch)
        meter.step()
        least = min(least, time.perf_counter() - start)
    assert least < 50e-6


def test_long_masks_are_counted_the_same() -> None:
    mask = torch.arange(20_000)[None] < torch.tensor([1, 12_345, 20_000])[:, None]
    assert metering._lengths(mask).tolist() == [1, 12_345, 20_000]


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "_peak_of", lambda device, precision: PEAK)


@pytest.mark.usefixtures("known_peak")
def test_adding_up_between_lines_changes_no_figure(
    model: Model, batch: Batch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for most in (1000, 2):
        monkeypatch.setattr(metering, "_MOST", most)
        meter = Meter(model, CPU, Ranks())
        for _ in range(5):
            meter.count(batch)
        assert len(meter._interval.sizes) <= most
        clock.now += 1
        found.append({key: value for key, value in meter.values().items() if key != "memory_gb"})
    assert found[0] == found[1]


@pytest.mark.usefixtures("known_peak")
def test_mfu_is_the_flops_of_every_tower_over_the_peak(model: Model, batch: Batch, clock: Clock) -> None:
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    meter.count(batch)
    clock.now += 2
    values = meter.values()
    cost = TrainingCost(model)
    cost.measure(batch)
    sizes = metering.Sizes(3, {name: (items.lengths, items.rows) for name, items in batch.items.items()})
    assert values["flops_per_second"] == pytest.approx(cost.of(sizes), rel=1e-4)
    assert values["mfu"] == pytest.approx(cost.of(sizes) / PEAK, rel=1e-4)


@pytest.mark.usefixtures("known_peak")
def test_the_time_that_measuring_takes_is_no_training(
    model: Model, batch: Batch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: TrainingCost, batch: Batch) -> None:
        clock.now += 50

    monkeypatch.setattr(TrainingCost, "measure", slow)
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    clock.now += 1
    assert meter.values()["samples_per_second"] == 3


@pytest.mark.usefixtures("known_peak")
def test_flops_that_cannot_be_measured_are_left_out_and_it_is_said_why(
    batch: Batch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = three_modalities("a b")

    def fail(*args: Any) -> None:
        raise RuntimeError("no item alone, please")

    monkeypatch.setattr(model, "encode_items", fail)
    meter = Meter(model, CPU, Ranks())
    meter.count(batch)
    clock.now += 1
    assert not {"flops_per_second", "mfu"} & set(meter.values())
    assert "no item alone" in meter.problem


@pytest.mark.usefixtures("known_peak")
def test_a_model_split_over_processes_is_measured_before_or_not_at_all(
    batch: Batch, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = three_modalities("a b c d e f g h")
    whole, late = Meter(model, CPU, Ranks()), Meter(model, CPU, Ranks())
    whole.measure(batch)
    monkeypatch.setattr(metering, "_is_split", lambda model: True)
    for meter in (whole, late):
        meter.count(batch)
    clock.now += 1
    assert whole.values()["mfu"] > 0
    assert "mfu" not in late.values()


@pytest.mark.gpu
def test_a_gpu_has_its_own_memory_and_waits_for_nothing(model: Model, batch: Batch) -> None:
    moved = three_modalities("a b c").to("cuda")
    meter = Meter(moved, torch.device("cuda"), Ranks(), torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = batch.to("cuda", non_blocking=True)
        meter.count(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < meter.values()["memory_gb"] < 80
    assert not meter.problem


# The reporter.


def run_in(folder: Path, steps: int = 10) -> TrainRun:
    return TrainRun(folder, {"task": "classification"}, steps)


def line(step: int, **more: Any) -> dict[str, Any]:
    speed = {"samples_per_second": 100.0 + step, "tokens_per_second": 20000.0, "data_wait_share": 0.1}
    return {"epoch": step / 5, "loss": 2.0 / step, "learning_rate": 1e-3, "gradient_norm": 1.0, "speed": speed} | more


def session(folder: Path, model: Model, first: int, last: int, ends: BaseException | None = None) -> None:
    """Report the steps from `first` to `last`."""
    reporter = Reporter(
        run_in(folder), quiet=True, step=first - 1, lines=99, facts=run_facts(model, CPU, torch.float32, Ranks())
    )
    for step in range(first, last + 1):
        reporter.step(1.0)
        reporter.log(step, line(step, seconds=step * 1.5))
        if step % 5 == 0:
            reporter.log(step, {"valid": {"accuracy": step / 10, "loss": 1.0 / step, "recall": {"1": 0.5}}})
    try:
        if ends is not None:
            raise ends
    except BaseException:
        reporter.close()
    else:
        reporter.close()


def test_metrics_keep_speed_apart_and_trackers_get_it_flat(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    tracker = SimpleNamespace(
        on_start=lambda run: None, on_log=lambda step, values: seen.append(values), on_end=lambda run: None
    )
    monkeypatch.setattr(reporting, "hook_items", lambda name, run: [("mmhub-fake", tracker)])
    session(tmp_path, model, 1, 1)
    (written,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert written["speed"]["samples_per_second"] == 101
    assert seen[0]["speed/samples_per_second"] == 101
    assert all(isinstance(value, (int, float)) for value in seen[0].values())


def test_of_several_processes_the_first_alone_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting, "hook_items", lambda name, run: pytest.fail("a tracker was asked"))
    reporter = Reporter(run_in(tmp_path), quiet=False, step=0, lines=0, ranks=Ranks(1, 2))
    reporter.step(1.0)
    reporter.log(1, line(1))
    reporter.say("hello")
    reporter.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""
    assert reporter.lines == 1, "checkpoints of all processes agree"


def test_a_log_file_shows_life_every_ten_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(run_in(tmp_path, 60), quiet=False, step=0, lines=0)
    for step in range(1, 61):
        clock.now += 0.5
        reporter.step(1.0)
        reporter.log(step, line(step))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 20/60: loss 0.1000, 120 samples/s, 20k tokens/s"
    assert [text.split(":")[0] for text in said] == ["step 20/60", "step 40/60", "step 60/60"]


def test_a_run_that_starves_for_data_says_so(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(run_in(tmp_path), quiet=False, step=0, lines=0)
    clock.now += 11
    reporter.log(1, line(1, speed={"samples_per_second": 3.0, "data_wait_share": 0.8, "mfu": 0.123}))
    assert capsys.readouterr().err == "step 1/10: loss 2.0000, 3 samples/s, MFU 12.3%, waiting for data 80%\n"


def test_a_quiet_run_says_nothing(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(run_in(tmp_path), quiet=True, step=0, lines=0)
    clock.now += 11
    reporter.step(1.0)
    reporter.log(1, line(1))
    reporter.close()
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_before_its_first_step_leaves_no_page(tmp_path: Path) -> None:
    Reporter(run_in(tmp_path), quiet=True, step=0, lines=0).close()
    assert list(tmp_path.glob("*.*")) == []


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(reporting, "write_page", full)
    session(tmp_path, model, 1, 2)
    assert "warning: report.html is not written: OSError: no space left" in capsys.readouterr().err


# The page.


class Tags(HTMLParser):
    """Checks that every tag is closed in order, and collects text and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses, self.tags = "", [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def page_of(folder: Path) -> Tags:
    return Tags((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_tells_the_run_and_needs_nothing_else(tmp_path: Path, model: Model) -> None:
    (tmp_path / "recipe.toml").write_text('task = "<script>alert(1)</script> & more"\n')
    facts = {
        "seconds": 3725.0, "seed": 7, "versions": {"torch": "2"}, "code": {"commit": "abc"},
        "data": {"train": {"rows": 48, "files": [{"name": "a<b>.csv", "sha256": "f" * 64}]}},
    }  # fmt: skip
    report = {
        "rows": 9, "metrics": {"accuracy": 0.875, "recall": {"1": 0.25}},
        "subsets": {"image": {"accuracy": 0.5, "rows": 4}},
    }  # fmt: skip
    (tmp_path / "model" / "eval").mkdir(parents=True)
    (tmp_path / "model" / "provenance.json").write_text(json.dumps(facts))
    (tmp_path / "model" / "eval" / "classification.json").write_text(json.dumps(report))
    session(tmp_path, model, 1, 10)
    page = page_of(tmp_path)
    assert page.open == ["html"] or page.open == []
    assert not page.addresses
    assert "script" not in page.tags
    assert "http" not in (tmp_path / "report.html").read_text()
    assert page.tags.count("svg") == 8  # loss, accuracy, recall, rate, norm, samples, tokens, waiting
    for text in (
        "finished", "<script>alert(1)</script> & more", "a<b>.csv", "f" * 64, "0.875", "recall 1", "0.25",
        "1 h 2 min", "mmhub-image/timm", "torch 2", "samples a second", "commit abc", "best at step",
    ):  # fmt: skip
        assert text in page.text, text


def test_the_page_of_an_interrupted_and_resumed_run_says_so(tmp_path: Path, model: Model) -> None:
    session(tmp_path, model, 1, 4, Interrupted("interrupted at step 4; saved", "go on", 130))
    assert "interrupted at step 4; saved" in page_of(tmp_path).text
    session(tmp_path, model, 5, 10)
    page = page_of(tmp_path)
    assert re.search(r"classification, +finished", page.text)
    assert "resumed" in page.text
    assert "interrupted at step 4; saved" in page.text, "among the sessions"
    assert 'class="mark"' in (tmp_path / "report.html").read_text()


def test_nothing_secret_leaves_with_the_page_or_a_tracker(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[TrainRun] = []
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {
        "data": {
            "train": ["https://ada:pw@host/a.tar?X-Amz-Signature=abc", "sql:/srv/ada/sales.db"],
            "valid": str(tmp_path / "x" / "valid.csv"), "columns": {"a": str(folder / "b" / "c.csv")},
        }
    }  # fmt: skip
    (folder / "recipe.toml").write_text(tomlkit.dumps(recipe))
    raw = (folder / "recipe.toml").read_bytes()
    tracker = SimpleNamespace(on_start=seen.append, on_end=lambda run: None)
    monkeypatch.setattr(reporting, "hook_items", lambda name, run: [("mmhub-fake", tracker)])
    reporter = Reporter(TrainRun(folder, recipe, 2), quiet=True, step=0, lines=0)
    reporter.step(1.0)
    try:
        raise Interrupted(f"cannot read 's3://key:pw@host/a?sig=abc' for '{tmp_path}/x/valid.csv'", "go on", 130)
    except Interrupted:
        reporter.close()
    for text in ((folder / "sessions.jsonl").read_text(), (folder / "report.html").read_text(), str(seen[0].config)):
        for secret in ("pw", "abc", "/srv", str(tmp_path)):
            assert secret not in text, text
    page = page_of(folder).text
    for text in ("https://host/a.tar", "sql:sales.db", '"valid.csv"', '"b/c.csv"', "'s3://host/a' for '~/x/valid.csv'"):
        assert text in page, text
    assert (folder / "recipe.toml").read_bytes() == raw


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("~", "~"), ("~nobody-knows/x.csv", "x.csv"), ("/home/ada2/x", "x"), ("./a/b.csv", "b.csv"),
        ("/data/s*/", "s*"), ("org/model", "org/model"), ("mmhub-text/transformer", "mmhub-text/transformer"),
        ("text: 1/2?", "text: 1/2?"), ("cannot read '/home/ada'", "cannot read '~'"),
        ("in /home/ada2/x", "in /home/ada2/x"), (3, 3), (None, None),
    ],
)  # fmt: skip
def test_only_folders_and_secrets_are_left_out(text: Any, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert public(text) == shown


def test_the_page_of_an_interrupted_run_knows_its_data(tmp_path: Path, model: Model) -> None:
    (tmp_path / "a.csv").write_text("x,label\n1,2\n")
    rows = open_rows(str(tmp_path / "a.csv"))
    facts = run_facts(model, CPU, torch.float32, Ranks(), rows)
    reporter = Reporter(run_in(tmp_path), quiet=True, step=0, lines=0, facts=facts)
    reporter.step(1.0)
    reporter.close()
    assert hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest() in page_of(tmp_path).text
    assert "a.csv" in page_of(tmp_path).text


def test_data_without_a_sha256_is_told_by_its_other_marks(tmp_path: Path, model: Model) -> None:
    files = [
        {"name": "s*.tar", "bytes": 5, "files": 200, "listing_sha256": "e" * 64},
        {"name": "a.tar", "bytes": 5, "etag": "W/abc"},
        {"name": "b.tar", "bytes": 5, "modified": "170001"},
    ]
    data = {"data": {"train": {"streamed": True, "rows": None, "files": files}}}
    reporter = Reporter(run_in(tmp_path), quiet=True, step=0, lines=0, facts=data)
    reporter.step(1.0)
    reporter.close()
    for text in ("listing_sha256 " + "e" * 64, "etag W/abc", "modified 170001"):
        assert text in page_of(tmp_path).text


def test_an_exception_that_the_caller_deals_with_is_not_the_runs(tmp_path: Path, model: Model) -> None:
    try:
        raise ValueError("something before")
    except ValueError:
        session(tmp_path, model, 1, 2)
    assert "something before" not in page_of(tmp_path).text


def test_the_page_can_be_made_again_and_from_what_is_left(tmp_path: Path, model: Model) -> None:
    session(tmp_path, model, 1, 6)
    before = (tmp_path / "report.html").read_bytes()
    assert write_page(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == before
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN}\n{"step": 8, "lo')
    (tmp_path / "sessions.jsonl").unlink()
    write_page(tmp_path)
    assert page_of(tmp_path).tags.count("svg") == 8
    (tmp_path / "metrics.jsonl").unlink()
    write_page(tmp_path)
    assert page_of(tmp_path).tags.count("svg") == 0


def test_a_killed_run_is_not_called_finished(tmp_path: Path, model: Model) -> None:
    session(tmp_path, model, 1, 3)
    path = tmp_path / "sessions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))  # it had no time for a last word
    write_page(tmp_path)
    assert "stopped without a word" in page_of(tmp_path).text
    assert "finished" not in page_of(tmp_path).text


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    points = [(float(i), 1.0 if i != 70_000 else 50.0) for i in range(100_000)]
    text = chart("loss", [Curve("loss", points)])
    assert len(text) < 40_000
    assert "polygon" in text
    highest = min(float(place.split(",")[1]) for place in re.findall(r"[\d.]+,[\d.]+", text))
    assert highest < 50, "the one point of 50 is near the top"


def test_charts_of_nothing_and_of_one_point() -> None:
    assert chart("loss", [Curve("loss", [])]) == ""
    assert chart("loss", [Curve("loss", [(1, float("nan"))])]) == ""
    assert "circle" in chart("loss", [Curve("loss", [(1, 0.0)])])
    assert short(1500) == "1500"


# The profiler.


def test_a_trace_of_a_few_steps_is_written_with_a_table(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 2, CPU)
    for _ in range(WARM_UP + 4):
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.step()
    profiler.close()
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == 2
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert table.startswith("2 optimizer steps")
    assert "aten::mm" in table


def test_a_run_shorter_than_its_profile_still_writes_it(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 100, CPU, rank=1)
    for _ in range(WARM_UP + 1):
        profiler.step()
    profiler.close()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"trace-1.json", "operations-1.txt"}


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").touch()
    profiler = Profiler(tmp_path, 1, CPU)
    for _ in range(WARM_UP + 1):
        profiler.step()
    assert "warning: the trace is not written: FileExistsError" in capsys.readouterr().err


def test_no_profile_costs_nothing(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, 0, CPU)
    for _ in range(WARM_UP + 4):
        profiler.step()
    profiler.close()
    assert list(tmp_path.iterdir()) == []


# All of it in a run.


def test_a_run_leaves_its_speed_its_page_and_its_trace(tables: Path, tmp_path: Path) -> None:
    table = recipe(tables, log_every=2, profile=1)
    out = train(table, tmp_path / "run").out
    found = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["speed"] for line in found if "loss" in line]
    assert speeds
    assert all(speed["samples_per_second"] > 0 and 0 < speed["data_wait_share"] < 1 for speed in speeds)
    assert (out / "profile" / "trace.json").is_file()
    assert "finished" in page_of(out).text
