"""Plans of batches: every row once, like lengths together, within the budget, the same for all; and the lengths."""

from __future__ import annotations

import io
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from mmhub.data import lengths as lengths_module
from mmhub.data.lengths import Lengths, measure_rows
from mmhub.data.loader import Collate, batches_of, epoch_order, load_batches
from mmhub.data.plan import plan_epoch, plan_in_order, plan_window
from mmhub.data.sources import open_rows
from mmhub.errors import InputError
from mmhub.interfaces import Policy
from mmhub_audio.processor import AudioProcessor
from mmhub_text.processor import TextProcessor
from tests.conftest import flac
from tests.fake_parts import Numbers


def sizes(*columns: list[int], per_token: int = 1) -> Lengths:
    found = {f"m{i}": np.array(column, np.int64) for i, column in enumerate(columns)}
    return Lengths(found, {name: -(-column // per_token) for name, column in found.items()})


def log_normal(rows: int, seed: int = 0) -> list[int]:
    draw = np.random.default_rng(seed).lognormal(3.5, 0.8, rows)
    return [int(length) for length in draw.clip(5, 200)]


def padded(batch: list[int], known: Lengths) -> int:
    return len(batch) * sum(int(found[batch].max()) for found in known.tokens.values())


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_in_one_batch_within_the_limits(seed: int) -> None:
    draw = random.Random(seed)
    rows = draw.randint(1, 300)
    columns = [[draw.randint(0, draw.choice((3, 50))) for _ in range(rows)] for _ in range(draw.randint(1, 3))]
    known = sizes(*columns, per_token=draw.choice((1, 4)))
    size, tokens = draw.choice((0, 1, 7, 32)), draw.choice((0, 1, 40, 400))
    options: dict[str, Any] = {"lengths": known, "batch_size": size, "batch_tokens": tokens}
    plans = [
        plan_epoch(rows, group_by_length=draw.random() < 0.8, seed=seed, epoch=3, **options),
        plan_window(rows, seed=seed, **options),
        plan_in_order(rows, **options),
    ]
    for plan in plans:
        assert sorted(row for batch in plan for row in batch) == list(range(rows))
        assert all(batch and (not size or len(batch) <= size) for batch in plan)
        assert all(len(batch) == 1 or not tokens or padded(batch, known) <= tokens for batch in plan)


def test_a_plan_depends_on_seed_and_epoch_alone() -> None:
    known = sizes(log_normal(500))
    plans = {
        (seed, epoch): plan_epoch(500, lengths=known, batch_size=16, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert plans[1, 1] == plan_epoch(500, lengths=known, batch_size=16, seed=1, epoch=1)
    assert len({str(plan) for plan in plans.values()}) == 4
    torch.manual_seed(5)
    assert plans[1, 1] == plan_epoch(500, lengths=known, batch_size=16, seed=1, epoch=1), "no global random state"


@pytest.mark.parametrize("options", [{"lengths": sizes([7] * 50)}, {"lengths": None}, {"group_by_length": False}])
def test_without_lengths_that_differ_it_is_the_shuffled_order_cut_into_pieces(options: dict[str, Any]) -> None:
    options = {"lengths": sizes(log_normal(50))} | options
    plan = plan_epoch(50, batch_size=8, seed=2, epoch=1, **options)
    assert plan == batches_of(epoch_order(50, 2, 1), 8)


def test_little_of_what_is_computed_is_padding() -> None:
    known = sizes(log_normal(2000))
    real = sum(int(found.sum()) for found in known.tokens.values())

    def waste(**options: Any) -> float:
        plan = plan_epoch(2000, lengths=known, seed=0, epoch=0, **options)
        return sum(padded(batch, known) for batch in plan) / real

    assert waste(batch_size=32) <= 1.06
    assert waste(batch_tokens=1400) <= 1.06
    assert waste(batch_size=32, group_by_length=False) > 3, "the data would show nothing"


def test_batches_are_at_random_between_buckets() -> None:
    known = sizes(log_normal(2000))
    plan = plan_epoch(2000, lengths=known, batch_size=32, seed=0, epoch=0)
    means = [known.tokens["m0"][batch].mean() for batch in plan]
    half = len(means) // 2
    assert 0.6 < np.mean(means[:half]) / np.mean(means[half:]) < 1.6
    rises = sum(b > a for a, b in pairwise(means))
    assert 0.3 < rises / len(means) < 0.7


def test_rows_of_equal_length_are_neighbours() -> None:
    known = sizes([1 + i % 4 for i in range(256)], per_token=4)  # all are one token
    plan = plan_epoch(256, lengths=known, batch_size=16, seed=0, epoch=0)
    assert all(len(set(known.positions["m0"][batch])) == 1 for batch in plan)


def test_the_modality_that_costs_most_decides() -> None:
    short, long = [i % 5 for i in range(200)], [10 * (i % 7) for i in range(200)]
    known = sizes(short, long)
    assert known.varying == ["m1", "m0"]
    plan = plan_epoch(200, lengths=known, batch_size=10, seed=0, epoch=0)
    assert np.mean([len(set(known.tokens["m1"][batch])) for batch in plan]) < 1.6
    assert np.mean([len(set(known.tokens["m0"][batch])) for batch in plan]) < 3.5, "within them, the other one"


def test_a_selection_of_rows_can_be_planned() -> None:
    known = sizes(log_normal(100))
    plan = plan_epoch(range(40, 60), lengths=known, batch_size=8, seed=0, epoch=0)
    assert sorted(row for batch in plan for row in batch) == list(range(40, 60))


def test_in_order_the_longest_come_first() -> None:
    known = sizes([3, 9, 1, 9, 5])
    assert plan_in_order(5, known, batch_size=2) == [[3, 1], [4, 0], [2]]
    assert plan_in_order(5, None, batch_size=2) == [[0, 1], [2, 3], [4]]
    assert plan_in_order(0, None, batch_size=2) == []


def test_a_window_of_whole_batches_leaves_none_smaller() -> None:
    sizes = np.arange(3 * 137) % 11
    known = Lengths({"numbers": sizes}, {"numbers": sizes})
    assert {len(part) for part in plan_window(len(sizes), lengths=known, batch_size=3, seed=1)} == {3}


# -- lengths


class Double(nn.Module):
    def token_count(self, positions: int) -> int:
        return 2 * positions


class Counted(Numbers):
    """Keeps what it reads, and counts how often it does."""

    augments, keeps_read, reads = False, True, 0

    def read(self, raw: Any, policy: Policy, rng: torch.Generator | None = None) -> Any:
        type(self).reads += 1
        return super().read(raw, policy).long()


def measured(rows: Any, processor: Any, **options: Any) -> Lengths:
    return measure_rows(rows, {"numbers": processor}, {"numbers": Double()}, {"numbers": "x"}, **options)


def test_lengths_are_positions_and_tokens_by_row(tmp_path: Path) -> None:
    cells = ["1 2 3", None, ["1", "2 3"], "two", "", "7"]
    for rows in (open_rows([{"x": cell} for cell in cells]), list(enumerate({"x": cell} for cell in cells))):
        known = measured(rows, Numbers())
        assert known.positions["numbers"].tolist() == [3, 0, 3, 0, 0, 1]
        assert known.tokens["numbers"].tolist() == [6, 0, 6, 0, 0, 2]
        assert not known.read, "what a processor would change in training is not kept"
    assert measured([], Counted()).positions["numbers"].tolist() == []


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "_EVERY", 4)
    told: list[tuple[int, int]] = []
    measured([(i, {"x": "1"}) for i in range(10)], Numbers(), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_inputs_of_fixed_length_are_not_looked_at() -> None:
    class Fixed(Numbers):
        fixed_length = True
        looks = 0

        def length(self, raw: Any, policy: Policy) -> int:
            Fixed.looks += 1
            return 5

    known = measured(open_rows([{"x": None}] + [{"x": "1 2"}] * 9), Fixed())
    assert known.tokens["numbers"].tolist() == [10] * 10
    assert Fixed.looks == 1
    assert known.varying == []


def test_of_a_decoder_of_pairs_the_two_of_a_pair_are_measured_and_read_once_as_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Pairs:
        paired, points, reads_text = True, False, False

        def encode_targets(self, targets: list[Any]) -> None:
            return None

    rows = open_rows([{"question": "the good film", "answer": "a"}, {"question": "bad", "answer": "the end"}])
    processor = TextProcessor.from_recipe({"kind": "word"}, default="word", max_length=30)
    processor.fit(["the good film a bad end"])
    inputs, parts = {"text": "question+answer"}, {"text": processor}
    known = measure_rows(rows, parts, {"text": Whole()}, inputs, pairs=True)
    expected = processor([["the good film", "a"], ["bad", "the end"]], Policy())
    assert known.positions["text"].tolist() == [int(expected.lengths[:2].sum()), int(expected.lengths[2:].sum())]
    decoder: Any = Pairs()

    def unreadable(*args: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(TextProcessor, "read", unreadable)
    batch = Collate(rows, parts, inputs, decoder, read=known.read)([(i, rows[i]) for i in range(2)]).batch
    assert batch is not None
    assert torch.equal(batch.items["text"].data, expected.data)
    assert torch.equal(batch.items["text"].rows, expected.rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_text_is_read_once_in_a_run(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the good film", "", "a", "bad " * 40, "the end"] * 5
    rows = open_rows([{"text": text, "more": [text, "good"]} for text in texts])
    processor = TextProcessor.from_recipe({"kind": "word"}, default="word", max_length=30)
    processor.fit(texts)
    processors = {"text": processor, "again": processor}
    inputs = {"text": "text", "again": "more"}
    fresh = Collate(rows, processors, inputs)
    known = measure_rows(rows, processors, {"text": Whole(), "again": Whole()}, inputs)
    order = batches_of(epoch_order(25, 0, 0), 4)
    expected = [part.batch for part in load_batches(fresh, order)]

    def unreadable(*args: Any) -> Any:
        raise AssertionError("read again")

    monkeypatch.setattr(TextProcessor, "read", unreadable)
    found = [part.batch for part in load_batches(Collate(rows, processors, inputs, read=known.read), order, workers)]
    for one, other in zip(expected, found, strict=True):
        assert one is not None
        assert other is not None
        for name in processors:
            for key in ("data", "mask", "rows"):
                assert torch.equal(getattr(one.items[name], key), getattr(other.items[name], key)), (name, key)
            assert one.items[name].data.dtype == other.items[name].data.dtype
            assert known.tokens[name][one.index].sum() == one.items[name].mask.sum()


class Whole(nn.Module):
    def token_count(self, positions: int) -> int:
        return positions


def test_rows_that_cannot_be_read_are_read_again_for_their_error() -> None:
    rows = open_rows([{"x": "1 2"}, {"x": "two"}, {"x": "3"}])
    known = measured(rows, Counted())
    Counted.reads = 0
    (part,) = load_batches(Collate(rows, {"numbers": Counted()}, {"numbers": "x"}, read=known.read), [[0, 1, 2]])
    assert str(part.error).startswith("the given rows row 2, column 'x': 'two' is no list of numbers")
    assert Counted.reads == 1


def test_what_does_not_fit_into_memory_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows([{"x": "1 2"}] * 10)
    monkeypatch.setattr(lengths_module, "KEPT_BYTES", 120)
    known = measured(rows, Counted())
    assert known.positions["numbers"].tolist() == [2] * 10
    assert known.read["numbers"].known.tolist() == [True] * 3 + [False] * 7
    assert known.read["numbers"].bytes <= 240, "33 bytes for each of three rows, and 9 for each of the others"
    Counted.reads = 0
    (part,) = load_batches(Collate(rows, {"numbers": Counted()}, {"numbers": "x"}, read=known.read), [range(10)])
    assert part.batch is not None
    assert part.batch.items["numbers"].data.tolist() == [[1, 2]] * 10
    assert Counted.reads == 7


def wave(rate: int, seconds: float, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(round(rate * seconds), np.float32), rate, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 44101])
def test_a_header_tells_the_length_of_a_sound(kind: str, rate: int, tmp_path: Path) -> None:
    if kind == "MP3" and rate == 44101:
        rate = 32000  # it knows few rates
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=16000))
    sound = wave(rate, 0.3217, kind)
    (tmp_path / "a").write_bytes(sound)
    array = {"array": np.zeros(777, np.float32), "sampling_rate": rate}
    for raw in (
        sound,
        {"bytes": sound, "path": "a"},
        tmp_path / "a",
        {"bytes": None, "path": str(tmp_path / "a")},
        array,
    ):
        assert processor.length(raw, Policy()) == len(processor.read(raw, Policy()))


def test_measuring_obeys_the_policy_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.flac").write_bytes(flac(1))
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=8000))
    with pytest.raises(InputError, match="may not be read here"):
        processor.length(str(tmp_path / "a.flac"), Policy(paths=False))
    with pytest.raises(InputError, match="cannot read the header"):
        processor.length(b"no sound", Policy())
    with pytest.raises(InputError, match="more than the limit"):
        processor.length(flac(1), Policy(max_seconds=0.1))

    def fetch(*args: Any) -> Any:
        raise AssertionError("fetched")

    monkeypatch.setattr("mmhub.interfaces.fetch.fetch", lambda url, policy: fetch() if policy.urls else raise_input())
    rows: list[Any] = [
        {"x": "http://example.org/a.flac"},
        {"x": str(tmp_path / "a.flac")},
        {"x": flac(1)},
        {"x": "gone.flac"},
    ]
    known = measure_rows(
        list(enumerate(rows)), {"audio": processor}, {"audio": Whole()}, {"audio": "x"}, Policy(urls=True)
    )
    assert known.positions["audio"].tolist() == [0, 1600, 1600, 0]


def test_relative_paths_in_rows_of_a_stream_start_from_their_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x.flac").write_bytes(flac(1))
    monkeypatch.chdir(tmp_path / "a")
    processor = AudioProcessor(AudioProcessor.Config(sample_rate=8000))
    known = measure_rows(
        [(7, {"x": "x.flac"}), (9, {"x": "x.flac"}), (11, {"x": "x.flac"}), (12, {"x": ["x.flac"]})],
        {"audio": processor},
        {"audio": Whole()},
        {"audio": "x"},
        folder={7: tmp_path / "a", 9: tmp_path / "b"}.get,
    )
    assert known.positions["audio"].tolist() == [1600, 0, 0, 0], "what only the current folder has is not measured"


def raise_input() -> Any:
    raise InputError("fetching is off")
