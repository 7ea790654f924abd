"""Who may see, read and change what: through the real client, and with requests that it would not send."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from mmhub_hubserver import routes
from mmhub_hubserver.routing import API, NAME, REVISION, WEB, Need

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub itself uploads
]

SECRET, OPEN = "lab/secret", "lab/open"


@pytest.fixture
def repos(team: Any) -> None:
    team.api().create_repo(SECRET)  # private: the default of the organization
    team.api().create_repo(OPEN, private=False)


def sample(pattern: str, repo: str) -> str:
    """Return an address that a route's pattern matches."""
    known = {API: f"/api/models/{repo}", WEB: f"/{repo}", REVISION: "main", NAME: "main", r"\.git": ".git"}
    known |= {"(?:/(?P<path>.*))?": "/x", "(?P<path>.+)": "x", "(?P<oid>[0-9a-f]{64})": "0" * 64}
    known |= {"(?P<number>[0-9]{1,9})": "1", "(?P<comment_id>[0-9a-f]{24})": "0" * 24}
    known |= {"(?P<state>pending|accepted|rejected)": "pending"}
    for part, text in known.items():
        pattern = pattern.replace(part, text)
    return pattern


ROUTES = [row for row in routes.TABLE if "repo" in row.pattern.groupindex and "/api/" in row.pattern.pattern]
ROUTES += [row for row in routes.TABLE if ".git/info" in row.pattern.pattern]
ROUTES += [row for row in routes.TABLE if "/resolve/" in row.pattern.pattern or "/raw/" in row.pattern.pattern]


@pytest.mark.parametrize("who", [None, "sam"])
def test_no_route_tells_a_private_repository_from_a_missing_one(team: Any, repos: None, who: str | None) -> None:
    assert len(ROUTES) > 30
    for row in ROUTES:
        private, missing = sample(row.pattern.pattern, SECRET), sample(row.pattern.pattern, "lab/missing")
        assert row.pattern.fullmatch(private), row.pattern.pattern
        got, expected = team.send(who, row.verb, private, {}), team.send(who, row.verb, missing, {})
        assert (got.status, got.data) == (expected.status, expected.data), private
        assert got.headers.get("x-error-code") == expected.headers.get("x-error-code")
        if row.need is not Need.NOTHING:
            assert got.headers["x-error-code"] == "RepoNotFound"
        assert got.status == (403 if row.need is Need.NOTHING else 401 if who is None else 404), private


def test_every_answer_names_the_request(team: Any, repos: None) -> None:
    assert team.send("sam", "GET", "/api/models/lab/none", X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
    assert team.send("sam", "GET", "/api/whoami-v2").headers["x-request-id"]


def test_a_wrong_token_is_refused_everywhere(team: Any, repos: None) -> None:
    for path in ("/api/whoami-v2", f"/api/models/{OPEN}", f"/{OPEN}/resolve/main/.gitattributes", "/api/models"):
        answer = team.send("hf_wrong_wrong_wrong", "GET", path)
        assert answer.status == 401
        assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"


def test_whoami_tells_the_organizations_and_the_role(team: Any) -> None:
    me = team.api("rita").whoami()
    assert (me["name"], me["auth"]["accessToken"]["role"]) == ("rita", "read")
    assert [(org["name"], org["fullname"]) for org in me["orgs"]] == [("lab", "The lab")]
    assert team.send(None, "GET", "/api/whoami-v2").status == 401


def test_members_read_what_is_private_and_only_writers_change_it(team: Any, repos: None) -> None:
    team.api("bob").upload_file(path_or_fileobj=b"x", path_in_repo="a", repo_id=SECRET)
    assert team.api("rita").model_info(SECRET).private is True
    team.api("rita").auth_check(SECRET)
    with pytest.raises(HfHubHTTPError, match="can only read"):
        team.api("rita").auth_check(SECRET, write=True)
    for body in ({"paths": []}, {}):
        assert team.send("rita", "PUT", f"/api/models/{SECRET}/settings", {"private": False, **body}).status == 403
    assert team.send("rita", "POST", f"/api/models/{SECRET}/commit/main", b"").status == 403
    assert team.send("rita", "DELETE", "/api/repos/delete", {"name": SECRET}).status == 403
    assert team.send("sam", "POST", f"/api/models/{OPEN}/branch/x", {}).status == 403
    assert team.send(None, "POST", f"/api/models/{OPEN}/branch/x", {}).status == 401


def test_repositories_are_created_in_ones_own_namespaces_only(team: Any) -> None:
    assert team.api().create_repo("mine").repo_id == "ann/mine"
    with pytest.raises(HfHubHTTPError, match="don't have the rights to create a model"):
        team.api("sam").create_repo("lab/x")
    with pytest.raises(HfHubHTTPError, match="can only read"):
        team.api("rita").create_repo("lab/x")
    team.api().create_repo("lab/old", private=False)
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        team.api().move_repo("lab/old", "sam/new")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        team.api().move_repo("ann/mine", "lab/old")


def test_listings_and_tags_show_what_one_may_see(team: Any, repos: None) -> None:
    assert {model.id for model in team.api("rita").list_models()} == {SECRET, OPEN}
    assert {model.id for model in team.api("sam").list_models(author="lab")} == {OPEN}
    assert {model.id for model in team.api(None).list_models()} == {OPEN}
    card = b"---\nlicense: mit\n---\n"
    team.api().upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=SECRET)
    assert team.send("sam", "GET", "/api/models-tags-by-type").data == {}
    assert [tag["id"] for tag in team.send("ann", "GET", "/api/models-tags-by-type").data["license"]] == ["license:mit"]


def test_a_gated_repository_is_described_to_all_and_read_by_those_let_in(
    team: Any, repos: None, tmp_path: Path
) -> None:
    team.api().upload_file(path_or_fileobj=b"x", path_in_repo="w.safetensors", repo_id=OPEN)
    team.api().update_repo_settings(OPEN, gated="manual")
    assert team.api(None).model_info(OPEN).gated == "manual"
    assert "w.safetensors" in team.api("sam").list_repo_files(OPEN)
    token = team.tokens["sam"]
    for who, status in ((None, 401), ("sam", 403)):
        for path in (f"/{OPEN}/resolve/main/w.safetensors", f"/{OPEN}/raw/main/.gitattributes"):
            answer = team.send(who, "GET", path)
            assert (answer.status, answer.headers["x-error-code"]) == (status, "GatedRepo")
        batch = {"operation": "download", "objects": []}
        assert team.send(who, "POST", f"/{OPEN}.git/info/lfs/objects/batch", batch).status == status
    with pytest.raises(GatedRepoError):
        hf_hub_download(OPEN, "w.safetensors", endpoint=team.hub.url, token=token, cache_dir=tmp_path)
    assert team.send("sam", "POST", f"/api/models/{OPEN}/user-access-request", {}).data == {"status": "pending"}
    assert [request.username for request in team.api().list_pending_access_requests(OPEN)] == ["sam"]
    requests, own = f"/api/models/{OPEN}/user-access-request", {"user": "sam", "status": "accepted"}
    assert team.send("sam", "POST", f"{requests}/grant", own).status == 403
    assert team.send("sam", "POST", f"{requests}/handle", own).status == 403
    assert team.send("sam", "GET", f"{requests}/pending").status == 403
    team.api().accept_access_request(OPEN, "sam")
    hf_hub_download(OPEN, "w.safetensors", endpoint=team.hub.url, token=token, cache_dir=tmp_path)
    team.api().reject_access_request(OPEN, "sam", rejection_reason="no")
    with pytest.raises(GatedRepoError):
        team.api("sam").auth_check(OPEN)


def test_a_moved_repository_is_found_under_its_old_name_by_those_who_may(team: Any, repos: None) -> None:
    team.api().upload_file(path_or_fileobj=b"x", path_in_repo="d/a b", repo_id=SECRET)
    team.api().move_repo(SECRET, "lab/renamed")
    assert team.api().model_info(SECRET).id == "lab/renamed"
    answer = team.send("rita", "GET", f"/{SECRET}/resolve/main/d/a%20b")
    assert (answer.status, answer.headers["location"]) == (307, "/lab/renamed/resolve/main/d/a%20b")
    assert team.send("sam", "GET", f"/{SECRET}/resolve/main/a").status == 404
    with pytest.raises(RepositoryNotFoundError):
        team.api("sam").model_info(SECRET)


def test_settings_that_are_not_known_are_refused(team: Any, repos: None) -> None:
    for body in ({}, {"gated": "maybe"}, {"gated": 0}, {"visibility": "protected"}, {"private": "yes"}, {"x": 1}):
        assert team.send("ann", "PUT", f"/api/models/{OPEN}/settings", body).status == 400, body


def test_a_name_is_taken_whatever_its_case_and_found_in_any(team: Any, repos: None) -> None:
    assert team.api().model_info("Lab/Open").id == OPEN
    answer = team.send("ann", "POST", "/api/repos/create", {"name": "OPEN", "organization": "lab"})
    assert (answer.status, re.sub("http://[^/]*", "", answer.data["url"])) == (409, f"/{OPEN}")


def test_nobody_learns_accounts_by_asking_for_likes(team: Any) -> None:
    assert team.api("sam").list_liked_repos("ann").total == 0
    answers = [team.send(None, "GET", f"/api/users/{name}/likes") for name in ("ann", "nobody")]
    assert [(answer.status, answer.data) for answer in answers] == [(200, [])] * 2
