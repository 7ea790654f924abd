"""What media of strangers cost the server's own process, and what it says when their decoders are at work."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from mmhub.errors import InputError
from mmhub.interfaces.apart import Busy
from mmhub_serve import inputs
from mmhub_serve.errors import Refused
from mmhub_serve.refusals import blaming
from mmhub_serve.settings import Limits
from mmhub_serve.transcripts import _seconds


def test_busy_decoders_are_no_fault_of_the_client() -> None:
    for several in (False, True):
        with pytest.raises(Refused) as caught, blaming("samples", several=several):
            raise Busy("the file could not be decoded: all 2 decoders are busy", "try again")
        assert caught.value.status == 503 and caught.value.headers == {"Retry-After": "1"}
        assert "all 2 decoders are busy" in caught.value.message
    with pytest.raises(Refused) as caught, blaming("samples"):
        raise InputError("it is damaged")
    assert caught.value.status == 400


def test_what_is_fetched_is_decoded_in_another_process_whatever_else_is() -> None:
    assert Limits(decoders=0).policy.worker is None
    for limits, workers in ((Limits(), 2), (Limits(decoders=0, urls=True), 1), (Limits(decoders=3, urls=("a.de",)), 3)):
        assert limits.policy.worker is not None and limits.policy.worker.workers == workers


def test_the_length_of_a_recording_is_measured_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("mmhub_audio.files")
    file = io.BytesIO()
    soundfile.write(file, np.zeros(12_000), 8_000, format="WAV")
    for name in ("info", "SoundFile", "read"):
        monkeypatch.setattr(soundfile, name, lambda *_, **__: pytest.fail("it was opened here"))
    monkeypatch.setattr("mmhub_audio.files._File", lambda *_, **__: pytest.fail("it was opened here"))
    assert _seconds(file.getvalue(), {}, Limits().policy) == 1.5
    assert _seconds(b"nothing that lasts", {"segments": [{"end": 2.5}]}, Limits().policy) == 2.5


def request(address: str, behind_proxy: bool = False, told: str = "") -> Request:
    app = SimpleNamespace(state=SimpleNamespace(settings=SimpleNamespace(behind_proxy=behind_proxy)))
    headers = [(b"x-forwarded-for", told.encode())] if told else []
    return Request({"type": "http", "client": (address, 1), "headers": headers, "app": app})


def test_a_client_is_who_is_connected_or_whom_the_proxy_names() -> None:
    assert inputs._client(request("10.0.0.1", told="8.8.8.8")) == "10.0.0.1"
    assert inputs._client(request("10.0.0.1", True, "1.1.1.1, 8.8.8.8")) == "8.8.8.8"
    assert inputs._client(request("10.0.0.1", True)) == "10.0.0.1"


def test_slow_addresses_of_one_client_leave_room_for_others_and_all_together_none() -> None:
    ended = threading.Event()

    def call(given: Any, fetch: inputs.Fetch) -> str:
        if given != "bytes":
            if not isinstance(fetch, inputs.Fetcher):
                fetch("http://slow.example", "image")
            ended.wait(20)
        return str(given)

    async def ask(given: str, address: str) -> str:
        return await inputs.read_inputs(request(address), Limits(urls=True), call, given)

    async def all_of_them() -> list[Any]:
        clients = [str(number // inputs._SHARE) for number in range(inputs._FETCHES)]
        slow = [asyncio.create_task(ask("address", client)) for client in clients[: inputs._SHARE]]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused, match="as many requests as it can") as caught:
            await ask("address", clients[0])
        assert caught.value.status == 503 and caught.value.headers == {"Retry-After": "1"}
        assert await ask("bytes", clients[0]) == "bytes"
        slow += [asyncio.create_task(ask("address", client)) for client in clients[inputs._SHARE :]]
        await asyncio.sleep(0.05)
        with pytest.raises(Refused):
            await ask("address", "another")
        slow[0].cancel()  # whoever hangs up does not make room: the thread goes on
        await asyncio.sleep(0.05)
        with pytest.raises(Refused):
            await ask("address", "another")
        ended.set()
        return await asyncio.gather(*slow, return_exceptions=True)

    found = asyncio.run(all_of_them())
    assert found[1:] == ["address"] * (inputs._FETCHES - 1)
    until = time.monotonic() + 5
    while inputs._asking and time.monotonic() < until:  # the thread of whoever hung up
        time.sleep(0.01)
    assert not inputs._asking
