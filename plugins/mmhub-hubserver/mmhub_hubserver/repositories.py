"""Routes about accounts and repositories as a whole: who am I, create, move, delete, settings, describe, search."""

import hashlib
import re
from contextlib import suppress
from typing import Any

from mmhub_hubserver import search, views
from mmhub_hubserver.accounts import Account
from mmhub_hubserver.errors import BROKEN, Conflict, Invalid
from mmhub_hubserver.routing import API, REVISION, Hub, Need, kind_of, route, web_path
from mmhub_hubserver.store import KINDS, Add, Change, Delete, Repo
from mmhub_hubserver.wire import Request, Response, member

GATES = (False, "auto", "manual")
NAMESPACE = "(?P<namespace>[^/]+)"
_SDK = re.compile(r"[a-z]{1,20}")


def whoami(hub: Hub, request: Request) -> Response:
    account = hub.access.check_login(request.account)
    orgs = []
    for slug in account.orgs:
        org = hub.accounts.org(slug)
        orgs.append({"type": "org", "id": _id("org", slug), "name": slug, "fullname": org.fullname if org else slug})
    token = {"displayName": account.name, "role": account.role}
    return Response.of(
        {
            "type": "user",
            "id": _id("user", account.name),
            "name": account.name,
            "fullname": account.fullname or account.name,
            "email": account.email or None,
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def create(hub: Hub, request: Request) -> Response:
    data = request.json()
    kind, account = kind_of(data), hub.access.check_login(request.account)
    repo_id = _named(data, account)
    namespace = repo_id.split("/")[0]
    hub.access.check_create(account, kind, namespace)
    sdk = member(data, "sdk", str, "static")
    if not _SDK.fullmatch(sdk):
        raise Invalid("'sdk' is a word like static, gradio or docker.")
    private = _wanted_private(data)
    if private is None:
        org = hub.accounts.org(namespace)
        private = org is not None and org.private_default
    try:
        repo = hub.store.create(kind, repo_id, private=private, author=account.name)
    except Conflict:
        url = request.base + web_path(kind, hub.store.repo(kind, repo_id).id)
        return Response.of(
            {"error": f"The {kind.removesuffix('s')} repository {repo_id} already exists", "url": url}, 409
        )
    if kind == "spaces":
        _describe_space(repo, sdk, account.name)
    return Response.of({"url": request.base + web_path(kind, repo.id), "name": repo.id, "id": repo.id})


def delete(hub: Hub, request: Request) -> Response:
    data = request.json()
    account = hub.access.check_login(request.account)
    hub.store.delete(hub.repo(kind_of(data), _named(data, account), request, Need.WRITE))
    return Response.of({})


def move(hub: Hub, request: Request) -> Response:
    data = request.json()
    kind, new_id = kind_of(data), member(data, "toRepo", str)
    repo = hub.repo(kind, member(data, "fromRepo", str), request, Need.WRITE)
    hub.access.check_create(request.account, kind, new_id.split("/")[0])
    try:
        hub.store.move(repo, new_id)
    except Conflict:
        raise Conflict(f"A {kind.removesuffix('s')} repository called {new_id} already exists") from None
    return Response.of({"url": request.base + web_path(kind, new_id)})


def settings(hub: Hub, request: Request, repo: Repo) -> Response:
    data = request.json()
    changes: dict[str, Any] = {}
    if (private := _wanted_private(data)) is not None:
        changes["private"] = private
    if "gated" in data:
        if data["gated"] not in GATES or (data["gated"] == 0 and data["gated"] is not False):
            raise Invalid('\'gated\' is false, "auto" or "manual".')
        changes["gated"] = data["gated"]
    if not changes:
        raise Invalid("Nothing to change: this hub knows the settings 'private', 'visibility' and 'gated'.")
    repo.set_meta(**changes)
    return Response.of({**changes})


def duplicate(hub: Hub, request: Request, repo: Repo) -> Response:
    """Make a new repository with the files of this one's default branch, without its history."""
    data = request.json()
    account, new_id = hub.access.check_login(request.account), member(data, "repository", str)
    hub.access.check_create(account, repo.kind, new_id.split("/")[0])
    private = _wanted_private(data)
    private = repo.meta["private"] if private is None else private
    url = request.base + web_path(repo.kind, new_id)
    try:
        made = hub.store.create(repo.kind, new_id, private=private, author=account.name)
    except Conflict as error:
        return Response.of({"error": error.message, "url": url}, 409)
    try:
        _copy_files(repo, made, account.name)
    except BaseException:
        hub.store.delete(made)
        raise
    return Response.of({"url": url, "filesCopyPending": False})


def storage(hub: Hub, request: Request, namespace: str = "") -> Response:
    """List the repositories of the account or of one of its organizations, with the bytes of their files."""
    account = hub.access.check_login(request.account)
    namespace = namespace or account.name
    if not hub.access.member(account, namespace):
        raise hub.access.refused(account, f"see the storage of {namespace[:100]}")
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        for repo in hub.store.repos(kind):
            if repo.id.split("/")[0] == namespace:
                with suppress(*BROKEN):
                    found.append(_storage(repo))
    total = sum(one["storage"] for one in found) or 1
    found.sort(key=lambda one: (-one["storage"], one["id"]))
    page, headers = request.page(found, views.PAGE)
    return Response.of([{**one, "storagePercent": 100 * one["storage"] / total} for one in page], headers=headers)


def _storage(repo: Repo) -> dict[str, Any]:
    commit = repo.at("main")
    size = sum(entry.size for entry in commit.files.values())
    facts = {"id": repo.id, "type": repo.kind.removesuffix("s"), "updatedAt": commit.date, "storage": size}
    return {**facts, "visibility": "private" if repo.meta["private"] else "public"}


def auth_check(hub: Hub, request: Request, repo: Repo) -> Response:
    return Response.of({})


def info(hub: Hub, request: Request, repo: Repo, revision: str = "main") -> Response:
    expand = request.values("expand")
    views.check_expand(repo.kind, expand)
    described = views.describe(repo, repo.at(revision), blobs=request.flag("blobs"))
    return Response.of(described.shown(expand))


def listing(hub: Hub, request: Request, kind: str) -> Response:
    expand = request.values("expand")
    views.check_expand(kind, expand)
    wanted = search.Wanted.of(request)
    found = []
    for repo in hub.store.repos(kind):
        try:
            if not hub.access.sees(request.account, repo) or not wanted.name(repo.id):
                continue
            described = views.describe(repo, repo.at("main"))
            if wanted.matches(described):
                found.append(described)
        except BROKEN:
            continue
    found.sort(key=wanted.order, reverse=True)
    page, headers = request.page(found, views.PAGE)
    shown = []
    for one in page:
        with suppress(*BROKEN):
            shown.append(one.shown(expand, hidden=wanted.hidden))
    return Response.of(shown, headers=headers)


def tags_by_type(hub: Hub, request: Request, kind: str) -> Response:
    """List the tags in use, by their type, as the search filters of a web page need them."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for repo in hub.store.repos(f"{kind}s"):
        try:
            if hub.access.sees(request.account, repo):
                for tag in views.describe(repo, repo.at("main")).tags():
                    group, _, label = tag.rpartition(":")
                    group = group.partition(":")[0] or "other"
                    found.setdefault(group, {})[tag] = {"id": tag, "label": label, "type": group}
        except BROKEN:
            continue
    return Response.of({group: [tags[tag] for tag in sorted(tags)] for group, tags in sorted(found.items())})


def likes(hub: Hub, request: Request, user: str) -> Response:
    """List what an account likes: nothing, as this hub has no likes, and nobody learns who has an account."""
    return Response.of([])


def _id(*parts: str) -> str:
    return hashlib.sha1("/".join(parts).encode()).hexdigest()[:24]


def _named(data: dict[str, Any], account: Account) -> str:
    """Return the id in the body of repos/create and repos/delete; without organization it is the account's own."""
    name = member(data, "name", str)
    return name if "/" in name else f"{member(data, 'organization', str, account.name) or account.name}/{name}"


def _describe_space(repo: Repo, sdk: str, author: str) -> None:
    """Give a new Space the card that clients expect to find there; it is a plain repository otherwise."""
    title = repo.id.split("/")[1]
    card = f"---\ntitle: {title}\nsdk: {sdk}\npinned: false\n---\n\nThis hub keeps the files of Spaces and runs none.\n"
    with repo.staging() as staged:
        add = Add("README.md", staged.add_content(card.encode()))
        repo.commit("main", [add], "Add a card", author=author, staged=staged)


def _copy_files(source: Repo, target: Repo, author: str) -> None:
    files = source.at("main").files
    with target.staging() as staged:
        changes: list[Change] = [Delete(path, folder=False) for path in target.at("main").files if path not in files]
        for path, entry in files.items():
            if entry.sha256 is not None:
                target.link_object(entry.sha256)
                changes.append(Add(path, entry))
            else:
                changes.append(Add(path, staged.add_content(source.content(entry))))
        target.commit("main", changes, f"Duplicate from {source.id}", author=author, staged=staged)


def _wanted_private(data: dict[str, Any]) -> bool | None:
    visibility = member(data, "visibility", str, "")
    if visibility not in ("", "public", "private"):
        raise Invalid("'visibility' is public or private.")
    if visibility:
        return visibility == "private"
    return member(data, "private", bool) if data.get("private") is not None else None


TABLE = (
    route("GET", "/api/whoami-v2", whoami, Need.LOGIN),
    route("POST", "/api/repos/create", create, Need.LOGIN),
    route("DELETE", "/api/repos/delete", delete, Need.LOGIN),
    route("POST", "/api/repos/move", move, Need.LOGIN),
    route("GET", "/api/(?P<kind>models|datasets|spaces)", listing, Need.ANYONE),
    route("GET", "/api/(?P<kind>model|dataset|space)s-tags-by-type", tags_by_type, Need.ANYONE),
    route("GET", "/api/users/(?P<user>[^/]+)/likes", likes, Need.ANYONE),
    route("GET", API, info, Need.SEE),
    route("GET", f"{API}/revision/{REVISION}", info, Need.SEE),
    route("PUT", f"{API}/settings", settings, Need.WRITE),
    route("POST", f"{API}/duplicate", duplicate, Need.READ),
    route("GET", "/api/settings/repositories", storage, Need.LOGIN),
    route("GET", f"/api/organizations/{NAMESPACE}/settings/repositories", storage, Need.LOGIN),
    route("GET", f"{API}/auth-check", auth_check, Need.READ),
    route("GET", f"{API}/auth-check/write", auth_check, Need.WRITE),
)
