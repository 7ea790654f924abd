"""Discussions and pull requests: what people say, who decides, and merging."""

import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from mmhub_hubserver import diffs, threads
from mmhub_hubserver.store import Repo

pytestmark = [pytest.mark.filterwarnings("error")]

REPO = "lab/model"


@pytest.fixture(autouse=True)
def _repo(team: Any) -> None:
    team.api().create_repo(REPO, private=False)
    commit(team, "ann", {"a": b"one\ntwo\n", "b": b"b"})


def commit(team: Any, who: str, files: dict[str, bytes | None], **options: Any) -> Any:
    changes = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    return team.api(who).create_commit(REPO, changes, commit_message="change", **options)


def act(team: Any, who: str | None, what: str, body: Any = None, number: int = 1) -> Any:
    return team.send(who, "POST", f"/api/models/{REPO}/discussions/{number}/{what}", body or {})


def test_discussions_and_pull_requests_are_numbered_together_and_filtered(team: Any) -> None:
    api = team.api()
    api.create_discussion(REPO, "first", description="text")
    team.api("sam").create_pull_request(REPO, "second")
    commit(team, "sam", {"c": b"c"}, create_pr=True)
    api.change_discussion_status(REPO, 1, "closed", comment="done")
    for options, expected in (
        ({}, [3, 2, 1]),
        ({"discussion_type": "pull_request"}, [3, 2]),
        ({"discussion_status": "closed"}, [1]),
        ({"discussion_status": "open"}, [3, 2]),
        ({"author": "sam"}, [3, 2]),
    ):
        assert [one.num for one in api.get_repo_discussions(REPO, **options)] == expected
    events = api.get_discussion_details(REPO, 1).events
    assert [event.type for event in events] == ["comment", "comment", "status-change"]


def test_many_discussions_come_in_pages(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub_hubserver.discussions._PAGE", 2)
    for number in range(5):
        team.api().create_discussion(REPO, f"number {number}", description="text")
    assert [one.num for one in team.api().get_repo_discussions(REPO)] == [5, 4, 3, 2, 1]


def test_a_pull_request_is_merged_with_what_happened_meanwhile(team: Any) -> None:
    commit(team, "sam", {"a": b"one\nTWO\n", "w.bin": b"large", "b": None}, create_pr=True)
    commit(team, "ann", {"c": b"meanwhile"})
    details = team.api().get_discussion_details(REPO, 1)
    assert (details.target_branch, details.conflicting_files) == ("refs/heads/main", [])
    assert (
        "-two\n+TWO\n" in str(details.diff)
        and "deleted file" in str(details.diff)
        and "oid sha256" in str(details.diff)
    )
    assert "meanwhile" not in str(details.diff)
    assert act(team, "sam", "merge").status == 403
    team.api("bob").merge_pull_request(REPO, 1, comment="thanks")
    details = team.api().get_discussion_details(REPO, 1)
    head = team.api().list_repo_commits(REPO)[0]
    assert (details.status, details.merge_commit_oid, head.authors) == ("merged", head.commit_id, ["bob"])
    assert sorted(team.api().list_repo_files(REPO)) == [".gitattributes", "a", "c", "w.bin"]
    assert [event.type for event in details.events] == ["comment", "commit", "comment", "status-change"]
    assert [act(team, "ann", "merge").status, act(team, "ann", "status", {"status": "open"}).status] == [409, 409]


def test_what_conflicts_is_named_and_not_merged(team: Any) -> None:
    commit(team, "sam", {"a": b"theirs", "b": b"same"}, create_pr=True)
    commit(team, "ann", {"a": b"ours", "b": b"same"})
    assert team.api().get_discussion_details(REPO, 1).conflicting_files == ["a"]
    before = team.api().model_info(REPO).sha
    with pytest.raises(HfHubHTTPError, match="'a' was changed on both sides"):
        team.api().merge_pull_request(REPO, 1)
    assert team.api().model_info(REPO).sha == before
    assert team.api().get_discussion_details(REPO, 1).status == "open"


def test_comments_are_edited_by_their_authors_and_hidden_by_members_for_good(team: Any) -> None:
    comment = team.api("sam").create_discussion(REPO, "title", description="first words").events[0]
    path = f"comment/{comment.id}"
    assert act(team, "ann", f"{path}/edit", {"content": "not mine"}).status == 403
    edited = team.api("sam").edit_discussion_comment(REPO, 1, comment.id, "<b>second</b> words")
    assert (edited.edited, edited.number_of_edits, edited.rendered) == (
        True,
        2,
        "<p>&lt;b&gt;second&lt;/b&gt; words</p>",
    )
    with pytest.warns(UserWarning, match="irreversible"):
        hidden = team.api().hide_discussion_comment(REPO, 1, comment.id)
    assert hidden.hidden and "words" not in str(team.send("ann", "GET", f"/api/models/{REPO}/discussions/1").data)
    assert act(team, "sam", f"{path}/edit", {"content": "again"}).status == 409
    assert act(team, "sam", f"comment/{'0' * 24}/edit", {"content": "x"}).status == 404


def test_titles_and_states_are_changed_by_the_author_and_by_members(team: Any) -> None:
    team.api("sam").create_discussion(REPO, "title", description="text")
    team.api("bob").create_discussion(REPO, "of bob", description="text")
    assert team.api("sam").rename_discussion(REPO, 1, "better").old_title == "title"
    assert team.api("ann").change_discussion_status(REPO, 1, "closed").new_status == "closed"
    assert act(team, "sam", "title", {"title": "mine"}, 2).status == 403
    assert act(team, "sam", "status", {"status": "closed"}, 2).status == 403
    assert act(team, "ann", "status", {"status": "merged"}).status == 400
    assert act(team, "ann", "merge").status == 409  # it is no pull request


def test_readers_and_strangers_without_account_do_not_take_part(team: Any) -> None:
    team.api().create_discussion(REPO, "title", description="text")
    for who, status in (("rita", 403), (None, 401)):
        assert act(team, who, "comment", {"comment": "x"}).status == status
        body = {"title": "t", "description": "d", "pullRequest": True}
        assert team.send(who, "POST", f"/api/models/{REPO}/discussions", body).status == status
    assert team.api(None).get_discussion_details(REPO, 1).title == "title"


def test_texts_have_limits(team: Any) -> None:
    team.api().create_discussion(REPO, "title", description="text")
    for text in ("", "  ", "x" * 70_000):
        assert act(team, "ann", "comment", {"comment": text}).status == 400
    assert act(team, "ann", "title", {"title": "x" * 501}).status == 400
    assert act(team, "ann", "comment", {"comment": "x"}, 999).status == 404
    assert team.send("ann", "GET", f"/api/models/{REPO}/discussions/{'9' * 30}").status == 404


def test_conversations_move_and_go_with_their_repository(team: Any) -> None:
    team.api().create_discussion(REPO, "title", description="text")
    team.api().move_repo(REPO, "lab/new")
    assert team.api().get_discussion_details("lab/new", 1).title == "title"
    team.api().delete_repo("lab/new")
    team.api().create_repo("lab/new", private=False)
    assert list(team.api().get_repo_discussions("lab/new")) == []


def test_a_slow_sender_does_not_hold_the_repository(team: Any) -> None:
    thread = team.api("sam").create_discussion(REPO, "title", description="text")
    hub = urlsplit(team.hub.url)
    for path in ("comment", f"comment/{thread.events[0].id}/edit", "title"):
        with socket.create_connection((hub.hostname, hub.port), timeout=10) as slow:
            head = f"POST /api/models/{REPO}/discussions/1/{path} HTTP/1.1\r\nHost: {hub.netloc}\r\n"
            head += f"Authorization: Bearer {team.tokens['sam']}\r\nContent-Length: 100\r\n\r\n{{"
            slow.sendall(head.encode())
            time.sleep(0.1)
            assert act(team, "ann", "comment", {"comment": path}).status == 200


def test_conversations_have_limits_and_count_towards_the_quota(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    comment = team.api("sam").create_discussion(REPO, "title", description="text").events[0]
    monkeypatch.setattr(threads, "MAX_VERSIONS", 3)
    for number in range(5):
        answer = act(team, "sam", f"comment/{comment.id}/edit", {"content": f"version {number}"})
    assert [one["raw"][-1] for one in answer.data["updatedComment"]["data"]["history"]] == ["2", "3", "4"]
    monkeypatch.setattr(threads, "MAX_BYTES", 5_000)
    assert act(team, "sam", "comment", {"comment": "x" * 5_000}).status == 400
    team.hub._store.disk.quota = 1
    assert act(team, "sam", "comment", {"comment": "x"}).status == 507
    assert act(team, "sam", f"comment/{comment.id}/hide").status == 200  # it makes room


def test_a_merge_is_noted_even_when_the_conversation_is_full(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(team, "sam", {"c": b"c"}, create_pr=True)
    monkeypatch.setattr(threads, "MAX_EVENTS", 1)
    assert act(team, "ann", "merge", {"comment": "x" * 70_000}).status == 400
    assert act(team, "ann", "merge").status == 200
    assert team.api().get_discussion_details(REPO, 1).status == "merged"


@pytest.mark.parametrize("step", ["commit", "create_ref"])
def test_nothing_is_left_of_a_proposal_that_broke(team: Any, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(Repo, step, lambda *_, **__: 1 / 0)
    lines = b'{"key": "header", "value": {"summary": "x"}}'
    assert team.send("sam", "POST", f"/api/models/{REPO}/commit/main?create_pr=1", lines).status == 500
    assert list(team.api().get_repo_discussions(REPO)) == []


def test_files_of_lines_that_repeat_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffs._steps("a\n" * 190 + "b", "b\n" + "a\n" * 190) < diffs.MAX_STEPS
    many = [f"{number % 90}" for number in range(9_000)]
    assert diffs._steps("\n".join(many), "\n".join(reversed(many))) > diffs.MAX_STEPS // 2
    lines = [str(number) for number in range(9_000)]
    assert diffs._steps("\n".join(lines), "\n".join([*lines[:500], "x", *lines[500:]])) < diffs.MAX_STEPS // 100


def test_a_diff_that_takes_too_long_only_names_the_files(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(team, "sam", {"a": b"1\n2\n"}, create_pr=True)
    monkeypatch.setattr(diffs, "MAX_STEPS", 3)
    assert "Binary files a/a and b/a differ" in str(team.api().get_discussion_details(REPO, 1).diff)
