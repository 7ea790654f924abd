"""A disk that fills up at any moment of a push: the client hears of it, the store stays whole, a later push works."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._xet import abort_xet_session

from mmhub_hubserver import lfs, writing
from mmhub_hubserver.store import Store
from mmhub_hubserver.xet.formats import chunk_hash, hash_text, xorb_hash

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

PART = 5_000  # bytes; also what a single write must have to reach the disk at once
Push = Callable[[Any, str, bytes], None]


class Full:
    """Lets so many steps of writing to the disk pass; then the disk is full, until it is freed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._left: int | None = None
        self.hit = False
        for name in ("mkdir", "replace", "rename", "link"):
            monkeypatch.setattr(os, name, self._checked(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._checked(lambda handle: None))  # hundreds would take half a minute
        make = self._checked(tempfile.NamedTemporaryFile)

        def made(*arguments: Any, **options: Any) -> Any:
            file = make(*arguments, **options)
            small, large = file.write, self._checked(file.write)
            file.write = lambda content: (large if len(content) >= PART else small)(content)  # small ones are buffered
            return file

        monkeypatch.setattr(tempfile, "NamedTemporaryFile", made)

    def after(self, steps: int) -> None:
        self._left, self.hit = steps, False

    def freed(self) -> None:
        self._left = None

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            if self._left == 0:
                self.hit = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._left is not None:
                self._left -= 1
            return function(*arguments, **options)

        return checked


@pytest.fixture
def full(team: Any, monkeypatch: pytest.MonkeyPatch) -> Full:
    monkeypatch.setattr(lfs, "PART_BYTES", PART)
    return Full(monkeypatch)


class Refused(Exception):
    def __init__(self, path: str, answer: Any) -> None:
        super().__init__(path, answer.data)
        self.path, self.status, self.text = path, answer.status, str(answer.data["error"])


def send(team: Any, method: str, path: str, body: Any = None, **headers: str) -> Any:
    answer = team.send(None if "Authorization" in headers else "ann", method, path, body, **headers)
    if answer.status >= 400:
        raise Refused(path, answer)
    return answer.data


def refused(action: Callable[[], object]) -> Refused | None:
    try:
        action()
    except Refused as error:
        return error
    return None


def commit(team: Any, repo: str, key: str, value: dict[str, Any]) -> None:
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": key, "value": {"path": "w.bin", **value}}]
    send(team, "POST", f"/api/models/{repo}/commit/main", "\n".join(map(json.dumps, lines)).encode())


def small_file(team: Any, repo: str, content: bytes) -> None:
    commit(team, repo, "file", {"content": base64.b64encode(content).decode(), "encoding": "base64"})


def by_lfs(team: Any, repo: str, content: bytes, *transfers: str) -> None:
    oid = hashlib.sha256(content).hexdigest()
    wanted = {
        "operation": "upload",
        "transfers": ["basic", *transfers],
        "objects": [{"oid": oid, "size": len(content)}],
    }
    (found,) = send(team, "POST", f"/{repo}.git/info/lfs/objects/batch", wanted)["objects"]
    if "actions" in found:
        upload = found["actions"]["upload"]
        parts = sorted((name, href) for name, href in upload.get("header", {}).items() if name.isdigit())
        for number, (_, href) in enumerate(parts):
            send(team, "PUT", href, content[number * PART : (number + 1) * PART])
        if parts:
            send(team, "POST", upload["href"], {"oid": oid, "parts": []})
        else:
            send(team, "PUT", upload["href"], content)
    commit(team, repo, "lfsFile", {"algo": "sha256", "oid": oid, "size": len(content)})


def in_parts(team: Any, repo: str, content: bytes) -> None:
    by_lfs(team, repo, content, "multipart")


def by_xet(team: Any, repo: str, content: bytes) -> None:
    given = send(team, "GET", f"/api/models/{repo}/xet-write-token/main")
    area, bearer = given["casUrl"], {"Authorization": f"Bearer {given['accessToken']}"}
    length, raw = len(content).to_bytes(3, "little"), xorb_hash([(chunk_hash(content), len(content))])
    send(team, "POST", f"{area}/v1/xorbs/default/{hash_text(raw)}", b"\0" + length + b"\0" + length + content, **bearer)
    oid = hashlib.sha256(content).hexdigest()
    shard = b"HFRepoMetaData\0" + bytes.fromhex("556967456a7b815783a5bdd95ccdd14aa9") + struct.pack("<QQ", 2, 0)
    shard += bytes(32) + struct.pack("<IIQ", 1 << 30, 1, 0) + raw + struct.pack("<IIII", 0, 0, 0, 1)
    shard += struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(oid))) + bytes(16) + b"\xff" * 32 + bytes(16)
    send(team, "POST", f"{area}/v1/shards", shard, **bearer)
    commit(team, repo, "lfsFile", {"algo": "sha256", "oid": oid, "size": len(content)})


@pytest.mark.slow
@pytest.mark.parametrize("push", [small_file, by_lfs, in_parts, by_xet])
def test_wherever_the_disk_fills_up_a_push_is_refused_and_works_later(team: Any, full: Full, push: Push) -> None:
    for steps in count():
        repo, content = f"lab/model-{steps}", random.Random(steps).randbytes(2 * PART + 7)
        team.api().create_repo(repo)
        full.after(steps)
        refusal = refused(partial(push, team, repo, content))
        if refusal is not None:
            assert refusal.status == (413 if "/api/xet/" in refusal.path else 507) and "space left" in refusal.text
        hit = full.hit
        full.freed()
        assert not list(data(team).glob("tmp/*"))
        push(team, repo, content)
        assert team.send("ann", "GET", f"/{repo}/resolve/main/w.bin").data == content
        if not hit:
            break
    assert steps >= 8
    check(team)


CHANGES: dict[str, Callable[[Any, str], Any]] = {
    "a repository": lambda team, name: send(team, "POST", "/api/repos/create", {"name": name, "organization": "lab"}),
    "a branch": lambda team, name: send(team, "POST", f"/api/models/lab/model/branch/{name}", {}),
    "a tag": lambda team, name: send(team, "POST", "/api/models/lab/model/tag/main", {"tag": name, "message": "x"}),
    "a setting": lambda team, name: send(team, "PUT", "/api/models/lab/model/settings", {"gated": "auto"}),
    "a discussion": lambda team, name: send(
        team, "POST", "/api/models/lab/model/discussions", {"title": name, "description": "x"}
    ),
    "a new name": lambda team, name: send(
        team, "POST", "/api/repos/move", {"fromRepo": "lab/old", "toRepo": f"lab/{name}", "type": "model"}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_wherever_the_disk_fills_up_no_change_is_made_by_half(
    team: Any, full: Full, change: Callable[[Any, str], Any]
) -> None:
    team.api().create_repo("lab/model")
    for steps in count():
        team.api().create_repo("lab/old", exist_ok=True)
        full.after(steps)
        refusal = refused(partial(change, team, f"name-{steps}"))
        if refusal is not None:
            assert refusal.status == 507 and "space left" in refusal.text
        hit = full.hit
        full.freed()
        assert not list(data(team).glob("tmp/*"))
        again = refused(partial(change, team, f"name-{steps}"))
        if again is not None:  # it was made, and only not yet known to be safe from a power cut
            assert again.status == 409 or "already" in again.text
        if not hit:
            break
    assert steps >= 3
    check(team)


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_the_client_hears_of_a_full_hub_at_once(team: Any, monkeypatch: pytest.MonkeyPatch, xet: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    hub, content = team.api(), random.Random(1).randbytes(3 << 20)
    hub.create_repo("lab/model")
    disk = team.hub._store.disk
    disk.quota, started = len(content) // 2, time.monotonic()
    try:
        with pytest.raises(HfHubHTTPError, match=r"507(.|\n)*The hub is full"):
            hub.create_commit("lab/model", [CommitOperationAdd("w.bin", content)], commit_message="x")
        with monkeypatch.context() as patch:
            patch.setattr(writing, "_new_bytes", lambda commit, file: 0)  # somebody else's push took the rest meanwhile
            with pytest.raises(OSError, match=r"413|507"):
                hub.create_commit("lab/model", [CommitOperationAdd("w.bin", content)], commit_message="x")
        assert time.monotonic() - started < 10
        disk.quota = None
        hub.create_commit("lab/model", [CommitOperationAdd("w.bin", content)], commit_message="x")
    finally:
        abort_xet_session()
    check(team)


def test_an_unchanged_file_needs_no_room(team: Any) -> None:
    team.api().create_repo("lab/model")
    small_file(team, "lab/model", b"x" * 1000)
    disk = team.hub._store.disk
    disk.quota = 1
    known = [{"path": "w.bin", "size": 1000, "sample": ""}]
    assert send(team, "POST", "/api/models/lab/model/preupload/main", {"files": known})
    refusal = refused(
        partial(send, team, "POST", "/api/models/lab/model/preupload/main", {"files": [{**known[0], "size": 1001}]})
    )
    assert refusal is not None and refusal.status == 507 and "mmhub hub gc" in refusal.text


def test_what_an_upload_took_meanwhile_is_given_back_to_the_quota(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfs, "PART_BYTES", PART)
    team.api().create_repo("lab/model")
    disk = team.hub._store.disk
    disk.quota = 10**9
    disk.recount(team.hub._store.usage)
    for number, push in enumerate((by_xet, in_parts)):
        push(team, "lab/model", random.Random(number).randbytes(2 * PART + 7))
        assert disk._used == team.hub._store.usage()


def data(team: Any) -> Path:
    root: Path = team.hub._store.root
    return root


def check(team: Any) -> None:
    """The store is as it should be, for us and for git."""
    root = data(team)
    team.hub.close()
    store = Store(root)
    assert store.verify() == []
    store.gc(grace_seconds=0)
    assert store.verify() == []
    store.close()
    assert not list(root.glob("uploads/*")) and not list(root.glob("repos/**/*.data"))
    for repository in root.glob("repos/*/*/*.git") if shutil.which("git") else ():
        command = ["git", "-C", str(repository), "fsck", "--full", "--strict"]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
