"""Commits: which files are sent how, who may propose, and what is left of what was refused."""

import json
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

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
    rules = b"*.png filter=lfs diff=lfs merge=lfs -text\n[broken\n" + b"*" * 50 + b" filter=lfs\n"
    push(team.api(), {".gitattributes": rules})
    assert [mode for mode, _ in modes(team, *files).values()] == ["regular", "regular", "lfs", "regular", "lfs"]


def test_ignored_files_are_pointed_out(team: Any) -> None:
    files = [("logs/a", 1), ("b.tmp", 1), ("keep.tmp", 1), ("c", 1)]
    rules = "# comment\nlogs/\n*.tmp\n!keep.tmp\n[\n" + "*" * 50
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
