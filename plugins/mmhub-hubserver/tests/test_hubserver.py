"""The hub against the real `huggingface_hub` client, and against requests no client would send."""

import hashlib
import http.client
import io
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import close_session

from mmhub_hubserver import HubServer, server
from mmhub_hubserver.cli import hub as hub_command

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

BIG = bytes(range(256)) * (3 << 12)  # 3 MiB
REPO = "team/model"


@pytest.fixture(autouse=True)
def _client_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def repo(api: HfApi) -> str:
    return api.create_repo(REPO).repo_id


def push(api: HfApi, files: dict[str, bytes], repo_id: str = REPO, **options: Any) -> str:
    """Commit file objects: the client then uses LFS instead of Xet."""
    additions = [CommitOperationAdd(path, io.BytesIO(content)) for path, content in files.items()]
    return str(api.create_commit(repo_id, additions, commit_message="files", **options).oid)


def pull(api: HfApi, name: str, cache: Path, **options: Any) -> bytes:
    path = hf_hub_download(REPO, name, endpoint=api.endpoint, token=False, cache_dir=cache, **options)
    return Path(path).read_bytes()


def raw(hub: HubServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Send one request past the client's own checks."""
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert b"Traceback" not in text
    return response.status, json.loads(text) if text else {}


def raw_commit(hub: HubServer, *operations: tuple[str, dict[str, Any]], repo: str = REPO) -> tuple[int, dict[str, Any]]:
    lines = [("header", {"summary": "crafted"}), *operations]
    body = "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines).encode()
    return raw(hub, "POST", f"/api/models/{repo}/commit/main", body)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_small_and_large_files_come_back_unchanged(api: HfApi, tmp_path: Path, kind: str) -> None:
    api.create_repo("team/data.v1", repo_type=kind)
    files = {"README.md": b"---\nlicense: mit\n---\n# hello\n", "a b/\xe4.txt": b"", "w.safetensors": BIG}
    oid = push(api, files, "team/data.v1", repo_type=kind)
    folder = snapshot_download(
        "team/data.v1", repo_type=kind, endpoint=api.endpoint, token=False, cache_dir=tmp_path / "c"
    )
    assert Path(folder).name == oid
    assert {name: (Path(folder) / name).read_bytes() for name in files} == files
    listed = api.list_repo_files("team/data.v1", repo_type=kind)
    assert sorted(listed) == sorted([".gitattributes", *files])


def test_metadata_names_the_commit_and_the_content(api: HfApi, repo: str) -> None:
    oid = push(api, {"config.json": b"{}", "w.safetensors": BIG})
    small = get_hf_file_metadata(hf_hub_url(REPO, "config.json", endpoint=api.endpoint), token=False)
    large = get_hf_file_metadata(hf_hub_url(REPO, "w.safetensors", endpoint=api.endpoint), token=False)
    assert (small.commit_hash, small.size) == (large.commit_hash, 2) == (oid, 2)
    assert small.etag == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object of {}
    assert (large.etag, large.size) == (sha256(BIG), len(BIG))


def test_any_token_is_the_local_user(api: HfApi) -> None:
    assert api.whoami(token="hf_x")["name"] == "local"
    assert api.create_repo("bare").repo_id == "local/bare"


def test_creating_twice_is_an_error_unless_asked_for(api: HfApi, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_a_commit_on_a_stale_parent_is_refused(api: HfApi, repo: str) -> None:
    first = push(api, {"a": b"1"})
    second = push(api, {"a": b"2"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError) as caught:
        push(api, {"a": b"3"}, parent_commit=first)
    assert caught.value.response.status_code == 412
    assert api.model_info(REPO).sha == second
    assert push(api, {"a": b"4"}, parent_commit=second[:7]) != second


def test_of_many_concurrent_commits_on_one_parent_exactly_one_wins(hub: HubServer, api: HfApi, repo: str) -> None:
    parent, statuses = api.model_info(REPO).sha, []

    def attempt(number: int) -> None:
        operation = ("file", {"path": f"{number}", "content": "x"})
        lines = [("header", {"summary": "race", "parentCommit": parent}), operation]
        body = "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines).encode()
        statuses.append(raw(hub, "POST", f"/api/models/{REPO}/commit/main", body)[0])

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [412] * 7


def test_unchanged_files_make_no_commit(api: HfApi, repo: str) -> None:
    files = {"a": b"1", "w.safetensors": BIG}
    assert push(api, files) == push(api, files)
    assert len(api.list_repo_commits(REPO)) == 2


def test_branches_and_tags_pin_downloads(api: HfApi, repo: str, tmp_path: Path) -> None:
    old = push(api, {"a": b"old"})
    api.create_tag(REPO, tag="v1/rc")
    api.create_branch(REPO, branch="dev/x", revision="v1/rc")
    push(api, {"a": b"dev"}, revision="dev/x")
    new = push(api, {"a": b"new"})
    found = {name: pull(api, "a", tmp_path, revision=name) for name in ("v1/rc", "dev/x", "main", old, new)}
    assert found == {"v1/rc": b"old", "dev/x": b"dev", "main": b"new", old: b"old", new: b"new"}
    refs = api.list_repo_refs(REPO)
    assert [ref.ref for ref in refs.branches] == ["refs/heads/dev/x", "refs/heads/main"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1/rc", old)]
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["files", "files", "initial commit"]


def test_branches_and_tags_are_created_and_deleted_once(api: HfApi, repo: str) -> None:
    api.create_branch(REPO, branch="dev")
    api.create_branch(REPO, branch="dev", exist_ok=True)
    api.create_tag(REPO, tag="v1")
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="dev")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(REPO, tag="v1")
    with pytest.raises(HfHubHTTPError, match="Cannot delete refs/heads/main"):
        api.delete_branch(REPO, branch="main")
    with pytest.raises(BadRequestError):
        api.create_branch(REPO, branch="refs/pr/5")


def test_what_is_missing_raises_the_clients_own_errors(api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("team/none")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2", revision="main")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("team/none", endpoint=api.endpoint, token=False, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        push(api, {"a": b"1"}, "team/none")
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        pull(api, "none.txt", tmp_path)
    assert caught.value.response.headers["X-Repo-Commit"] == api.model_info(REPO).sha
    with pytest.raises(RevisionNotFoundError):
        pull(api, ".gitattributes", tmp_path, revision="none")
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a": b"1"}, revision="none")
    assert not api.file_exists(REPO, "none.txt")
    assert not api.repo_exists(REPO, repo_type="dataset")


def test_the_tree_is_listed_by_folder_and_in_pages(api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub_hubserver.views.PAGE", 2)
    push(api, {"a": b"1", "d/b": b"2", "d/e/c.safetensors": BIG})
    top = {item.path: type(item).__name__ for item in api.list_repo_tree(REPO)}
    assert top == {".gitattributes": "RepoFile", "a": "RepoFile", "d": "RepoFolder"}
    assert [item.path for item in api.list_repo_tree(REPO, "d")] == ["d/b", "d/e"]
    below = {item.path: item for item in api.list_repo_tree(REPO, recursive=True)}
    assert list(below) == [".gitattributes", "a", "d", "d/b", "d/e", "d/e/c.safetensors"]
    lfs = below["d/e/c.safetensors"].lfs  # type: ignore[union-attr]
    assert lfs is not None and (lfs.sha256, lfs.size) == (sha256(BIG), len(BIG))
    assert {item.path for item in api.get_paths_info(REPO, ["a", "d/e", "none"])} == {"a", "d/e"}
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "none"))


def test_files_are_copied_and_deleted(api: HfApi, repo: str, tmp_path: Path) -> None:
    push(api, {"a": b"1", "d/b": b"2", "d/w.safetensors": BIG})
    operations: list[Any] = [
        CommitOperationCopy("d/w.safetensors", "copy.safetensors"),
        CommitOperationDelete("a"),
        CommitOperationDelete("d/"),
    ]
    api.create_commit(REPO, operations, commit_message="tidy")
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "copy.safetensors"]
    assert pull(api, "copy.safetensors", tmp_path) == BIG
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("a", REPO)


def test_a_deleted_repository_is_gone_and_its_files_cannot_be_claimed_by_hash(hub: HubServer, api: HfApi) -> None:
    for name in (REPO, "other/model"):
        api.create_repo(name)
    push(api, {"w.safetensors": BIG})
    value = {"path": "stolen", "algo": "sha256", "oid": sha256(BIG)}
    assert raw_commit(hub, ("lfsFile", value), repo="other/model")[0] == 400
    api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    api.delete_repo(REPO, missing_ok=True)
    api.create_repo(REPO)
    assert raw_commit(hub, ("lfsFile", value))[0] == 400
    push(api, {"w.safetensors": BIG})


def test_the_card_is_described_and_searched(api: HfApi, repo: str) -> None:
    card = (
        "---\nlibrary_name: mmhub\npipeline_tag: image-classification\nlicense: apache-2.0\ntags: [digits]\n---\n# x\n"
    )
    push(api, {"README.md": card.encode()})
    api.create_repo("else/model")
    info = api.model_info(REPO, files_metadata=True)
    assert (info.library_name, info.pipeline_tag, info.private) == ("mmhub", "image-classification", False)
    assert info.card_data is not None and info.card_data.license == "apache-2.0"
    assert info.tags == ["mmhub", "image-classification", "digits", "license:apache-2.0"]
    assert info.siblings is not None and {file.rfilename for file in info.siblings} == {".gitattributes", "README.md"}
    assert api.model_info(REPO, expand=["sha"]).sha == info.sha
    assert {found.id for found in api.list_models()} == {REPO, "else/model"}
    assert [found.id for found in api.list_models(filter=["mmhub", "digits"])] == [REPO]
    assert [found.id for found in api.list_models(author="else", limit=1)] == ["else/model"]
    assert [found.id for found in api.list_models(search="TEAM")] == [REPO]
    assert not [*api.list_models(search="nothing"), *api.list_datasets()]


def test_a_card_that_is_not_yaml_is_refused_before_the_upload(api: HfApi, repo: str) -> None:
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(api, {"README.md": b"---\na: [\n---\n"})
    with pytest.raises(ValueError, match="aliases"):
        push(api, {"README.md": b"---\na: &a [1]\nb: [*a, *a]\n---\n"})
    with pytest.raises(ValueError, match="deep nesting"):  # half a minute for PyYAML
        push(api, {"README.md": b"---\n" + b"[" * 60_000 + b"\n---\n"})
    push(api, {"README.md": b"---\nhuge: " + b"1:" * 9_000 + b"1\nnan: .nan\n---\n"})
    assert api.model_info(REPO).card_data is None


def test_an_interrupted_download_resumes(
    hub: HubServer, api: HfApi, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(api, {"w.safetensors": BIG})
    send, asked = server._Connection._send, []

    def send_half_once(self: Any, response: Any) -> None:
        if self.command == "GET" and response.file is not None:
            asked.append(self.headers.get("Range"))
            if len(asked) == 1:
                self._send_head(response, response.file[2])
                self.wfile.write(BIG[:1000_000])
                raise ConnectionResetError
        send(self, response)

    monkeypatch.setattr(server._Connection, "_send", send_half_once)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    assert pull(api, "w.safetensors", tmp_path) == BIG
    assert asked == [None, "bytes=1000000-"]


def test_ranges_are_answered_on_one_kept_connection(hub: HubServer, api: HfApi, repo: str) -> None:
    push(api, {"w.safetensors": BIG})
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    for asked, status, content in (
        ("bytes=0-3", 206, BIG[:4]),
        ("bytes=-5", 206, BIG[-5:]),
        (f"bytes={len(BIG) - 2}-{len(BIG) + 9}", 206, BIG[-2:]),
        (f"bytes={len(BIG)}-", 416, b""),
        ("bytes=-0", 416, b""),
        ("bytes=5-2", 200, BIG),
        ("bytes=0-1,4-5", 200, BIG),
        ("lines=1-2", 200, BIG),
    ):
        connection.request("GET", f"/{REPO}/resolve/main/w.safetensors", headers={"Range": asked})
        response = connection.getresponse()
        assert (response.status, response.read()) == (status, content), asked
    connection.close()


def test_a_refused_body_does_not_become_the_next_request(hub: HubServer) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    for _ in range(2):
        connection.request("POST", "/api/unknown", b"GET /api/whoami-v2 HTTP/1.1\r\n\r\n" * 1000)
        response = connection.getresponse()
        assert (response.status, response.read()) == (404, b'{"error": "This hub has no /api/unknown."}')
    connection.close()


def test_dangerous_paths_are_refused(hub: HubServer, api: HfApi, repo: str) -> None:
    before = api.model_info(REPO).sha
    paths = ["../x", "a/../x", "/x", "a\\b", ".git/config", "d/.GIT/x", ".cache/x", "a//b", "a/", ".", "a\nb", "a\x00"]
    for path in [*paths, "C:x", "\ud800", "", "x" * 256, "y/" * 600 + "y"]:
        assert raw_commit(hub, ("file", {"path": path, "content": "x"}))[0] == 422, path
        assert raw(hub, "POST", f"/api/models/{REPO}/preupload/main", {"files": [{"path": path, "size": 1}]})[0] == 422
    assert api.model_info(REPO).sha == before


def test_paths_that_cannot_share_a_disk_are_refused(hub: HubServer, api: HfApi, repo: str) -> None:
    for one, two in (("a", "a/b"), ("C", "c"), ("D", "d/b"), ("\xe9", "e\u0301")):
        push(api, {one: b"x"})
        assert raw_commit(hub, ("file", {"path": two, "content": "x"}))[0] == 422
        assert raw_commit(hub, ("deletedFile", {"path": one}), ("file", {"path": two, "content": "x"}))[0] == 200


def test_addresses_cannot_leave_the_store(hub: HubServer, api: HfApi, repo: str) -> None:
    for name in ("..%2F..%2F..%2Fsecret", "%2e%2e", "..", "%00", "x" * 3000, "%ff"):
        for path in (f"/{REPO}/resolve/{name}/x", f"/api/models/{REPO}/revision/{name}", f"/api/models/{name}/x"):
            assert raw(hub, "GET", path)[0] in (400, 404), path
    assert raw(hub, "GET", f"/{REPO}/resolve/main/..%2F..%2Fsecret")[0] == 404
    for name in ("../../x", "a/b/c", "..", "x.git", "a--b"):
        assert raw(hub, "POST", "/api/repos/create", {"name": name, "organization": "o"})[0] == 400
    assert raw(hub, "POST", "/api/repos/create", {"name": "x", "type": "../x"})[0] == 400


def test_malformed_requests_get_a_short_answer(hub: HubServer, api: HfApi, repo: str) -> None:
    assert raw(hub, "POST", "/api/repos/create", b"{nonsense")[0] == 400
    assert raw(hub, "POST", "/api/repos/create", b"[" * 100_000)[0] == 400
    assert raw(hub, "POST", "/api/repos/create", [])[0] == 400
    assert raw(hub, "POST", "/api/repos/create", {"name": 5})[0] == 400
    assert raw(hub, "POST", "/api/repos/create", b" " * (17 << 20))[0] == 413
    assert raw(hub, "POST", f"/api/models/{REPO}/commit/main", b"x" * (18 << 20))[0] == 413
    assert raw(hub, "POST", f"/api/models/{REPO}/commit/main", b"")[0] == 400
    assert raw_commit(hub, ("file", {"path": "a", "content": "*", "encoding": "base64"}))[0] == 400
    assert raw_commit(hub, ("rm -rf", {"path": "a"}))[0] == 400
    assert raw(hub, "POST", f"/api/models/{REPO}/preupload/main", {"files": [3]})[0] == 400
    assert raw(hub, "GET", f"/api/models/{REPO}/tree/main?cursor=x")[0] == 400
    assert raw(hub, "GET", "/api/unknown") == (404, {"error": "This hub has no /api/unknown."})
    assert raw(hub, "PUT", "/api/whoami-v2")[0] == 405
    assert raw(hub, "BREW", "/")[0] == 501
    assert raw(hub, "GET", "/", Content_Length="-1")[0] == 400
    assert raw(hub, "GET", "/api/whoami-v2")[0] == 200


def test_a_web_page_cannot_reach_the_hub(hub: HubServer) -> None:
    assert raw(hub, "GET", "/api/whoami-v2", Host="evil.example")[0] == 403
    assert raw(hub, "POST", "/api/repos/create", {"name": "x"}, Origin="http://evil.example")[0] == 403
    assert raw(hub, "GET", "/api/whoami-v2", Host="localhost:1")[0] == 200


def upload_url(hub: HubServer, content: bytes) -> str:
    body = {"operation": "upload", "objects": [{"oid": sha256(content), "size": len(content)}]}
    _, answer = raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", body)
    href: str = answer["objects"][0]["actions"]["upload"]["href"]
    return href.removeprefix(hub.url)


def test_an_upload_needs_its_signed_address_and_the_right_content(
    hub: HubServer, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload_url(hub, b"good")
    assert raw(hub, "PUT", url, b"evil")[0] == 400
    assert raw(hub, "PUT", url, b"longer")[0] == 400
    assert raw(hub, "PUT", re.sub("expires=1", "expires=2", url), b"good")[0] == 403
    assert raw(hub, "PUT", url.partition("?")[0], b"good")[0] == 403
    assert raw_commit(hub, ("lfsFile", {"path": "a", "oid": sha256(b"good")}))[0] == 400
    monkeypatch.setattr("mmhub_hubserver.signing.SECONDS", -1)
    assert raw(hub, "PUT", upload_url(hub, b"good"), b"good")[0] == 403
    assert raw(hub, "PUT", url, b"4\r\ngood\r\n0\r\n\r\n", Transfer_Encoding="chunked")[0] == 200
    assert raw_commit(hub, ("lfsFile", {"path": "a", "oid": sha256(b"good")}))[0] == 200
    assert raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/verify", {"oid": sha256(b"good"), "size": 5})[0] == 404


def test_a_killed_upload_leaves_nothing(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    url, address = upload_url(hub, BIG), urlsplit(hub.url)
    with socket.create_connection((address.hostname, address.port or 0)) as connection:
        connection.sendall(f"PUT {url} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BIG)}\r\n\r\n".encode())
        connection.sendall(BIG[: len(BIG) // 2])
    with socket.create_connection((address.hostname, address.port or 0)) as connection:
        head = f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"key": "header", "value": {"summary": "half"}}\n')
    hub.close()
    assert list((tmp_path / "hub" / "tmp").iterdir()) == []
    assert not (tmp_path / "hub" / "blobs" / sha256(BIG)[:2] / sha256(BIG)).exists()
    with HubServer(tmp_path / "hub") as again:
        api = HfApi(endpoint=again.url, token=False)
        assert len(api.list_repo_commits(REPO)) == 1
        push(api, {"w.safetensors": BIG})


def test_a_client_that_stalls_is_let_go(hub: HubServer, api: HfApi, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server._Connection.timeout == server.SOCKET_SECONDS
    monkeypatch.setattr(server._Connection, "timeout", 0.1)
    address = urlsplit(hub.url)
    for start in (b"", b"GET /api", b"POST /api/repos/create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection((address.hostname, address.port or 0), timeout=10) as connection:
            connection.sendall(start)
            assert connection.recv(100) == b""


def test_a_restart_keeps_everything_and_upload_addresses_stay_valid(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as first:
        api = HfApi(endpoint=first.url, token=False)
        api.create_repo(REPO)
        oid = push(api, {"a": b"1", "w.safetensors": BIG})
        api.create_tag(REPO, tag="v1")
        url, port = upload_url(first, b"later"), urlsplit(first.url).port
    with HubServer(tmp_path / "hub", port=port or 0) as second:
        assert second.url == api.endpoint
        assert api.model_info(REPO, revision="v1").sha == oid
        assert pull(api, "w.safetensors", tmp_path / "cache") == BIG
        assert raw(second, "PUT", url, b"later")[0] == 200


def test_one_data_folder_has_one_server(hub: HubServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(hub_command, ["serve", "--data", str(tmp_path / "hub")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Another hub server (or gc, or verify) is already using")


def test_a_damaged_commit_is_reported_and_does_not_hide_the_others(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("team/good")
    api.create_repo("team/bad")
    git_dir = tmp_path / "hub" / "repos" / "models" / "team" / "bad.git"
    (pack,) = (git_dir / "objects" / "pack").glob("*.pack")
    content = pack.read_bytes()
    pack.write_bytes(content[:12] + b"\x15" * (len(content) - 32) + content[-20:])
    assert [found.id for found in api.list_models()] == ["team/good"]
    commit = (git_dir / "refs" / "heads" / "main").read_text().strip()
    assert raw(hub, "GET", "/api/models/team/bad") == (
        500,
        {"error": f"The object {commit} is damaged on the hub's disk."},
    )


def test_serve_refuses_the_network_and_a_taken_port(hub: HubServer, tmp_path: Path) -> None:
    outside = CliRunner().invoke(hub_command, ["serve", "--data", str(tmp_path / "b"), "--host", "0.0.0.0"])
    assert outside.exit_code == 2 and "only loopback" in outside.stderr
    assert not (tmp_path / "b").exists()
    taken = CliRunner().invoke(hub_command, ["serve", "--data", str(tmp_path / "b"), "--port", hub.url.split(":")[-1]])
    assert taken.exit_code == 1 and "Address already in use" in taken.stderr
    with pytest.raises(ValueError, match="loopback"):
        HubServer(tmp_path / "c", host="192.0.2.1")


def test_serve_says_how_to_use_it_and_ends_on_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: HubServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HubServer, "serve_forever", interrupt)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = CliRunner().invoke(hub_command, ["serve", "--port", "0"])
    assert result.exit_code == 130 and result.stdout == ""
    assert re.search(r"export HF_ENDPOINT=http://127\.0\.0\.1:\d+\n", result.stderr)
    assert str(tmp_path / "mmhub" / "hub") in result.stderr
    assert os.stat(tmp_path / "mmhub" / "hub").st_mode & 0o077 == 0
