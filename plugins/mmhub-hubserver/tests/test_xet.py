"""Xet uploads by the real client, and by clients that no one would want."""

import hashlib
import http.client
import json
import os
import random
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lz4.frame
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils._http import close_session
from huggingface_hub.utils._xet import abort_xet_session

from mmhub_hubserver import HubServer
from mmhub_hubserver.disk import Disk
from mmhub_hubserver.store import Repo, Store
from mmhub_hubserver.xet import routes as xet_routes
from mmhub_hubserver.xet import sweep
from mmhub_hubserver.xet.area import Area
from mmhub_hubserver.xet.formats import chunk_hash, hash_text, xorb_hash

pytestmark = pytest.mark.filterwarnings("error")

REPO = "team/model"
MIB = 1 << 20
TAG = b"HFRepoMetaData\0UigEj{\x81W\x83\xa5\xbd\xd9\\\xcd\xd1J\xa9"
BOOKEND = b"\xff" * 32 + bytes(16)


@pytest.fixture(autouse=True)
def _client_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    close_session()
    yield
    abort_xet_session()
    close_session()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def hub(data: Path) -> Iterator[HubServer]:
    with HubServer(data) as running:
        yield running


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    api = HfApi(endpoint=hub.url, token=False)
    api.create_repo(REPO)
    return api


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the xorbs that the hub took in, uncompressed."""
    sizes: list[int] = []
    add = Area.add

    def counted(area: Area, name: str, chunks: Iterable[Any]) -> None:
        kept = list(chunks)
        sizes.append(sum(map(len, kept)))
        add(area, name, kept)

    monkeypatch.setattr(Area, "add", counted)
    return sizes


class Client:
    """What the Xet client sends, by hand."""

    def __init__(self, hub: HubServer, repo: str = REPO) -> None:
        self.hub, self.repo = hub, repo
        status, answer = self.request("GET", f"/api/models/{repo}/xet-write-token/main")
        assert status == 200
        self.root, self.token = urlsplit(answer["casUrl"]).path, answer["accessToken"]

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(urlsplit(self.hub.url).netloc, timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        answer = json.loads(response.read() or b"{}")
        connection.close()
        return response.status, answer

    def post(self, path: str, body: bytes, token: str | None = None) -> tuple[int, dict[str, Any]]:
        return self.request("POST", self.root + path, body, Authorization=f"Bearer {token or self.token}")

    def xorb(self, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        return self.post(f"/v1/xorbs/default/{name}", body)

    def shard(self, body: bytes) -> tuple[int, dict[str, Any]]:
        return self.post("/v1/shards", body)

    def send(self, *chunks: bytes, scheme: int = 1) -> str:
        name = named(chunks)
        assert self.xorb(name, packed(chunks, scheme))[0] == 200
        return name

    def commit(self, path: str, content: bytes) -> tuple[int, dict[str, Any]]:
        oid = hashlib.sha256(content).hexdigest()
        file = {"path": path, "algo": "sha256", "oid": oid, "size": len(content)}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": file}]
        body = "\n".join(map(json.dumps, lines)).encode()
        return self.request("POST", f"/api/models/{self.repo}/commit/main", body)

    def content(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.hub.url).netloc, timeout=10)
        connection.request("GET", f"/{self.repo}/resolve/main/{path}")
        content = connection.getresponse().read()
        connection.close()
        return content


def named(chunks: Iterable[bytes]) -> str:
    return hash_text(xorb_hash([(chunk_hash(chunk), len(chunk)) for chunk in chunks]))


def packed(chunks: Iterable[bytes], scheme: int) -> bytes:
    return b"".join(pack(chunk, scheme) for chunk in chunks)


def pack(chunk: bytes, scheme: int, size: int | None = None) -> bytes:
    data = b"".join(chunk[first::4] for first in range(4)) if scheme == 2 else chunk
    data = data if scheme == 0 else lz4.frame.compress(data)
    size = len(chunk) if size is None else size
    return b"\0" + len(data).to_bytes(3, "little") + bytes([scheme]) + size.to_bytes(3, "little") + data


def raw(text: str) -> bytes:
    return struct.pack("<4Q", *struct.unpack(">4Q", bytes.fromhex(text)))


def shard(*files: tuple[bytes | str, list[tuple[str, int, int]]], flags: int = 0xC0000000) -> bytes:
    """Describe files, each by its content (or sha256) and its terms."""
    body = TAG + struct.pack("<QQ", 2, 0)
    for content, terms in files:
        sha256 = content if isinstance(content, str) else hashlib.sha256(content).hexdigest()
        body += bytes(32) + struct.pack("<IIQ", flags, len(terms), 0)
        body += b"".join(raw(xorb) + struct.pack("<IIII", 0, 0, start, end) for xorb, start, end in terms)
        body += bytes(48 * len(terms)) if flags & 0x80000000 else b""
        body += raw(sha256) + bytes(16) if flags & 0x40000000 else b""
    return body + BOOKEND + BOOKEND


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def area(data: Path) -> Path:
    (found,) = [path for path in data.glob("repos/**/xet/*") if path.is_dir()]
    return found


def pending(data: Path) -> list[Path]:
    return list(data.glob("repos/**/xet/*/*.data"))


def pull(api: HfApi, name: str, cache: Path, repo: str = REPO) -> bytes:
    path = hf_hub_download(repo, name, endpoint=api.endpoint, token=False, cache_dir=cache)
    return Path(path).read_bytes()


def push(api: HfApi, path: Path, content: bytes, repo: str = REPO) -> None:
    path.write_bytes(content)
    api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)


def test_a_large_file_comes_back_unchanged(api: HfApi, data: Path, tmp_path: Path, received: list[int]) -> None:
    content = noise(11 * MIB)
    push(api, tmp_path / "w.bin", content)
    assert sum(received) == len(content)
    assert pull(api, "w.bin", tmp_path / "c") == content
    assert not pending(data), "the chunks are in the file now"
    assert not list((data / "tmp").iterdir())


def test_a_folder_of_weights_comes_back_unchanged(api: HfApi, tmp_path: Path, received: list[int]) -> None:
    numbers = struct.pack("<500000f", *(number / 7 for number in range(500_000)))  # compresses when grouped by bytes
    files = {
        "model.safetensors": struct.pack("<Q", 2) + b"{}" + numbers,
        "other/copy.safetensors": struct.pack("<Q", 2) + b"{}" + numbers,
        "zeros.bin": bytes(2 * MIB),
        "odd.bin": noise(MIB + 4321),
        "config.json": b"{}",
    }
    for name, content in files.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(content)
    api.upload_folder(folder_path=tmp_path / "up", repo_id=REPO)
    folder = Path(snapshot_download(REPO, endpoint=api.endpoint, token=False, cache_dir=tmp_path / "c"))
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert 0 < sum(received) < sum(map(len, files.values())), "zeros are sent once"


def test_a_changed_file_is_sent_in_part(api: HfApi, data: Path, tmp_path: Path, received: list[int]) -> None:
    first = noise(6 * MIB)
    second = first[: 2 * MIB] + b"inserted" + first[2 * MIB :]
    push(api, tmp_path / "w.bin", first)
    received.clear()
    push(api, tmp_path / "w.bin", second)
    assert 0 < sum(received) < MIB
    assert pull(api, "w.bin", tmp_path / "c") == second
    assert not pending(data)


def test_a_deleted_and_recreated_repository_gets_everything_again(api: HfApi, tmp_path: Path) -> None:
    content = noise(2 * MIB)
    push(api, tmp_path / "w.bin", content)
    api.delete_repo(REPO)
    api.create_repo(REPO)
    push(api, tmp_path / "w.bin", content)
    assert pull(api, "w.bin", tmp_path / "c") == content


def test_a_renamed_repository_still_knows_its_chunks(api: HfApi, tmp_path: Path, received: list[int]) -> None:
    content = noise(2 * MIB)
    push(api, tmp_path / "w.bin", content)
    api.move_repo(REPO, "team/renamed")
    push(api, tmp_path / "w2.bin", content + b"more", "team/renamed")
    assert pull(api, "w2.bin", tmp_path / "c", "team/renamed") == content + b"more"


def test_chunks_of_another_repository_are_out_of_reach(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    secret = noise(MIB)
    push(api, tmp_path / "w.bin", secret)
    mine = Client(hub)
    xorb = mine.send(secret[:1000])
    api.create_repo("other/model")
    thief = Client(hub, "other/model")
    assert thief.root != mine.root
    status, answer = thief.shard(shard((secret[:1000], [(xorb, 0, 1)])))
    assert status == 400 and "Push again" in answer["error"]
    assert thief.commit("w.bin", secret)[0] == 400
    assert thief.post("/v1/shards", b"", token=mine.token)[0] == 401
    crossed = thief.root.rpartition("/")[0] + "/" + mine.root.rpartition("/")[2]
    assert thief.request("POST", f"{crossed}/v1/shards", Authorization=f"Bearer {mine.token}")[0] == 403


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_every_compression_is_understood(hub: HubServer, api: HfApi, scheme: int) -> None:
    client, chunks = Client(hub), [noise(8192), b"abc", noise(10_001, 1), b"z" * (128 << 10)]
    footer = b"XETBLOB\1" + noise(300)
    xorb = named(chunks)
    assert client.xorb(xorb, packed(chunks, scheme) + footer) == (200, {"was_inserted": True})
    assert client.xorb(xorb, packed(chunks, scheme) + footer) == (200, {"was_inserted": False})
    content = chunks[1] + chunks[2] + chunks[3] + chunks[0] + chunks[1]
    assert client.shard(shard((content, [(xorb, 1, 4), (xorb, 0, 2)]))) == (200, {"result": 1})
    assert client.commit("f.bin", content)[0] == 200
    assert client.content("f.bin") == content


def test_the_hash_of_a_xorb_is_that_of_the_protocol() -> None:
    """Values from the tests of the reference implementation."""
    one = raw("cfc5d07f6f03c29bbf424132963fe08d19a37d5757aaf520bf08119f05cd56d6")
    two = raw("c3e67584b5c4fc2a89837ec39e40f2c8a6bb0b2987ac94cd4b31e5fbdd210a72")
    three = raw("0d2beb91b9196929a5ddec9f6e306924ddf4a24268e3e59fd8464738d525af37")
    four = raw("adf8773496a9b7319b2e50dc98093f344053b17d8ad37100b9c07d9805988784")
    assert hash_text(xorb_hash([(one, 100)])) == hash_text(one)
    expected = "71ec1275fca074724e2dd666921b3277c7cee603e4d025bcab2d4050015be2bc"
    assert hash_text(xorb_hash([(one, 100), (two, 200), (three, 300)])) == expected
    expected = "52c826f99507aa05d0b45e9837fa1709e0485425cfbcb1e80db3905cf98b3ee9"
    nodes = [(one, 100), (two, 200), (one, 100), (two, 200), (three, 300), (four, 400)]
    assert hash_text(xorb_hash(nodes)) == expected


def test_chunks_wait_until_the_last_of_them_is_in_a_file(hub: HubServer, api: HfApi, data: Path) -> None:
    client, chunks = Client(hub), [noise(9000, 1), noise(9000, 2)]
    xorb = client.send(*chunks)
    assert client.shard(shard((chunks[0], [(xorb, 0, 1)])))[0] == 200
    assert len(pending(data)) == 1
    assert client.shard(shard((chunks[1] + chunks[0], [(xorb, 1, 2), (xorb, 0, 1)])))[0] == 200
    assert not pending(data)
    both = chunks[0] + chunks[1] + chunks[0]
    assert client.shard(shard((both, [(xorb, 0, 2), (xorb, 0, 1)])))[0] == 200
    assert client.commit("both.bin", both)[0] == 200
    assert client.content("both.bin") == both


def test_a_shard_may_be_sent_again(hub: HubServer, api: HfApi) -> None:
    client, content = Client(hub), noise(5000)
    body = shard((content, [(client.send(content), 0, 1)]), (b"", []))
    assert client.shard(body)[0] == client.post("/shards", body)[0] == 200
    assert client.commit("empty.bin", b"")[0] == 200


def test_uploads_at_the_same_time_do_not_disturb_each_other(hub: HubServer, api: HfApi, data: Path) -> None:
    client, chunks = Client(hub), [noise(60_000, seed) for seed in range(20)]
    failures: list[object] = []

    def upload(number: int) -> None:
        terms = [(client.send(chunk), 0, 1) for chunk in chunks[number : number + 12]]
        content = b"".join(chunks[number : number + 12])
        for answer in (client.shard(shard((content, terms))), client.commit(f"{number}.bin", content)):
            if answer[0] != 200:
                failures.append(answer)

    threads = [threading.Thread(target=upload, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(client.content(f"{number}.bin") == b"".join(chunks[number : number + 12]) for number in range(8))
    assert not pending(data)


BAD_XORBS = {
    "empty": b"",
    "only a footer": b"XETBLOB\1" + bytes(100),
    "not a xorb": noise(500),
    "half a header": packed([b"a"], 0) + b"\0\0",
    "cut off": packed([noise(5000)], 1)[:-1],
    "of a newer version": b"\1" + packed([b"a"], 0)[1:],
    "unknown compression": pack(b"a", 3),
    "empty chunk": pack(b"", 0),
    "chunk over the limit": pack(bytes(130 << 10), 1),
    "longer than announced": pack(bytes(100_000), 1, size=10),
    "shorter than announced": pack(bytes(10), 1, size=100_000),
    "stored longer than announced": pack(bytes(10), 0, size=9),
    "broken compression": pack(bytes(100), 1)[:12] + b"\xff" * 20,
    "other chunks": packed([b"something else"], 1),
}


@pytest.mark.parametrize("name", BAD_XORBS)
def test_a_bad_xorb_is_refused(hub: HubServer, api: HfApi, data: Path, name: str) -> None:
    client = Client(hub)
    status, answer = client.xorb(named([b"a"]), BAD_XORBS[name])
    assert status == 400 and answer["error"], answer
    assert not list(area(data).iterdir()) and not list((data / "tmp").iterdir())


def test_a_flipped_bit_is_refused(hub: HubServer, api: HfApi) -> None:
    client, chunk = Client(hub), noise(70_000)
    body = bytearray(packed([chunk], 0))
    body[40_000] ^= 4
    status, answer = client.xorb(named([chunk]), bytes(body))
    assert status == 400 and "do not make up" in answer["error"]


XORB = named([b"a"])
BAD_SHARDS = {
    "empty": b"",
    "not a shard": noise(500),
    "of a newer version": TAG + struct.pack("<QQ", 3, 0) + BOOKEND * 2,
    "without an end": shard((b"a", [(XORB, 0, 1)]))[:-96],
    "with fewer terms than announced": TAG + struct.pack("<QQ", 2, 0) + bytes(32) + struct.pack("<IIQ", 0, 1000, 0),
    "without sha256": shard((b"a", [(XORB, 0, 1)]), flags=1 << 31),
    "with another sha256": shard((b"b", [(XORB, 0, 1)])),
    "of no chunks": shard((b"a", [(XORB, 0, 0)])),
    "of chunks that are not there": shard((b"a", [(XORB, 0, 2)])),
    "of chunks backwards": shard((b"a", [(XORB, 1, 0)])),
    "of too few chunks": shard((b"a", [])),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_a_bad_shard_is_refused(hub: HubServer, api: HfApi, data: Path, name: str) -> None:
    client = Client(hub)
    assert client.send(b"a") == XORB
    status, answer = client.shard(BAD_SHARDS[name])
    assert status == 400 and answer["error"], answer
    assert client.commit("a.bin", b"a")[0] == client.commit("b.bin", b"b")[0] == 400
    assert client.shard(shard((b"a", [(XORB, 0, 1)])))[0] == 200, "what was sent before is still there"
    assert not list((data / "tmp").iterdir())


@pytest.mark.parametrize("path", ["/v1/xorbs/default/" + "0" * 64, "/v1/shards"])
def test_a_huge_announced_length_is_refused_at_once(hub: HubServer, api: HfApi, path: str) -> None:
    client = Client(hub)
    headers = {"Content_Length": str(1 << 50), "Authorization": f"Bearer {client.token}"}
    assert client.request("POST", client.root + path, b"", **headers)[0] == 413


def test_a_shard_that_announces_billions_of_terms_is_refused(hub: HubServer, api: HfApi) -> None:
    body = TAG + struct.pack("<QQ", 2, 0) + bytes(32) + struct.pack("<IIQ", 0xC0000000, 0xFFFFFFFF, 0)
    assert Client(hub).shard(body)[0] == 413


@pytest.mark.slow
def test_a_small_shard_cannot_fill_the_disk(hub: HubServer, api: HfApi, data: Path) -> None:
    client, chunks = Client(hub), [bytes(128 << 10)] * 512
    xorb = client.send(*chunks)
    for terms, message in ((70_000, "disk is full"), (300_000, "at most")):
        status, answer = client.shard(shard((noise(1), [(xorb, 0, 512)] * terms)))
        assert status == 413 and message in answer["error"]


def test_a_token_opens_one_repository_for_a_while(hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    client, path = Client(hub), f"/v1/xorbs/default/{XORB}"
    _, expires, signature = client.token.split("_")
    forged = [f"xet_{int(expires) + 9}_{signature}", f"xet_{expires}_{'0' * 64}", "xet_\xe9_\xe9", "x", "hf_token"]
    for token in forged:
        assert client.post(path, packed([b"a"], 1), token=token)[0] == 401
    assert client.request("POST", client.root + path)[0] == 401
    assert client.request("POST", client.root + path, Authorization=f"Basic {client.token}")[0] == 401
    assert client.xorb(XORB, packed([b"a"], 1))[0] == 200
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + xet_routes.TOKEN_SECONDS + 1)
    status, answer = client.xorb(XORB, packed([b"a"], 1))
    assert status == 401 and "expired" in answer["error"]


def test_a_token_that_runs_out_is_renewed_by_the_client(
    api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xet_routes, "TOKEN_SECONDS", 1)
    content = noise(3 * MIB)
    push(api, tmp_path / "w.bin", content)
    assert pull(api, "w.bin", tmp_path / "c") == content


def test_what_this_hub_does_not_offer_is_not_found(hub: HubServer, api: HfApi) -> None:
    client = Client(hub)
    assert client.request("GET", f"{client.root}/v1/chunks/default/{XORB}")[0] == 404
    for path in (f"/v1/xorb-grants/default/{XORB}", "/v2/shards", "/v1/reconstructions"):
        assert client.post(path, b"{}")[0] == 404
    assert client.post("/v1/telemetry", b"{}")[0] == 200
    assert client.request("GET", "/api/models/no/repo/xet-write-token/main")[0] == 404


def damage_data(hub: HubServer, data: Path) -> None:
    for path in pending(data):
        path.write_bytes(bytes(path.stat().st_size))


def lose_data(hub: HubServer, data: Path) -> None:
    for path in pending(data):
        path.unlink()


def cut_index(hub: HubServer, data: Path) -> None:
    (area(data) / XORB).write_bytes(b"")


@pytest.mark.parametrize("loss", [damage_data, lose_data, cut_index])
def test_a_client_starts_afresh_after_the_hub_lost_chunks(hub: HubServer, api: HfApi, data: Path, loss: Any) -> None:
    client, body = Client(hub), shard((b"a", [(XORB, 0, 1)]))
    client.send(b"a")
    loss(hub, data)
    status, answer = client.shard(body)
    assert status == 400 and "Push again" in answer["error"]
    assert client.shard(body)[0] == client.xorb(XORB, packed([b"a"], 0))[0] == 403
    again = Client(hub)
    assert again.root != client.root
    assert again.send(b"a") == XORB
    assert again.shard(body)[0] == 200


def test_a_push_works_after_the_chunks_of_the_one_before_were_swept(
    api: HfApi, data: Path, tmp_path: Path, received: list[int]
) -> None:
    content = noise(2 * MIB)
    push(api, tmp_path / "w.bin", content)
    Area.drop(Area(_repo(data), area(data).name))
    push(api, tmp_path / "w.bin", content + b"more")
    assert pull(api, "w.bin", tmp_path / "c") == content + b"more"
    assert sum(received) >= 2 * len(content)


def _repo(data: Path) -> Repo:
    store = Store.__new__(Store)  # the running server holds the lock of the real one
    store.root = data
    store.disk = Disk(store.tmp)
    return Repo(store, "models", REPO)


def test_only_abandoned_uploads_are_swept(data: Path) -> None:
    with HubServer(data) as hub:
        HfApi(endpoint=hub.url, token=False).create_repo(REPO)
        client = Client(hub)
        xorb = client.send(noise(5000))
    store = Store(data)
    assert sweep(store) == 0 and len(pending(data)) == 1
    old = time.time() - 4 * 24 * 3600
    os.utime(pending(data)[0], (old, old))
    assert sweep(store) == 1 and not pending(data)
    store.close()
    with HubServer(data) as hub:
        assert Client(hub).root.rpartition("/")[2] != client.root.rpartition("/")[2]
        assert Client(hub).shard(shard((noise(5000), [(xorb, 0, 1)])))[0] == 400


def test_an_abandoned_upload_makes_way_for_the_next(hub: HubServer, api: HfApi, data: Path) -> None:
    client = Client(hub)
    client.send(noise(5000))
    assert Client(hub).root == client.root
    old = time.time() - 4 * 24 * 3600
    os.utime(pending(data)[0], (old, old))
    assert Client(hub).root != client.root
    assert not pending(data)


def test_chunks_in_a_file_that_is_gone_are_swept(data: Path) -> None:
    content = noise(5000)
    with HubServer(data) as hub:
        HfApi(endpoint=hub.url, token=False).create_repo(REPO)
        client = Client(hub)
        assert client.shard(shard((content, [(client.send(content), 0, 1)])))[0] == 200
    store = Store(data)
    assert sweep(store) == 0
    oid = hashlib.sha256(content).hexdigest()
    for path in data.rglob(oid):
        path.unlink()
    assert sweep(store) == 1
    store.close()


def test_an_upload_goes_on_after_a_restart_of_the_hub(data: Path) -> None:
    content = noise(5000)
    with HubServer(data) as hub:
        HfApi(endpoint=hub.url, token=False).create_repo(REPO)
        client = Client(hub)
        xorb = client.send(content)
    with HubServer(data) as client.hub:
        assert client.shard(shard((content, [(xorb, 0, 1)])))[0] == 200
        assert client.commit("f.bin", content)[0] == 200
        assert client.content("f.bin") == content


def test_a_known_file_of_another_size_is_refused_unread(
    hub: HubServer, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, content = Client(hub), noise(5000)
    xorb = client.send(content)
    assert client.shard(shard((content, [(xorb, 0, 1)])))[0] == 200
    monkeypatch.setattr(Area, "_read", lambda *_: pytest.fail("nothing is read"))
    assert client.shard(shard((content, [(xorb, 0, 1)] * 2)))[0] == 400


def test_who_only_proposes_drops_nobody_elses_chunks(team: Any) -> None:
    team.api().create_repo(REPO := "lab/model", private=False)

    def area_of(who: str) -> tuple[str, str]:
        answer = team.send(who, "GET", f"/api/models/{REPO}/xet-write-token/main?create_pr=1")
        return urlsplit(answer.data["casUrl"]).path, answer.data["accessToken"]

    root, token = area_of("sam")
    assert area_of("bob")[0] == area_of("ann")[0] != root == area_of("sam")[0]
    body = shard((b"a", [(XORB, 0, 1)]))
    assert team.send(token, "POST", f"{root}/v1/shards", body).status == 400
    before = area_of("ann")[0]
    assert area_of("sam")[0] != root and area_of("ann")[0] == before
