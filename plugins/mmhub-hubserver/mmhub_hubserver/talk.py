"""Discussions and pull requests in a browser, to read only: the addresses that clients print after a proposal.

What is shown comes from `discussions`, the pages around it from `web`.
"""

from typing import Any

from mmhub_hubserver import discussions, markdown, threads, web
from mmhub_hubserver.routing import Hub, Need, route
from mmhub_hubserver.store import DEFAULT_BRANCH, Repo
from mmhub_hubserver.wire import Request, Response


def listing(hub: Hub, request: Request, repo: Repo) -> Response:
    start = request.number("from", 0)
    found = threads.listed(repo)
    more = start + web.PAGE if start + web.PAGE < len(found) else None
    shown: dict[str, Any] = {"threads": found[start : start + web.PAGE], "more": more}
    return web.page(hub, request, "discussions.html", **_about(request, repo), **shown)


def discussion(hub: Hub, request: Request, repo: Repo, number: str) -> Response:
    thread = discussions.described(hub, request, repo, int(number), diff=True)
    about, left = _about(request, repo), markdown.MAX_CHARS

    def comment(text: str) -> Any:
        """Render a comment; when the page has become long, show it as it is."""
        nonlocal left
        left -= len(text)
        return text if left < 0 else markdown.render(text, about["to"].blob(""), about["to"].resolve(""))

    return web.page(hub, request, "discussion.html", **about, thread=thread, comment=comment)


def _about(request: Request, repo: Repo) -> dict[str, Any]:
    return web.about(request, repo, DEFAULT_BRANCH, repo.at(DEFAULT_BRANCH), "discussions")


TABLE = (
    route("GET", f"{web.PAGES}/discussions", listing, Need.SEE),
    route("GET", f"{web.PAGES}/discussions/(?P<number>[0-9]{{1,9}})", discussion, Need.SEE),
)
