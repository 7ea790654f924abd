"""Routes about discussions and pull requests: open, comment, rename, close, merge. What they hold is in `threads`."""

import html
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import takewhile
from typing import Any

from mmhub_hubserver import threads
from mmhub_hubserver.access import Access
from mmhub_hubserver.diffs import unified_diff
from mmhub_hubserver.errors import Conflict, EntryNotFound, Forbidden, HubError, Invalid, RevisionNotFound
from mmhub_hubserver.routing import API, Hub, Need, route
from mmhub_hubserver.store import DEFAULT_BRANCH, Commit, Repo
from mmhub_hubserver.threads import Event, Thread
from mmhub_hubserver.wire import Request, Response, member

_PAGE = 50


def listing(hub: Hub, request: Request, repo: Repo) -> Response:
    author, kind, status = (request.option(name) for name in ("author", "type", "status"))
    found = [
        thread
        for thread in threads.listed(repo)
        if (author in (None, thread["author"]))
        and (kind in (None, "all", "pull_request" if thread["base"] else "discussion"))
        and (status in (None, "all") or (status == "open") == (thread["status"] == "open"))
    ]
    start = request.number("p", 0) * _PAGE
    shown = [_brief(repo, thread) for thread in found[start : start + _PAGE]]
    return Response.of({"discussions": shown, "count": len(found), "start": start, "numClosedDiscussions": 0})


def details(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    return Response.of(described(hub, request, repo, int(number), diff=request.flag("diff")))


def described(hub: Hub, request: Request, repo: Repo, number: int, *, diff: bool) -> dict[str, Any]:
    """Return all about one conversation; the `diff` of a pull request only for those who may read the files."""
    thread = threads.load(repo, number)
    shown, events = _brief(repo, thread), list(thread["events"])
    if base := thread["base"]:
        shown["changes"] = {"base": f"refs/heads/{base}", "mergeCommitId": thread["mergeCommitId"]}
        start, head = _ends(repo, thread)
        events += _commits(repo, thread, start)
        shown["filesWithConflicts"] = _conflicts(repo, thread, start) if thread["status"] == "open" else []
        if diff and hub.access.reads(request.account, repo):
            shown["diff"] = unified_diff(repo, start, head)
    shown["events"] = [_event(event) for event in sorted(events, key=lambda event: str(event["createdAt"]))]
    return shown


def create(hub: Hub, request: Request, repo: Repo) -> Response:
    data, author = request.json(), _author(hub, request)
    title, text = member(data, "title", str), member(data, "description", str)
    if data.get("pullRequest") is True:
        number = open_pull(repo, title, text, author, DEFAULT_BRANCH)
    else:
        number = threads.start(repo, title, text, author, None)["num"]
    return Response.of({"num": number, "pullRequest": data.get("pullRequest") is True})


def comment(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    author, text = _author(hub, request), member(request.json(), "comment", str)
    with threads.changing(repo, int(number)) as thread:
        event = threads.say(thread, author, text)
    return Response.of({"newMessage": _event(event)})


def edit(hub: Hub, request: Request, repo: Repo, number: str, comment_id: str) -> Response:
    author, text = _author(hub, request), member(request.json(), "content", str)
    with threads.changing(repo, int(number)) as thread:
        event = _own_comment(hub.access, request, repo, thread, comment_id, members=False)
        threads.edit(event, author, text)
    return Response.of({"updatedComment": _event(event)})


def hide(hub: Hub, request: Request, repo: Repo, number: str, comment_id: str) -> Response:
    author = _author(hub, request)
    with threads.changing(repo, int(number)) as thread:
        event = _own_comment(hub.access, request, repo, thread, comment_id, members=True)
        threads.hide(event, author)
    return Response.of({"updatedComment": _event(event)})


def rename(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    author, title = _author(hub, request), member(request.json(), "title", str)
    with threads.changing(repo, int(number)) as thread:
        _check_decides(hub.access, request, repo, thread)
        event = threads.rename(thread, author, title)
    return Response.of({"newTitle": _event(event)})


def change_status(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    author, data = _author(hub, request), request.json()
    status, text = member(data, "status", str), member(data, "comment", str, "")
    if status not in ("open", "closed"):
        raise Invalid("'status' is open or closed.")
    with threads.changing(repo, int(number)) as thread:
        _check_decides(hub.access, request, repo, thread)
        if thread["status"] == "merged":
            raise Conflict("This pull request was merged.")
        if text:
            threads.say(thread, author, text)
        event = threads.change_status(thread, author, status)
    return Response.of({"newStatus": _event(event)})


def merge(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    author, text = _author(hub, request), member(request.json(), "comment", str, "")
    if text:
        threads.check_text(text)  # before the merge, which nothing takes back
    thread = threads.load(repo, int(number))
    if not thread["base"] or thread["status"] != "open":
        raise Conflict("This is not an open pull request.")
    title = f"{thread['title']} (#{number})"
    merged = repo.merge(thread["base"], _ref(thread), title, author=author)
    with threads.changing(repo, int(number), whatever_it_takes=True) as thread:
        if text:
            threads.say(thread, author, text)
        thread["mergeCommitId"] = merged
        event = threads.change_status(thread, author, "merged")
    return Response.of({"newStatus": _event(event), "mergeCommitId": merged})


def open_pull(repo: Repo, title: str, text: str, author: str, base: str) -> int:
    """Start a pull request that changes nothing yet; return its number."""
    start = repo.resolve(base)
    text = text.strip() or f"Proposed by {author}."
    number: int = threads.start(repo, title, text, author, base)["num"]
    try:
        repo.create_ref("pr", str(number), start)
    except BaseException:
        threads.forget(repo, number)
        raise
    return number


def withdraw(repo: Repo, number: int) -> None:
    """Undo `open_pull`."""
    with suppress(HubError):
        repo.delete_ref("pr", str(number))
    threads.forget(repo, number)


def is_author(repo: Repo, revision: str, name: str) -> bool:
    """Say whether `revision` is the reference of an open pull request of that account."""
    number = revision.removeprefix("refs/pr/")
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        return False
    try:
        thread = threads.load(repo, int(number))
    except EntryNotFound:
        return False
    return bool(thread["base"]) and thread["author"] == name and thread["status"] == "open"


def _author(hub: Hub, request: Request) -> str:
    account = hub.access.check_login(request.account)
    if account.role != "write":
        raise hub.access.refused(account, "take part in discussions")
    return account.name


def _check_decides(access: Access, request: Request, repo: Repo, thread: Thread) -> None:
    """Who opened a conversation, and the members of the namespace, decide about it."""
    name = request.account.name if request.account else None
    if thread["author"] != name and not access.writes(request.account, repo):
        raise Forbidden(f"You don't have the rights to change discussion {thread['num']} of {repo.id}.")


def _own_comment(
    access: Access, request: Request, repo: Repo, thread: Thread, comment_id: str, *, members: bool
) -> Event:
    name = request.account.name if request.account else None
    for event in thread["events"]:
        if event["id"] == comment_id and event["type"] == "comment":
            if event["data"]["hidden"]:
                raise Conflict("This comment was hidden.")
            if event["author"] == name or (members and access.writes(request.account, repo)):
                return event  # type: ignore[no-any-return]
            raise Forbidden("This comment is somebody else's.")
    raise EntryNotFound("There is no such comment.")


def _ref(thread: Thread) -> str:
    return f"refs/pr/{thread['num']}"


def _ends(repo: Repo, thread: Thread) -> tuple[str, str]:
    """Return the commits that a pull request starts from and ends at."""
    known = {commit.id for commit in _base_history(repo, thread)}
    head = repo.resolve(_ref(thread))
    return next((commit.id for commit in repo.history(_ref(thread)) if commit.id in known), head), head


def _base_history(repo: Repo, thread: Thread) -> Iterator[Commit]:
    with suppress(RevisionNotFound):  # the branch may be gone
        yield from repo.history(f"refs/heads/{thread['base']}")


def _conflicts(repo: Repo, thread: Thread, start_id: str) -> list[str]:
    """Return the files that the pull request and, since it left it, its base branch changed in different ways."""
    base = next(_base_history(repo, thread), None)
    if base is None:
        return []
    start, head, now = repo.load(start_id).files, repo.at(_ref(thread)).files, base.files
    both = {path for path in {*start, *head} if head.get(path) not in (start.get(path), now.get(path))}
    return sorted(path for path in both if now.get(path) != start.get(path))


def _commits(repo: Repo, thread: Thread, start: str) -> Iterator[Event]:
    """Yield the commits of a pull request as events; git knows their times to the second only."""
    for commit in takewhile(lambda commit: commit.id != start, repo.history(_ref(thread))):
        data = {"subject": commit.title, "oid": commit.id}
        at = max(commit.date, str(thread["events"][0]["createdAt"]))
        yield {"id": commit.id[:24], "type": "commit", "createdAt": at, "author": commit.author, "data": data}


def _brief(repo: Repo, thread: Thread) -> dict[str, Any]:
    shown = {name: thread[name] for name in ("num", "title", "status", "createdAt")}
    shown |= {"author": _person(thread["author"]), "isPullRequest": bool(thread["base"])}
    shown |= {"repo": {"name": repo.id, "type": repo.kind.removesuffix("s")}, "numComments": len(thread["events"])}
    return shown


def _event(event: Event) -> dict[str, Any]:
    data = event["data"]
    if event["type"] == "comment":
        data = {**data, "latest": _text(data["latest"]), "history": [_text(one) for one in data["history"]]}
        data["numEdits"] = len(data["history"]) - 1
    return {**event, "author": _person(event["author"]), "data": data}


def _text(version: Mapping[str, Any]) -> dict[str, Any]:
    return {**version, "author": _person(version["author"]), "html": f"<p>{html.escape(version['raw'])}</p>"}


def _person(name: str) -> dict[str, Any]:
    return {"name": name, "fullname": name, "type": "user"}


_ONE = f"{API}/discussions/(?P<number>[0-9]{{1,9}})"
_COMMENT = f"{_ONE}/comment/(?P<comment_id>[0-9a-f]{{24}})"

TABLE = (
    route("GET", f"{API}/discussions", listing, Need.SEE),
    route("POST", f"{API}/discussions", create, Need.SEE),
    route("GET", _ONE, details, Need.SEE),
    route("POST", f"{_ONE}/comment", comment, Need.SEE),
    route("POST", f"{_COMMENT}/edit", edit, Need.SEE),
    route("POST", f"{_COMMENT}/hide", hide, Need.SEE),
    route("POST", f"{_ONE}/title", rename, Need.SEE),
    route("POST", f"{_ONE}/status", change_status, Need.SEE),
    route("POST", f"{_ONE}/merge", merge, Need.WRITE),
)
