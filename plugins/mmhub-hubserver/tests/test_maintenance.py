"""`mmhub hub gc` frees what nobody needs and nothing else; `mmhub hub verify` finds what the disk damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmhub_hubserver import maintenance
from mmhub_hubserver.cli import hub as hub_command
from mmhub_hubserver.errors import StorageFailed, StoreUnusable
from mmhub_hubserver.pool import link_path
from mmhub_hubserver.store import Add, Entry, Repo, Store
from mmhub_hubserver.xet.area import Area
from mmhub_hubserver.xet.formats import chunk_hash, hash_text, xorb_hash

KEPT, LOST = b"kept" * 1000, b"lost" * 2000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A closed store with one repository that has a large file in a commit."""
    store = Store(tmp_path / "hub")
    repo = store.create("models", "team/model")
    repo.commit("main", [Add("w.bin", upload(repo, KEPT))], "weights")
    store.close()
    return store.root


def upload(repo: Repo, content: bytes) -> Entry:
    sha256 = hashlib.sha256(content).hexdigest()
    repo.store.add_stream([content], sha256, len(content))
    repo.add_object(sha256)
    return Entry.large(sha256, len(content))


def collect(data: Path, grace_seconds: float = 0) -> maintenance.Collected:
    store = Store(data)
    try:
        report = store.gc(grace_seconds=grace_seconds)
        assert store.verify() == []
        return report
    finally:
        store.close()


def in_model(data: Path, action: Callable[[Repo], object]) -> None:
    store = Store(data)
    try:
        action(store.repo("models", "team/model"))
    finally:
        store.close()


def pool(data: Path) -> set[bytes]:
    return {path.read_bytes() for path in data.glob("pool/*/*")}


def xorb(repo: Repo) -> None:
    name = hash_text(xorb_hash([(chunk_hash(LOST), len(LOST))]))
    Area.current(repo).add(name, [LOST])


def part(repo: Repo) -> None:
    folder = repo.store.root / "uploads" / "one"
    folder.mkdir(parents=True)
    (folder / "1").write_bytes(LOST)


@pytest.mark.parametrize(
    "leave",
    [
        lambda repo: upload(repo, LOST),
        lambda repo: repo.store.delete(repo.store.move(repo.store.create("models", "team/b"), "team/c")),
        lambda repo: repo.store.add_stream([LOST], hashlib.sha256(LOST).hexdigest(), len(LOST)),
        xorb,
        part,
        lambda repo: (repo.folder / "objects" / "pack" / "pack-1.pack").write_bytes(LOST),
    ],
    ids=["upload", "repository", "unlinked", "chunks", "part", "pack"],
)
def test_what_no_commit_needs_is_freed_in_one_go(data: Path, leave: Callable[[Repo], object]) -> None:
    before = files(data)
    in_model(data, leave)
    collect(data)
    assert files(data) - {"repos/models/team/b.moved"} == before and pool(data) == {KEPT}
    assert str(collect(data)) == "nothing to free"


def files(data: Path) -> set[str]:
    found = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("locks/")}


def test_an_upload_whose_commit_may_still_come_is_kept(data: Path) -> None:
    in_model(data, lambda repo: upload(repo, LOST))
    assert collect(data, grace_seconds=60).files == 0
    assert pool(data) == {KEPT, LOST}


def test_a_deleted_repository_gives_its_space_back(data: Path) -> None:
    in_model(data, lambda repo: repo.store.delete(repo))
    assert collect(data).bytes >= len(KEPT)
    assert pool(data) == set()


def test_a_squashed_history_gives_its_space_back(data: Path) -> None:
    def replace(repo: Repo) -> None:
        repo.commit("main", [Add("w.bin", upload(repo, LOST))], "more weights")
        repo.squash("main", "one")

    in_model(data, replace)
    report = collect(data)
    assert report.objects >= 3 and pool(data) == {LOST}
    assert str(report).startswith(f"freed {report.bytes:,} bytes: large files 1, links to large files 1, git objects ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda repo: flip(next(repo.store.pool.files())), "does not have its sha256"),
        (lambda repo: link_path(repo.folder, hashlib.sha256(KEPT).hexdigest()).unlink(), "is missing"),
        (lambda repo: flip(max(repo.folder.glob("objects/pack/*.pack"), key=os.path.getmtime)), "pack"),
        (lambda repo: [path.unlink() for path in repo.folder.glob("objects/pack/*")], "is missing"),
        (lambda repo: (repo.folder / "refs" / "heads" / "main").unlink(), "the branch main is missing"),
    ],
    ids=["large file", "link", "pack", "no packs", "branch"],
)
def test_verify_says_what_is_damaged_and_exits_5(data: Path, damage: Callable[[Repo], object], found: str) -> None:
    sound = CliRunner().invoke(hub_command, ["verify", "--data", str(data)])
    assert (sound.exit_code, sound.stdout) == (0, "everything is as it was stored\n")
    in_model(data, damage)
    told = CliRunner().invoke(hub_command, ["verify", "--data", str(data), "--json"])
    problems = json.loads(told.stdout)["problems"]
    assert problems and any(found in problem for problem in problems)
    assert told.exit_code != 0 and "from a backup" in str(told.exception.hint)  # type: ignore[union-attr]


def test_looking_after_a_hub_needs_it_to_be_stopped_and_to_exist(data: Path, tmp_path: Path) -> None:
    running = Store(data)
    for command in ("gc", "verify"):
        told = CliRunner().invoke(hub_command, [command, "--data", str(data)])
        assert told.exit_code == 1 and "Stop it first" in told.stderr
        nowhere = CliRunner().invoke(hub_command, [command, "--data", str(tmp_path / "none")])
        assert "there is no hub in" in str(nowhere.exception)
    with pytest.raises(StoreUnusable):
        Store(data)
    running.close()
    freed = CliRunner().invoke(hub_command, ["gc", "--data", str(data), "--json"])
    assert json.loads(freed.stdout)["files"] == 0


def test_a_full_disk_is_freed_before_anything_is_repacked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_model(data, lambda repo: (upload(repo, LOST), repo.squash("main", "one commit")))

    def full(*_: object) -> None:
        raise StorageFailed("There is no space left.")

    monkeypatch.setattr("mmhub_hubserver.git.Objects.keep_only", full)
    report = collect(data)
    assert (report.links, report.files, pool(data)) == (1, 1, {KEPT})
    assert report.errors == ["models/team/model: There is no space left."]
    assert "not looked after: models/team/model" in str(report)


def test_a_damaged_repository_does_not_end_the_run(data: Path) -> None:
    store = Store(data)
    broken = store.create("models", "team/broken")
    upload(broken, KEPT)
    upload(store.repo("models", "team/model"), LOST)
    (broken.folder / "refs" / "heads" / "main").write_text("0" * 40)
    report = store.gc(grace_seconds=0)
    assert (report.links, report.files, len(report.errors)) == (1, 1, 1)
    assert link_path(broken.folder, hashlib.sha256(KEPT).hexdigest()).exists()
    store.close()
