"""Streams: every row exactly once an epoch, whatever the ranks, windows and interruptions; mixing, damage, memory."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mmhub.config import DataRecipe, MixRecipe
from mmhub.data import hub_files
from mmhub.data import stream as stream_module
from mmhub.data import windows as windows_module
from mmhub.data.addresses import File, expand_braces, shown_address
from mmhub.data.hub_files import hub_split_files
from mmhub.data.lanes import Lane, Place, Unit, batch_shares, deal, scramble
from mmhub.data.parts import brief, without_secrets
from mmhub.data.shards import ParquetShard, find_shards
from mmhub.data.stream import Stream, join_states, open_stream, wants_stream
from mmhub.data.windows import Cut, Numbered, Window, ahead, weight
from mmhub.errors import InputError, NetworkError, NotFoundError, UsageError

Row = dict[str, Any]

# Shards in every format.


def row(i: int) -> Row:
    return {"id": str(i), "text": f"word {i} " * (i % 5)}


def text_of(ending: str, rows: Sequence[Row]) -> str:
    if ending == ".json":
        return json.dumps(rows, indent=1)
    if ending in (".csv", ".tsv"):
        mark = "," if ending == ".csv" else "\t"
        return "".join(mark.join(cells) + "\n" for cells in [["id", "text"], *([r["id"], r["text"]] for r in rows)])
    return "".join(json.dumps(r) + "\n" for r in rows)


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shard_bytes(ending: str, rows: Sequence[Row]) -> bytes:
    plain = ending.removesuffix(".gz").removesuffix(".zst")
    if plain == ".parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=5)
        return file.getvalue()
    if plain == ".tar":
        members = [(f"s{r['id']}.{kind}.txt", r[kind].encode()) for r in rows for kind in ("id", "text")]
        content = tar_bytes(members)
    else:
        content = text_of(plain, rows).encode()
    if ending.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if ending.endswith(".zst") else content


def write_shards(folder: Path, ending: str = ".jsonl", sizes: Sequence[int] = (11, 3, 17, 1, 8)) -> str:
    """Write shards with rows numbered from 0 on, and return the glob that names them."""
    at = 0
    for number, size in enumerate(sizes):
        (folder / f"s{number}{ending}").write_bytes(shard_bytes(ending, [row(i) for i in range(at, at + size)]))
        at += size
    return str(folder / f"s*{ending}")


def opened(source: Any, **options: Any) -> Stream:
    return open_stream(DataRecipe(train=source, stream=True, **options), None)


def mixed(sources: Sequence[tuple[Any, float]], **options: Any) -> Stream:
    return open_stream(DataRecipe(mix=[MixRecipe(source=s, weight=w) for s, w in sources], **options), None)


def cut_of(size: int) -> Cut:
    """Batches of `size` rows in a random order."""

    def cut(rows: list[Numbered], seed: int) -> list[list[int]]:
        batches = [list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
        random.Random(seed).shuffle(batches)
        return batches

    return cut


def ids(rows: Sequence[tuple[int, Row]]) -> list[str]:
    return [str(r.get("id", r.get("id.txt"))) for _, r in rows]


Batches = list[list[list[str]]]  # of each rank


def run(
    stream: Stream, world: int = 1, *, stop: int = 10**9, state: Any = None, epoch: int = 0, seed: int = 5
) -> tuple[Batches, Any]:
    """What each of `world` ranks gets until all have had `stop` batches or the epoch ends; and the joined state."""
    got: Batches = []
    states: list[Any] = [state]
    for rank in range(world):
        got.append([])
        batches = stream.batches(epoch, seed=seed, rank=rank, world=world, cut=cut_of(12 // world), state=state)
        for _, (rows, after) in zip(range(stop), batches, strict=False):
            got[-1].append(ids(rows))
            states.append(json.loads(json.dumps(after)))
        batches.close()  # type: ignore[attr-defined]
    return got, join_states(states)


def flat(got: Batches) -> list[str]:
    return [i for rank in got for batch in rank for i in batch]


def numbers(count: int) -> list[str]:
    return sorted(str(i) for i in range(count))


ENDINGS = (
    ".parquet",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".json",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tar",
    ".tar.gz",
    ".tar.zst",
)


# Exactly once.


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_comes_once_an_epoch_whatever_the_format_ranks_and_window(tmp_path: Path, ending: str) -> None:
    source = write_shards(tmp_path, ending)
    for window in (1, 7, 1000):
        for world in (1, 2, 3):
            got, _ = run(opened(source, shuffle_rows=window), world)
            assert sorted(flat(got)) == numbers(40), (window, world)


def test_lines_of_text_and_parallel_text_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    (tmp_path / "b.en").write_text("1\n2\n")
    (tmp_path / "b.de").write_text("eins\nzwei\n")
    assert list(opened(str(tmp_path / "a.txt"))) == [{"text": "one"}, {"text": ""}, {"text": "three"}]
    table = {"source": str(tmp_path / "b.en"), "target": str(tmp_path / "b.de")}
    assert list(opened(table)) == [{"source": "1", "target": "eins"}, {"source": "2", "target": "zwei"}]
    (tmp_path / "b.de").write_text("eins\n")
    with pytest.raises(
        InputError, match="ends before the others, after row 1; parallel text needs one line for each line"
    ):
        list(opened(table))


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.gz", ".tar"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_interrupted_epoch_goes_on_with_the_very_same_batches(tmp_path: Path, ending: str, world: int) -> None:
    stream = opened(write_shards(tmp_path, ending), shuffle_rows=9)
    whole, _ = run(stream, world)
    for stop in range(max(len(rank) for rank in whole) + 1):
        before, state = run(stream, world, stop=stop)
        after, _ = run(opened(str(tmp_path / f"s*{ending}"), shuffle_rows=9), world, state=state)
        assert [a + b for a, b in zip(before, after, strict=True)] == whole, stop


@pytest.mark.parametrize("worlds", [(3, 1, 2), (2, 3, 1), (1, 2, 2), (3, 2, 3), (2, 1, 1)])
@pytest.mark.parametrize("window", [4, 11, 1000])
def test_a_run_goes_on_with_other_numbers_of_ranks_and_no_row_is_lost_or_repeated(
    tmp_path: Path, worlds: tuple[int, int, int], window: int
) -> None:
    stream = opened(write_shards(tmp_path), shuffle_rows=window)
    for first in (0, 1, 2, 3, 5):
        for second in (0, 1, 2):
            one, state = run(stream, worlds[0], stop=first)
            two, state = run(stream, worlds[1], stop=second, state=state)
            three, _ = run(stream, worlds[2], state=state)
            assert sorted(flat(one) + flat(two) + flat(three)) == numbers(40), (first, second)


def test_a_window_that_was_cut_afresh_goes_on_with_the_very_same_batches(tmp_path: Path) -> None:
    stream = opened(write_shards(tmp_path, sizes=(80, 90)), shuffle_rows=1000)
    _, state = run(stream, 2, stop=1)
    whole, _ = run(stream, 1, state=state)
    for stop in range(1, 6):
        before, between = run(stream, 1, stop=stop, state=state)
        after, _ = run(stream, 1, state=between)
        assert before[0] + after[0] == whole[0]


def test_the_order_differs_by_epoch_and_seed_and_not_between_runs(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    first, again = (run(opened(source), 2)[0] for _ in range(2))
    assert first == again
    others = [run(opened(source), 2, **change)[0] for change in ({"epoch": 1}, {"seed": 6})]
    assert len({json.dumps(got) for got in (first, *others)}) == 3
    one, two = (list(map(int, flat(run(opened(source), 1, epoch=epoch)[0]))) for epoch in (0, 1))
    assert one != two != sorted(two)
    single = str(tmp_path / "s2.jsonl")
    assert len({json.dumps(run(opened(single), epoch=epoch)[0]) for epoch in range(3)}) == 3, "of one unit, too"


def test_rows_are_shuffled_within_their_window_only(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(shard_bytes(".jsonl", [row(i) for i in range(40)]))
    got = [int(i) for i in flat(run(opened(str(tmp_path / "one.jsonl"), shuffle_rows=10))[0])]
    windows = [got[i : i + 10] for i in range(0, 40, 10)]
    assert [sorted(window) for window in windows] == [list(range(i, i + 10)) for i in range(0, 40, 10)]
    assert [i % 10 for i in windows[0]] != [i % 10 for i in windows[1]], "each in its own order"


def test_a_window_is_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "WINDOW_BYTES", 3 * weight(row(0)))
    (tmp_path / "one.jsonl").write_bytes(shard_bytes(".jsonl", [row(0)] * 9))
    sizes: list[int] = []

    def cut(rows: list[Numbered], seed: int) -> list[list[int]]:
        sizes.append(len(rows))
        return [list(range(len(rows)))]

    list(opened(str(tmp_path / "one.jsonl")).batches(0, seed=0, rank=0, world=1, cut=cut))
    assert sizes == [3, 3, 3]


def test_fewer_units_than_ranks_are_read_by_all_who_take_turns(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(shard_bytes(".jsonl", [row(i) for i in range(10)]))
    got, _ = run(opened(str(tmp_path / "one.jsonl")), 3)
    assert [len(flat([rank])) for rank in got] == [4, 3, 3]
    assert sorted(flat(got)) == numbers(10)


def test_parquet_row_groups_are_shared_out_when_files_are_few(tmp_path: Path) -> None:
    (tmp_path / "one.parquet").write_bytes(shard_bytes(".parquet", [row(i) for i in range(40)]))
    got, _ = run(opened(str(tmp_path / "one.parquet")), 2)
    for rank in got:
        groups = Counter(int(i) // 5 for i in flat([rank]))
        assert list(groups.values()) == [5] * 4, "whole groups of 5 rows"


def test_units_are_dealt_evenly_and_never_twice() -> None:
    for sizes in ([1] * 12, [9, 1, 1, 1, 1, 1, 1, 1, 1, 1], list(range(1, 30))):
        for lanes in (1, 2, 3):
            dealt, striped = deal(sizes, [4] * lanes, key=7)
            assert not striped
            assert sorted(i for lane in dealt for i in lane) == list(range(len(sizes)))
            shares = [sum(sizes[i] for i in lane) for lane in dealt]
            assert max(shares) <= 1.5 * sum(sizes) / lanes
    assert deal([1, 1], [1] * 3, key=7)[1], "one rank would have nothing"
    assert deal([100, 1, 1], [1, 1], key=7)[1], "one rank would have nearly all"
    assert deal([1] * 9, [1, 1], key=7) != deal([1] * 9, [1, 1], key=8)


# How many batches.


def counted(stream: Stream, batch_size: int, world: int) -> list[list[int]]:
    """The rows of the batches that each rank gets in an epoch."""
    return [
        [
            len(rows)
            for rows, _ in stream.batches(
                0,
                seed=5,
                rank=rank,
                world=world,
                cut=lambda pairs, seed, share=share: [  # type: ignore[misc]
                    list(range(i, min(i + share, len(pairs)))) for i in range(0, len(pairs), share)
                ],
                batch_size=batch_size,
            )
        ]
        for rank, share in enumerate(batch_shares(batch_size, world))
    ]


@pytest.mark.parametrize(("sizes", "few"), [((11, 3, 17, 1, 8), 64), ((40,), 64), ((40,), 0), ((30, 5, 3), 0)])
@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (6, 2), (3, 2), (8, 3), (7, 3), (1, 2)])
@pytest.mark.parametrize("window", [1, 7, 1000])
def test_only_the_last_batch_of_a_rank_is_smaller_and_their_number_is_known(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, ...],
    few: int,
    batch_size: int,
    world: int,
    window: int,
) -> None:
    monkeypatch.setattr(stream_module, "_FEW", few)  # files up to which row groups are units
    stream = opened(write_shards(tmp_path, ".parquet", sizes), shuffle_rows=window)
    got = counted(stream, batch_size, world)
    assert sum(map(sum, got)) == sum(sizes)
    shares = batch_shares(batch_size, world)
    assert sum(shares) == max(batch_size, world)
    for share, batches in zip(shares, got, strict=True):
        assert set(batches[:-1]) <= {share}
    assert stream.batches_known(batch_size, world, 0, 5) == max(map(len, got))


def test_windows_hold_whole_batches_where_bytes_bound_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "WINDOW_BYTES", 3 * weight(row(0)))
    stream = opened(write_shards(tmp_path, sizes=(22,)))
    assert counted(stream, 4, 1) == [[4, 4, 4, 4, 4, 2]]


def test_the_number_of_batches_is_unknown_where_that_of_rows_is(tmp_path: Path) -> None:
    assert opened(write_shards(tmp_path)).batches_known(4, 2, 0, 5) is None


def test_the_number_of_batches_of_a_mix_is_what_its_weights_lead_to_expect(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    a, b = write_shards(tmp_path / "a", ".parquet", [3000]), write_shards(tmp_path / "b", ".parquet", [400])
    stream = mixed([(a, 3.0), (b, 1.0)])
    assert stream.batches_known(10, 1, 0, 5) == 400
    assert 380 < len(counted(stream, 10, 1)[0]) < 420


def test_a_window_is_read_again_as_it_was_whatever_the_batches_now(tmp_path: Path) -> None:
    stream = opened(write_shards(tmp_path), shuffle_rows=9)

    def batches(size: int, state: Any) -> Any:
        return stream.batches(0, seed=5, rank=0, world=1, cut=cut_of(size), batch_size=size, state=state)

    for done in range(1, 8):
        first, states = zip(*itertools.islice(batches(5, None), done), strict=True)
        after = [rows for rows, _ in batches(3, json.loads(json.dumps(states[-1])))]
        assert sorted(i for rows in [*first, *after] for i in ids(rows)) == numbers(40), done


def test_a_state_of_other_shards_or_another_epoch_is_refused(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    _, state = run(opened(source), 1, stop=1)
    with pytest.raises(UsageError, match="one of epoch 1, not 2"):
        run(opened(source), 1, epoch=1, state=state)
    (tmp_path / "s9.jsonl").write_text('{"id": "40"}\n')
    with pytest.raises(UsageError, match="have changed since this run was saved"):
        run(opened(source), 1, state=state)


def test_the_states_of_an_old_and_a_new_epoch_are_not_mixed() -> None:
    old, new = ({"epoch": e, "lanes": 2, "shards": "x", "at": {str(lane): {}}} for e, lane in ((0, 0), (1, 1)))
    assert join_states([old, None, new]) == new
    assert join_states([None]) is None


# Mixing.


def make_mix(tmp_path: Path, sizes: tuple[int, int], weights: tuple[float, float], **options: Any) -> Stream:
    for name, size in zip("ab", sizes, strict=True):
        lines = "".join(json.dumps({"id": f"{name}{i}"}) + "\n" for i in range(size))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return mixed([(str(tmp_path / f"{name}.jsonl"), w) for name, w in zip("ab", weights, strict=True)], **options)


def test_sources_are_mixed_by_weight_until_each_was_passed_once(tmp_path: Path) -> None:
    got = Counter(flat(run(make_mix(tmp_path, (300, 40), (3.0, 1.0)))[0]))
    of_a = [count for name, count in got.items() if name[0] == "a"]
    of_b = [count for name, count in got.items() if name[0] == "b"]
    assert of_a == [1] * 300, "the source that lasts longest is passed once"
    assert len(of_b) == 40
    assert set(of_b) <= {2, 3}, "the other goes round"
    assert 70 <= sum(of_b) <= 130
    assert max(of_b) - min(of_b) <= 1


def test_each_pass_has_its_own_order() -> None:
    units = [Unit(i, i, None, 0, 1) for i in range(20)]
    rows: list[tuple[int, Row]] = [(0, {})]
    lane = Lane(
        [(units, 9.0), ([units[0]] * 20, 1.0)],
        lambda unit, start, aloud: iter(rows[start:]),
        key=(1, 0),
        lane=0,
        shares=[1],
    )
    order = [number >> 32 for number, _ in lane]
    passes = [[i for i in order if i][k * 19 : k * 19 + 19] for k in (0, 1)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(1, 20))
    assert passes[0] != passes[1]


def test_a_mix_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    stream = make_mix(tmp_path, (60, 9), (2.0, 1.0), shuffle_rows=10)
    for world in (1, 2):
        whole, _ = run(stream, world)
        for stop in (1, 3, 6):
            before, state = run(stream, world, stop=stop)
            after, _ = run(stream, world, state=state)
            assert [a + b for a, b in zip(before, after, strict=True)] == whole


def test_a_mix_ends_though_a_source_has_no_row_for_a_rank(tmp_path: Path) -> None:
    got, _ = run(make_mix(tmp_path, (30, 1), (1.0, 1.0)), 2)
    assert set(flat(got)) == {f"a{i}" for i in range(30)} | {"b0"}
    assert "b0" not in flat(got[1:]), "it is the first rank's"


def test_the_rows_of_a_mix_are_estimated_where_those_of_its_sources_are_known(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = write_shards(tmp_path / "a", ".parquet", [30]), write_shards(tmp_path / "b", ".parquet", [40])
    assert mixed([(a, 3.0), (b, 1.0)]).rows == 160
    assert mixed([(a, 3.0), (write_shards(tmp_path / "b", ".csv", [4]), 1.0)]).rows is None


def test_a_source_may_lack_a_column_of_another(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["x"], "text": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": ["y"]}), tmp_path / "b.parquet")
    stream = mixed([(str(tmp_path / "a.parquet"), 1.0), (str(tmp_path / "b.parquet"), 1.0)]).only(["id", "text"])
    assert stream.columns == ("id", "text")
    assert sorted(map(len, stream)) == [1, 2]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(tmp_path: Path, weight: float) -> None:
    with pytest.raises(UsageError, match="weights are finite and above 0"):
        make_mix(tmp_path, (1, 1), (1.0, weight))


def test_a_draw_is_fair() -> None:
    units = [Unit(i, i, None, 0, 1) for i in range(2)]

    def endless(unit: Unit, start: int, aloud: bool) -> Iterator[tuple[int, Row]]:
        yield from ((i, {}) for i in range(start, 10**6))

    lane = Lane([([units[0]], 1.0), ([units[1]], 4.0)], endless, key=(1, 0), lane=0, shares=[1])
    drawn = Counter(number >> 32 for number, _ in zip(range(5000), lane, strict=False) for number in [_[0]])
    assert 0.78 < drawn[1] / 5000 < 0.82
    assert len({scramble(a, b) for a in range(50) for b in range(50)}) == 2500


# Tar files.


def read_tar(folder: Path, members: Sequence[tuple[str, bytes]], name: str = "t.tar", **options: Any) -> list[Row]:
    (folder / name).write_bytes(tar_bytes(members))
    return list(opened(str(folder / name), **options))


def test_members_of_a_tar_that_share_a_name_are_a_sample(tmp_path: Path) -> None:
    members = [
        ("a/1.jpg", b"pixels"),
        ("a/1.cls", b" 7\n"),
        ("a/1.seg.PNG", b"mask"),
        ("b/1.txt", "schön".encode()),
        ("b/1.cls", b"cat"),
        ("v1.0/x.json", b'{"k": [1]}'),
        ("v1.0/y.json", b"2"),
        ("README", b"no extension"),
        ("b/.hidden.txt", b"hidden"),
        ("__meta__.json", b"{}"),
        ("b/1.txt", b"again, as a sample of its own"),
    ]
    assert read_tar(tmp_path, members) == [
        {
            "__key__": "a/1",
            "jpg": {"bytes": b"pixels", "path": "a/1.jpg"},
            "cls": 7,
            "seg.png": {"bytes": b"mask", "path": "a/1.seg.PNG"},
        },
        {"__key__": "b/1", "txt": "schön", "cls": "cat"},
        {"__key__": "v1.0/x", "json": {"k": [1]}},
        {"__key__": "v1.0/y", "json": 2},
        {"__key__": "b/1", "txt": "again, as a sample of its own"},
    ]
    assert opened(str(tmp_path / "t.tar")).columns == ("__key__", "jpg", "cls", "seg.png", "txt", "json")


def test_links_folders_and_devices_in_a_tar_are_left_out_and_unsafe_names_are_labels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"x{kind.decode()}.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("../../evil.txt", "/abs.txt", "long/" * 60 + "n.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ok"))
    before = sorted(tmp_path.iterdir())
    rows = list(opened(str(tmp_path / "t.tar")))
    assert [r["__key__"] for r in rows] == ["../../evil", "/abs", "long/" * 60 + "n"]
    assert all(r["txt"] == "ok" for r in rows)
    assert sorted(tmp_path.iterdir()) == before


def test_a_pickle_in_a_tar_is_bytes(tmp_path: Path) -> None:
    (sample,) = read_tar(tmp_path, [("a.pkl", pickle.dumps([1])), ("a.pyd", pickle.dumps([1]))])
    assert sample["pkl"]["bytes"] == sample["pyd"]["bytes"] == pickle.dumps([1])


def test_only_the_wanted_members_of_a_tar_are_kept(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes([("a.jpg", b"x" * 100), ("a.cls", b"1"), ("b.cls", b"2")]))
    stream = opened(str(tmp_path / "t.tar"))
    assert list(stream.only(["cls"])) == [{"__key__": "a", "cls": 1}, {"__key__": "b", "cls": 2}]
    assert list(stream.column("cls")) == [1, 2]


def test_a_member_that_cannot_be_read_costs_its_sample_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.json", b"{}"), ("b.json", b"{bad"), ("c.txt", b"\xff"), ("d.json", b"{}")]
    with pytest.raises(InputError, match=r"t\.tar row 2: member 'b\.json' cannot be read: Expecting property name"):
        read_tar(tmp_path, members)
    stream = opened(str(tmp_path / "t.tar"), on_error="skip")
    got = list(stream.batches(0, seed=0, rank=0, world=1, cut=cut_of(9)))
    assert sorted(r["__key__"] for rows, _ in got for _, r in rows) == ["a", "d"]
    assert stream.skipped == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["skipped", f" t.tar row {i}"] for i in (2, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:1500], "t.tar' is damaged: it has no end mark after member 's0.id.txt'; it may"),
        (lambda data: data[: 512 * 4], "t.tar' is damaged: it has no end mark after member 's0.text.txt'"),
        (lambda data: data[:600], "t.tar' is not a readable tar at member 's0.id.txt'"),
        (lambda data: data[:1024] + b"rubbish" * 400, "t.tar' is damaged: it has no end mark after member 's0.id.txt'"),
        (lambda data: b"rubbish" * 400, "t.tar' is not a readable tar"),
        (lambda data: b"", "t.tar' is empty"),
        (lambda data: tar_bytes([]), "t.tar' has no samples"),
        (lambda data: tar_bytes([("a.txt", b""), ("a.txt", b"")]), "t.tar' has two members 'a.txt' in a row"),
    ],
)
def test_a_damaged_tar_is_one_line_that_says_where(tmp_path: Path, change: Any, message: str) -> None:
    whole = tar_bytes([(f"s{i}.{kind}.txt", b"x" * 200) for i in range(2) for kind in ("id", "text")])
    (tmp_path / "t.tar").write_bytes(change(whole))
    with pytest.raises(InputError) as caught:
        list(opened(str(tmp_path / "t.tar")))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Damage.


def test_a_damaged_shard_stops_the_run_or_is_skipped_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path, ".parquet", (20, 20))
    write_shards(tmp_path, ".jsonl.gz", (20, 20))
    zipped = tmp_path / "s1.jsonl.gz"
    zipped.write_bytes(zipped.read_bytes()[:60])
    data = bytearray((tmp_path / "s1.parquet").read_bytes())
    data[4:60] = b"\xff" * 56
    (tmp_path / "s1.parquet").write_bytes(data)
    for glob, message in (
        (source, r"s1\.parquet' is damaged: "),
        (str(tmp_path / "*.gz"), r"gz' is damaged"),
    ):
        with pytest.raises(InputError, match=message):
            run(opened(glob))
        stream = opened(glob, on_error="skip")
        got = flat(run(stream)[0])
        assert set(got) >= {str(i) for i in range(20)}
        assert len(set(got)) == len(got) < 40
        assert stream.skipped >= 1
        assert capsys.readouterr().err.count("skipped: ") == stream.skipped


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv", ".jsonl.zst", ".tar"])
def test_an_empty_shard_is_an_error_or_skipped(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_shards(tmp_path, ending, (3, 3))
    (tmp_path / f"s1{ending}").write_bytes(b"")
    with pytest.raises(InputError, match=rf"'s1\{ending}' is empty"):
        opened(source)
    stream = opened(source, on_error="skip")
    assert sorted(flat(run(stream)[0])) == numbers(3)
    assert stream.skipped == 1
    assert capsys.readouterr().err == f"skipped: 's1{ending}' is empty\n"
    (tmp_path / f"s0{ending}").write_bytes(b"")
    with pytest.raises(InputError, match="has no readable shard"):
        opened(source, on_error="skip")


def test_damage_within_a_shard_is_placed(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": random.Random(i).randbytes(300).hex()} for i in range(9000)]
    (tmp_path / "a.jsonl.gz").write_bytes(shard_bytes(".jsonl.gz", rows)[:-1_000_000])
    batches = opened(str(tmp_path / "a.jsonl.gz"), shuffle_rows=10).batches(0, seed=0, rank=0, world=1, cut=cut_of(5))
    with pytest.raises(
        InputError, match=r"'a\.jsonl\.gz' is damaged: Compressed file ended .*, after row [1-9]\d{3}; mend it, or set"
    ):
        list(batches)


def test_a_table_without_rows_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n")
    (tmp_path / "b.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "c.parquet")
    for name in ("a.csv", "b.jsonl", "c.parquet"):
        with pytest.raises(InputError, match=f"'{name}' has no rows"):
            list(opened(str(tmp_path / name)))


def test_a_bad_line_costs_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "0"}\n\n{bad\n[1]\n{"id": "1"}\n')
    with pytest.raises(InputError, match=r"'a\.jsonl' line 3 is not valid JSON"):
        run(opened(str(tmp_path / "a.jsonl")))
    stream = opened(str(tmp_path / "a.jsonl"), on_error="skip")
    assert sorted(flat(run(stream)[0])) == numbers(2)
    assert stream.skipped == 2
    assert "line 4 is a JSON list; expected an object" in capsys.readouterr().err
    (tmp_path / "a.tsv").write_text("id\ttext\n0\tx\n1\n2\ty\n")
    with pytest.raises(InputError, match=r"'a\.tsv' line 3 has 1 fields, expected 2"):
        run(opened(str(tmp_path / "a.tsv")))
    assert sorted(flat(run(opened(str(tmp_path / "a.tsv"), on_error="skip"))[0])) == ["0", "2"]


def test_each_skipped_line_is_told_once_and_counted_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row(i)) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "{bad", *lines[3:], "{worse"]) + "\n")
    (tmp_path / "b.jsonl").write_text("")

    def streams() -> list[Stream]:
        return [opened(str(tmp_path / "*.jsonl"), on_error="skip", shuffle_rows=4) for _ in range(2)]

    ranks = streams()
    batches = [s.batches(0, seed=5, rank=r, world=2, cut=cut_of(4)) for r, s in enumerate(ranks)]
    states = [[json.loads(json.dumps(state)) for _, state in part] for part in batches]
    assert sum(stream.skipped for stream in ranks) == 3
    told = capsys.readouterr().err.splitlines()
    assert [sum(word in line for line in told) for word in ("empty", "line 4 ", "line 22")] == [1, 1, 1]
    assert len(told) == 3
    for stop in range(3):
        again, state = streams(), join_states([part[stop] for part in states])
        for rank, stream in enumerate(again):
            list(stream.batches(0, seed=5, rank=rank, world=2, cut=cut_of(4), state=state))
        assert sum(stream.skipped for stream in again) == 3, stop


def test_a_resumed_shard_that_disagrees_is_not_placed_after_a_row(tmp_path: Path) -> None:
    write_shards(tmp_path, ".csv", (3, 3))
    (tmp_path / "s1.csv").write_text("id,txt\n3,x\n4,y\n")
    stream = opened(str(tmp_path / "s*.csv"))
    with pytest.raises(InputError, match=r"no column 'text'; it has id, txt$"):
        next(stream._read(stream._units[1], 1, True))


def test_shards_that_disagree_are_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path, ".csv", (3, 3))
    (tmp_path / "s1.csv").write_text("id,txt\n3,x\n")
    with pytest.raises(InputError, match=r"shards disagree: 's1\.csv' has no column 'text'; it has id, txt"):
        run(opened(str(tmp_path / "s*.csv")))


def test_reading_beside_the_training_neither_counts_nor_tells_what_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "0"}\n{bad\n{"id": "1"}\n')
    stream = opened(str(tmp_path / "a.jsonl"), on_error="skip")
    assert list(stream.column("id")) == ["0", "1"]
    assert (stream.skipped, capsys.readouterr().err) == (0, "")


# What a stream says of itself.


def test_a_stream_says_where_a_row_came_from(tmp_path: Path) -> None:
    stream = opened(write_shards(tmp_path, ".parquet", (12, 12)))
    places = {
        r["id"]: stream.where(i)
        for rows, _ in stream.batches(0, seed=1, rank=0, world=1, cut=cut_of(5))
        for i, r in rows
    }
    assert places["0"] == "s0.parquet row 1"
    assert places["23"] == "s1.parquet row 12"
    assert [stream.where(number) for number, _ in stream.cells("id")][5:7] == ["s0.parquet row 6", "s0.parquet row 7"]
    assert stream.folder(0) == tmp_path
    assert (stream.rows, stream.columns) == (24, ("id", "text"))


def test_columns_are_chosen_and_read_alone(tmp_path: Path) -> None:
    for ending in ENDINGS:
        stream = opened(write_shards(tmp_path, ending, (7, 6)))
        name = "id.txt" if ".tar" in ending else "id"
        assert list(stream.column(name)) == [str(i) for i in range(13)], ending
        assert {frozenset(r) - {"__key__"} for r in stream.only([name])} == {frozenset([name])}
    stream = opened(write_shards(tmp_path, ".csv"))
    with pytest.raises(UsageError, match=r"no column 'ids' in .*did you mean 'id'"):
        stream.only(["ids"])


def test_the_fingerprint_names_every_file_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path, ".parquet", (4, 4))
    found = opened(source).fingerprint()
    assert [f["name"] for f in found["files"]] == ["s0.parquet", "s1.parquet"]
    assert all(len(f["sha256"]) == 64 and "modified" not in f for f in found["files"])
    assert (found["rows"], found["streamed"]) == (8, True)
    monkeypatch.setattr(stream_module, "_HASHED", 10)
    assert all("sha256" not in f and f["modified"] for f in opened(source).fingerprint()["files"])
    monkeypatch.setattr(stream_module, "_LISTED", 1)
    (entry,) = opened(source).fingerprint()["files"]
    assert entry["files"] == 2
    assert len(entry["listing_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(found)


def test_the_fingerprint_is_that_of_the_files_when_it_was_first_asked_for(tmp_path: Path) -> None:
    write_shards(tmp_path, ".csv", (4, 4))
    stream, begun, late = (opened(str(tmp_path / "s*.csv")) for _ in range(3))
    found = stream.fingerprint()
    assert len(flat(run(begun)[0])) == 8
    (tmp_path / "s0.csv").unlink()
    assert stream.fingerprint() == stream.only(["id"]).fingerprint() == found
    assert begun.fingerprint() == found, "training asks for it"
    assert late.fingerprint()["files"][0]["note"] == "cannot read 's0.csv': No such file or directory"
    assert late.fingerprint()["files"][1] == found["files"][1]


SECRETS = [
    ("https://ada:pw@host/a.tar", "https://host/a.tar"),
    ("https://ada@host:80/a.tar?sig=S", "https://host:80/a.tar"),
    ("http://host:8080/x@y/a.tar?SECRET", "http://host:8080/x@y/a.tar"),
    ("simplecache::https://u:p@h/x?sig=S", "simplecache::https://h/x"),
    ("zip://a.csv::https://u:p@h/x.zip?sig=S", "zip://a.csv::https://h/x.zip"),
    ("abfs://box/a.tar?sv=2024&sig=S", "abfs://box/a.tar"),
    ("s3://key:sec/ret@bucket/a.tar", "s3://bucket/a.tar"),
    ("s3://key:p@ss@bucket/part-?.tar", "s3://bucket/part-?.tar"),
    ("hf://datasets/org/set@main/a?.tar", "hf://datasets/org/set@main/a?.tar"),
    (
        "Max retries exceeded with url: /x?X-Amz-Signature=S (Caused by)",
        "Max retries exceeded with url: /x (Caused by)",
    ),
    ("404, url='https://u:p@h/x?sig=S&b=S'", "404, url='https://h/x'"),
    ("org/set@main#en:train", "org/set@main#en:train"),
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_logins_and_signatures_are_shown_nowhere(text: str, shown: str) -> None:
    assert without_secrets(text) == shown_address(text) == brief(ValueError(text)) == shown


def test_recipes_that_want_a_stream() -> None:
    assert wants_stream(DataRecipe(train="a.csv", stream=True))
    assert wants_stream(DataRecipe(mix=[MixRecipe(source="a.csv")]))
    assert wants_stream(DataRecipe(train=["a.csv", "b-{0..9}.tar.gz"]))
    assert wants_stream(DataRecipe(train="s3://bucket/a.parquet"))
    assert not wants_stream(DataRecipe(train={"source": "a.en", "target": "a.de"}))
    assert not wants_stream(DataRecipe(train="sql://host/table"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "a.csv", "mix": [MixRecipe(source="a.csv")]}, "data.train and data.mix are both given"),
        ({"train": "a.csv", "stream": True, "shuffle_rows": 0}, "shuffle_rows is 0; it must be at least 1"),
        ({"train": "folder", "stream": True}, "'folder' is a folder, and folders are not streamed; name the shards"),
        ({"train": "a.xlsx", "stream": True}, "'a.xlsx' has no extension that is streamed; known are .parquet"),
        ({"train": "sql:db", "stream": True}, "'sql:db' is not streamed"),
        ({"train": [], "stream": True}, "the list of data files is empty"),
        ({"train": "nope://x/a.csv", "stream": True}, "'nope://' is no known kind of address"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UsageError) as caught:
        open_stream(DataRecipe(**given), tmp_path)
    assert message in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, ".tar", (2, 2))
    assert len(list(opened(str(tmp_path / "s{0..1}.tar")))) == 4
    with pytest.raises(NotFoundError, match=r"no file or folder '.*s2\.tar'; did you mean"):
        opened(str(tmp_path / "s{0..2}.tar"))
    with pytest.raises(NotFoundError, match="no file matches"):
        opened(str(tmp_path / "*.parquet"))
    assert expand_braces("a{008..011}{x,y}.tar")[::3] == ["a008x.tar", "a009y.tar", "a011x.tar"]
    assert expand_braces("a{b,{c,d{1..2}}}") == ["ab", "ac", "ad1", "ad2"]
    with pytest.raises(UsageError, match="more than 100,000 files"):
        expand_braces("a{0..9999}{0..99}")


# Elsewhere.


@pytest.fixture
def memory() -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.gz", ".csv.zst", ".tar", ".tar.gz", ".tar.zst"])
def test_shards_behind_an_address_are_read_in_place(memory: Any, ending: str) -> None:
    for number in range(3):
        rows = [row(i) for i in range(number * 9, number * 9 + 9)]
        memory.pipe(f"/set/s{number}{ending}", shard_bytes(ending, rows))
    stream = opened(f"memory://set/s*{ending}", shuffle_rows=8)
    whole, _ = run(stream, 2)
    assert sorted(flat(whole)) == numbers(27)
    before, state = run(stream, 2, stop=1)
    after, _ = run(opened(f"memory://set/s{{0..2}}{ending}", shuffle_rows=8), 2, state=state)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole
    assert stream.folder(0) is None
    files = stream.fingerprint()["files"]
    assert files[0]["name"] == f"memory:///set/s0{ending}" or files[0]["name"] == f"memory://set/s0{ending}"
    assert files[0]["created"]
    with pytest.raises(NotFoundError, match=r"no file 'memory://set/x\.csv'"):
        opened("memory://set/x.csv")


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize(("ending", "change"), [(".tar", b"\xff"), (".tar.zst", b"\xff"), (".tar.gz", b"\xff")])
def test_damage_within_a_tar_is_skipped_wherever_it_is(
    tmp_path: Path, memory: Any, where: str, ending: str, change: bytes
) -> None:
    rows = [{"id": str(i), "text": random.Random(i).randbytes(3000).hex()} for i in range(400)]
    data = bytearray(shard_bytes(ending, rows))
    if ending == ".tar":
        data[len(data) // 1024 // 8 * 4096 :] = change * 512 * 20  # where a header would be, or its member's middle
    else:
        data[len(data) // 2 : len(data) // 2 + 4000] = change * 4000
    memory.pipe(f"/t{ending}", bytes(data))
    (tmp_path / f"t{ending}").write_bytes(data)
    source = f"memory://t{ending}" if where == "memory" else str(tmp_path / f"t{ending}")
    with pytest.raises(InputError, match=r"is not a readable tar|is damaged"):
        list(opened(source))
    stream = opened(source, on_error="skip")
    assert 0 < len(flat(run(stream)[0])) < 400
    assert stream.skipped == 1


def test_a_tar_header_that_is_rubbish_is_damage_and_no_matter_of_the_network(memory: Any) -> None:
    memory.pipe("/t.tar", b"rubbish" * 400)
    with pytest.raises(InputError, match="is not a readable tar"):
        list(opened("memory://t.tar"))


def test_a_file_elsewhere_whose_size_is_not_told_is_not_empty(memory: Any) -> None:
    memory.pipe("/t.parquet", shard_bytes(".parquet", [row(0)]))
    (shard,) = find_shards("memory://t.parquet", None, None)
    assert list(ParquetShard(replace(shard.file, size=0)).rows()) == [row(0)]


def test_the_hub_is_not_read_through_another_file_system(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(UsageError, match="chains hf:// to something else"):
        opened("simplecache::hf://datasets/org/set/a.csv")


def test_parallel_text_on_the_hub_obeys_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub.data.hub_files.is_offline", lambda: True)
    with pytest.raises(NetworkError, match="offline mode is on"):
        opened({"source": "hf://datasets/org/set/a.en", "target": "hf://datasets/org/set/a.de"})


def test_a_local_address_is_a_local_path(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    stream = opened(f"file://{source}")
    assert sorted(flat(run(stream)[0])) == numbers(40)
    assert stream.folder(0) == tmp_path
    assert str(tmp_path) not in json.dumps(stream.fingerprint()["files"])


def test_an_address_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("fsspec.registry")
    monkeypatch.setitem(registry.known_implementations, "moon", {"class": "moonfs.MoonFS", "err": "Install moonfs"})
    with pytest.raises(UsageError, match="'moon://' needs a package that is missing; run: pip install moonfs"):
        opened("moon://crater/a.tar")


def test_a_broken_connection_is_tried_again_where_it_broke(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/set/a.jsonl", shard_bytes(".jsonl", [row(i) for i in range(30)]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    broken = {"left": 0}

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 300 and broken["left"]:
                broken["left"] -= 1
                raise RuntimeError("connection reset")
            return super().read(200)

    monkeypatch.setattr(File, "open", lambda file: Broken(memory.cat("/set/a.jsonl")))
    stream = opened("memory://set/a.jsonl")
    broken["left"] = 2
    assert sorted(flat(run(stream)[0])) == numbers(30)
    broken["left"] = 99
    with pytest.raises(NetworkError, match=r"cannot read 'memory://.*set/a\.jsonl': connection reset"):
        run(stream)


def test_a_connection_may_break_any_number_of_times_if_rows_came_between(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/set/a.jsonl", shard_bytes(".jsonl", [row(i) for i in range(60)]))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    opens = [0]

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 400 * opens[0]:
                raise RuntimeError("connection reset")
            return super().read(200)

    def open_file(file: File) -> Broken:
        opens[0] += 1
        return Broken(memory.cat("/set/a.jsonl"))

    stream = opened("memory://set/a.jsonl")
    monkeypatch.setattr(File, "open", open_file)
    assert sorted(flat(run(stream)[0])) == numbers(60)
    assert opens[0] > 4


def upload(hub: str, files: dict[str, bytes], repo: str = "org/set") -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=hub)
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    added = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(repo, added, commit_message="data", repo_type="dataset")


@pytest.mark.usefixtures("client")
def test_a_data_set_on_the_hub_is_streamed_at_one_commit(hub: str) -> None:
    parts = [[row(i) for i in range(k * 10, k * 10 + 10)] for k in range(3)]
    upload(hub, {f"data/train-{k}.parquet": shard_bytes(".parquet", rows) for k, rows in enumerate(parts)})
    upload(hub, {"data/test-0.parquet": shard_bytes(".parquet", parts[0][:2]), "notes.md": b"# A set"})
    stream = opened("hub:org/set", shuffle_rows=8)
    assert stream.rows == 30
    whole, _ = run(stream, 2)
    assert sorted(flat(whole)) == numbers(30)
    before, state = run(stream, 2, stop=2)
    after, _ = run(opened("hf://datasets/org/set/data/train-*.parquet", shuffle_rows=8), 2, state=state)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole
    found = stream.fingerprint()
    assert len(found["revision"]) == 40
    assert [f["name"] for f in found["files"]] == [f"org/set/data/train-{k}.parquet" for k in range(3)]
    assert stream.where(0) == "org/set/data/train-0.parquet row 1"
    assert opened("hub:org/set:test").rows == 2
    with pytest.raises(NotFoundError, match=r"data set 'org/set' has no split 'dev'; it has data/test-0\.parquet"):
        opened("hub:org/set:dev")
    with pytest.raises(NotFoundError, match="no repository 'org/none'"):
        opened("hub:org/none")
    with pytest.raises(
        NotFoundError, match=r"has no file 'data/trian-0\.parquet'; did you mean 'data/train-0\.parquet'"
    ):
        opened("hf://datasets/org/set/data/trian-0.parquet")


@pytest.mark.usefixtures("client")
def test_a_run_goes_on_after_a_commit_that_left_its_files_alone(hub: str) -> None:
    upload(hub, {f"data/train-{k}.jsonl": shard_bytes(".jsonl", [row(k)] * 20) for k in range(3)}, "org/live")
    whole, _ = run(opened("hub:org/live"))
    before, state = run(opened("hub:org/live"), stop=2)
    upload(hub, {"notes.md": b"# News"}, "org/live")
    after, _ = run(opened("hub:org/live"), state=state)
    assert before[0] + after[0] == whole[0]
    upload(hub, {"data/train-1.jsonl": shard_bytes(".jsonl", [row(5)] * 20)}, "org/live")
    with pytest.raises(UsageError, match="have changed since this run was saved"):
        run(opened("hub:org/live"), state=state)


def test_the_configurations_of_the_hubs_parquet_copy_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [f"{config}/{split}/0000.parquet" for config in ("en", "fr") for split in ("train", "test")]
    found = {path: {"size": 1, "type": "file"} for path in there}
    listings = {"main": {}, "refs/convert/parquet": found}
    filesystem = type("Files", (), {"unstrip_protocol": lambda self, path: path})()
    monkeypatch.setattr(hub_files, "_open", lambda repo, revision: (filesystem, revision or "main", "c"))
    monkeypatch.setattr(hub_files, "_listing", lambda filesystem, root, repo: listings[root])
    monkeypatch.setattr(hub_files, "_card_patterns", lambda *given: [])
    with pytest.raises(UsageError, match="'org/set' has configurations en, fr; name one: hub:org/set#en"):
        hub_split_files("org/set", None, None, "train")
    assert [f.name for f in hub_split_files("org/set", None, "fr", "train")] == ["org/set/fr/train/0000.parquet"]
    with pytest.raises(NotFoundError, match="no configuration 'de'; it has en, fr"):
        hub_split_files("org/set", None, "de", "train")
    del found["en/train/0000.parquet"], found["en/test/0000.parquet"]
    assert [f.name for f in hub_split_files("org/set", None, None, "train")] == ["org/set/fr/train/0000.parquet"]
    found["default/train/0000.parquet"] = {"size": 1, "type": "file"}
    names = [f.name for f in hub_split_files("org/set", None, None, "train")]
    assert names == ["org/set/default/train/0000.parquet"]


@pytest.mark.usefixtures("client")
def test_the_card_of_a_data_set_says_which_files_are_a_split(hub: str) -> None:
    card = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: "x/*.jsonl"}
- config_name: de
  data_files: [{split: train, path: ["y/a.jsonl", "y/b.jsonl"]}]
---
"""
    files = {f"{name}.jsonl": shard_bytes(".jsonl", [row(i)]) for i, name in enumerate(("x/a", "y/a", "y/b", "y/c"))}
    upload(hub, {"README.md": card.encode(), **files})
    assert [r["id"] for r in opened("hub:org/set#en")] == ["0"]
    assert [r["id"] for r in opened("hub:org/set#de")] == ["1", "2"]
    with pytest.raises(UsageError, match="has configurations en, de; name one: hub:org/set#en"):
        opened("hub:org/set")
    with pytest.raises(NotFoundError, match="has no configuration 'fr'; it has en, de"):
        opened("hub:org/set#fr")


# Threads, processes, memory.


def test_a_window_is_cut_knowing_the_numbers_of_its_rows(tmp_path: Path) -> None:
    stream = opened(write_shards(tmp_path))
    seen: list[tuple[str, Any, str]] = []

    def cut(rows: list[Numbered], seed: int) -> list[list[int]]:
        seen.extend((stream.where(number), stream.folder(number), found["id"]) for number, found in rows)
        return [list(range(len(rows)))]

    list(stream.batches(0, seed=0, rank=0, world=1, cut=cut))
    assert len(seen) == 40
    assert ("s1.jsonl row 1", tmp_path, "11") in seen


def test_one_item_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    reached = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            reached.release()
            yield i

    taken = ahead(items())
    assert made == [], "nothing is read before it is asked for"
    assert next(taken) == 0
    assert reached.acquire(timeout=5) and reached.acquire(timeout=5)
    assert not reached.acquire(timeout=0.1)
    assert made == [0, 1]
    taken.close()  # type: ignore[attr-defined]
    for thread in [t for t in threading.enumerate() if t.name == "mmhub-stream"]:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_window_lets_go_of_the_rows_it_has_handed_out() -> None:
    pairs: list[tuple[int, Row] | None] = [(i, {}) for i in range(10)]
    window = Window(Place.start(1), Place.start(1), pairs, key=1)
    left = [sum(pair is not None for pair in pairs) for _ in window.batches(cut_of(4), None)]
    assert sorted(left, reverse=True) == left
    assert (len(left), left[-1]) == (3, 0)


def test_a_tar_of_many_members_takes_no_more_memory_than_one_of_few(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes([(f"{i}.txt", b"x") for i in range(2000)]))
    stream = opened(str(tmp_path / "t.tar"))
    tracemalloc.start()
    rows = sum(1 for _ in stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 2000
    assert peak < 500_000, "tarfile would keep every member"


def test_an_error_comes_after_the_batches_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(20)) + "{bad\n")
    batches = opened(str(tmp_path / "a.jsonl"), shuffle_rows=10).batches(0, seed=0, rank=0, world=1, cut=cut_of(5))
    assert sorted(i for _, (rows, _) in zip(range(4), batches, strict=False) for i in ids(rows)) == numbers(20)
    with pytest.raises(InputError, match="line 21 is not valid JSON"):
        next(batches)


def test_a_stream_can_be_sent_to_a_process(tmp_path: Path) -> None:
    stream = open_stream(
        DataRecipe(train=write_shards(tmp_path, ".parquet"), stream=True), None, tell=lambda text: None
    )
    there = pickle.loads(pickle.dumps(stream))
    assert there.where(0) == stream.where(0)
    assert run(there, 2) == run(stream, 2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_change_nothing(tmp_path: Path, workers: int) -> None:
    from mmhub.data.loader import load_batches

    stream = opened(write_shards(tmp_path), shuffle_rows=9)
    whole, _ = run(stream)
    batches = (rows for rows, _ in stream.batches(0, seed=5, rank=0, world=1, cut=cut_of(12)))
    assert list(load_batches(_Ids(), batches, workers)) == whole[0]  # type: ignore[arg-type, comparison-overlap]


class _Ids:
    """What stands for decoding."""

    rows, columns = None, None

    def __call__(self, rows: Sequence[tuple[int, Row]]) -> list[str]:
        return ids(rows)


MEMORY = """
import sys
from pathlib import Path
import pyarrow.parquet
from mmhub.config import DataRecipe
from mmhub.data import windows
from mmhub.data.stream import open_stream

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) // 1024

windows.WINDOW_BYTES = 2 * 2**20
cut = lambda rows, seed: [list(range(i, min(i + 16, len(rows)))) for i in range(0, len(rows), 16)]
for source in sys.argv[1:]:  # a little data first, to have every library at work
    stream = open_stream(DataRecipe(train=source, stream=True, shuffle_rows=500), None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = status("VmRSS")
    rows = sum(len(rows) for rows, _ in stream.batches(0, seed=0, rank=0, world=1, cut=cut))
    print(rows, status("VmHWM") - start)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux does")
@pytest.mark.slow
def test_memory_stays_flat_while_the_data_grow(tmp_path: Path) -> None:
    noise, files = random.Random(0).randbytes(20_000), []
    for rows in (200, 5000):
        files += [tmp_path / f"{rows}.tar", tmp_path / f"{rows}.parquet"]
        files[-2].write_bytes(tar_bytes([(f"{i}.jpg", noise) for i in range(rows)]))
        table = pa.table({"jpg": [noise] * rows})  # one row group, in pages of 320 kB
        pq.write_table(table, files[-1], use_dictionary=False, compression="none", write_batch_size=16)
    assert all(file.stat().st_size > 100e6 for file in files[2:])
    command = [sys.executable, "-c", MEMORY, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [rows for rows, _ in measured] == [200, 200, 5000, 5000]
    assert all(megabytes < 60 for _, megabytes in measured[2:]), f"100 MB in windows of 2 MB: {measured}"
