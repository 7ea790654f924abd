"""Large files: uploads in parts through the real client, and addresses that somebody tampered with."""

import hashlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from mmhub_hubserver import HubServer, lfs

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

PART = 1 << 20
BIG = os.urandom(5 * PART // 2)  # two parts and a half
REPO, OTHER = "lab/model", "sam/model"


@pytest.fixture(autouse=True)
def _small_parts(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfs, "PART_BYTES", PART)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    team.api().create_repo(REPO, private=False)
    team.api("sam").create_repo(OTHER)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def batch(team: Any, who: str, content: bytes, repo: str = REPO, **options: Any) -> dict[str, Any]:
    body = {"operation": "upload", "transfers": ["basic", "multipart"], **options}
    body["objects"] = [{"oid": sha256(content), "size": len(content)}]
    answer = team.send(who, "POST", f"/{repo}.git/info/lfs/objects/batch", body)
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.data["objects"][0]
    return found


def parts_of(upload: dict[str, Any]) -> list[str]:
    return [href for number, href in sorted(upload["header"].items()) if number.isdigit()]


def complete(team: Any, upload: dict[str, Any], content: bytes = BIG) -> int:
    status: int = team.send(None, "POST", upload["href"], {"oid": sha256(content), "parts": []}).status
    return status


def test_the_client_uploads_in_parts_and_gets_the_same_bytes_back(team: Any, tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(BIG)
    team.api().upload_file(path_or_fileobj=path, path_in_repo="w.bin", repo_id=REPO)
    got = hf_hub_download(REPO, "w.bin", endpoint=team.hub.url, token=team.tokens["rita"], cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == BIG
    assert not list((tmp_path / "hub" / "uploads").iterdir())


def test_an_upload_in_parts_goes_on_after_a_restart(team: Any, tmp_path: Path) -> None:
    upload = batch(team, "ann", BIG)["actions"]["upload"]
    first, *rest = parts_of(upload)
    assert team.send(None, "PUT", first, BIG[:PART]).status == 200
    port = int(team.hub.url.rpartition(":")[2])
    team.hub.close()
    with HubServer(tmp_path / "hub", port=port) as hub:
        team.hub = hub
        assert complete(team, upload) == 400  # two parts are missing
        for number, href in enumerate(rest, 1):
            assert team.send(None, "PUT", href, BIG[number * PART : (number + 1) * PART]).headers["etag"]
        assert [complete(team, upload), complete(team, upload)] == [200, 200]  # the first answer may get lost
        body = {"oid": sha256(BIG), "size": len(BIG)}
        assert team.send("ann", "POST", f"/{REPO}.git/info/lfs/objects/verify", body).status == 200


def test_parts_of_another_size_or_content_are_refused(team: Any) -> None:
    upload = batch(team, "ann", BIG)["actions"]["upload"]
    one, two, three = parts_of(upload)
    assert team.send(None, "PUT", one, BIG[: PART - 1]).status == 400
    assert team.send(None, "PUT", three, BIG[:PART]).status == 400
    chunked = b"5\r\nxxxxx\r\n0\r\n\r\n"
    assert team.send(None, "PUT", one, chunked, Transfer_Encoding="chunked").status == 400
    for href, content in ((one, BIG[:PART]), (two, bytes(PART)), (three, BIG[2 * PART :])):
        assert team.send(None, "PUT", href, content).status == 200
    assert complete(team, upload) == 400
    assert "actions" in batch(team, "ann", BIG)  # it is not there


def test_what_nobody_finished_is_swept(team: Any, tmp_path: Path) -> None:
    one = parts_of(batch(team, "ann", BIG)["actions"]["upload"])[0]
    assert team.send(None, "PUT", one, BIG[:PART]).status == 200
    (folder,) = (tmp_path / "hub" / "uploads").iterdir()
    batch(team, "ann", b"x")
    assert folder.exists()
    os.utime(folder, (0, 0))
    batch(team, "ann", b"x")
    assert not folder.exists()


def test_an_address_is_good_for_one_method_object_part_and_repository(team: Any) -> None:
    upload = batch(team, "ann", BIG)["actions"]["upload"]
    one = parts_of(upload)[0]
    small = batch(team, "ann", b"small")["actions"]["upload"]["href"]
    forged = [
        (small.replace(sha256(b"small"), sha256(b"other")), b"other"),
        (small.replace(REPO, OTHER), b"small"),
        (small.replace(f"/{REPO}", f"/datasets/{REPO}"), b"small"),
        (small.replace("size=5", "size=6"), b"small!"),
        (re.sub(r"expires=\d+", "expires=99999999999", small), b"small"),
        (re.sub(r"signature=\w+", "signature=%FF", small), b"small"),
        (one.replace("part=1", "part=2"), BIG[:PART]),
        (one.replace("/part?", "?"), BIG[:PART]),
        (one.replace(f"chunk={PART}", f"chunk={PART * 2}"), BIG[:PART]),
        (upload["href"].replace("/complete?", "?"), BIG),
    ]
    for href, content in forged:
        assert team.send(None, "PUT", href, content).status == 403, href
    assert team.send(None, "GET", small).status == 403
    assert team.send(None, "PUT", small, b"small").status == 200
    assert team.send(None, "GET", small).status == 403


def test_an_address_dies_with_its_repository(team: Any) -> None:
    href = batch(team, "ann", b"small")["actions"]["upload"]["href"]
    team.api().delete_repo(REPO)
    assert team.send(None, "PUT", href, b"small").status == 403
    team.api().create_repo(REPO)
    assert team.send(None, "PUT", href, b"small").status == 403


def test_git_lfs_downloads_by_a_signed_address(team: Any) -> None:
    team.api().upload_file(path_or_fileobj=BIG, path_in_repo="w.bin", repo_id=REPO)
    href = batch(team, "rita", BIG, operation="download")["actions"]["download"]["href"]
    assert team.send(None, "GET", href).data == BIG
    assert batch(team, "rita", b"none", operation="download")["error"]["code"] == 404


def test_to_know_a_hash_is_not_to_have_the_file(team: Any) -> None:
    team.api().create_repo("lab/secret", private=True)
    team.api().upload_file(path_or_fileobj=BIG, path_in_repo="w.bin", repo_id="lab/secret")
    assert "actions" in batch(team, "sam", BIG, OTHER)  # not "already there"
    assert batch(team, "sam", BIG, OTHER, operation="download")["error"]["code"] == 404
    lines = b'{"key":"header","value":{"summary":"steal"}}\n'
    lines += b'{"key":"lfsFile","value":{"path":"w.bin","oid":"%s"}}' % sha256(BIG).encode()
    assert team.send("sam", "POST", f"/api/models/{OTHER}/commit/main", lines).status == 400
    body = {"target": {"type": "model", "name": OTHER}, "files": [{"sha256": sha256(BIG)}]}
    for source, status in (("lab/secret", 404), (OTHER, 200)):
        answer = team.send("sam", "POST", f"/api/models/{source}/lfs-files/duplicate", body)
        assert answer.status == status
    assert answer.data["failed"][0]["sha256"] == sha256(BIG)
    assert "actions" in batch(team, "sam", BIG, OTHER)


def test_large_files_are_duplicated_by_those_who_may_read_them(team: Any) -> None:
    team.api().upload_file(path_or_fileobj=BIG, path_in_repo="w.bin", repo_id=REPO)
    body = {"target": {"type": "model", "name": OTHER}, "files": [{"sha256": sha256(BIG)}]}
    assert team.send("ann", "POST", f"/api/models/{REPO}/lfs-files/duplicate", body).status == 403
    assert team.send("sam", "POST", f"/api/models/{REPO}/lfs-files/duplicate", body).data == {"failed": []}
    assert "actions" not in batch(team, "sam", BIG, OTHER)


def test_a_repository_is_duplicated_with_its_large_files_or_not_at_all(
    team: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    additions = [CommitOperationAdd("w.bin", BIG), CommitOperationAdd("a.txt", b"small")]
    team.api().create_commit(REPO, additions, commit_message="files")
    team.api("sam").delete_repo(OTHER)
    assert team.api("sam").duplicate_repo(REPO).repo_id == OTHER
    assert team.send("sam", "GET", "/sam/model/resolve/main/w.bin").data == BIG
    assert len(team.api("sam").list_repo_commits("sam/model")) == 2
    with pytest.raises(HfHubHTTPError, match="already exists"):
        team.api("sam").duplicate_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        team.api("sam").duplicate_repo(REPO, "lab/copy")
    monkeypatch.setattr("mmhub_hubserver.store.Repo.commit", lambda *_, **__: 1 / 0)
    assert team.send("ann", "POST", f"/api/models/{REPO}/duplicate", {"repository": "lab/copy"}).status == 500
    assert not team.api().repo_exists("lab/copy")


def test_the_storage_of_a_namespace_is_told_to_its_members(team: Any) -> None:
    team.api().upload_file(path_or_fileobj=BIG, path_in_repo="w.bin", repo_id=REPO)
    (found,) = team.api("rita").list_user_repos("lab")
    assert (found.id, found.storage_percent, found.storage > len(BIG)) == (REPO, 100, True)
    assert list(team.api().list_user_repos()) == []
    assert team.send("sam", "GET", "/api/organizations/lab/settings/repositories").status == 403


def test_files_of_one_content_are_uploaded_once(team: Any) -> None:
    additions = [CommitOperationAdd(name, io.BytesIO(b"same")) for name in ("a.bin", "b.bin", "c.bin")]
    team.api().create_commit(REPO, additions, commit_message="files")
    assert team.send("ann", "GET", f"/{REPO}/resolve/main/c.bin").data == b"same"
    body = {"operation": "upload", "objects": [{"oid": sha256(b"x"), "size": 1}] * 3}
    assert len(team.send("ann", "POST", f"/{REPO}.git/info/lfs/objects/batch", body).data["objects"]) == 1


def test_what_exceeds_the_quota_is_refused_before_it_is_sent(team: Any) -> None:
    team.hub._store.disk.quota = len(BIG)
    body = {"operation": "upload", "objects": [{"oid": sha256(BIG), "size": len(BIG)}]}
    answer = team.send("ann", "POST", f"/{REPO}.git/info/lfs/objects/batch", body)
    assert (answer.status, answer.data["error"].startswith("The hub is full")) == (507, True)


def test_large_files_are_listed_and_deleted_for_good(team: Any) -> None:
    additions = [CommitOperationAdd("w.bin", BIG), CommitOperationAdd("a.txt", b"small")]
    team.api().create_commit(REPO, additions, commit_message="files")
    listed = list(team.api().list_lfs_files(REPO))
    assert [(file.filename, file.size, file.ref) for file in listed] == [("w.bin", len(BIG), "refs/heads/main")]
    with pytest.raises(HfHubHTTPError):
        list(team.api("sam").list_lfs_files(REPO))
    team.api().permanently_delete_lfs_files(REPO, listed)
    assert "w.bin" not in team.api().list_repo_files(REPO)
    assert list(team.api().list_lfs_files(REPO)) == []


def test_only_those_who_may_write_something_may_upload(team: Any) -> None:
    body = {"operation": "upload", "objects": [{"oid": sha256(b"x"), "size": 1}]}
    path = f"/{REPO}.git/info/lfs/objects/batch"
    assert team.send(None, "POST", path, body).status == 401
    assert team.send("rita", "POST", path, body).status == 403
    assert team.send("sam", "POST", path, body).status == 200  # for a pull request
    for wrong in ({"size": -1}, {"size": 1 << 60}, {"oid": "../x"}, {"size": "1"}):
        broken = {**body, "objects": [{"oid": sha256(b"x"), "size": 1, **wrong}]}
        assert team.send("ann", "POST", path, broken).status == 400


def put_parts(team: Any) -> dict[str, Any]:
    upload: dict[str, Any] = batch(team, "ann", BIG)["actions"]["upload"]
    for number, href in enumerate(parts_of(upload)):
        assert team.send(None, "PUT", href, BIG[number * PART : (number + 1) * PART]).status == 200
    return upload


def test_an_upload_in_parts_needs_room_for_the_parts_and_the_file(team: Any) -> None:
    body = {"operation": "upload", "transfers": ["multipart"], "objects": [{"oid": sha256(BIG), "size": len(BIG)}]}
    disk = team.hub._store.disk
    for times, status in ((1.5, 507), (2.5, 200)):
        disk.quota = disk._used + int(times * len(BIG))
        assert team.send("ann", "POST", f"/{REPO}.git/info/lfs/objects/batch", body).status == status


def test_parts_make_way_for_the_file_and_go_when_it_has_no_room(team: Any, tmp_path: Path) -> None:
    upload, seen = put_parts(team), []
    store, add = team.hub._store, team.hub._store.add_stream

    def counted(chunks: Any, oid: str, size: int) -> None:
        def counting() -> Any:
            for chunk in chunks:
                seen.append(len(list((tmp_path / "hub" / "uploads").glob("*/[0-9]*"))))
                yield chunk

        add(counting(), oid, size)

    store.add_stream = counted
    assert complete(team, upload) == 200
    assert (seen[0], seen[-1]) == (3, 1)
    team.api().delete_repo(REPO)
    team.api().create_repo(REPO, private=False)
    store.add_stream, upload = add, put_parts(team)
    store.disk.quota = 1
    assert complete(team, upload) == 507
    assert not list((tmp_path / "hub" / "uploads").iterdir())


def test_an_upload_may_be_completed_twice_at_once(team: Any) -> None:
    upload = put_parts(team)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: complete(team, upload), range(4))) == [200] * 4
