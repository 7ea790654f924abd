"""`mmhub models search`: what is found where, in which order, and what is said when the Hub is away."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import close_session

from mmhub.cli.text import parse_size, printable, size_text
from mmhub.errors import ExitCode, UsageError
from mmhub.hub import search as engine
from mmhub.hub.search import Hit, Wanted, merge, select
from mmhub.interfaces.task import TASKS
from tests.fake_plugins import Site, make_site, run
from tests.tiny_models import files, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

ENTRY = "schema = 1\n[models.digits]\nref = 'hub:team/digits'\nsummary = 'Reads numerals'\naliases = ['numbers']\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _client(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def models(hub: str) -> str:
    """A Hub with three models of ours and one of another library."""
    upload(hub, "team/digits", files(("image", "audio"), text="Tells digits apart."))
    upload(hub, "team/birds", files(("audio",), license="cc-by-nc-4.0", requires={"mmhub-nose": ">=2"}, tags=["songs"]))
    upload(hub, "other/reader", files(("text",), task="tagging", requires={}))
    upload(hub, "other/bert", {"README.md": b"---\nlibrary_name: transformers\nlicense: mit\n---\n"})
    return hub


def found(capsys: Any, *args: str) -> list[dict[str, Any]]:
    code, out, _ = run(capsys, "models", "search", *args, "--json")
    assert code == 0
    return json.loads(out)


def names(capsys: Any, *args: str) -> list[str]:
    return [row["name"] for row in found(capsys, *args)]


def test_models_of_ours_on_the_hub_are_found_with_what_is_known_of_them(models: str, capsys: Any) -> None:
    assert set(names(capsys)) == {"team/digits", "team/birds", "other/reader"}
    row = found(capsys, "birds")[0]
    assert (row["task"], row["modalities"], row["license"]) == ("classification", ["audio"], "cc-by-nc-4.0")
    assert (row["requires"], row["missing"]) == (["mmhub-nose"], ["mmhub-nose (not installed)"])
    assert row["sources"] == ["hub"]
    assert row["updated"] and row["commit"] and row["size"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["BIRDS"], ["team/birds"]),
        (["songs"], ["team/birds"]),
        (["team", "birds"], ["team/birds"]),
        (["team birds"], ["team/birds"]),
        (["birds", "digits"], []),
        (["--task", "tagging"], ["other/reader"]),
        (["--task", "Tagging"], ["other/reader"]),
        (["--modality", "audio", "--modality", "image"], ["team/digits"]),
        (["--modality", "image,audio"], ["team/digits"]),
        (["--license", "CC-BY-NC-4.0"], ["team/birds"]),
        (["--plugin", "mmhub_nose"], ["team/birds"]),
        (["--max-size", "1B"], []),
        (["reader", "--max-size", "1GB"], ["other/reader"]),
        (["birds", "--source", "registry"], []),
        (["birds", "--source", "cache"], []),
        (["birds", "--source", "hub"], ["team/birds"]),
    ],
)
def test_every_filter_narrows_the_list(models: str, capsys: Any, args: list[str], expected: list[str]) -> None:
    assert names(capsys, *args) == expected


def test_a_registered_repository_is_one_result_under_its_short_name(models: str, site: Site, capsys: Any) -> None:
    site.registry(ENTRY)
    rows = found(capsys, "digits")
    assert [row["name"] for row in rows] == ["digits"]
    assert rows[0]["sources"] == ["project", "hub"]
    assert (rows[0]["license"], rows[0]["summary"]) == ("mit", "Reads numerals")
    for words in ("NUMERALS", "numbers"):
        assert names(capsys, words) == ["digits"]


def test_registered_names_stand_before_the_hubs(models: str, site: Site, capsys: Any) -> None:
    site.registry("schema = 1\n[models.zebra-birds]\nref = 'hub:z/z'\n")
    assert names(capsys, "s")[0] == "zebra-birds"
    assert names(capsys, "birds") == ["team/birds", "zebra-birds"], "but the name itself is the best answer"


def test_what_is_cached_is_found_offline_and_the_missing_hub_is_said(
    models: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "models", "show", "team/digits")[0] == 0
    assert found(capsys, "digits")[0]["sources"] == ["hub", "cache"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, "models", "search", "--json")
    rows = json.loads(out)
    assert (code, [row["name"] for row in rows]) == (0, ["team/digits"])
    assert (rows[0]["summary"], rows[0]["modalities"]) == ("Tells digits apart.", ["image", "audio"])
    assert err == "the Hub is not searched (HF_HUB_OFFLINE is set): these are the registered and cached models\n"
    code, out, err = run(capsys, "models", "search", "--source", "hub")
    assert (code, out) == (ExitCode.NETWORK, "")
    assert err.startswith("error: HF_HUB_OFFLINE is set")


class _Odd(BaseHTTPRequestHandler):
    """A server that is no Hub: it answers 500, HTML, nonsense, or not at all."""

    how = ""

    def do_GET(self) -> None:
        if self.how == "never":
            time.sleep(2)
        odd = [3, {"id": 4}, {"id": "a/b", "tags": {}, "cardData": [], "downloads": "x"}]
        body = {"html": b"<html>", "odd": json.dumps(odd).encode(), "deep": b"[" * 200_000}
        self.send_response({"error": 500, "closed": 401}.get(self.how, 200))
        self.end_headers()
        for _ in range(20 if self.how == "trickle" else 0):
            time.sleep(0.1)
            with suppress(OSError):
                self.wfile.write(b" ")
        with suppress(OSError):
            self.wfile.write(body.get(self.how, b"{}"))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def odd_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    server = HTTPServer(("127.0.0.1", 0), _Odd)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield lambda how: monkeypatch.setattr(_Odd, "how", how)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("how", ["error", "html", "dict", "deep", "never", "trickle"])
def test_a_server_that_is_no_hub_costs_a_note_and_no_more(
    odd_hub: Callable[[str], None], site: Site, capsys: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(engine, "SECONDS", 0.5)
    odd_hub(how)
    site.registry(ENTRY)
    code, out, err = run(capsys, "models", "search", "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, ["digits"])
    assert err.count("\n") == 1
    reasons = {"never": "cannot reach", "trickle": f"{os.environ['HF_ENDPOINT']} does not end its answer"}
    assert err.startswith(f"the Hub is not searched ({reasons.get(how, '')}")
    assert run(capsys, "models", "search", "--source", "hub")[0] == ExitCode.NETWORK


def test_a_hub_that_wants_a_token_is_not_searched(odd_hub: Callable[[str], None], site: Site, capsys: Any) -> None:
    odd_hub("closed")
    site.registry(ENTRY)
    code, out, err = run(capsys, "models", "search", "--json")
    assert (code, len(json.loads(out))) == (0, 1)
    assert err.startswith("the Hub is not searched (")
    assert run(capsys, "models", "search", "--source", "hub")[0] != 0


def test_rows_of_another_form_than_the_hubs_are_read_as_far_as_they_go(
    odd_hub: Callable[[str], None], capsys: Any
) -> None:
    odd_hub("odd")
    row = found(capsys)[0]
    assert (row["name"], row["tags"], row["downloads"]) == ("a/b", [], None)


def test_nobody_listening_is_said_at_once(site: Site, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    site.registry(ENTRY)
    code, out, err = run(capsys, "models", "search", "numerals", "--json")
    assert (code, len(json.loads(out))) == (0, 1)
    assert "cannot reach http://127.0.0.1:9" in err


def test_no_result_is_an_empty_list_and_a_hint(models: str, capsys: Any) -> None:
    assert run(capsys, "models", "search", "zzz", "--json")[:2] == (0, "[]\n")
    code, out, err = run(capsys, "models", "search", "zzz")
    assert (code, out) == (0, "")
    assert err.startswith("nothing found: ")


def test_the_limit_is_said(models: str, capsys: Any) -> None:
    code, out, err = run(capsys, "models", "search", "--limit", "2", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert err == "3 found, the first 2 shown; --limit 3 shows all\n"


def test_what_the_allow_list_forbids_is_left_out_and_counted(models: str, site: Site, capsys: Any) -> None:
    site.registry('schema = 1\n[hub]\nallow = ["team/*"]\n')
    _, out, err = run(capsys, "models", "search", "--json")
    assert {row["name"] for row in json.loads(out)} == {"team/digits", "team/birds"}
    assert err == "1 left out: [hub] allow in a registry.toml does not list them\n"


def test_hostile_text_reaches_the_terminal_as_plain_text(hub: str, site: Site, capsys: Any) -> None:
    nasty = "red \x1b[31m\u202etxet\nnew"
    upload(hub, "evil/x", files(license=nasty, tags=[nasty]))
    site.registry("schema = 1\n[models.a]\nref = 'hub:evil/y'\nsummary = \"x\\u001b[2J\\u202e\\ny\"\n")
    for args in (["models", "search"], ["models", "ls"], ["models", "show", "evil/x"]):
        code, out, _ = run(capsys, *args)
        assert code == 0
        assert all(line.isprintable() for line in out.splitlines()), args


def test_a_bad_size_is_a_usage_error(capsys: Any) -> None:
    assert run(capsys, "models", "search", "--max-size", "big")[0] == ExitCode.USAGE


# --- the parts


def test_the_known_tasks_hold_those_of_this_version() -> None:
    assert set(TASKS) <= set(engine.TASKS)


def test_a_nearer_scope_hides_a_farther_one_and_takes_no_facts_from_it() -> None:
    near, far = (Hit(name="a", repo_id=f"{where}/a", sources=[where], license=where) for where in ("project", "user"))
    assert merge([near, far]) == [near]


def test_a_name_that_stays_at_one_revision_takes_no_licence_from_another() -> None:
    hub = Hit(name="o/a", repo_id="o/a", sources=["hub"], license="gpl-3.0", size=7, downloads=5, commit="c" * 40)
    for own, license in (
        ({"revision": "v1"}, ""),
        ({"commit": "d" * 40}, ""),
        ({"commit": "c" * 40}, "gpl-3.0"),
        ({}, "gpl-3.0"),
    ):
        (hit,) = merge([Hit(name="a", repo_id="o/a", sources=["user"], **own), hub])
        assert (hit.license, hit.downloads) == (license, 5), own


def test_the_better_known_come_first_among_equals_and_newer_before_older() -> None:
    hits = [
        Hit(name="a/old", downloads=1, updated="2024-01-01"),
        Hit(name="a/new", downloads=1, updated="2025-01-01"),
        Hit(name="a/used", downloads=9, updated="2023-01-01"),
    ]
    assert [hit.name for hit in select(hits, Wanted())[0]] == ["a/used", "a/new", "a/old"]


def test_an_unknown_size_is_left_out_and_counted_where_a_limit_is_asked_for() -> None:
    hits = [Hit(name="a"), Hit(name="b", size=5), Hit(name="c", size=50)]
    kept, unsized = select(hits, Wanted(max_size=10))
    assert ([hit.name for hit in kept], unsized) == (["b"], 1)


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500_000_000), ("1.5 GiB", 1_610_612_736), ("7", 7), ("2k", 2000), ("1 kb", 1000)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "5 apples", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_text_for_a_terminal_holds_nothing_that_acts() -> None:
    shown = printable("a\x1b]0;x\x07b\n\u202ec\u200bd\ud800").replace("\N{REPLACEMENT CHARACTER}", "?")
    assert shown == "a?]0;x?b ?c?d?"
    assert size_text(999_999) == "1 MB"
