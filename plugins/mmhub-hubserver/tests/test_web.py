"""The pages for people: what they show and to whom, and that nothing in them acts."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import urlencode

import pytest
from huggingface_hub import CommitOperationAdd, constants

from mmhub_hubserver import markdown

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

REPO = "lab/model"
BAD = '<script>alert(1)</script><img src=x onerror="alert(1)">[click](javascript:alert(1))'
CARD = f"""---
license: mit
pipeline_tag: image-classification
tags: ["<b>bold</b>"]
---
# Digits & <em>more</em>

{BAD}

See {BAD} [config](config.json) ![curve](curve.png) ![spy](https://example.com/spy.png)

| a | b |
|---|--:|
| 1 | 2 |
"""


@pytest.fixture
def team(team: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = team.api()
    api.create_repo(REPO, private=False)
    api.create_repo("lab/secret", private=True)
    files = {"README.md": CARD, "config.json": '{"a": "<i>"}', "sub/a ü.txt": "ü", "w.bin": "\0"}
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    api.create_commit(REPO, operations, commit_message=f"Say <b> {BAD}")
    return team


def page(team: Any, path: str, who: str | None = None, status: int = 200, **headers: str) -> str:
    answer = team.send(who, "GET", path, Accept="text/html", **headers)
    assert answer.status == status, answer
    text = str(answer.data.decode())
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "unsafe" not in policy
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"<script|<[^>]+\son\w+=|javascript:[^)]*\"|<b>|<i>|style=", text)
    return text


def test_lists_are_searched_and_show_what_one_may_see(team: Any) -> None:
    assert "lab/model" in page(team, "/") and "lab/secret" not in page(team, "/")
    assert "lab/secret" in page(team, "/", "rita") and "lab/secret" not in page(team, "/lab", "sam")
    assert "lab/model" in page(team, "/?search=MOD") and "lab/model" not in page(team, "/?search=none")
    assert "Nothing here yet" in page(team, "/datasets")
    assert page(team, "/nobody", status=404)


def test_a_card_is_rendered_and_cannot_act(team: Any) -> None:
    text = page(team, f"/{REPO}")
    assert re.search(r'<h2 id="card-digits[^"]*">Digits &amp; more</h2>', text) and '<td class="right">2</td>' in text
    assert f'href="/{REPO}/blob/main/config.json"' in text and f'src="/{REPO}/resolve/main/curve.png"' in text
    assert "https://example.com/spy.png" not in text and "[spy]" in text
    assert "image-classification" in text and "&lt;b&gt;bold" in text and "hf download lab/model" in text


def test_files_are_listed_shown_and_offered(team: Any) -> None:
    assert {"sub/", "config.json", "w.bin"} <= set(re.findall(r">([^<>]+)</a>", page(team, f"/{REPO}/tree/main")))
    assert "a ü.txt" in page(team, f"/{REPO}/tree/main/sub")
    assert "&#34;&lt;i&gt;&#34;" in page(team, f"/{REPO}/blob/main/config.json")
    assert "no text" in page(team, f"/{REPO}/blob/main/w.bin")
    assert ">ü</code>" in page(team, f"/{REPO}/blob/main/sub/a%20%C3%BC.txt")
    for path in ("tree/none", "tree/main/none", "blob/main/none", "commits/none", "commit/none"):
        assert "Not here" in page(team, f"/{REPO}/{path}", status=404)


def test_the_history_leads_to_what_a_commit_changed(team: Any) -> None:
    text = page(team, f"/{REPO}/commits/main")
    commit = re.findall(rf'href="(/{REPO}/commit/[0-9a-f]{{40}})">Say &lt;b&gt;', text)[0]
    assert "added" in page(team, commit) and "config.json" in page(team, commit)


def test_discussions_and_proposals_are_shown_where_clients_say(team: Any) -> None:
    assert "Nothing was discussed" in page(team, f"/{REPO}/discussions")
    team.api().create_discussion(REPO, f"Why {BAD}?", description=f"**Really** {BAD}")
    operation = CommitOperationAdd("config.json", b"{}")
    made = team.api("sam").create_commit(REPO, [operation], commit_message="Empty", create_pr=True)
    team.api().change_discussion_status(REPO, 1, "closed")
    text = page(team, f"/{REPO}/discussions")
    assert text.index("Empty") < text.index("Why &lt;script&gt;") and "closed" in text
    assert "<strong>Really</strong>" in page(team, f"/{REPO}/discussions/1")
    text = page(team, made.pr_url.removeprefix(team.hub.url))
    assert "into main" in text and "+{}" in text and "refs%2Fpr%2F2" in text
    assert page(team, f"/{REPO}/discussions/9", status=404)


def test_private_pages_look_like_missing_ones(team: Any) -> None:
    hidden, missing = (page(team, f"/lab/{name}", status=401) for name in ("secret", "missing"))
    assert hidden == missing and "sign in" in hidden
    assert page(team, "/lab/secret", "rita") and page(team, "/lab/secret", "sam", status=404)
    assert page(team, "/lab/secret/discussions", status=401)


def test_a_gated_repository_does_not_show_its_files_and_proposals(team: Any) -> None:
    operation = CommitOperationAdd("config.json", b"{}")
    team.api().create_commit(REPO, [operation], commit_message="Empty", create_pr=True)
    team.api().update_repo_settings(REPO, gated="manual")
    assert page(team, f"/{REPO}", "sam") and page(team, f"/{REPO}/blob/main/config.json", "sam", status=403)
    assert "+{}" not in page(team, f"/{REPO}/discussions/1", "sam")
    assert "+{}" in page(team, f"/{REPO}/discussions/1", "rita")


def sign_in(team: Any, token: str, **headers: str) -> Any:
    form = {"Content_Type": "application/x-www-form-urlencoded", **headers}
    return team.send(None, "POST", "/-/sign-in", urlencode({"token": token}).encode(), **form)


def test_a_token_signs_a_browser_in_to_look_and_not_to_change(team: Any) -> None:
    assert "Your token" in page(team, "/-/sign-in")
    assert sign_in(team, "hf_wrong").status == 403
    answer = sign_in(team, team.tokens["ann"])
    cookie = answer.headers["set-cookie"]
    assert answer.status == 303 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert team.tokens["ann"] not in cookie
    session = cookie.partition(";")[0]
    assert "lab/secret" in page(team, "/", Cookie=session)
    body = {"name": "new", "organization": "lab"}
    assert team.send(None, "POST", "/api/repos/create", body, Cookie=session).status == 401
    assert team.send(None, "GET", "/api/models/lab/secret", Cookie=session).status == 401
    assert team.send(None, "POST", "/-/sign-out", b"", Cookie=session).status == 303
    assert "lab/secret" not in page(team, "/", Cookie=session)


def test_another_page_cannot_sign_a_browser_in(team: Any) -> None:
    assert sign_in(team, team.tokens["ann"], Origin="https://example.com").status == 403
    assert sign_in(team, team.tokens["ann"], Origin=team.hub.url).status == 303


def test_the_style_and_the_health_need_no_account(team: Any) -> None:
    assert team.send(None, "GET", "/-/style.css").headers["content-type"] == "text/css; charset=utf-8"
    assert team.send(None, "GET", "/-/health").data == {"status": "ok"}


@pytest.mark.parametrize("start", ["<!", "<a ", "<script", "<!--", "</p", "&"])
def test_no_html_takes_long_to_strip(start: str) -> None:
    begin = time.monotonic()
    markdown.render("<div>\n" + start * 30_000, "", "")
    assert time.monotonic() - begin < 3


def test_the_text_of_html_stays(team: Any) -> None:
    text = markdown.render("<div title='x'>\n<b>fish</b> &amp; <!-- hidden --><style>p {}</style>chips\n</div>", "", "")
    assert text == "<p>fish &amp; chips</p>\n"
    assert markdown.render("<div>\na < b\n</div>", "", "") == "<p>a &lt; b</p>\n"


def test_long_texts_are_cut_off_and_long_pages_not_rendered(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "MAX_CHARS", 100)
    text = markdown.render("**word** " * 100, "a", "b")
    assert text.count("<strong>") == 11 and "left out" in text
    team.api().create_discussion(REPO, "title", description="**first**" + " " * 85 + ".")
    team.api().comment_discussion(REPO, 1, "**second**")
    assert "<strong>first</strong>" in (shown := page(team, f"/{REPO}/discussions/1")) and "**second**" in shown
