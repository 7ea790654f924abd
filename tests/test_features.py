"""Features of frozen encoders: computed once, the same as at once, known again, bounded, and never damaged or stale."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmhub.engine.features as module
from mmhub.batch import Encoded, Features, Items
from mmhub.build import compose
from mmhub.cli.main import main
from mmhub.data.loader import Collate, load_batches
from mmhub.data.sources import Rows, open_rows
from mmhub.engine import feature_key, train
from mmhub.engine.feature_key import read_cells
from mmhub.engine.feature_store import FeatureStore
from mmhub.engine.features import open_features
from mmhub.engine.ranks import Ranks
from mmhub.errors import InputError
from mmhub.evaluation import EvalOptions, evaluate
from mmhub.feature_cache import feature_sets, features_folder, make_room, remove_set
from mmhub.model import Model
from tests.conftest import png
from tests.fake_parts import Numbers, Sensitive, fake_model

LINES = ["4 5 6 7 8", "1 2", "", "3", "9 8 7 6 5 4", "2 2 2", "7", "5 4"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(feature_key, "_code", lambda part: "")  # somebody may be editing these very tests


def rows_of(values: list[Any]) -> Rows:
    return open_rows([{"x": value, "label": float(i)} for i, value in enumerate(values)])


def frozen(*, augments: bool = False) -> Model:
    processor = Numbers()
    processor.augments = augments  # type: ignore[misc]
    torch.manual_seed(0)
    model = fake_model(Sensitive(Sensitive.Config(), processor))
    model.freeze("numbers")
    return model


def opened(model: Model, rows: Rows, **options: Any) -> FeatureStore:
    return open_features(model, rows, {"numbers": "x"}, **options)["numbers"]


def seen(model: Model) -> list[tuple[int, ...]]:
    encoder: Any = model.encoders["numbers"]
    return list(encoder.seen)


def batch_of(model: Model, rows: Rows, numbers: list[int], **options: Any) -> Any:
    collate = Collate(rows, model.processors, {"numbers": "x"}, model.decoder, "label", **options)
    (loaded,) = load_batches(collate, [numbers])
    return loaded


def text_model(fusion: str = "streams", encoder: str = "transformer", **config: Any) -> Model:
    small = {"dim": 8, "depth": 1, "heads": 2} if encoder == "transformer" else {"dim": 8, "embedding_dim": 4}
    torch.manual_seed(0)
    model = compose(
        encoders={"text": {"use": encoder, "config": small}},
        fusion={"use": fusion, "config": config},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        texts=["one two three four five six"],
    )
    model.freeze("text")
    return model.eval()


TEXTS = ["one two three", "four", "five six one two four three", "six", "one one"]


# -- the same as without ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["tokens", "summary"])
def test_a_batch_of_kept_features_gives_what_the_encoder_would(reads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = frozen(), rows_of([["1 2 3", "4"], *LINES])
    monkeypatch.setattr(type(model.decoder), "reads", reads, raising=False)
    store = opened(model, rows, batch_size=3)
    for numbers in ([0, 4, 2], [8, 7, 6, 5, 4, 1], [2, 0]):
        plain = batch_of(model, rows, numbers).batch
        kept = batch_of(model, rows, numbers, features={"numbers": store}).batch
        assert not kept.items
        assert kept.index == plain.index
        expected, found = model(plain), model(kept)
        assert expected.logits.any(1).all(), "not only zeros are compared"
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-6)
    encoded = store.take([0, 1])
    assert encoded.rows.tolist() == [0, 0, 1]
    assert encoded.features.mask.sum(1).tolist() == ([3, 1, 5] if reads == "tokens" else [1, 1, 1])


@pytest.mark.parametrize(
    ("fusion", "config", "encoder", "one_vector"),
    [
        ("streams", {}, "lstm", True),
        ("streams", {}, "transformer", True),
        ("concat", {"dim": 8}, "transformer", True),
        ("gated", {"dim": 8}, "lstm", True),
        ("attention", {"dim": 8, "depth": 1, "heads": 2}, "lstm", False),
        ("attention", {"dim": 8, "depth": 1, "heads": 2, "tokens": False}, "lstm", True),
        ("attention", {"dim": 8, "depth": 1, "heads": 2, "tokens": False}, "transformer", False),
    ],
)
def test_one_vector_an_item_is_kept_where_nobody_reads_more(
    fusion: str, config: dict[str, Any], encoder: str, one_vector: bool
) -> None:
    model, rows = text_model(fusion, encoder, **config), rows_of(TEXTS)
    pooled = model.encoders["text"].pooled_dim is not None
    (store,) = open_features(model, rows, {"text": "x"}).values()
    encoded = store.take(range(len(TEXTS)))
    longest = model.collate([{"text": text} for text in TEXTS]).items["text"].mask.shape[1]
    assert longest > 1
    assert encoded.features.mask.shape[1] == (1 if one_vector else longest)
    assert bool((encoded.features.tokens != 0).any()) == (not pooled or not one_vector)
    plain = model(model.collate([{"text": text} for text in TEXTS]))
    bundle = model.encode({}, len(TEXTS), {"text": encoded})
    torch.testing.assert_close(model.decode(bundle).logits, plain.logits, rtol=0, atol=1e-6)


def test_an_empty_text_has_features_too() -> None:
    model, rows = text_model(), rows_of(["one two", ""])
    (store,) = open_features(model, rows, {"text": "x"}).values()
    assert store.has(1)
    plain = model(model.collate([{"text": "one two"}, {"text": ""}]))
    kept = model.decode(model.encode({}, 2, {"text": store.take([0, 1])}))
    torch.testing.assert_close(kept.logits, plain.logits, rtol=0, atol=1e-6)
    assert not torch.equal(plain.logits[0], plain.logits[1])


def test_several_texts_in_a_row_without_a_summary_of_their_own_keep_their_tokens() -> None:
    model, rows = text_model(), rows_of([["one two three", "four"], "five"])
    (store,) = open_features(model, rows, {"text": "x"}).values()
    batch = model.collate([{"text": ["one two three", "four"]}, {"text": "five"}])
    assert store.take([0, 1]).features.lengths.tolist() == batch.items["text"].lengths.tolist()
    plain = model(batch)
    kept = model.decode(model.encode({}, 2, {"text": store.take([0, 1])}))
    torch.testing.assert_close(kept.logits, plain.logits, rtol=0, atol=1e-6)


def test_evaluation_runs_no_frozen_encoder_and_measures_the_same() -> None:
    model, rows = frozen(), rows_of([line for line in LINES if line])
    model.task = replace(model.task, metrics=())  # the fake decoder answers with lists
    expected = evaluate(model, rows, inputs={"numbers": "x"}, target="label")
    store = opened(model, rows)
    before = len(seen(model))
    options = EvalOptions(features={"numbers": store})
    found = evaluate(model, rows, inputs={"numbers": "x"}, target="label", options=options)
    assert len(seen(model)) == before
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)


def test_the_column_of_kept_features_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = frozen(), rows_of(LINES)
    store = opened(model, rows)
    read: list[str] = []
    column = Rows.column

    def noted(rows: Rows, name: str) -> Any:
        read.append(name)
        return column(rows, name)

    monkeypatch.setattr(Rows, "column", noted)
    monkeypatch.setattr(Rows, "__getitem__", None)
    assert batch_of(model, rows, [0, 1], features={"numbers": store}).batch.raw_targets == [0.0, 1.0]
    assert set(read) == {"label"}


def test_features_take_no_gradient_and_their_encoder_does_not_run() -> None:
    model = frozen()
    store = opened(model, rows_of(LINES))
    model.train()
    before = len(seen(model))
    batch = batch_of(model, rows_of(LINES), [0, 1], features={"numbers": store}).batch
    assert not model.encode(batch.items, batch.size, batch.features)["numbers"].tokens.requires_grad
    assert len(seen(model)) == before


def test_a_batch_carries_its_features_to_a_device() -> None:
    features = Features(torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), pooled=torch.ones(1, 3))
    batch = replace(batch_of(frozen(), rows_of(LINES), [0]).batch, features={"x": Encoded(features, torch.tensor([0]))})
    moved = batch.to("meta").features["x"]
    parts = (moved.features.tokens, moved.features.mask, moved.features.pooled, moved.rows)
    assert all(isinstance(part, Tensor) and part.is_meta for part in parts)


@pytest.mark.parametrize("encoder", ["lstm", "transformer"])
def test_a_run_on_kept_features_learns_as_one_without(encoder: str, tmp_path: Path) -> None:
    table = [{"text": text, "label": f"c{i % 2}"} for i, text in enumerate(TEXTS * 4)]
    for name, part in (("train", table), ("valid", table[:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    small = {"dim": 8, "depth": 1, "heads": 2} if encoder == "transformer" else {"dim": 8, "embedding_dim": 4}
    curves, sets = [], []
    for cached in (False, True):
        recipe = {
            "task": "classification",
            "model": {
                "encoders": {"text": {"use": encoder, "config": small, "freeze": True}},
                "decoder": {"use": "classification"},
            },
            "data": {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "valid.jsonl"), "target": "label"},
            "train": {
                "epochs": 2, "batch_size": 4, "log_every": 1, "cache_features": cached, "group_by_length": False
            },
        }  # fmt: skip
        result = train(recipe, tmp_path / f"run{cached}")
        lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line] + [result.metrics["loss"]])
        sets.append(len(feature_sets()))
    assert len(curves[0]) == 11
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert sets == [0, 2], "training and validation rows"


@pytest.mark.gpu
def test_features_are_computed_on_a_gpu_and_get_there_from_pinned_memory() -> None:
    model, rows = frozen().to("cuda"), rows_of(LINES)
    store = opened(model, rows)
    plain = batch_of(model, rows, [0, 1]).batch.to("cuda")
    batch = batch_of(model, rows, [0, 1], features={"numbers": store}).batch.pin_memory()
    assert batch.features["numbers"].features.tokens.is_pinned()
    found = model(batch.to("cuda", non_blocking=True))
    torch.testing.assert_close(found.logits, model(plain).logits, rtol=0, atol=1e-5)


# -- rows that lack the input, or cannot be read ----------------------------------------------------------------


def test_a_row_without_an_input_is_missing_in_the_features_too() -> None:
    model, rows = frozen(), rows_of(["1 2", None, "3"])
    store = opened(model, rows)
    assert [store.has(i) for i in range(3)] == [True, False, True]
    assert store.take([1]).rows.tolist() == []
    alone = batch_of(model, rows, [1], features={"numbers": store})
    assert str(alone.error) == str(batch_of(model, rows, [1]).error)


def test_a_rank_whose_rows_lack_a_kept_input_runs_no_encoder_either() -> None:
    """Under FSDP the ranks that have features would not take part in its pass."""
    model, rows = frozen(), rows_of(["1 2", None])
    model.stand_ins = {"numbers": batch_of(model, rows, [0]).batch.items["numbers"]}
    store = opened(model, rows)
    before = len(seen(model))
    bundle = model.encode({}, 1, {"numbers": store.take([1])})
    assert len(seen(model)) == before
    assert not bundle["numbers"].present.any()


def test_an_unreadable_row_is_skipped_and_counted_as_before() -> None:
    model, rows = frozen(), rows_of(["1 2", "bad", "3"])
    store = opened(model, rows, skip=True)
    plain = batch_of(model, rows, [2, 1, 0], skip=True)
    kept = batch_of(model, rows, [2, 1, 0], skip=True, features={"numbers": store})
    assert kept.skipped == plain.skipped == ["the given rows row 2, column 'x': 'bad' is no list of numbers"]
    assert kept.batch.index == plain.batch.index == [2, 0]


def test_an_unreadable_row_stops_with_the_message_of_training() -> None:
    model, rows = frozen(), rows_of(["1 2", "bad", "3"])
    with pytest.raises(InputError) as stopped:
        opened(model, rows)
    assert str(stopped.value) == str(batch_of(model, rows, [1]).error)
    assert list(features_folder().iterdir()) == []


def test_a_set_without_any_item_can_be_opened() -> None:
    store = opened(frozen(), rows_of([None, None]))
    assert not store.has(0)
    assert len(store.take([0, 1])) == 0


# -- known again, or not ----------------------------------------------------------------------------------------


def test_features_are_computed_once_and_found_again() -> None:
    model, rows = frozen(), rows_of(LINES)
    first = opened(model, rows)
    count = len(seen(model))
    assert count
    again = opened(frozen(), rows_of(LINES))
    assert again.path == first.path
    assert len(seen(model)) == count
    model = frozen()
    opened(model, rows)
    assert not seen(model)


def test_computing_again_gives_the_same_bytes() -> None:
    def files(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    path = opened(frozen(), rows_of(LINES), batch_size=3).path
    first = files(path)
    shutil.rmtree(path)
    assert files(opened(frozen(), rows_of(LINES), batch_size=3).path) == first


def test_whatever_the_features_depend_on_makes_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(values: list[Any] = LINES, change: Any = None, **options: Any) -> str:
        model = frozen()
        if change:
            change(model)
        return opened(model, rows_of(values), **options).path.name

    def weights(model: Model) -> None:
        next(model.encoders["numbers"].parameters()).data[0] += 1e-3

    def state(model: Model) -> None:
        model.processors["numbers"].state = lambda: {"scale": 2}

    def files(model: Model) -> None:
        model.processors["numbers"].files = lambda: {"tokenizer.json": b"{}"}

    def version(model: Model) -> None:
        model.sources["numbers_encoder"] = replace(model.sources["numbers_encoder"], version="0.2.0")

    keys = [key(), key(LINES[::-1]), key(LINES[:-1]), key([*LINES[:-1], None]), key([None, *LINES[:-1]])]
    keys += [key(change=change) for change in (weights, state, files, version)]
    keys += [key(precision=torch.bfloat16), key(batch_size=2)]
    monkeypatch.setattr(feature_key, "_versions", lambda: {"torch": "9.9"})
    keys.append(key())
    monkeypatch.setattr(feature_key, "_code", lambda part: "edited")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert len(feature_sets()) == len(keys)


def test_a_file_that_changes_behind_its_path_makes_another_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    rows = open_rows([{"image": str(tmp_path / "a.png")}])

    def digest() -> str:
        return read_cells(rows, "image", "image", Numbers(), alone=True).digest

    first = digest()
    assert digest() == first
    (tmp_path / "a.png").write_bytes(png(2))
    assert digest() != first


def test_an_input_that_cannot_be_compared_is_not_kept() -> None:
    lines: list[str] = []
    rows = rows_of([object()])
    assert open_features(frozen(), rows, {"numbers": "x"}, say=lines.append) == {}
    assert lines == ["numbers: a object has no content that could be compared; its frozen encoder runs every epoch"]


def test_an_augmented_input_is_not_kept_for_training_and_says_so() -> None:
    lines: list[str] = []
    model, rows = frozen(augments=True), rows_of(LINES)
    assert open_features(model, rows, {"numbers": "x"}, say=lines.append) == {}
    assert lines == [
        'numbers is augmented: its frozen encoder runs every epoch; set augment = "none" to compute it once'
    ]
    assert open_features(model, rows, {"numbers": "x"}, training=False).keys() == {"numbers"}


def test_inputs_of_like_length_are_encoded_together_the_longest_first() -> None:
    model = frozen()
    opened(model, rows_of(["1", "1 2", "3", "3 4"]), batch_size=2)
    assert seen(model) == [(2, 2), (2, 1)]


def test_an_encoder_that_learns_is_not_kept() -> None:
    assert open_features(fake_model(), rows_of(LINES), {"numbers": "x"}) == {}


# -- damage, limits, other processes ----------------------------------------------------------------------------


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (_cut, "bytes, not"),
        (_flip, "has changed"),
        (os.unlink, "No such file"),
        (lambda f: _cut(f.parent / "manifest.json"), ""),
    ],
)
def test_a_damaged_set_is_computed_again_with_one_line(harm: Any, what: str) -> None:
    lines: list[str] = []
    path = opened(frozen(), rows_of(LINES)).path
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    harm(next(path.glob("*.safetensors")))
    model = frozen()
    opened(model, rows_of(LINES), say=lines.append)
    assert seen(model)
    (line,) = [line for line in lines if "damaged" in line]
    assert what in line
    assert line.endswith("its features are computed again")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_the_least_recently_used_set_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [opened(frozen(), rows_of([str(i), "2"])).path for i in range(3)]
    for age, path in zip((30, 10, 20), paths, strict=True):
        os.utime(path / "manifest.json", (time.time() - age,) * 2)
    size = feature_sets()[0].size
    opened(frozen(), rows_of(["9", "2"]), limit_gb=(3.5 * size) / 1e9)
    assert [path.exists() for path in paths] == [False, True, True]


def test_a_set_that_is_in_use_is_never_removed() -> None:
    store = opened(frozen(), rows_of(LINES))
    assert not remove_set(store.path)
    assert not make_room(10, 20)
    path = store.path
    del store
    assert remove_set(path)
    assert not path.exists()


def test_nothing_is_removed_for_what_would_not_fit_even_then() -> None:
    store = opened(frozen(), rows_of(LINES))
    idle = opened(frozen(), rows_of(["1", "2"])).path
    held = next(one.size for one in feature_sets() if one.path == store.path)
    assert not make_room(10, held + 5)
    assert idle.exists()
    assert make_room(10, held + 10)
    assert not idle.exists()


def test_only_a_folder_with_the_name_of_a_set_is_taken_for_one() -> None:
    folders = [features_folder() / name for name in ("backup", "data", "f" * 31)]
    for folder in folders:
        folder.mkdir(parents=True)
    assert make_room(0, 0)
    assert feature_sets() == []
    assert all(folder.is_dir() for folder in folders)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such lock")
def test_a_set_is_claimed_through_a_descriptor_open_for_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    path, modes = opened(frozen(), rows_of(LINES)).path, []

    def flock(file: int, kind: int) -> None:
        if kind & fcntl.LOCK_EX:
            modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert remove_set(path)
    assert modes == [os.O_RDWR], "an exclusive lock over NFS needs it"


def test_a_set_beyond_the_limit_is_not_kept_and_says_so() -> None:
    lines: list[str] = []
    model = frozen()
    assert open_features(model, rows_of(LINES * 50), {"numbers": "x"}, limit_gb=1e-6, say=lines.append) == {}
    (line,) = lines
    assert line.startswith("numbers: its features would take 0.00 GB of train.cache_gb = 0.00 GB")
    assert len(seen(model)) <= 5 * 8
    assert list(features_folder().iterdir()) == []


def test_a_set_that_grows_beyond_its_estimate_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module._Work, "_check_space", lambda work: features_folder().mkdir(parents=True))
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    assert open_features(frozen(), rows_of(LINES * 9), {"numbers": "x"}, limit_gb=5e-6, say=lines.append) == {}
    assert lines[-1] == (
        "numbers: its features take more than train.cache_gb = 0.00 GB; its frozen encoder runs every epoch"
    )
    assert list(features_folder().iterdir()) == []


def test_a_disk_that_is_nearly_full_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    full = shutil.disk_usage("/")._replace(free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert open_features(frozen(), rows_of(LINES), {"numbers": "x"}, say=lines.append) == {}
    assert lines[0].endswith("and the disk has 0.10 GB left; its frozen encoder runs every epoch")


def test_many_shards_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = frozen(), rows_of(LINES)
    whole = opened(model, rows, batch_size=2).take(range(8))
    shutil.rmtree(features_folder())
    monkeypatch.setattr(module, "SHARD_BYTES", 50)
    store = opened(model, rows, batch_size=2)
    assert len(list(store.path.glob("*.safetensors"))) > 2
    parts = store.take(range(8))
    assert torch.equal(parts.features.tokens, whole.features.tokens)
    assert torch.equal(parts.features.mask, whole.features.mask)


def test_a_worker_process_opens_the_set_itself() -> None:
    store = opened(frozen(), rows_of(LINES))
    copied = pickle.loads(pickle.dumps(store))
    assert torch.equal(copied.take([0, 1]).features.tokens, store.take([0, 1]).features.tokens)
    model = frozen()
    alone = batch_of(model, rows_of(LINES), [0, 1], features={"numbers": store})
    collate = Collate(rows_of(LINES), {}, {"numbers": "x"}, features={"numbers": store})
    (helped,) = load_batches(collate, [[0, 1]], workers=1)
    assert helped.batch is not None
    assert torch.equal(
        alone.batch.features["numbers"].features.tokens, helped.batch.features["numbers"].features.tokens
    )


def test_features_are_read_in_worker_processes_too() -> None:
    alone = opened(frozen(), rows_of(LINES), batch_size=3).take(range(8))
    shutil.rmtree(features_folder())
    helped = opened(frozen(), rows_of(LINES), batch_size=3, workers=2).take(range(8))
    assert torch.equal(alone.features.tokens, helped.features.tokens)


SLOW = """
import time
from tests.test_features import feature_key, LINES, Sensitive, frozen, module, opened, rows_of
module.SHARD_BYTES = 50
forward = Sensitive.forward
def slow(self, data, mask):
    time.sleep(0.05)
    return forward(self, data, mask)
Sensitive.forward = slow
feature_key._code = lambda part: ""
opened(frozen(), rows_of(LINES * 20), batch_size=2)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_set_and_the_next_run_cleans_up() -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW], cwd=Path(__file__).parents[1]) as process:
        deadline = time.monotonic() + 60
        while not list(features_folder().glob(".*.tmp/000-00003.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert feature_sets() == []
    path = opened(frozen(), rows_of(LINES * 20), batch_size=2).path
    assert list(features_folder().iterdir()) == [path]


def test_what_a_killed_run_of_other_data_left_goes_after_a_day() -> None:
    old, new = (features_folder() / f".{key}.elsewhere.12345.tmp" for key in ("a" * 32, "b" * 32))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 100_000,) * 2)
    make_room(0, 10)
    assert [old.exists(), new.exists()] == [False, True]


def _two_ranks(job: Any) -> list[Any]:
    """Run two processes of one machine as threads, which pass JSON through a list behind a barrier."""
    import threading

    barrier, box, results = threading.Barrier(2, timeout=60), [None, None], [None, None]

    class Thread(Ranks):
        def gather(self, data: Any) -> list[Any]:
            box[self.rank] = json.loads(json.dumps(data))
            barrier.wait()
            found = list(box)
            barrier.wait()
            return found

    def run(rank: int) -> None:
        try:
            results[rank] = job(Thread(rank=rank, world=2, local=rank))
        except Exception as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_processes_share_the_work_and_read_the_same() -> None:
    alone = opened(frozen(), rows_of(LINES), batch_size=2).take(range(8))
    shutil.rmtree(features_folder())
    models = [frozen(), frozen()]
    one, other = _two_ranks(lambda ranks: opened(models[ranks.rank], rows_of(LINES), batch_size=2, ranks=ranks))
    for store in (one, other):
        assert torch.equal(store.take(range(8)).features.tokens, alone.features.tokens)
    work = [sum(shape[0] for shape in seen(model)) for model in models]
    assert min(work) >= 2, "each did a share"
    assert len(feature_sets()) == 1
    models = [frozen(), frozen()]
    again = _two_ranks(lambda ranks: opened(models[ranks.rank], rows_of(LINES), batch_size=2, ranks=ranks))
    assert [store.path for store in again] == [one.path, one.path]


def test_what_stops_one_process_stops_all() -> None:
    values = [*LINES, "bad"]
    models = [frozen(), frozen()]
    results = _two_ranks(lambda ranks: opened(models[ranks.rank], rows_of(values), batch_size=2, ranks=ranks))
    assert [str(result) for result in results] == [
        "the given rows row 9, column 'x': 'bad' is no list of numbers; fix the row, or set data.on_error = \"skip\""
    ] * 2


@pytest.mark.parametrize("failing", ["mkdir", "write_text"])
def test_a_leader_that_cannot_write_turns_features_off_for_all(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(Path, failing)

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        if ".tmp" in str(self):
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, failing, full)
    models, lines = [frozen(), frozen()], [[], []]  # type: ignore[var-annotated]
    results = _two_ranks(
        lambda r: open_features(models[r.rank], rows_of(LINES), {"numbers": "x"}, ranks=r, say=lines[r.rank].append)
    )
    assert results == [{}, {}]
    for said in lines:
        assert "cannot be written (No space left on device); its frozen encoder runs every epoch" in said[-1]
    assert list(features_folder().iterdir()) == []


def test_a_set_that_vanishes_at_once_turns_features_off_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Vanished(FeatureStore):
        def __init__(self, path: Path, *, check: bool = False) -> None:
            shutil.rmtree(path, ignore_errors=True)
            super().__init__(path, check=check)

    monkeypatch.setattr(module, "FeatureStore", Vanished)
    models = [frozen(), frozen()]
    results = _two_ranks(lambda ranks: open_features(models[ranks.rank], rows_of(LINES), {"numbers": "x"}, ranks=ranks))
    assert results == [{}, {}]


def test_progress_is_shown_by_the_first_process_alone() -> None:
    shown: list[int] = []

    def progress(parts: Any, total: int) -> Any:
        shown.append(total)
        yield from parts

    models = [frozen(), frozen()]
    _two_ranks(lambda r: opened(models[r.rank], rows_of(LINES), batch_size=2, ranks=r, progress=progress))
    assert shown == [2]


# -- the command ------------------------------------------------------------------------------------------------


def test_the_cache_command_lists_and_removes_features(capsys: pytest.CaptureFixture[str]) -> None:
    path = opened(frozen(), rows_of(LINES)).path
    run = _cli(capsys)
    text = run("cache", "features")
    assert "numbers by mmhub-fake/sensitive, 8 rows of the given rows" in text
    found = json.loads(run("cache", "features", "--json"))
    assert [one["path"] for one in found["sets"]] == [str(path)]
    run("cache", "features", "--clear")
    assert not path.exists()
    assert "no features" in run("cache", "features")


def _cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as leave:
            main(args)
        assert not leave.value.code
        return capsys.readouterr().out

    return run


def test_items_of_a_row_stay_in_order() -> None:
    model, rows = frozen(), rows_of([["1", "2 3", "4 5 6"]])
    store = opened(model, rows)
    items: Items = batch_of(model, rows, [0]).batch.items["numbers"]
    assert store.take([0]).features.mask.sum(1).tolist() == items.lengths.tolist() == [1, 2, 3]
