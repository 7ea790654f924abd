"""Commits: which files are sent how, who may propose, and what is left of what was refused."""

import json
import time
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from mmhub_hubserver import cards, writing
from mmhub_hubserver.wildcards import Wildcard, rules_for

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

REPO = "lab/model"


@pytest.fixture(autouse=True)
def _repo(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    team.api().create_repo(REPO, private=False)


def push(api: HfApi, files: dict[str, bytes], **options: Any) -> Any:
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, additions, commit_message="files", **options)


def modes(team: Any, *files: tuple[str, int], **options: Any) -> dict[str, tuple[str, bool]]:
    body = {"files": [{"path": path, "size": size} for path, size in files], **options}
    answer = team.send("ann", "POST", f"/api/models/{REPO}/preupload/main", body)
    assert answer.status == 200, answer
    return {file["path"]: (file["uploadMode"], file["shouldIgnore"]) for file in answer.data["files"]}


def operations(*found: tuple[str, dict[str, Any]]) -> bytes:
    lines = [("header", {"summary": "crafted"}), *found]
    return "\n".join(json.dumps({"key": key, "value": value}) for key, value in lines).encode()


def test_files_are_large_by_their_size_or_by_the_rules_of_the_repository(team: Any) -> None:
    files = [("w.safetensors", 9), ("empty.bin", 0), ("big.txt", 2 << 20), ("small.txt", 9), ("a.png", 9)]
    assert [mode for mode, _ in modes(team, *files).values()] == ["lfs", "regular", "lfs", "regular", "regular"]
    rules = b"*.png filter=lfs diff=lfs merge=lfs -text\n[broken\n" + b"*" * 600 + b" filter=lfs\n"
    push(team.api(), {".gitattributes": rules})
    assert [mode for mode, _ in modes(team, *files).values()] == ["regular", "regular", "lfs", "regular", "lfs"]


def test_ignored_files_are_pointed_out(team: Any) -> None:
    files = [("logs/a", 1), ("b.tmp", 1), ("keep.tmp", 1), ("c", 1)]
    rules = "# comment\nlogs/\n*.tmp\n!keep.tmp\n[\n" + "*" * 600
    assert [ignored for _, ignored in modes(team, *files).values()] == [False] * 4
    assert [ignored for _, ignored in modes(team, *files, gitIgnore=rules).values()] == [True, True, False, False]
    push(team.api(), {".gitignore": rules.encode()})
    assert [ignored for _, ignored in modes(team, *files).values()] == [True, True, False, False]
    assert [ignored for _, ignored in modes(team, *files, gitIgnore="").values()] == [False] * 4


def test_the_author_of_a_commit_is_the_account(team: Any) -> None:
    push(team.api("bob"), {"a": b"1"})
    commits = team.api("rita").list_repo_commits(REPO, formatted=True)
    assert [commit.authors for commit in commits] == [["bob"], ["ann"]]
    assert commits[0].formatted_title == "files"


def test_a_folder_is_deleted_by_its_bare_name_too(team: Any) -> None:
    push(team.api(), {"d/a": b"1", "d/e/b": b"2", "c": b"3"})
    team.api().create_commit(REPO, [CommitOperationDelete("d", is_folder=False)], commit_message="tidy")
    assert sorted(team.api().list_repo_files(REPO)) == [".gitattributes", "c"]


def test_a_stranger_proposes_and_goes_on_proposing_but_does_not_commit(team: Any) -> None:
    sam = team.api("sam")
    with pytest.raises(HfHubHTTPError, match="pull request"):
        push(sam, {"a": b"1"})
    made = push(sam, {"a": b"1", "w.bin": b"large"}, create_pr=True)
    assert (made.pr_num, made.pr_url) == (1, f"{team.hub.url}/{REPO}/discussions/1")
    push(sam, {"b": b"2"}, revision="refs/pr/1")
    assert {"a", "b", "w.bin"} <= set(sam.list_repo_files(REPO, revision="refs/pr/1"))
    assert team.api().list_repo_files(REPO) == [".gitattributes"]
    push(team.api(), {"c": b"3"}, revision="refs/pr/1")  # members may help
    push(team.api(), {"d": b"4"}, create_pr=True)
    with pytest.raises(HfHubHTTPError, match="pull request"):
        push(sam, {"b": b"5"}, revision="refs/pr/2")
    team.api().change_discussion_status(REPO, 1, "closed")
    with pytest.raises(HfHubHTTPError, match="pull request"):
        push(sam, {"b": b"6"}, revision="refs/pr/1")
    for who, status in (("rita", 403), (None, 401)):
        body = operations(("file", {"path": "x", "content": "x"}))
        assert team.send(who, "POST", f"/api/models/{REPO}/commit/main?create_pr=1", body).status == status


def test_a_refused_proposal_leaves_no_pull_request(team: Any) -> None:
    push(team.api(), {"a": b"1"})
    path = f"/api/models/{REPO}/commit/main?create_pr=1"
    for found in (("file", {"path": "a/b", "content": "x"}), ("deletedFile", {"path": "none"}), ("x", {"path": "a"})):
        assert team.send("sam", "POST", path, operations(found)).status in (400, 404, 422)
    late = operations(("header", {"summary": "s", "parentCommit": "0" * 40}), ("file", {"path": "b", "content": ""}))
    assert team.send("sam", "POST", path, late).status == 412
    assert list(team.api().get_repo_discussions(REPO)) == []
    assert team.api().list_repo_refs(REPO, include_pull_requests=True).pull_requests == []


def test_proposals_are_made_against_branches_only(team: Any) -> None:
    head = team.api().model_info(REPO).sha
    for revision in (head, "none", "refs/pr/1"):
        with pytest.raises(RevisionNotFoundError):
            push(team.api(), {"a": b"1"}, revision=revision, create_pr=True)


def test_tags_carry_messages_and_name_proposals_and_short_ids(team: Any) -> None:
    made = push(team.api(), {"a": b"1"}, create_pr=True)
    team.api().create_tag(REPO, tag="proposed", tag_message="have a look", revision="refs/pr/1")
    team.api().create_tag(REPO, tag="short", revision=made.oid[:7])
    for tag in ("proposed", "short"):
        assert team.api().model_info(REPO, revision=tag).sha == made.oid
    refs = team.api().list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", made.oid)]


def test_a_squashed_history_keeps_the_files(team: Any) -> None:
    for number in range(3):
        push(team.api(), {"a": b"%d" % number})
    team.api("bob").super_squash_history(REPO, commit_message="all")
    (commit,) = team.api().list_repo_commits(REPO)
    assert (commit.title, commit.authors) == ("all", ["bob"])
    assert set(team.api().list_repo_files(REPO)) == {".gitattributes", "a"}


def test_bodies_without_end_are_refused(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub_hubserver.writing.COMMIT_LIMIT", 3 << 20)
    path = f"/api/models/{REPO}/commit/main"
    big = operations(*[("file", {"path": f"f{number}", "content": "x" * (1 << 20)}) for number in range(4)])
    assert team.send("ann", "POST", path, big).status == 413
    assert team.api().list_repo_files(REPO) == [".gitattributes"]
    many = {"files": [{"path": "a", "size": 1}] * 100_001}
    assert team.send("ann", "POST", f"/api/models/{REPO}/preupload/main", many).status == 400


def test_a_space_is_a_plain_repository_with_a_card(team: Any) -> None:
    team.api().create_repo("lab/app", repo_type="space", space_sdk="gradio", private=False)
    info = team.api().space_info("lab/app")
    assert (info.sdk, "README.md" in {file.rfilename for file in info.siblings}) == ("gradio", True)
    bad = {"name": "app2", "organization": "lab", "type": "space", "sdk": "x: y"}
    assert team.send("ann", "POST", "/api/repos/create", bad).status == 400
    assert not team.api().repo_exists("lab/app2", repo_type="space")


@pytest.mark.parametrize("pattern", ["*a" * 60 + "b", "/".join(["**", "a*a"] * 20 + ["b"])])
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.monotonic()
    for _ in range(20):
        assert not Wildcard(pattern.encode()).match([b"a" * 250] * 4)
    assert time.monotonic() - start < 2


def test_patterns_of_strangers_and_of_the_repository_do_not_stop_the_hub(team: Any) -> None:
    pattern = "*a" * 8 + "b"
    push(team.api(), {".gitattributes": f"{pattern} filter=lfs\n".encode()})
    assert modes(team, ("a" * 250, 1), gitIgnore=pattern) == {"a" * 250: ("regular", False)}


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("*.tar.*", ["a.tar.gz", "d/a.tar.gz"], ["a.tar", "a.tar.gz/b"]),
        ("saved_model/**/*", ["saved_model/a", "saved_model/a/b"], ["saved_model", "x/saved_model/a"]),
        ("/a*c", ["abc", "ac"], ["d/abc"]),
        ("**/d/*.b?n", ["d/x.bin", "e/d/x.bon"], ["d/e/x.bin"]),
        ("a/**/b", ["a/b", "a/c/d/b"], ["ab", "a/b/c"]),
        ("d/**", ["d/a", "d/a/b"], ["d"]),
        (r"\*[!a-c]", ["*d"], ["dd", "*a"]),
    ],
)
def test_patterns_mean_what_they_mean_to_git(pattern: str, matches: list[str], others: list[str]) -> None:
    wildcard = Wildcard(pattern.encode())
    assert [path for path in matches + others if wildcard.match(path.encode().split(b"/"))] == matches


def test_nothing_below_an_ignored_folder_is_let_in_again(team: Any) -> None:
    files = [("logs/a", 1), ("logs/keep", 1), ("d/keep", 1), ("#a", 1)]
    rules = "logs/\n!keep\n\\#a"
    assert [ignored for _, ignored in modes(team, *files, gitIgnore=rules).values()] == [True, True, False, True]


def test_very_many_files_are_compared_with_fewer_rules() -> None:
    assert rules_for([b"a"] * 256) == 1000
    assert 30 < rules_for([b"a/b"] * 100_000) < 1000


def test_what_is_sent_has_limits(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert team.send(None, "POST", "/api/validate-yaml", {"content": "x" * (3 << 20)}).status == 413
    monkeypatch.setattr(writing, "MAX_FILES", 2)
    adds = [("file", {"path": name, "content": "x"}) for name in ("a", "b", "c")]
    for count, status in ((3, 400), (2, 200)):
        sent = operations(*adds[:count])
        assert team.send("ann", "POST", f"/api/models/{REPO}/commit/main", sent).status == status


def test_tags_are_not_committed_to(team: Any) -> None:
    team.api().create_tag(REPO, tag="v1")
    before = team.api().list_repo_refs(REPO).tags[0].target_commit
    line = operations(("file", {"path": "a", "content": "x"}))
    assert team.send("ann", "POST", f"/api/models/{REPO}/commit/refs%2Ftags%2Fv1", line).status == 404
    assert team.send("ann", "POST", f"/api/models/{REPO}/super-squash/refs%2Ftags%2Fv1", {}).status == 404
    assert team.api().list_repo_refs(REPO).tags[0].target_commit == before


def test_the_cache_of_cards_holds_their_front_matter_only(team: Any) -> None:
    cards._parsed.cache_clear()
    for text in ("long " * 1000, "other " * 1000):
        push(team.api(), {"README.md": b"---\nlicense: mit\n---\n" + text.encode()})
        assert team.api().model_info(REPO).card_data["license"] == "mit"
    assert cards._parsed.cache_info().currsize <= 2  # this and the empty one
