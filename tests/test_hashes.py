"""Remembered hashes: never wrong after a write, and nothing is lost when the record is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmhub import hashes
from mmhub.hashes import facts_of, git_sha1_of, remember, sha256_of
from mmhub.hub.integrity import check_blob, is_blob

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is remembered")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written a while ago."""
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is hashed from now on."""
    seen: list[str] = []
    real = hashes._read_hash

    def read(file: Any, kind: str, size: int) -> str:
        seen.append(kind)
        return real(file, kind, size)

    monkeypatch.setattr(hashes, "_read_hash", read)
    return seen


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content" * 100)
    return path


def test_the_hashes_are_those_of_sha256sum_and_git(file: Path) -> None:
    content = file.read_bytes()
    assert sha256_of(file) == hashlib.sha256(content).hexdigest()
    assert git_sha1_of(file) == hashlib.sha1(b"blob 700\0" + content).hexdigest()


@pytest.mark.usefixtures("patient")
def test_a_file_is_read_once_and_again_after_any_write(file: Path, reads: list[str]) -> None:
    for _ in range(3):
        sha256_of(file)
    assert reads == ["sha256"]
    dice = random.Random(5)
    for _ in range(20):
        times = file.stat().st_mtime_ns
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
        os.utime(file, ns=(times, times))  # a writer who hides that it wrote
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()
    assert sha256_of(file, fresh=True) == sha256_of(file)
    assert reads == ["sha256"] * 22


def test_a_file_written_just_now_is_not_remembered_except_by_its_writer(file: Path, reads: list[str]) -> None:
    sha256_of(file)
    sha256_of(file)
    assert len(reads) == 2
    remember(file, {"finite": True})
    assert facts_of(file) == {}
    remember(file, {"sha256": "x" * 64}, written_by_us=True)
    assert sha256_of(file) == "x" * 64


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "content", ["", "nonsense", "[]", '{"format": 1}', '{"format": 99, "files": {}}', '{"format": 1, "files": [1]}',
                '{"format": 1, "files": {"a": 3}}', "[" * 100_000],
    ids=range(8),
)  # fmt: skip
def test_a_record_that_is_damaged_is_made_anew(cache: Path, file: Path, reads: list[str], content: str) -> None:
    cache.mkdir()
    (cache / "hashes.json").write_text(content)
    sha256_of(file)
    sha256_of(file)
    assert reads == ["sha256"]


@pytest.mark.usefixtures("patient")
def test_where_nothing_can_be_written_all_works(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMHUB_CACHE", str(file / "below a file"))
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts_of(tmp_path / "missing") == {}
    remember(tmp_path / "missing", {"finite": True})


@pytest.mark.usefixtures("patient")
def test_the_record_is_bounded_and_forgets_the_oldest(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    monkeypatch.setattr(hashes, "MAX_FILES", 5)
    paths = [tmp_path / f"file-{i}" for i in range(8)]
    for path in paths:
        path.write_bytes(path.name.encode())
        sha256_of(path)
    assert len(json.loads((cache / "hashes.json").read_text())["files"]) == 5
    reads.clear()
    for path in reversed(paths):
        sha256_of(path)
    assert len(reads) == 3


@pytest.mark.usefixtures("patient")
def test_processes_and_threads_lose_nothing_of_each_other(cache: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"file-{i}" for i in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode())
    code = (
        "import sys; from pathlib import Path; from mmhub import hashes; hashes.RACY_SECONDS = 0\n"
        "[hashes.sha256_of(Path(name)) for name in sys.argv[1:]]"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, *map(str, paths[i:20:4])]) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sha256_of, paths[20:]))
    assert [child.wait(60) for child in children] == [0] * 4
    assert len(json.loads((cache / "hashes.json").read_text())["files"]) == 40
    assert {path.name for path in cache.iterdir()} == {"hashes.json", "hashes.lock"}


def test_a_blob_is_checked_against_its_name(tmp_path: Path) -> None:
    content = b"weights"
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    names = (hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob 7\0" + content).hexdigest())
    for i, name in enumerate(names):
        (blobs / name).write_bytes(content)
        link = snapshot / f"file-{i}"
        link.symlink_to(f"../../blobs/{name}")
        assert check_blob(link)
        assert check_blob(blobs / name, fresh=True)
        (blobs / name).write_bytes(b"Weights")
        assert not check_blob(link)
        (blobs / name).unlink()
        assert not check_blob(link)
    store = tmp_path / "store"
    store.write_bytes(content)
    (blobs / names[0]).symlink_to(store)  # as caches that share their blobs have it
    assert check_blob(snapshot / "file-0")
    (tmp_path / "plain").write_bytes(content)
    assert not is_blob(tmp_path / "plain")
    with pytest.raises(ValueError, match="not named by its hash"):
        check_blob(tmp_path / "plain")


@pytest.mark.parametrize(
    ("clock", "age", "known"), [(1, 0.05, False), (1, 0.3, True), (10**9, 0.3, False), (10**9, 3, True)]
)
def test_a_file_is_remembered_once_its_clock_has_ticked(
    file: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, clock: int, age: float, known: bool
) -> None:
    now = 1_700_000_000_123_456_789

    def stamped(status: os.stat_result) -> os.stat_result:
        written = int(now - age * 1e9) // clock * clock
        return SimpleNamespace(
            st_dev=status.st_dev, st_ino=status.st_ino, st_size=status.st_size, st_mode=status.st_mode,
            st_mtime_ns=written, st_ctime_ns=written, st_mtime=written / 1e9, st_ctime=written / 1e9,
        )  # type: ignore[return-value]  # fmt: skip

    sha256_of(file)
    stat, fstat = os.stat, os.fstat
    monkeypatch.setattr(hashes.time, "time", lambda: now / 1e9)
    monkeypatch.setattr(hashes.os, "stat", lambda path, **more: stamped(stat(path, **more)))
    monkeypatch.setattr(hashes.os, "fstat", lambda handle: stamped(fstat(handle)))
    reads.clear()
    sha256_of(file), sha256_of(file)
    assert len(reads) == (1 if known else 2)
