"""What every group of routes is made of: the hub that handlers work on, and rows that say which path needs what.

A handler is a function `handler(hub, request, **parts of the path)`. Where the path names a repository, `repo` is that
`Repo`, and the account behind the request was already checked for the `Need` of the row.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from mmhub_hubserver.access import Access
from mmhub_hubserver.accounts import Accounts
from mmhub_hubserver.errors import Invalid, RepoNotFound
from mmhub_hubserver.store import Entry, Repo, Store
from mmhub_hubserver.wire import Request, Response

# The namespace is optional so that `gpt2` is answered with RepoNotFound and not as an unknown address.
REPO = "(?P<repo>[^/]+(?:/[^/]+)?)"
API = f"/api/(?P<kind>models|datasets|spaces)/{REPO}"
WEB = f"/(?:(?P<kind>datasets|spaces)/)?{REPO}"
REVISION = "(?P<revision>[^/]+)"
NAME = "(?P<name>[^/]+)"


class Need(Enum):
    """What the account behind a request must be allowed to."""

    NOTHING = auto()  # no account is looked for: a signed address or a token of another kind is enough
    ANYONE = auto()  # the handler checks for itself
    LOGIN = auto()
    SEE = auto()  # know that the repository exists and what is in it
    READ = auto()  # have the contents: more than SEE where a repository is gated
    WRITE = auto()


@dataclass(frozen=True)
class Hub:
    store: Store
    accounts: Accounts
    access: Access

    def repo(self, kind: str, repo_id: str, request: Request, need: Need = Need.SEE) -> Repo:
        """Return a repository that the account behind the request may use in this way."""
        account = request.account
        try:
            repo = self.store.repo(kind, repo_id)
            visible = self.access.sees(account, repo)
        except RepoNotFound:
            visible = False
        if not visible:
            raise self.access.not_found(account)
        if need is Need.READ:
            self.access.check_read(account, repo)
        elif need is Need.WRITE:
            self.access.check_write(account, repo)
        elif need is Need.LOGIN:
            self.access.check_login(account)
        return repo

    def xet_hash(self, repo: Repo, entry: Entry) -> str | None:
        """Return the Xet hash of a large file, None where there is none."""
        return None


Handler = Callable[..., Response]


@dataclass(frozen=True)
class Route:
    verb: str
    pattern: re.Pattern[str]
    handler: Handler
    need: Need


def route(verb: str, pattern: str, handler: Handler, need: Need) -> Route:
    return Route(verb, re.compile(pattern), handler, need)


def web_path(kind: str, repo_id: str) -> str:
    return f"/{repo_id}" if kind == "models" else f"/{kind}/{repo_id}"


def kind_of(data: dict[str, Any]) -> str:
    """Return the plural kind that the `type` of a JSON body names; a model where it names none."""
    kind = f"{data.get('type') or 'model'}s"
    if kind not in ("models", "datasets", "spaces"):
        raise Invalid("'type' is model, dataset or space.")
    return kind
