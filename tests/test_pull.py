"""Downloads that break: flipped bits, kills, stalls, crowds, hostile listings, proxies. Nothing wrong gets through."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils._http import close_session

from mmhub import hashes
from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError, UsageError
from mmhub.hub import download, load, pull
from mmhub.hub.client import endpoint
from mmhub.hub.describe import describe
from mmhub.hub.pins import compare, lock
from mmhub.names import resolve
from tests.conftest import Cli
from tests.fake_plugins import run
from tests.faulty_hub import COMMIT, REPO, FaultyHub, folder_files

FETCH = """
import sys
from mmhub.hub.download import fetch, in_cache, list_files
place, commit = in_cache(sys.argv[1]), sys.argv[2]
listed = list_files(place.repo, commit)
fetch(place, commit, [remote for name, remote in listed.items() if name.endswith(".safetensors")])
print("done", flush=True)
"""


def checkpoint_files(**weights: bytes) -> dict[str, bytes]:
    """A checkpoint of the right form whose parts no plugin provides; enough for what never gets as far as loading."""
    files = {"model.safetensors": b"w" * 3000, "tokenizer.json": b'{"kind": "byte"}'}
    files |= {f"{name}.safetensors": content for name, content in weights.items()}
    part = {"use": "mmhub-x/part", "weights": "model.safetensors"}
    config = {
        "mmhub_format": 1,
        "task": "classification",
        "components": {"text_encoder": part, "fusion": part, "decoder": part},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
        },
    }
    files["config.json"] = json.dumps(config).encode()
    files["README.md"] = b"---\nlicense: mit\n---\n# A model\n" + b"text " * 100
    files["eval/classification.json"] = b'{"rows": 3}'
    files["provenance.json"] = b'{"seed": 0}'
    return files


@pytest.fixture(autouse=True)
def _client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MMHUB_CACHE", str(tmp_path / "mmhub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.05)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield
    close_session()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    with FaultyHub(checkpoint_files()) as faulty:
        monkeypatch.setenv("HF_ENDPOINT", faulty.url)
        yield faulty


def new_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))  # for child processes
    return folder


def flip(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def partials(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.incomplete") if path.is_file()]


# -- integrity --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_bit_that_flips_in_the_cache_is_found_and_repaired(
    server: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(REPO)
    assert folder_files(folder) == server.files
    dice = random.Random(7)
    for trial in range(100):
        name = dice.choice(sorted(server.files))
        blob = (folder / name).resolve()
        blob.write_bytes(flip(server.files[name], dice.randrange(8 * len(server.files[name]))))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(TrustError, match="damaged") as caught:
            pull(REPO)
        assert caught.value.exit_code == 5
        assert "online" in str(caught.value.hint), (trial, name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert folder_files(pull(REPO)) == server.files, (trial, name)


@pytest.mark.slow
def test_every_bit_that_flips_on_the_way_is_found(
    server: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(8)
    for trial in range(100):
        cache = new_cache(monkeypatch, tmp_path / f"cache-{trial}")
        wrong = dice.choice(sorted(server.files))
        bit = dice.randrange(8 * len(server.files[wrong]))
        server.body = lambda path, content, wrong=wrong, bit=bit: flip(content, bit) if path == wrong else content  # type: ignore[misc]
        with pytest.raises(TrustError, match="damaged, twice") as caught:
            pull(REPO)
        assert wrong in str(caught.value), trial
        assert caught.value.exit_code == 5
        assert not list(cache.rglob(f"snapshots/*/{wrong}")), "nothing wrong becomes visible"


def test_one_wrong_delivery_is_fetched_again(server: FaultyHub) -> None:
    times: list[str] = []

    def once(path: str, content: bytes) -> bytes:
        times.append(path)
        return flip(content, 9) if times.count(path) == 1 else content

    server.body = once
    assert folder_files(pull(REPO)) == server.files


def test_a_listing_that_contradicts_config_json_is_refused_before_weights_are_fetched(server: FaultyHub) -> None:
    server.files["model.safetensors"] = b"W" * 3000
    with pytest.raises(TrustError, match=r"contradicts itself.*'model\.safetensors'"):
        pull(REPO)
    server.files["model.safetensors"] = b"w" * 2999
    with pytest.raises(TrustError, match="contradicts itself"):
        pull(REPO)
    assert not [path for _, path, _ in server.log if path.endswith("model.safetensors")]
    server.files["model.safetensors"] = b"w" * 3000
    server.files["tokenizer.json"] = b'{"kind": "BYTE"}'  # same size, and git's hash says nothing of the sha256
    with pytest.raises(TrustError, match=r"contradicts itself.*'tokenizer\.json'"):
        pull(REPO)
    del server.files["tokenizer.json"]
    with pytest.raises(TrustError, match=r"lacks 'tokenizer\.json'"):
        pull(REPO)


def test_a_damaged_cache_without_a_network_says_what_to_do(server: FaultyHub) -> None:
    blob = (pull(REPO) / "model.safetensors").resolve()
    blob.write_bytes(b"x" * 3000)
    server.shutdown()
    server.server_close()
    close_session()  # its threads still serve open connections
    with pytest.raises(TrustError, match="is damaged, and cannot reach") as caught:
        pull(f"{REPO}@{COMMIT}")
    assert "online" in str(caught.value.hint)


def test_a_second_load_reads_no_file_to_hash_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyHub(folder_files(trained)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        counted = count_hashed(monkeypatch)
        folder = pull(REPO)
        assert counted == [], "a fresh download is hashed on its way"
        load(REPO)
        assert counted == []
        os.utime((folder / "model.safetensors").resolve())
        load(REPO)
        assert counted == [(trained / "model.safetensors").stat().st_size], "a file somebody touched is hashed once"
    monkeypatch.setattr(hashes, "RACY_SECONDS", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    counted.clear()
    load(REPO)
    load(REPO)
    assert len(counted) == 1


def count_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the files that are read for their hash."""
    counted: list[int] = []
    real = hashes._read_hash

    def read(file: Any, kind: str, size: int) -> str:
        counted.append(size)
        return real(file, kind, size)

    monkeypatch.setattr(hashes, "_read_hash", read)
    return counted


# -- resuming ---------------------------------------------------------------------------------------------------


def fetcher(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, REPO, COMMIT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_pull_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40 * 2**20
    with FaultyHub({"model.safetensors": random.Random(1).randbytes(size)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        cache = new_cache(monkeypatch, tmp_path / "cache")
        server.pause = 0.001
        for part in (0.3, 0.6):
            process = fetcher()
            wait_for(lambda part=part: server.sent > part * size)
            process.kill()
            process.communicate()
        assert len(partials(cache)) == 1
        server.pause = 0
        process = fetcher()
        out, err = process.communicate(timeout=60)
        assert out == "done\n", err
        assert server.sent <= 1.05 * size
        link = next(cache.rglob("snapshots/*/model.safetensors"))
        assert link.read_bytes() == server.files["model.safetensors"]
        assert partials(cache) == []


def leave_partial(server: FaultyHub, content: bytes) -> Path:
    """As a killed pull would: config.json is here, the weights are not whole."""
    place = download.in_cache(REPO)
    (place.folder / "blobs").mkdir(parents=True)
    partial = place.folder / "blobs" / f"{server.hash_of('model.safetensors')}.incomplete"
    partial.write_bytes(content)
    return partial


@pytest.mark.parametrize("content", [b"x" * 2000, b"x" * 3000, b"w" * 3001, b"x" * 9000], ids=len)
def test_a_partial_file_that_is_wrong_is_thrown_away(server: FaultyHub, content: bytes) -> None:
    partial = leave_partial(server, content)
    assert folder_files(pull(REPO)) == server.files
    assert not partial.exists()


def test_a_partial_file_that_is_whole_already_is_not_fetched(server: FaultyHub) -> None:
    leave_partial(server, server.files["model.safetensors"])
    pull(REPO)
    assert not [path for _, path, _ in server.log if path.endswith("model.safetensors")]


def test_a_server_that_ignores_range_still_works(server: FaultyHub) -> None:
    server.ranges = False
    leave_partial(server, b"w" * 1000)
    assert folder_files(pull(REPO)) == server.files
    assert [r for _, path, r in server.log if path.endswith("model.safetensors")] == ["bytes=1000-"]


def test_a_connection_that_breaks_off_goes_on_in_the_same_pull(server: FaultyHub) -> None:
    cuts = iter([1000, 2500])

    def cut(request: Any, path: str) -> bool:
        at = next(cuts, None) if path.endswith("model.safetensors") else None
        if at is None:
            return False
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(3000 - start))
        request.send_header("Content-Range", f"bytes {start}-2999/3000")
        request.end_headers()
        request.wfile.write(b"w" * (at - start))
        request.close_connection = True
        return True

    server.fault = cut
    assert folder_files(pull(REPO)) == server.files
    asked = [r for _, path, r in server.log if path.endswith("model.safetensors")]
    assert asked == ["", "bytes=1000-", "bytes=2500-"]


@pytest.mark.parametrize("answer", ["bytes 0-2999/3000", "bytes 1000-2999/4000", "nonsense"])
def test_a_wrong_range_is_not_appended(server: FaultyHub, answer: str) -> None:
    leave_partial(server, b"w" * 1000)

    def wrong(request: Any, path: str) -> bool:
        if not request.headers.get("Range"):
            return False
        request.reply(206, b"w" * 2000, {"Content-Range": answer})
        return True

    server.fault = wrong
    assert folder_files(pull(REPO)) == server.files


# -- patience ---------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)


def test_by_default_a_stalled_server_is_given_up_within_two_minutes() -> None:
    assert download.patience() + constants.HF_HUB_DOWNLOAD_TIMEOUT <= 120


@pytest.mark.parametrize("pause", [0.02, 60], ids=["trickles", "stalls"])
@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "tree"])
@pytest.mark.usefixtures("impatient")
def test_a_server_that_brings_next_to_nothing_is_given_up(server: FaultyHub, pause: float, what: str) -> None:
    def slow(request: Any, path: str) -> bool:
        if what not in path or request.command == "HEAD":
            return False
        request.send_response(200)
        request.send_header("Content-Length", "3000")
        request.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(3000):
                request.wfile.write(b"w")
                time.sleep(pause)
        return True

    server.fault = slow
    begin = time.monotonic()
    with pytest.raises(NetworkError, match=r"stalled|did not answer") as caught:
        pull(REPO)
    assert caught.value.exit_code == 6
    assert time.monotonic() - begin < 20, "it would take a minute"
    if what == "model.safetensors":
        kept = partials(Path(constants.HF_HUB_CACHE))
        assert [path.read_bytes()[:1] for path in kept] == [b"w"], "what came is kept"
        server.fault = lambda request, path: False
        assert folder_files(pull(REPO)) == server.files


@pytest.mark.usefixtures("impatient")
def test_headers_that_trickle_are_given_up_too(server: FaultyHub) -> None:
    def slow(request: Any, path: str) -> bool:
        with contextlib.suppress(OSError):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            for _ in range(1000):
                request.wfile.write(b"x")
                time.sleep(0.02)
        return True

    server.fault = slow
    with pytest.raises(NetworkError, match="did not answer"):
        pull(REPO)


def failing(server: FaultyHub, status: int, times: int, headers: dict[str, str] | None = None) -> None:
    """Let every address fail so many times before it works."""
    seen: list[str] = []

    def fail(request: Any, path: str) -> bool:
        seen.append(f"{request.command} {path}")
        if seen.count(seen[-1]) > times:
            return False
        request.reply(status, b"", headers or {})
        return True

    server.fault = fail


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(server: FaultyHub, status: int) -> None:
    failing(server, status, 2)
    assert folder_files(pull(REPO)) == server.files


@pytest.mark.usefixtures("impatient")
def test_a_server_that_keeps_failing_is_named_with_its_answer(server: FaultyHub) -> None:
    failing(server, 503, 1000)
    with pytest.raises(NetworkError, match="answered 503") as caught:
        pull(REPO)
    assert caught.value.exit_code == 6


def test_retry_after_is_waited_for_within_reason(server: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    failing(server, 429, 1, {"Retry-After": "7"})
    pull(REPO)
    assert set(slept) == {7.0}
    failing(server, 429, 1, {"Retry-After": "3600"})
    with pytest.raises(NetworkError, match="come back in 3600 s"):
        pull(f"{REPO}@v2")


def test_while_the_hub_fails_the_cached_copy_is_used_and_said(
    server: FaultyHub, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pull(REPO)
    failing(server, 503, 1000)
    assert pull(REPO) == folder
    assert "warning: " in (err := capfd.readouterr().err)
    assert "answered 503" in err
    assert "using the copy pulled before" in err


def test_a_partial_file_that_another_process_completes_meanwhile_is_no_error(server: FaultyHub) -> None:
    blobs = download.in_cache(REPO).folder / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'a' * 64}.incomplete").symlink_to("gone")
    assert folder_files(pull(REPO)) == server.files


# -- crowds -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupt_ends_a_process_that_waits_for_another(server: FaultyHub) -> None:
    place = download.in_cache(REPO)
    place.locks.mkdir(parents=True)
    with FileLock(place.locks / f"{server.hash_of('model.safetensors')}.lock"):
        waiting = fetcher()
        assert waiting.stderr
        said = waiting.stderr.readline()
        assert said == f"waiting: another process is fetching '{REPO}/model.safetensors'\n"
        time.sleep(1.2)
        waiting.send_signal(signal.SIGINT)
        _, rest = waiting.communicate(timeout=3)
    assert waiting.returncode != 0
    assert "waiting" not in rest


@pytest.mark.slow
def test_eight_processes_download_once_and_one_that_is_killed_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 8 * 2**20
    with FaultyHub({"model.safetensors": random.Random(2).randbytes(size)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        cache = new_cache(monkeypatch, tmp_path / "cache")
        server.pause = 0.01
        first = fetcher()
        wait_for(lambda: server.sent > size // 4)
        others = [fetcher() for _ in range(7)]
        wait_for(lambda: server.sent > size // 2)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        ends = [process.communicate(timeout=90) for process in others]
        assert [out for out, _ in ends] == ["done\n"] * 7, ends
        assert server.sent <= 1.25 * size, "what was in the network's buffers is lost"
        assert next(cache.rglob("snapshots/*/model.safetensors")).read_bytes() == server.files["model.safetensors"]


# -- parts, offline, folders, other tools -----------------------------------------------------------------------


def test_a_part_is_pulled_without_the_weights_of_others(server: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = {f"model-{role}": role.encode() * 2000 for role in ("text_encoder", "fusion", "decoder")}
    server.files = checkpoint_files(**shards)
    del server.files["model.safetensors"]
    index = {"weight_map": {f"{name.removeprefix('model-')}.w": f"{name}.safetensors" for name in shards}}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    config = json.loads(server.files["config.json"])
    del config["files"]["model.safetensors"]
    content = server.files["model.safetensors.index.json"]
    config["files"]["model.safetensors.index.json"] = {
        "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
    }  # fmt: skip
    for part in config["components"].values():
        part["weights"] = "model.safetensors.index.json"
    config["components"]["text_encoder"]["processor"] = {"files": {"tokenizer.json": "tokenizer.json"}}
    server.files["config.json"] = json.dumps(config).encode()
    names = {"config.json", "tokenizer.json", "model.safetensors.index.json", "model-text_encoder.safetensors"}
    assert set(folder_files(pull(f"{REPO}#text"))) == names
    count = len(server.log)
    pull(f"{REPO}@{COMMIT}#text_encoder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pull(f"{REPO}#text")
    assert len(server.log) == count, "pinned or offline, and cached: no request"
    with pytest.raises(NetworkError, match="not wholly in the cache"):
        pull(REPO)
    with pytest.raises(NotFoundError, match="no component 'audio'"):
        pull(f"{REPO}#audio")
    with pytest.raises(UsageError, match="whole checkpoint"):
        pull(f"{REPO}#text", local_dir="out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert folder_files(pull(REPO)) == server.files


def test_pinned_and_offline_loads_ask_for_nothing(server: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(REPO)
    server.log.clear()
    pull(f"{REPO}@{COMMIT}")
    pull(REPO, revision=COMMIT)
    (Path.cwd() / "mmhub.lock").write_text(
        json.dumps({"schema": 1, "models": {REPO: {"ref": f"hub:{REPO}", "commit": COMMIT}}})
    )
    pull(REPO)
    (Path.cwd() / "mmhub.lock").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pull(REPO)
    assert server.log == []


def test_hugging_face_tools_see_what_was_pulled(server: FaultyHub) -> None:
    folder = pull(REPO)
    cache = folder.parents[2]
    report = scan_cache_dir(cache)
    (repo,) = report.repos
    assert repo.repo_id == REPO
    assert {ref for revision in repo.revisions for ref in revision.refs} == {"main"}
    assert [str(w) for w in report.warnings] == []
    assert Path(snapshot_download(REPO, cache_dir=cache, local_files_only=True)) == folder


def test_a_killed_pull_into_a_folder_goes_on_and_leaves_nothing_beside(server: FaultyHub, tmp_path: Path) -> None:
    server.fault = lambda request, path: path.endswith("model.safetensors") and bool(request.reply(404, b"") or True)
    with pytest.raises(MmhubError):
        pull(REPO, local_dir="out")
    assert not (tmp_path / "out").exists()
    (staged,) = tmp_path.glob(".out.partial/blobs")
    (staged / f"{server.hash_of('model.safetensors')}.incomplete").write_bytes(b"w" * 1000)
    server.fault = lambda request, path: False
    assert folder_files(pull(REPO, local_dir="out")) == server.files
    assert ("GET", f"/{REPO}/resolve/{COMMIT}/model.safetensors", "bytes=1000-") in server.log
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    with pytest.raises(UsageError, match="is a local folder already"):
        pull("./out", local_dir="other")


# -- proxies and mirrors ----------------------------------------------------------------------------------------


def test_the_current_folder_is_not_replaced(server: FaultyHub, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="is the current folder, which cannot be replaced"):
        pull(REPO, local_dir=".")
    assert not server.sent > len(server.files["config.json"])


class _Proxy(BaseHTTPRequestHandler):
    """A forward proxy for plain HTTP: GET and HEAD of absolute addresses."""

    seen: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._pass_on()

    def do_GET(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        import http.client
        from urllib.parse import urlsplit

        self.seen.append(self.path)
        there = http.client.HTTPConnection("127.0.0.1", urlsplit(self.path).port)
        there.request(self.command, self.path.split("/", 3)[-1].join(["/", ""]), headers=dict(self.headers))
        answer = there.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        there.close()


def test_a_proxy_is_used_unless_no_proxy_names_the_hub(server: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Proxy", (_Proxy,), {"seen": seen})) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        pull(REPO)
        assert seen == []
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        close_session()
        blob = (pull(REPO) / "model.safetensors").resolve()
        blob.unlink()
        assert folder_files(pull(REPO)) == server.files
        assert any(path.endswith("model.safetensors") for path in seen)
        proxy.shutdown()
    close_session()
    blob.unlink()
    with pytest.raises(NetworkError):
        pull(f"{REPO}@{COMMIT}")


def test_a_redirect_to_another_host_works_and_takes_no_token_along(
    server: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    tokens: dict[str, set[str | None]] = {"hub": set(), "other": set()}
    with FaultyHub(server.files) as other:

        def redirect(request: Any, path: str) -> bool:
            tokens["hub"].add(request.headers.get("Authorization"))
            if not path.endswith("model.safetensors"):
                return False
            request.reply(302, b"", {"Location": f"{other.url.replace('127.0.0.1', 'localhost')}{path}"})
            return True

        def note(request: Any, path: str) -> bool:
            tokens["other"].add(request.headers.get("Authorization"))
            return False

        server.fault, other.fault = redirect, note
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert folder_files(pull(REPO)) == server.files
    assert tokens == {"hub": {"Bearer hf_mine"}, "other": {None}}


# -- hostile repositories ---------------------------------------------------------------------------------------

DANGEROUS = [
    "../outside", "a/../../outside", "..", "/etc/passwd", "~/x", "C:/x", "c:x", "\\\\server\\share\\x", "a\\..\\b",
    ".git/hooks/post-checkout", "a/.GIT/config", "a//b",
]  # fmt: skip
CONTROLS = ["a\nb", "\x1b[31mred", "a\x00b", "README\u202etxt.md"]
UNWANTED = [
    "model.py", "pytorch_model.bin", "x.pkl", "weights.pt", ".cache/huggingface/download/config.json.metadata",
    ".gitattributes", "n" * 300, "eval/" + "n" * 300 + ".txt", "sitecustomize.pth", "a/b", "a", "Readme.md", "CON",
    "Screenshot 9.41.00\u202fAM.png", "a\u00a0b.txt", "\u3000.md", "family \U0001f468\u200d\U0001f469.png", *CONTROLS,
]  # fmt: skip


def entry(path: str) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": 4, "oid": "0" * 40}


@pytest.mark.parametrize("name", DANGEROUS, ids=ascii)
def test_a_dangerous_name_in_a_listing_is_refused(server: FaultyHub, tmp_path: Path, name: str) -> None:
    server.listing = [entry(name)]
    with pytest.raises(TrustError) as caught:
        pull(REPO)
    assert caught.value.exit_code == 5
    assert str(caught.value).isprintable()
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if path.name != "config.json"]
    assert not (tmp_path.parent / "outside").exists()


def test_unwanted_files_are_never_asked_for(server: FaultyHub) -> None:
    server.listing = [entry(name) for name in UNWANTED]
    assert folder_files(pull(REPO)) == server.files
    asked = {path.partition(f"/resolve/{COMMIT}/")[2] for _, path, _ in server.log}
    assert not asked & set(UNWANTED)


@pytest.mark.parametrize(
    "name", [*DANGEROUS, *CONTROLS, "x.py", "model.bin", "model-" + "n" * 300 + ".safetensors"], ids=ascii
)
def test_a_config_that_lists_such_a_name_is_refused(server: FaultyHub, name: str) -> None:
    config = json.loads(server.files["config.json"])
    config["files"][name] = {"sha256": "0" * 64, "bytes": 4}
    server.files["config.json"] = json.dumps(config).encode()
    server.listing = [entry(name)]
    with pytest.raises(TrustError) as caught:
        pull(REPO)
    assert str(caught.value).isprintable()
    assert {path.name for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*")} <= {"config.json"}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("model-A.safetensors", "model-a.safetensors"), "take for one"),
        (("README.md/x",), "as a file and as a folder"),
        (("readme.MD/x",), "as a file and as a folder"),
    ],
)
def test_files_that_cannot_exist_side_by_side_are_refused(server: FaultyHub, names: tuple[str, ...], why: str) -> None:
    server.files = checkpoint_files(**{n.removesuffix(".safetensors"): b"x" for n in names if "safetensors" in n})
    server.listing = [entry(name) for name in names if "safetensors" not in name]
    with pytest.raises(TrustError, match=why):
        pull(REPO)


@pytest.mark.parametrize("etag", ["../../evil", "", "W/x", "0" * 39, "A" * 40])
def test_an_etag_that_is_no_hash_is_refused(server: FaultyHub, etag: str) -> None:
    server.hash_of = lambda path: etag  # type: ignore[method-assign]
    with pytest.raises(MmhubError, match="does not answer as a Hugging Face Hub does"):
        pull(REPO)


def test_a_server_that_answers_with_another_commit_is_refused(server: FaultyHub) -> None:
    with pytest.raises(TrustError, match="answered with"):
        pull(f"{REPO}@{'d' * 40}")


def test_more_bytes_than_announced_are_not_taken(server: FaultyHub) -> None:
    server.body = lambda path, content: content + b"x" * 10_000_000 if path.endswith("model.safetensors") else content
    with pytest.raises(TrustError, match="damaged, twice"):
        pull(REPO)
    assert sum(path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()) < 100_000


def model_info(server: FaultyHub, sha: Any = COMMIT, **config: Any) -> dict[str, Any]:
    """What a Hub answers about a model, with the record of config.json changed."""
    record = {"size": len(server.files["config.json"]), "blobId": server.hash_of("config.json")} | config
    return {"id": REPO, "sha": sha, "siblings": [{"rfilename": "config.json", **record}]}


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"sha": "../../../../../outside"}, 5, "the commit '../../../../../outside', which is none"),
        ({"sha": None}, 5, "the commit 'None', which is none"),
        ({"sha": "d" * 40}, 5, "answered with"),
        ({"blobId": "../../../../outside"}, 5, "gives 'config.json' no usable hash"),
        ({"blobId": ["a" * 40]}, 5, "gives 'config.json' no usable hash"),
        ({"blobId": None}, 1, "gives 'config.json' no hash, as a Hugging Face Hub does"),
        ({"lfs": {"size": 4, "sha256": "/tmp/outside", "pointerSize": 9}}, 5, "no usable hash"),
        ({"size": -1}, 5, "no usable size"),
    ],
)
def test_an_answer_that_leads_out_of_the_cache_is_refused_and_nothing_written(
    server: FaultyHub, change: dict[str, Any], code: int, message: str
) -> None:
    answers = [model_info(server, **change), {"id": REPO, "sha": "e" * 40, "siblings": []}]

    def answer(request: Any, path: str) -> bool:
        if not path.startswith(f"/api/models/{REPO}"):
            return False
        old = path.endswith(f"/revision/{'e' * 40}")
        request.reply(200, json.dumps(answers[old]).encode(), {"Content-Type": "application/json"})
        return True

    server.fault = answer
    home = Path(constants.HF_HUB_CACHE).parents[1]
    for look in (lambda: describe(resolve(f"{REPO}@{COMMIT}")), lambda: compare(REPO, "e" * 40, COMMIT)):
        with pytest.raises(MmhubError) as caught:
            look()
        assert (caught.value.exit_code, message in str(caught.value)) == (code, True), str(caught.value)
        assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_pin_is_never_anything_but_a_commit(server: FaultyHub) -> None:
    server.fault = lambda request, path: bool(request.reply(200, b'{"id": "team/model", "sha": "v1"}')) or True
    with pytest.raises(TrustError, match="the commit 'v1', which is none"):
        lock([REPO])


def test_an_address_with_a_password_is_used_and_never_shown(
    server: FaultyHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: set[str | None] = set()

    def note(request: Any, path: str) -> bool:
        asked.add(request.headers.get("Authorization"))
        return False

    server.fault = note
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("://", "://ann:hunter2@"))
    folder = pull(REPO)
    assert asked == {"Basic " + base64.b64encode(b"ann:hunter2").decode()}
    assert endpoint() == server.url
    assert "hunter2" not in str(folder) and "ann" not in str(folder.relative_to(constants.HF_HUB_CACHE))
    assert "hunter2" not in run(capsys, "env")[1]


@pytest.mark.parametrize("status", [401, 404, 418, pytest.param(500, marks=pytest.mark.slow)])  # 500 is tried again
def test_a_refusal_shows_no_password(server: FaultyHub, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url.replace("://", "://ann:hunter2@"))
    server.fault = lambda request, path: bool(request.reply(status, b"")) or True
    with pytest.raises(MmhubError) as caught:
        pull("team/other")
    assert "hunter2" not in str(caught.value)


# -- the command ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pull_prints_the_folder_or_one_json_document(server: FaultyHub, cli: Cli, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1"}
    done = cli("pull", REPO, "--json", **environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["files"]) == set(server.files)
    done = cli("pull", REPO, **environment, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == found["path"]
    (Path(found["path"]) / "model.safetensors").resolve().write_bytes(b"x" * 3000)
    done = cli("pull", REPO, **environment, HF_HUB_OFFLINE="1")
    assert done.returncode == 5, done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"], done.stderr
    assert done.stdout == ""
