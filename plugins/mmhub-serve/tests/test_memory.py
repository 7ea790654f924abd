"""Memory that requests took is given back when the server rests."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from pathlib import Path

import pytest

from mmhub.errors import MmhubError
from mmhub_serve.memory import Rests, give_back
from mmhub_serve.run import listen, start
from mmhub_serve.settings import Settings

from .conftest import Serving

SIZE, COUNT = 4_096, 10_000


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no malloc_trim")
def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(SIZE) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in blocks[:-1]:  # the last holds the heap as it is
        libc.free(block)
    held = _resident()
    give_back()
    assert held - _resident() > SIZE * COUNT // 2
    libc.free(blocks[-1])


def test_a_server_gives_memory_back_after_it_has_answered(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    given = threading.Event()
    monkeypatch.setattr("mmhub_serve.run.give_back", given.set)
    monkeypatch.setattr(Rests, "_REST", 0.1)
    with serve() as running:
        assert given.wait(5)  # what loading took
        given.clear()
        assert running.predict("a good film").status == 200
        assert given.wait(5)


def test_memory_is_given_back_at_rest_and_now_and_then_under_load() -> None:
    rests = Rests(0.0)
    assert [rests.due(now / 10, False, 0) for now in range(8)] == [False] * 5 + [True] + [False] * 2  # once
    assert not rests.due(100.0, False, 1)  # one was answered since the last look
    assert rests.due(100.5, False, 1) and not rests.due(200.0, False, 1)
    assert [now for now in range(300, 500) if rests.due(float(now), True, 1)] == [360, 421, 482]
    assert not rests.due(499.2, False, 1) and rests.due(499.5, False, 1)  # as soon as it rests


@pytest.mark.parametrize("name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"])
@pytest.mark.parametrize("given", [None, "17"])
def test_few_kernels_are_kept_unless_the_user_says_how_many(
    name: str, given: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for one in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(one, "0")  # is put back as it was
        monkeypatch.delenv(one)
    if given is not None:
        monkeypatch.setenv(name, given)
    with pytest.raises(MmhubError):
        start(Settings(models=(str(tmp_path / "nothing"),)), listen("127.0.0.1", 0), lambda url: None)
    kept = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert kept == ("256" if given is None else given if name.startswith("ONEDNN") else None)
