"""kill -9 of server and client at random moments of pushes: no half commit, no lost commit, nothing left over.

The default run kills a few times; MMHUB_KILLS=100 with `-m slow` is the long one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmhub_hubserver.errors import StorageFailed
from mmhub_hubserver.pool import link_path
from mmhub_hubserver.store import Add, Entry, Store

PUSHER = Path(__file__).with_name("pusher.py")
FILES = ("weights.safetensors", "part.safetensors", "config.json", "card.md")
PART = 100_000  # bytes; some of the files are uploaded by LFS in parts of it, and some whole
SERVE = f"from mmhub_hubserver import lfs; from mmhub.cli.main import main; lfs.PART_BYTES = {PART}; main()"
QUICK, LONG = 2, int(os.environ.get("MMHUB_KILLS", "100"))


class Processes:
    """A hub server and a client that pushes one numbered version after the other, each restarted after its death."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.folder, self.acknowledged = folder, folder / "acknowledged.txt"
        self.acknowledged.touch()
        self._env = os.environ | {"HF_HUB_DISABLE_XET": "" if xet else "1", "HF_HOME": str(folder / "home")}
        self.url, self.port = "", "0"
        self.server = self.start_server()
        self.client = self.start_client()

    def start_server(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SERVE, "hub", "serve", "--data", str(self.folder / "hub")]
        process = subprocess.Popen([*command, "--port", self.port], stderr=subprocess.PIPE, text=True)
        assert process.stderr
        greeting = ""
        while "http://" not in greeting:
            line = process.stderr.readline()
            assert line, f"the server did not start again: {greeting}"
            greeting += line
        self.url = next(word for word in greeting.split() if word.startswith("http://"))
        self.port = self.url.rpartition(":")[2].strip("/")
        return process

    def start_client(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(PUSHER), self.url, str(self.acknowledged)]
        return subprocess.Popen(command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    def kill(self, *who: str) -> None:
        for name in who:
            end(getattr(self, name))
        for name in who:
            setattr(self, name, self.start_server() if name == "server" else self.start_client())

    def all_acknowledged(self) -> list[int]:
        return [int(line) for line in self.acknowledged.read_text().split("\n")[:-1]]  # a kill may leave half a line

    def last_acknowledged(self) -> int:
        return max(self.all_acknowledged(), default=0)

    def wait_for_progress(self, seconds: float = 90) -> None:
        before, end = self.last_acknowledged(), time.monotonic() + seconds
        while self.last_acknowledged() == before:
            assert time.monotonic() < end, "no push came through after the restart"
            time.sleep(0.02)

    def stop(self) -> None:
        end(self.client)
        end(self.server, signal.SIGTERM)


def end(process: subprocess.Popen[str], how: int = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait(30)
    if process.stderr:
        process.stderr.close()


def versions(url: str) -> list[int]:
    """The version of every commit, newest first, each checked to be whole."""
    from huggingface_hub import HfApi, hf_hub_download

    hub, found = HfApi(endpoint=url, token=False), []
    for commit in hub.list_repo_commits("local/crash"):
        names = hub.list_repo_files("local/crash", revision=commit.commit_id)
        if "config.json" not in names:
            assert names == [".gitattributes"]
            continue
        assert set(FILES) < set(names)
        inside = set()
        for name in FILES:
            path = hf_hub_download("local/crash", name, revision=commit.commit_id, endpoint=url, token=False)
            inside.add(_version_of(Path(path)))
        assert len(inside) == 1, f"commit {commit.commit_id} mixes versions {inside}"
        found += inside
    return found


def _version_of(path: Path) -> int:
    if path.suffix == ".safetensors":
        head, _, rest = path.read_bytes().partition(b"\n")
        assert rest == random.Random(f"{path.name}{int(head)}").randbytes(len(rest)) and len(rest) >= 50_000
        return int(head)
    return int(json.loads(path.read_text())["version"])


def leftovers(store: Store) -> list[str]:
    """What no commit needs: pool files without a link, temporary files, unfinished uploads, packs without an index."""
    data = store.root
    found = [path for path in data.glob("pool/*/*") if path.stat().st_nlink < 2]
    found += [*data.glob("tmp/*"), *data.glob("uploads/*"), *data.glob("repos/**/xet/*/*.data")]
    found += [path for path in data.glob("repos/**/*.pack") if not path.with_suffix(".idx").exists()]
    links = {path.name for path in data.glob("repos/**/lfs/objects/*/*/*")}
    commits = store.repo("models", "local/crash").history("main")
    named = {str(entry.sha256) for commit in commits for entry in commit.files.values() if entry.lfs}
    return sorted(str(path.relative_to(data)) for path in found) + sorted(links - named)


def torture(folder: Path, kills: int, *, xet: bool) -> None:
    chance = random.Random(kills + xet)
    processes = Processes(folder, xet=xet)
    try:
        processes.wait_for_progress()
        for _ in range(kills):
            time.sleep(chance.uniform(0, 0.4))
            before = processes.last_acknowledged()
            processes.kill(*chance.choice([["server"], ["client"], ["server", "client"], ["client", "server"]]))
            history = _newest(processes.url)
            assert history >= before, f"version {before} was acknowledged, the newest commit is {history}"
            processes.wait_for_progress()
        end(processes.client)
        found = versions(processes.url)
        assert found == sorted(set(found), reverse=True) and set(processes.all_acknowledged()) <= set(found)
    finally:
        processes.stop()
    data = folder / "hub"
    store = Store(data)
    try:
        store.gc(grace_seconds=0)
        assert leftovers(store) == []
        assert store.verify() == []
    finally:
        store.close()
    if shutil.which("git"):
        repository = f"{data}/repos/models/local/crash.git"
        checked = subprocess.run(
            ["git", "-C", repository, "fsck", "--full", "--strict"], capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr


def goes_on(folder: Path, *, xet: bool) -> None:
    """After all that and the cleaning up, the hub starts, has every commit, and takes the next."""
    processes = Processes(folder, xet=xet)
    try:
        processes.wait_for_progress()
        end(processes.client)
        assert set(processes.all_acknowledged()) <= set(versions(processes.url))
    finally:
        processes.stop()


def _newest(url: str) -> int:
    """The version `main` has now; every file of it must carry the same."""
    from huggingface_hub import HfApi

    title: Any = HfApi(endpoint=url, token=False).list_repo_commits("local/crash")[0].title
    return int(title.split()[-1]) if title.startswith("version") else 0


def test_everything_is_on_the_disk_before_a_branch_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose what was not synced: a file before it is moved, and then the folder it was moved to."""
    synced: list[int] = []  # inodes
    moved: list[tuple[int, int, Path]] = []  # how much was synced before, inode, to where
    replace = os.replace

    def move(source: str, target: Path) -> None:
        moved.append((len(synced), os.stat(source).st_ino, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", move)
    store = Store(tmp_path / "hub")
    repo = store.create("models", "local/crash")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    moved.clear()
    store.add_stream([b"weights"], sha256, 7)
    repo.add_object(sha256)
    repo.commit("main", [Add("w.bin", Entry.large(sha256, 7))], "weights")
    store.close()
    assert [target.suffix or target.name for _, _, target in moved] == [sha256, ".pack", ".idx", "main"]
    named = moved[-1][0]
    for at, inode, target in moved:
        assert inode in synced[:at]
        assert target.parent.stat().st_ino in (synced[at:] if target.name == "main" else synced[at:named])
    assert link_path(repo.folder, sha256).parent.stat().st_ino in synced[:named]


@pytest.mark.slow
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_few_kills_leave_only_whole_commits(tmp_path: Path, xet: bool) -> None:
    torture(tmp_path, QUICK, xet=xet)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_many_kills_leave_only_whole_commits(tmp_path: Path, xet: bool) -> None:
    torture(tmp_path, LONG // 2, xet=xet)
    goes_on(tmp_path, xet=xet)


def test_a_new_store_that_cannot_write_its_format_is_new_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StorageFailed):
            Store(tmp_path / "hub")
    assert not (tmp_path / "hub" / "format").exists()
    Store(tmp_path / "hub").close()
    assert (tmp_path / "hub" / "format").read_text() == "2"
