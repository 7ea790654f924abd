"""Several processes train as one would: the same curve, the same errors, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmhub.engine import train
from mmhub.engine.ranks import Ranks
from tests.conftest import recipe
from tests.fake_plugins import ROOT
from tests.ranks_worker import run_case

WORDS = ["red", "green", "blue", "cat", "dog", "fox", "runs", "sits", "sleeps", "here", "there", "now"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def on_ranks(world: int, cases: list[dict[str, Any]], folder: Path, timeout: float = 240) -> list[list[dict[str, Any]]]:
    """Run training cases one after the other in `world` processes; return each rank's results."""
    path = folder / f"cases-{free_port()}.json"
    path.write_text(json.dumps(cases))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "GOMP_SPINCOUNT": "1000"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks_worker", str(path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end or any(process.poll() for process in processes):
            break  # the others would wait for ever
        time.sleep(0.1)
    for process in processes:
        process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in range(world)]


def texts(folder: Path, count: int = 40) -> dict[str, Any]:
    """A recipe without anything random but the order of rows, over sentences of many lengths."""
    rng = random.Random(0)
    lines = ["text\tlabel"]
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 30))
        lines.append(f"{' '.join(words)}\t{'cat' if words.count('cat') else 'none'}")
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    config = {"dim": 16, "depth": 2, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}
    return {
        "task": "classification",
        "model": {
            "encoders": {"text": {"use": "transformer", "config": config}},
            "decoder": {"use": "classification", "config": {"dropout": 0.0}},
            "tokenizer": {"kind": "word", "min_frequency": 1},
        },
        "data": {"train": str(folder / "train.tsv"), "valid": str(folder / "train.tsv"), "target": "label"},
        "train": {"epochs": 2, "batch_size": 8, "log_every": 1, "learning_rate": 3e-3, "checkpoint_every": 3},
    }


def curve(out: Path) -> list[float]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


def valid_loss(out: Path) -> float:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["valid"]["loss"] for line in map(json.loads, lines) if "valid" in line][-1]


def streaming(folder: Path) -> dict[str, Any]:
    """The recipe of `texts` on a stream of four shards, one epoch."""
    table = texts(folder)
    lines = [line.split("\t") for line in (folder / "train.tsv").read_text().splitlines()[1:]]
    for number in range(4):
        rows = [json.dumps({"text": text, "label": label}) for text, label in lines[number::4]]
        (folder / f"shard-{number}.jsonl").write_text("\n".join(rows) + "\n")
    table["data"] |= {"train": str(folder / "shard-*.jsonl"), "stream": True, "shuffle_rows": 6}
    table["train"] |= {"epochs": 1, "max_steps": 30, "batch_size": 4}
    return table


def damaged(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same stream with a line in the last shard that is no JSON, which only the rank that reads it can know."""
    for number in range(4):
        text = (folder / f"shard-{number}.jsonl").read_text()
        (folder / f"damaged-{number}.jsonl").write_text(text + "{no json\n" * (number == 3))
    config = {"labels": ["cat", "none"], "dropout": 0.0}
    model = table["model"] | {"decoder": {"use": "classification", "config": config}, "tokenizer": {"kind": "byte"}}
    return table | {"model": model, "data": table["data"] | {"train": str(folder / "damaged-*.jsonl")}}


def missing_on_one_rank(tables: Path) -> dict[str, Any]:
    """A recipe whose batches of two rows hold one without a picture and one without a sound, so that each rank lacks
    something in every step."""
    import pyarrow.parquet as pq

    rows = pq.read_table(tables / "valid.parquet").to_pylist()
    one_each = [row | ({"image": None} if i % 2 else {"audio": None}) for i, row in enumerate(rows)]
    import pyarrow as pa

    path = tables / "one_each.parquet"
    pq.write_table(pa.Table.from_pylist(one_each), path)
    table = recipe(tables, batch_size=2, max_steps=4, log_every=1)
    table["data"] |= {"train": str(path)}
    return table


@pytest.mark.slow
def test_two_processes_train_as_one(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = texts(tmp_path)
    sharded = plain | {"train": plain["train"] | {"parallel": "fsdp"}}
    broken = texts(tmp_path) | {"data": plain["data"] | {"train": str(tmp_path / "broken.tsv")}}
    (tmp_path / "broken.tsv").write_text((tmp_path / "train.tsv").read_text() + "cat\t\n")
    lacking = missing_on_one_rank(tables)
    streamed = streaming(tmp_path)
    cases = [
        {"recipe": plain, "out": str(tmp_path / "ddp")},
        {"recipe": sharded, "out": str(tmp_path / "fsdp")},
        {"recipe": plain, "out": str(tmp_path / "stopped"), "stop_at": 4, "stop_rank": 1},
        {"recipe": sharded, "out": str(tmp_path / "stopped-fsdp"), "stop_at": 4},
        {"recipe": broken, "out": str(tmp_path / "broken")},
        {"recipe": lacking, "out": str(tmp_path / "lacking")},
        {"recipe": lacking | {"train": lacking["train"] | {"parallel": "fsdp"}}, "out": str(tmp_path / "lacking-fsdp")},
        {"recipe": sharded, "out": str(tmp_path / "in-evaluation"), "stop_in": 1, "stop_rank": 1},
        {"recipe": sharded, "out": str(tmp_path / "in-evaluation"), "resume": True},
        {"recipe": streamed, "out": str(tmp_path / "stream"), "stop_at": 3, "stop_rank": 1},
        {"recipe": streamed, "out": str(tmp_path / "stream"), "resume": True, "stop_at": 4},
        {"recipe": damaged(streamed, tmp_path), "out": str(tmp_path / "damaged")},
    ]
    first, second = on_ranks(2, cases, tmp_path)

    alone = train(plain, tmp_path / "alone")
    expected = curve(alone.out)
    assert len(expected) == alone.steps == 10
    for name in ("ddp", "fsdp"):
        assert curve(tmp_path / name) == pytest.approx(expected, rel=1e-4), name
        assert valid_loss(tmp_path / name) == pytest.approx(valid_loss(alone.out), rel=1e-4), name
    assert first[0]["metrics"]["accuracy"] == pytest.approx(alone.metrics["accuracy"])
    assert second[0]["steps"] == 10 and not second[0]["metrics"], "the first process alone describes the model"
    assert sorted(first[0]["rows"] + second[0]["rows"]) == sorted([*range(40)] * 2), "each row once an epoch"

    for case, name in ((2, "stopped"), (3, "stopped-fsdp")):
        assert first[case]["exit_code"] == second[case]["exit_code"] == 143, first[case]
        assert "; saved" in first[case]["error"]
        going_on = plain if name == "stopped" else sharded
        train(going_on, tmp_path / name, resume=True)  # one process goes on with what two began
        assert curve(tmp_path / name) == pytest.approx(expected, rel=1e-4), name

    for case, place in ((4, "broken.tsv row 41"), (11, "damaged-3.jsonl")):
        assert first[case]["error"] == second[case]["error"], "an error on one rank is the error of all"
        assert place in first[case]["error"]
    assert first[5]["steps"] == first[6]["steps"] == 4, "a rank without a modality takes part"

    assert first[7]["exit_code"] == 143 and first[8]["steps"] == 10
    assert curve(tmp_path / "in-evaluation") == pytest.approx(expected, rel=1e-4)

    assert first[9]["exit_code"] == first[10]["exit_code"] == 143
    monkeypatch.setenv("RANK", "0")
    last = run_case({"recipe": streamed, "out": str(tmp_path / "stream"), "resume": True})  # on one process
    seen = [row for case in (9, 10) for rank in (first, second) for row in rank[case]["rows"]] + last["rows"]
    assert len(seen) == len({*seen}) == 40 and last["rows"], "each row of a stream once an epoch"


@pytest.mark.slow
def test_torchrun_runs_the_same_recipe(tmp_path: Path) -> None:
    table = texts(tmp_path)
    from mmhub.config import check_recipe, dump_recipe

    (tmp_path / "recipe.toml").write_text(dump_recipe(check_recipe(table)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmhub", "train",
         "recipe.toml", "--out", "run", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 10
    assert curve(tmp_path / "run") == pytest.approx(curve(train(table, tmp_path / "alone").out), rel=1e-4)


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks()
    assert ranks.first and not ranks.several
    assert ranks.sum(1.0, 2.0) == [1.0, 2.0] and ranks.gather({"a": 1}) == [{"a": 1}] and ranks.tell("b") == "b"
    ranks.barrier()


def test_the_position_of_a_stream_keeps_every_ranks_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.engine.loop import with_all_places
    from mmhub.engine.state import Position

    def place(lane: int, row: int) -> dict[str, Any]:
        return {"epoch": 0, "lanes": 2, "shards": "a", "at": {str(lane): row}}

    ranks = Ranks(0, 2)
    monkeypatch.setattr(Ranks, "gather", lambda self, data: [data, place(1, 7)])
    assert with_all_places(Position(stream=place(0, 3)), None, ranks).stream == place(0, 3) | {"at": {"0": 3, "1": 7}}
    monkeypatch.setattr(Ranks, "gather", lambda self, data: [data, None])
    resumed = with_all_places(Position(stream=place(0, 3)), place(1, 5), ranks)
    assert resumed.stream is not None and resumed.stream["at"] == {"0": 3, "1": 5}, "a rank without a batch since"
    assert with_all_places(Position(), None, ranks).stream is None
