"""Routes about access to gated repositories: who was granted it, who was refused, kept with the repository."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from mmhub_hubserver.errors import Conflict, EntryNotFound, Invalid
from mmhub_hubserver.routing import API, Hub, Need, route
from mmhub_hubserver.store import Repo
from mmhub_hubserver.wire import Request, Response, member

STATES = ("pending", "accepted", "rejected")
Book = dict[str, dict[str, Any]]  # by account
_LOCK = threading.Lock()


def listing(hub: Hub, request: Request, repo: Repo, state: str) -> Response:
    names = {account.name: account.fullname for account in hub.accounts.list()}
    found = []
    for name, facts in _book(repo).items():
        if facts["status"] == state:
            user = {"user": name, "fullname": names.get(name, name)}
            found.append({**facts, "user": user})
    return Response.of(found)


def grant(hub: Hub, request: Request, repo: Repo) -> Response:
    """Let an account in that did not ask."""
    name = member(request.json(), "user", str)
    if name not in {account.name for account in hub.accounts.list()}:
        raise EntryNotFound(f"There is no account '{name[:100]}'.")
    with _changing(repo) as book:
        if book.get(name, {}).get("status") == "accepted":
            raise Conflict(f"'{name}' has access already.")
        book[name] = _entry("accepted", book.get(name))
    return Response.of({})


def handle(hub: Hub, request: Request, repo: Repo) -> Response:
    data = request.json()
    state, wanted = member(data, "status", str), member(data, "user", str, "") or member(data, "requestId", str, "")
    if state not in STATES:
        raise Invalid(f"'status' is one of {', '.join(STATES)}.")
    with _changing(repo) as book:
        name = next((name for name, facts in book.items() if wanted in (name, facts["requestId"])), None)
        if name is None:
            raise EntryNotFound(f"'{wanted[:100]}' did not ask for access to {repo.id}.")
        if book[name]["status"] == state:
            raise Conflict(f"The request of '{name}' is {state} already.")
        book[name] = _entry(state, book[name])
    return Response.of({})


def ask(hub: Hub, request: Request, repo: Repo) -> Response:
    """Ask for access, or get it at once where the gate is automatic."""
    account, gate = hub.access.check_login(request.account), repo.meta.get("gated", False)
    if not gate:
        raise Invalid(f"{repo.id} is not gated.")
    state = "accepted" if gate == "auto" else "pending"
    with _changing(repo) as book:
        if account.name in book:
            raise Conflict(f"Your request is {book[account.name]['status']} already.")
        book[account.name] = _entry(state, None)
    return Response.of({"status": state})


@contextmanager
def _changing(repo: Repo) -> Iterator[Book]:
    """Change who has access, one request at a time: one process serves a store. Saved if nothing was raised."""
    with _LOCK:
        book = _book(repo)
        yield book
        repo.set_meta(access=book)


def _book(repo: Repo) -> Book:
    return dict(repo.meta.get("access", {}))


def _entry(state: str, old: dict[str, Any] | None) -> dict[str, Any]:
    first = {"requestId": secrets.token_hex(12), "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    return {**(old or first), "status": state}


TABLE = (
    route("GET", f"{API}/user-access-request/(?P<state>pending|accepted|rejected)", listing, Need.WRITE),
    route("POST", f"{API}/user-access-request/grant", grant, Need.WRITE),
    route("POST", f"{API}/user-access-request/handle", handle, Need.WRITE),
    route("POST", f"{API}/user-access-request", ask, Need.SEE),
)
