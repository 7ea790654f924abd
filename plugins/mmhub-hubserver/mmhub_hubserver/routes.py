"""From a request to a response: which path does what, who may ask for it, and how a refusal is told.

The tables of the modules below are the whole surface; whatever is not in them answers 404.
"""

import re
from typing import Any
from urllib.parse import unquote

from mmhub_hubserver import discussions, gates, lfs, reading, repositories, talk, web, writing
from mmhub_hubserver.access import Access
from mmhub_hubserver.accounts import Accounts
from mmhub_hubserver.errors import Invalid, MethodNotAllowed, RouteNotFound
from mmhub_hubserver.routing import API, Hub, Need, Route
from mmhub_hubserver.store import DEFAULT_BRANCH, Store
from mmhub_hubserver.wire import Request, Response
from mmhub_hubserver.xet import routes as xet

TABLE: tuple[Route, ...] = (
    *repositories.TABLE,
    *reading.TABLE,
    *writing.TABLE,
    *lfs.TABLE,
    *discussions.TABLE,
    *gates.TABLE,
    *xet.TABLE,
    *talk.TABLE,
    *web.TABLE,
)
_REPO = re.compile(f"{API}(?:/.*)?")


class Routes:
    """Answers requests from one store. Without accounts everybody may do everything."""

    def __init__(self, store: Store, accounts: Accounts | None = None) -> None:
        accounts = Accounts(store.root / "accounts.json") if accounts is None else accounts
        self.hub = Hub(store, accounts, Access(accounts))
        lfs.sweep(store)

    def handle(self, request: Request) -> Response:
        """Find the route of a request, check that the account may use it, and run it.

        Raises:
            HubError: the refusal to send to the client.
        """
        method = "GET" if request.method == "HEAD" else request.method
        known = False
        for row in TABLE:
            if (match := row.pattern.fullmatch(request.path)) is None:
                continue
            known = True
            if row.verb == method:
                return self._call(row, request, match.groupdict())
        if match := _REPO.fullmatch(request.path):
            self._authenticate(request)  # clients want to hear first that there is no such repository
            self.hub.repo(match["kind"], _decoded(match["repo"]), request)
        if known:
            raise MethodNotAllowed(f"{request.method} is not possible here.")
        raise RouteNotFound(f"This hub has no {request.path[:200]}.")

    def _call(self, row: Route, request: Request, found: dict[str, str | None]) -> Response:
        request.parts = {name: _decoded(value or "") for name, value in found.items()}
        values: dict[str, Any] = dict(request.parts)
        if values.get("revision") == "HEAD":  # git's name for the default branch; the JavaScript client uses it
            values["revision"] = DEFAULT_BRANCH
        if row.need is not Need.NOTHING:
            self._authenticate(request)
            if row.need is Need.LOGIN:
                self.hub.access.check_login(request.account)
            if "repo" in values:
                kind = values.pop("kind") or "models"
                values["repo"] = self.hub.repo(kind, values["repo"], request, row.need)
        return row.handler(self.hub, request, **values)

    def _authenticate(self, request: Request) -> None:
        if request.account is None:
            request.account = self.hub.access.account(request.headers.get("Authorization"))


def _decoded(value: str) -> str:
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("The address is not valid UTF-8.") from None
