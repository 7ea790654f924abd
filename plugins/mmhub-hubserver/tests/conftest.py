"""A hub with two people in an organization, a reader and a stranger, for the tests of what they may do."""

import http.client
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils._http import close_session

from mmhub_hubserver import HubServer
from mmhub_hubserver.accounts import Accounts


class Answer(NamedTuple):
    status: int
    data: Any
    headers: dict[str, str]


@dataclass
class Team:
    """Ann and Bob write for `lab`, Rita reads it, Sam is a stranger; `None` is nobody."""

    hub: HubServer
    tokens: dict[str, str]

    def api(self, name: str | None = "ann") -> HfApi:
        return HfApi(endpoint=self.hub.url, token=self.tokens[name] if name else False)

    def send(self, name: str | None, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request past the client's own checks."""
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        if name:
            given["Authorization"] = f"Bearer {self.tokens.get(name, name)}"
        connection = http.client.HTTPConnection(urlsplit(self.hub.url).netloc, timeout=10)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path.removeprefix(self.hub.url), content, given)
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert b"Traceback" not in text
        kind = response.getheader("Content-Type") or ""
        data = json.loads(text) if "json" in kind and text else text
        return Answer(response.status, data, {key.lower(): value for key, value in response.getheaders()})


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of the time would be fsync. `test_crashes` checks it, and kills servers that do it."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def _client_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def team(tmp_path: Path, _client_settings: Callable[[], None]) -> Iterator[Team]:
    accounts = Accounts(tmp_path / "hub" / "accounts.json")
    tokens = {
        "ann": accounts.add("ann", orgs=["lab"], org_names={"lab": "The lab"}, fullname="Ann A.", private_orgs=["lab"]),
        "bob": accounts.add("bob", orgs=["lab"]),
        "rita": accounts.add("rita", orgs=["lab"], role="read"),
        "sam": accounts.add("sam"),
    }
    with HubServer(tmp_path / "hub") as hub:
        yield Team(hub, tokens)
