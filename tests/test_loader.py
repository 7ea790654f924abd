"""The loader: the same batches whatever the workers, bad rows stopped at or skipped, missing cells, media paths."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from mmhub.batch import Batch
from mmhub.data import loader
from mmhub.data.loader import (
    Collate,
    Loaded,
    batches_of,
    epoch_order,
    load_batches,
    on_device,
    row_seed,
    usable,
    worker_count,
)
from mmhub.data.parts import pack, values_of
from mmhub.data.sources import Rows, open_rows
from mmhub.errors import MmhubError
from tests.conftest import png
from tests.fake_parts import Numbers, fake_model


def table(folder: Path, rows: list[dict[str, Any]]) -> Rows:
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_rows(str(folder / "t.jsonl"))


def collate(rows: Rows, **options: Any) -> Collate:
    columns = {"numbers": "x"} | ({"more": "y"} if "y" in rows.columns else {})
    processors = dict.fromkeys(columns, Numbers())
    decoder: Any = fake_model().decoder
    return Collate(rows, processors, columns, decoder, "label", **options)


def load(given: Collate, order: list[list[int]], workers: int = 0) -> list[Loaded]:
    return list(load_batches(given, order, workers))


GOOD: list[dict[str, Any]] = [{"x": f"{i} {i + 1}", "label": i} for i in range(10)]


def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path: Path) -> None:
    given = collate(table(tmp_path, GOOD), seed=3)
    order = batches_of(epoch_order(10, seed=1, epoch=0), 3)
    alone, helped = load(given, order), load(given, order, workers=2)
    assert len(alone) == len(helped) == 4
    for one, other in zip(alone, helped, strict=True):
        assert one.batch is not None
        assert other.batch is not None
        assert one.batch.index == other.batch.index
        assert torch.equal(one.batch.items["numbers"].data, other.batch.items["numbers"].data)
        assert torch.equal(one.batch.targets, other.batch.targets)
    assert sorted(i for part in alone if part.batch for i in part.batch.index) == list(range(10))


def test_loading_leaves_the_random_state_of_the_run_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    load(collate(table(tmp_path, GOOD), seed=3), [[0], [1]])
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_seed_and_row_alone(tmp_path: Path) -> None:
    rows = table(tmp_path, GOOD)

    def numbers(order: list[int], seed: int | None) -> dict[int, list[float]]:
        (part,) = load(collate(rows, seed=seed), [order])
        assert part.batch is not None
        return dict(zip(part.batch.index, part.batch.items["numbers"].data.tolist(), strict=True))

    first, again = numbers([4, 7, 1], seed=5), numbers([1, 4], seed=5)
    assert first[1] == again[1]
    assert first[4] == again[4]
    assert numbers([1], seed=6)[1] != first[1]
    assert first[1][0] - 1 != pytest.approx(first[4][0] - 4), "rows draw apart"
    assert numbers([1], seed=None)[1] == [1.0, 2.0]


def test_row_seeds_and_epoch_orders_differ() -> None:
    assert len({row_seed(seed, row) for seed in range(30) for row in range(30)}) == 900
    assert all(0 <= row_seed(2**40, row) < 2**63 for row in (0, 10**9))
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(50, 1, 1) == orders[3]


def test_the_last_batch_may_be_smaller() -> None:
    assert batches_of([4, 3, 2, 1, 0], 2) == [[4, 3], [2, 1], [0]]
    assert batches_of([], 2) == []


BAD = [*GOOD[:3], {"x": "1 two", "label": 0}, {"x": "5", "label": None}, {"x": None, "label": 1}, *GOOD[6:]]


def test_stopping_names_row_file_and_column(tmp_path: Path) -> None:
    given = collate(table(tmp_path, BAD))
    messages = [str(part.error) for part in load(given, [[0, 3], [2, 4], [5]])]
    skip = 'fix the row, or set data.on_error = "skip"'
    assert messages == [
        f"t.jsonl row 4, column 'x': '1 two' is no list of numbers; {skip}",
        f"t.jsonl row 5, column 'label': the target is missing; {skip}",
        f"t.jsonl row 6: none of x is given; {skip}",
    ]


def test_an_error_comes_back_whole_from_a_worker(tmp_path: Path) -> None:
    (part,) = load(collate(table(tmp_path, BAD)), [[0, 3]], workers=1)
    assert part.batch is None
    assert part.error is not None
    assert part.error.message == "t.jsonl row 4, column 'x': '1 two' is no list of numbers"


def test_skipping_drops_bad_rows_and_counts_them(tmp_path: Path) -> None:
    first, second = load(collate(table(tmp_path, BAD), skip=True), [[0, 3, 4, 5, 6], [3, 5]])
    assert first.batch is not None
    assert first.batch.index == [0, 6]
    assert first.batch.raw_targets == [0, 6]
    assert first.batch.size == first.batch.items["numbers"].batch == 2
    assert [text.partition(":")[0] for text in first.skipped] == [
        "t.jsonl row 6",
        "t.jsonl row 4, column 'x'",
        "t.jsonl row 5, column 'label'",
    ]
    assert second.batch is None
    assert second.error is None
    assert len(second.skipped) == 2


def test_a_row_needs_one_input_and_may_lack_the_others(tmp_path: Path) -> None:
    (part,) = load(
        collate(table(tmp_path, [{"x": "1", "y": None, "label": 0}, {"x": None, "y": "2", "label": 1}])), [[0, 1]]
    )
    assert part.batch is not None
    assert part.batch.items["numbers"].rows.tolist() == [0]
    assert part.batch.items["more"].rows.tolist() == [1]


def test_rows_without_a_target_column_give_no_targets(tmp_path: Path) -> None:
    rows = table(tmp_path, [{"x": "1"}])
    part = Collate(rows, {"numbers": Numbers()}, {"numbers": "x"})([(0, rows[0])])
    assert part.batch is not None
    assert part.batch.targets is None


@pytest.mark.parametrize(
    "cell", [None, math.nan, "", {"bytes": None, "path": None}, {"bytes": None, "path": ""}, [], [None]]
)
def test_an_empty_cell_is_a_missing_medium(cell: Any) -> None:
    assert usable("image", cell) is None


def test_an_empty_text_is_a_text_and_nan_is_not() -> None:
    assert usable("text", "") == ""
    assert usable("text", "", alone=False) is None
    assert usable("text", "a.png") == "a.png"
    assert usable("text", math.nan) is None
    assert usable("text", ["a", None, ""]) == ["a", ""]


def test_relative_paths_are_looked_for_beside_the_table_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    assert usable("image", "a.png", folder) == folder / "a.png"
    assert usable("image", "b.png", folder) == "b.png"
    assert usable("image", {"path": "a.png", "bytes": None}, folder) == folder / "a.png"
    assert usable("image", ["a.png", "b.png"], folder) == [folder / "a.png", "b.png"]
    assert usable("image", str(tmp_path / "b.png"), folder) == tmp_path / "b.png"
    assert usable("text", "a.png", folder) == "a.png"
    assert usable("image", "https://example.org/a.png", folder) == "https://example.org/a.png"


@pytest.mark.parametrize("cell", ["A" * 70_000, "a\0b"])
def test_a_text_that_can_be_no_path_is_left_to_the_processor(tmp_path: Path, cell: str) -> None:
    assert usable("image", cell, tmp_path) == cell


def test_media_with_bytes_and_arrays_stay_as_they_are() -> None:
    for cell in ({"bytes": b"x", "path": "a"}, {"array": [0.0], "sampling_rate": 8000}, b"x"):
        assert usable("audio", cell) is cell


def test_workers_are_for_gpus_unless_asked_for() -> None:
    assert worker_count("auto", torch.device("cpu")) == 0
    assert worker_count("auto", torch.device("cuda")) >= 1
    assert worker_count(3, torch.device("cpu")) == 3


def test_the_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    counts = []
    for processes in ("1", "4", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        counts.append(worker_count("auto", torch.device("cuda")))
    assert counts == [8, 3, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_can_come_with_their_content_and_one_by_one(tmp_path: Path, workers: int) -> None:
    given = collate(table(tmp_path, GOOD), seed=3)
    taken: list[int] = []

    def stream() -> Iterator[list[tuple[int, dict[str, Any]]]]:
        for start in (0, 4, 8):
            taken.append(start)
            yield [(i, GOOD[i]) for i in range(start, min(start + 4, 10))]

    streamed = load_batches(given, stream(), workers)
    by_number = load(given, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    for one, other in zip(streamed, by_number, strict=True):
        assert workers or taken[-1] == (one.batch.index[0] if one.batch else None), "no row is read too early"
        assert one.batch is not None
        assert other.batch is not None
        assert one.batch.index == other.batch.index
        assert torch.equal(one.batch.items["numbers"].data, other.batch.items["numbers"].data)


class Deadly(Numbers):
    """Kills or stops the process that reads the number 5."""

    how: Any = None

    def read(self, raw: Any, *args: Any) -> Any:
        if str(raw).startswith("5 "):
            self.how()
        return super().read(raw, *args)


def deadly(folder: Path) -> Collate:
    given = collate(table(folder, GOOD))
    given.processors = {"numbers": Deadly()}
    return given


def killed() -> None:
    time.sleep(0.2)  # until what was decoded before is on its way
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_and_never_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL", 0.3)
    monkeypatch.setattr(Deadly, "how", staticmethod(killed))
    batches = load_batches(deadly(tmp_path), [[0], [5], [1]], workers=1)
    assert next(batches).batch
    with pytest.raises(MmhubError) as caught:
        next(batches)
    assert str(caught.value) == (
        "a process that decodes the data was killed or crashed; "
        "if it was killed for want of memory, lower data.workers or the batch size"
    )


def test_a_worker_that_dies_interrupts_nothing_but_the_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(Deadly, "how", staticmethod(killed))
    batches = load_batches(deadly(tmp_path), [[0], [5], [1]], workers=1)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before, "torch's handler raises in the middle of a step"
    until = time.monotonic() + 0.6  # the worker dies in the meantime
    while time.monotonic() < until:
        sum(range(1000))


@pytest.mark.slow
def test_workers_that_hang_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL", 0.2)
    monkeypatch.setattr(loader, "_PATIENCE", 0.5)
    monkeypatch.setattr(Deadly, "how", staticmethod(lambda: time.sleep(1)))
    with pytest.raises(MmhubError, match=r"no batch was decoded for 0\.6\d* seconds"):
        load(deadly(tmp_path), [[0], [5]], workers=1)


def test_a_slow_worker_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL", 0.1)
    monkeypatch.setattr(Deadly, "how", staticmethod(lambda: time.sleep(0.5)))
    parts = load(deadly(tmp_path), [[0], [5], [1]], workers=1)
    assert [part.batch.index if part.batch else None for part in parts] == [[0], [5], [1]]


def test_ctrl_c_reaches_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = os.getpgrp()

    def interrupted() -> None:
        assert os.getpgrp() != group, "a terminal interrupts the whole group"
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Deadly, "how", staticmethod(interrupted))
    (part,) = load(deadly(tmp_path), [[5]], workers=1)
    assert part.batch is not None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12 says so of any fork
def test_batches_are_loaded_from_any_thread(tmp_path: Path) -> None:
    given, found = collate(table(tmp_path, GOOD)), []
    thread = threading.Thread(target=lambda: found.extend(load(given, [[0], [1]], workers=1)))
    thread.start()
    thread.join(60)
    assert len(found) == 2


class Told:
    """A copier that writes down what it is asked for."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, part: Loaded) -> Loaded:
        self.events.append(f"begin {part.skipped[0]}")
        return part

    def ready(self, begun: Loaded) -> Loaded:
        self.events.append(f"ready {begun.skipped[0]}")
        return begun


def test_the_next_batch_is_copied_before_this_one_is_computed() -> None:
    told = Told()
    parts = (Loaded(skipped=[name]) for name in "abc")
    for part in on_device(parts, torch.device("cpu"), told):
        told.events.append(f"compute {part.skipped[0]}")
    assert told.events == [
        "begin a", "begin b", "ready a", "compute a", "begin c", "ready b", "compute b", "ready c", "compute c",
    ]  # fmt: skip


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    taken: list[int] = []

    def parts() -> Iterator[Loaded]:
        for number in range(3):
            taken.append(number)
            yield Loaded(Batch(items={}, size=1, index=[number]))

    for part in on_device(parts(), torch.device("cpu")):
        assert part.batch is not None
        assert taken[-1] == part.batch.index[0]
    assert taken == [0, 1, 2]


def test_all_tensors_of_a_batch_are_found(tmp_path: Path) -> None:
    (part,) = load(collate(table(tmp_path, GOOD)), [[0, 1]])
    assert part.batch is not None
    found = list(loader._tensors(part.batch))
    items = part.batch.items["numbers"]
    wanted = [items.data, items.mask, items.rows, part.batch.targets]
    assert {id(tensor) for tensor in found} == {id(tensor) for tensor in wanted}


NO_PANDAS = """
import sys
class Watch:
    def find_spec(self, name, *rest):
        assert name != "pandas", "pandas takes a second to import"
sys.meta_path.insert(0, Watch())
from pathlib import Path
from mmhub.data.sources import open_rows
for name in ("t.csv", "t.jsonl"):
    rows = open_rows(name, base=Path(sys.argv[1]))
    assert [row["x"] for row in rows] == list(rows.column("x")) and len(rows) == 3, list(rows)
"""


def test_reading_a_table_does_not_import_pandas(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,label\na,1\nb,2\n,3\n")
    table(tmp_path, [{"x": "a", "label": 0}, {"x": None, "label": 1}, {"x": "c", "label": 2.5}])
    subprocess.run([sys.executable, "-c", NO_PANDAS, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "values", [["a", None, "é日"], [1, None, -(2**63)], [0.5, None, -0.0], [True, None, False], [None]]
)
def test_packed_values_come_back(values: list[Any]) -> None:
    for column in (values, values * 20):
        packed = pack(column)
        assert isinstance(packed, pa.ChunkedArray)
        packed.validate(full=True)
        assert list(map(repr, values_of(packed))) == list(map(repr, column))
        assert packed.type == pa.array(column, pa.large_string() if isinstance(values[0], str) else None).type


@pytest.mark.parametrize("values", [[2**64], ["\ud800"], [1, "a"], [[1]], [1, 1.5]])
def test_what_fits_no_type_stays_as_it_is(values: list[Any]) -> None:
    assert pack(values) == values


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_whole_on_a_gpu(tmp_path: Path, workers: int) -> None:
    given, order = collate(table(tmp_path, GOOD), seed=3), [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9]] * 20
    device = torch.device("cuda")
    sums = []
    for part in on_device(load_batches(given, order, workers, pin_memory=True), device):
        assert part.batch is not None
        data = part.batch.items["numbers"].data
        assert data.device.type == "cuda"
        sums.append((torch.ones(2000, 2000, device=device) @ torch.ones(2000, 1, device=device))[0] * 0 + data.sum())
    plain = [part.batch.items["numbers"].data.sum() for part in load(given, order) if part.batch]
    assert torch.allclose(torch.cat(sums).cpu(), torch.stack(plain))
