"""Batches by tokens, streams, memory and stop signals: what happens to the data of a run, through the engine."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mmhub.batch import Batch
from mmhub.engine import loop, train
from mmhub.engine.parallel import Parallel
from mmhub.engine.report import Reporter
from mmhub.errors import Interrupted, MmhubError, UsageError
from tests.test_distributed import curve, texts


def noisy(folder: Path, count: int = 60, **options: Any) -> dict[str, Any]:
    """A recipe over sentences of many lengths with dropout, which a resumed step must draw again."""
    table = texts(folder, count)
    table["model"]["encoders"]["text"]["config"] |= {"dropout": 0.2, "word_dropout": 0.1}
    table["train"] |= {"eval_every": 5} | options
    return table


def shards(folder: Path) -> Path:
    """The rows of `texts` in four parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()[1:]]
    for number in range(4):
        part = lines[number::4]
        table = pa.table({"text": [text for text, _ in part], "label": [label for _, label in part]})
        pq.write_table(table, folder / f"shard-{number}.parquet")
    return folder


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def stopped(
    table: dict[str, Any], out: Path, step: int = 0, *, evaluation: int = 0, resume: bool = False
) -> Interrupted:
    """Train, with SIGTERM in the middle of an optimizer step, or as the first evaluation begins."""
    count = 0
    real = Reporter.step

    def on_step(self: Reporter, loss: float) -> None:
        nonlocal count
        count += 1
        real(self, loss)
        if count == step:
            os.kill(os.getpid(), signal.SIGTERM)

    evaluate = loop.evaluate

    def on_evaluate(*args: Any, **options: Any) -> Any:
        if evaluation == 1 or out.joinpath("metrics.jsonl").read_text().count('"valid"') == evaluation - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", on_step)
        if evaluation:
            patch.setattr(loop, "evaluate", on_evaluate)
        with pytest.raises(Interrupted) as caught:
            train(table, out, resume=resume)
    return caught.value


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tokens", "stream"])
def test_an_interrupted_run_ends_in_the_same_bytes_whatever_its_batches(
    tmp_path: Path, kind: str, workers: int
) -> None:
    table = noisy(tmp_path)
    table["data"]["workers"] = workers
    if kind == "tokens":
        table["train"] |= {"batch_tokens": 120}
    else:
        shards(tmp_path)
        table["data"] |= {"train": str(tmp_path / "shard-*.parquet"), "stream": True, "shuffle_rows": 16}
    whole = train(table, tmp_path / "whole")
    for step in (3, 9):
        run = tmp_path / f"run-{step}"
        assert stopped(table, run, step).exit_code == 143
        result = train(table, run, resume=True)
        assert result.steps == whole.steps
        assert weights(run) == weights(whole.out)
        assert curve(run) == curve(whole.out)


@pytest.mark.slow
def test_a_resumed_stream_may_stop_where_an_epoch_ends(tmp_path: Path) -> None:
    table = noisy(tmp_path)
    shards(tmp_path)
    table["data"] |= {"train": str(tmp_path / "shard-*.parquet"), "stream": True, "shuffle_rows": 16}
    table["train"] |= {"eval_every": 0, "epochs": 3}
    whole, run = train(table, tmp_path / "whole"), tmp_path / "run"
    stopped(table, run, 2)
    for evaluation in (1, 2):  # each ends an epoch, and stops before the next has begun
        stopped(table, run, evaluation=evaluation, resume=True)
    assert train(table, run, resume=True).steps == whole.steps
    assert weights(run) == weights(whole.out)


def test_batches_of_tokens_hold_more_short_rows_than_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    real = Parallel.forward

    def watch(self: Parallel, batch: Batch) -> Any:
        sizes.append((batch.size, batch.items["text"].mask.shape[1]))
        return real(self, batch)

    monkeypatch.setattr(Parallel, "forward", watch)
    table = noisy(tmp_path, epochs=1, batch_size=1000, batch_tokens=120)
    train(table, tmp_path / "run")
    assert sum(rows for rows, _ in sizes) == 60, "every row once"
    assert all(rows * longest <= 120 for rows, longest in sizes)
    assert max(rows for rows, _ in sizes) > 2 * min(rows for rows, _ in sizes)


def test_a_stream_of_unknown_length_needs_a_number_of_steps(tmp_path: Path) -> None:
    table = noisy(tmp_path)
    table["data"] |= {"stream": True}
    with pytest.raises(UsageError, match="not known before it is read"):
        train(table, tmp_path / "run")
    table["train"] |= {"max_steps": 4}
    assert train(table, tmp_path / "run").steps == 4


def test_a_batch_that_does_not_fit_is_computed_in_pieces_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = texts(tmp_path, 128)
    table["train"] |= {"batch_size": 64, "checkpoint_every": 1}
    expected = train(table, tmp_path / "whole")
    table["train"] |= {"batch_size": "auto"}
    real, refused = Parallel.forward, 0

    def small(self: Parallel, batch: Batch) -> Any:
        nonlocal refused
        if batch.size > 20:
            refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(Parallel, "forward", small)
    train(table, tmp_path / "run", quiet=False)
    assert refused == 2, "64 rows, then 32; from there on 16"
    assert "from here on 16 rows are computed at a time" in capsys.readouterr().err
    assert curve(tmp_path / "run") == pytest.approx(curve(expected.out), rel=1e-5)
    monkeypatch.setattr(Parallel, "forward", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(MmhubError, match="out of memory at step 1") as caught:
        train(table | {"train": table["train"] | {"batch_size": 8}}, tmp_path / "other")
    assert "lower train.batch_size" in str(caught.value.hint)


def test_sigterm_in_an_evaluation_saves_at_once_and_evaluates_again_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = noisy(tmp_path)
    whole = train(table, tmp_path / "whole")
    real, calls = loop.evaluate, 0

    def signalled(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", signalled)
        with pytest.raises(Interrupted, match="terminated at step 10; saved"):
            train(table, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count('"valid"') == 1, "the second evaluation did not end"
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole.out)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"valid"') == (
        (whole.out / "metrics.jsonl").read_text().count('"valid"')
    )


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    table = texts(tmp_path)
    stopped(table, tmp_path / "run", 2)
    path = tmp_path / "train.tsv"
    path.write_text(path.read_text().replace("cat", "dog", 1))
    with pytest.raises(UsageError, match="has changed since this run was started"):
        train(table, tmp_path / "run", resume=True)


def test_speed_is_measured_for_every_line(tmp_path: Path) -> None:
    out = train(texts(tmp_path), tmp_path / "run").out
    speeds = [json.loads(line)["speed"] for line in (out / "metrics.jsonl").read_text().splitlines() if "speed" in line]
    assert all(speed["samples_per_second"] > 0 and speed["tokens_per_second"] > 0 for speed in speeds)
    assert "<svg" in (out / "report.html").read_text()


def test_batches_split_by_rows_and_lose_their_padding() -> None:
    from mmhub.batch import Items

    rng = random.Random(1)
    lengths = [rng.randint(1, 9) for _ in range(5)]
    mask = torch.zeros(5, 9, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True
    data = torch.arange(45).view(5, 9) * mask
    batch = Batch(
        {"text": Items(data, mask, torch.tensor([0, 1, 1, 2, 3]), 4)}, 4, torch.arange(4), list("abcd"), [7, 8, 9, 6]
    )
    first, second = batch.split(2)
    assert (first.size, second.size) == (2, 2) and second.raw_targets == ["c", "d"] and second.index == [9, 6]
    assert second.items["text"].rows.tolist() == [0, 1] and second.targets.tolist() == [2, 3]
    assert first.items["text"].data.shape == (3, max(lengths[:3]))
    assert len(batch.split(3)) == 2 and len(batch.split(10)) == 4
