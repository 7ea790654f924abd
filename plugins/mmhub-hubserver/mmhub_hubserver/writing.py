"""Routes that change a repository: branches, tags, commits, and squashing a history into one commit."""

import base64
from collections.abc import Iterator
from typing import Any

from mmhub_hubserver import cards, discussions, names
from mmhub_hubserver.errors import Conflict, Forbidden, Invalid, RevisionNotFound, Stale
from mmhub_hubserver.routing import API, NAME, REVISION, Hub, Need, route, web_path
from mmhub_hubserver.store import DEFAULT_BRANCH, Add, Change, Commit, Delete, Repo, Staging
from mmhub_hubserver.uploadmode import UploadRules
from mmhub_hubserver.wire import Request, Response, json_object, member

COMMIT_LIMIT = 1 << 30  # bytes of one commit request
MAX_FILES = 100_000  # of one preupload or commit request
_YAML_LIMIT = 2 << 20  # bytes of a card to check, which anybody may send; a README of 1 MiB as JSON has less
_STALE = "The branch was updated since you opened this page. Please refresh and try again."


def create_branch(hub: Hub, request: Request, repo: Repo, name: str) -> Response:
    start = member(request.json(), "startingPoint", str, DEFAULT_BRANCH)
    try:
        repo.create_ref("heads", name, start)
    except Conflict:
        raise Conflict(f"Reference refs/heads/{name} already exists") from None
    return Response.of({})


def delete_branch(hub: Hub, request: Request, repo: Repo, name: str) -> Response:
    if name == DEFAULT_BRANCH:
        raise Forbidden(f"Cannot delete refs/heads/{name}")
    try:
        repo.delete_ref("heads", name)
    except RevisionNotFound:
        raise RevisionNotFound(f"Invalid rev id: there is no branch '{name}'") from None
    return Response.of({})


def create_tag(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    data = request.json()
    tag, message = member(data, "tag", str), member(data, "message", str, "")
    commit_id = repo.resolve(revision)  # first, so that a missing revision is what the client hears about
    try:
        repo.create_ref("tags", tag, commit_id, message=message or None, author=_author(request))
    except Conflict:
        raise Conflict(f"Reference refs/tags/{tag} already exists") from None
    return Response.of({})


def delete_tag(hub: Hub, request: Request, repo: Repo, name: str) -> Response:
    repo.delete_ref("tags", name)
    return Response.of({})


def squash(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    default = f"Super-squash branch '{revision}'"
    repo.squash(revision, member(request.json(), "message", str, default), author=_author(request))
    return Response.of({})


def validate_yaml(hub: Hub, request: Request) -> Response:
    try:
        warning = cards.check(member(request.json(_YAML_LIMIT), "content", str))
    except cards.CardError as error:
        return Response.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return Response.of({"errors": [], "warnings": [{"message": warning}] if warning else []})


def preupload(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    """Say how each file of a commit to come is to be sent, and what is there already under its name."""
    check_may_commit(hub, request, repo, revision)
    data = request.json()
    commit = repo.at(revision)
    ignore = member(data, "gitIgnore", str) if data.get("gitIgnore") is not None else None
    files = member(data, "files", list)
    if len(files) > MAX_FILES:
        raise Invalid(f"More than {MAX_FILES} files in one request.")
    rules = UploadRules(repo, commit, [names.check_path(member(file, "path", str)) for file in files], ignore)
    answer = [_mode(commit, rules, file) for file in files]
    hub.store.check_room(sum(_new_bytes(commit, file) for file in files))
    return Response.of({"files": answer})


def commit(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    """Apply a stream of operations, one JSON object a line: contents are stored as they arrive, not collected."""
    check_may_commit(hub, request, repo, revision)
    pull = request.flag("create_pr")
    if pull and revision not in repo.refs("heads"):
        raise RevisionNotFound(f"Invalid rev id: there is no branch '{revision}' to make a pull request against")
    base = repo.at(revision)
    number, lines = None, (line for line in request.body.lines(COMMIT_LIMIT) if line.strip())
    with repo.staging() as staged:
        header, changes = _read(repo, base, staged, lines)
        title, message = member(header, "summary", str), member(header, "description", str, "")
        parent = member(header, "parentCommit", str) if header.get("parentCommit") else None
        if pull:
            number = _pull_request(repo, request, revision, title, message, parent)
            revision, parent = f"refs/pr/{number}", None
        try:
            oid = repo.commit(revision, changes, title, message, parent, author=_author(request), staged=staged)
        except BaseException:
            if number is not None:
                discussions.withdraw(repo, number)
            raise
    place = f"{request.base}{web_path(repo.kind, repo.id)}"
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{place}/commit/{oid}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{place}/discussions/{number}"
    return Response.of(answer)


def check_may_commit(hub: Hub, request: Request, repo: Repo, revision: str) -> None:
    """Members may commit; everybody with an account may propose, and commit further to what they proposed."""
    if hub.access.writes(request.account, repo):
        return
    account = hub.access.check_login(request.account)
    if account.role == "write":
        if request.flag("create_pr"):
            return
        if revision.startswith("refs/pr/") and discussions.is_author(repo, revision, account.name):
            return
    raise hub.access.refused(account, f"commit to {repo.id}; a pull request (create_pr=True) is possible")


def _mode(commit: Commit, rules: UploadRules, file: Any) -> dict[str, Any]:
    path, size = names.check_path(member(file, "path", str)), member(file, "size", int)
    mode = "lfs" if rules.large(path, size) else "regular"
    shown: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": rules.ignored(path)}
    if path in commit.files:
        shown["oid"] = commit.files[path].etag
    return shown


def _new_bytes(commit: Commit, file: dict[str, Any]) -> int:
    """Return how much room a file needs; none if it looks unchanged. Xet clients do not understand a later refusal."""
    known, size = commit.files.get(file["path"]), int(file["size"])
    return 0 if known is not None and known.size == size else max(size, 0)


def _read(repo: Repo, base: Commit, staged: Staging, lines: Iterator[bytes]) -> tuple[dict[str, Any], list[Change]]:
    header: dict[str, Any] = {}
    changes: list[Change] = []
    for line in lines:
        operation = json_object(line)
        key, value = member(operation, "key", str), member(operation, "value", dict)
        if key == "header":
            header = value
        elif len(changes) == MAX_FILES:
            raise Invalid(f"More than {MAX_FILES} operations in one commit; make several.")
        else:
            changes.append(_change(repo, base, staged, key, value))
    return header, changes


def _change(repo: Repo, base: Commit, staged: Staging, key: str, value: dict[str, Any]) -> Change:
    path = member(value, "path", str)
    if key == "deletedFolder":
        return Delete(names.check_path(path.rstrip("/")), folder=True)
    names.check_path(path)
    if key == "deletedFile":
        folder = path not in base.files and any(name.startswith(f"{path}/") for name in base.files)
        return Delete(path, folder=folder)
    if key == "file":
        return Add(path, staged.add_content(_content(value)))
    if key == "lfsFile":
        oid = member(value, "oid", str)
        entry = repo.uploaded(oid) if names.SHA256.fullmatch(oid) else None
        if entry is None:
            raise Invalid(f"The content of '{path}' ({oid[:100]}) was not uploaded to {repo.id}.")
        return Add(path, entry)
    raise Invalid(f"Unknown commit operation '{key[:50]}'.")


def _pull_request(repo: Repo, request: Request, base: str, title: str, message: str, parent: str | None) -> int:
    """Open a pull request for one commit that is still to be made."""
    if parent is not None and not repo.resolve(base).startswith(parent):
        raise Stale(_STALE)
    return discussions.open_pull(repo, title, message, _author(request), base)


def _author(request: Request) -> str:
    return request.account.name if request.account else "local"


def _content(value: dict[str, Any]) -> bytes:
    text = member(value, "content", str)
    try:
        if member(value, "encoding", str, "utf-8") == "base64":
            return base64.b64decode(text, validate=True)
        return text.encode()
    except ValueError:
        raise Invalid("The content of a file is not valid base64 or Unicode.") from None


TABLE = (
    route("POST", "/api/validate-yaml", validate_yaml, Need.NOTHING),
    route("POST", f"{API}/branch/{NAME}", create_branch, Need.WRITE),
    route("DELETE", f"{API}/branch/{NAME}", delete_branch, Need.WRITE),
    route("POST", f"{API}/tag/{REVISION}", create_tag, Need.WRITE),
    route("DELETE", f"{API}/tag/{NAME}", delete_tag, Need.WRITE),
    route("POST", f"{API}/super-squash/{REVISION}", squash, Need.WRITE),
    route("POST", f"{API}/preupload/{REVISION}", preupload, Need.READ),
    route("POST", f"{API}/commit/{REVISION}", commit, Need.READ),
)
