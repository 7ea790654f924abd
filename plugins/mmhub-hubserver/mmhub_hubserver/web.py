"""The hub in a browser: lists, cards, files and history, to look at only. The last rows of the table of routes.

Pages are plain HTML without scripts. Every value goes through Jinja's escaping, cards through `markdown`, and the
content security policy forbids whatever might still slip through.
"""

import functools
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

import jinja2

from mmhub_hubserver import cards, markdown
from mmhub_hubserver.errors import BROKEN, EntryNotFound, HubError, RepoHidden, Unauthorized
from mmhub_hubserver.routing import NAME, REVISION, Hub, Need, route, web_path
from mmhub_hubserver.sessions import LIFETIME
from mmhub_hubserver.store import Commit, Entry, Repo
from mmhub_hubserver.wire import Request, Response, form

COOKIES = ("mmhub_session", "__Host-mmhub_session")  # browsers keep the second one from subdomains; it needs https
PAGE = 50  # repositories or commits
_MOST_FILES = 2000  # rows of one folder
_TEXT_LIMIT = 256 << 10  # bytes of a card or text file that is shown
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "private, no-cache",
    "Vary": "Cookie, Authorization",
}
_KINDS = {"models": "Models", "datasets": "Datasets", "spaces": "Spaces"}


# lists


def models(hub: Hub, request: Request) -> Response:
    return _list(hub, request, "models")


def listing(hub: Hub, request: Request, tab: str) -> Response:
    return _list(hub, request, tab)


def namespace(hub: Hub, request: Request, name: str) -> Response:
    """Show what one account or organization has."""
    return _list(hub, request, request.option("kind") or "models", name)


def _list(hub: Hub, request: Request, kind: str, author: str = "") -> Response:
    kind = kind if kind in _KINDS else "models"
    text, start = (request.option("search") or "").strip(), request.number("from", 0)
    found = []
    for repo in hub.store.repos(kind):
        if text.lower() not in repo.id.lower() or (author and repo.id.split("/")[0].lower() != author.lower()):
            continue
        try:
            if hub.access.sees(request.account, repo):
                found.append((repo.at("main"), repo))
        except BROKEN:
            continue
    if author and not found and not text and not _known(hub, request, author):
        raise EntryNotFound(f"There is nothing called '{author[:100]}' here.")
    found.sort(key=lambda pair: pair[0].date, reverse=True)
    rows = []
    for commit, repo in found[start : start + PAGE]:
        with suppress(*BROKEN):
            rows.append(_row(repo, commit))
    more = urlencode({"search": text, "kind": kind, "from": start + PAGE}) if start + PAGE < len(found) else None
    facts: dict[str, Any] = {
        "kind": kind,
        "kinds": _KINDS,
        "author": author,
        "search": text,
        "total": len(found),
        "more": more,
    }
    return page(hub, request, "list.html", rows=rows, **facts)


def _known(hub: Hub, request: Request, name: str) -> bool:
    """Say whether somebody has this name, for those who may know: an empty list is then right, and not an error."""
    return not hub.accounts or (request.account is not None and request.account.belongs_to(name))


def _row(repo: Repo, commit: Commit) -> dict[str, Any]:
    task = _text(cards.card_data(repo, commit).get("pipeline_tag"))
    size = sum(entry.size for entry in commit.files.values())
    return {"repo": repo, "meta": repo.meta, "date": commit.date, "size": size, "task": task}


# a repository


def card(hub: Hub, request: Request, repo: Repo) -> Response:
    revision = request.option("revision") or "main"
    commit = repo.at(revision)
    facts, entry = cards.card_data(repo, commit), commit.files.get("README.md")
    readme = _body(_content(repo, entry) or "") if entry is not None else None
    shown = {name: _texts(facts.get(key)) for name, key in _FACTS.items() if facts.get(key)}
    address = _Address(web_path(repo.kind, repo.id), revision)
    return page(
        hub,
        request,
        "repo.html",
        **about(request, repo, revision, commit, "card"),
        facts=shown,
        ours=facts.get("library_name") == "mmhub",
        readme=markdown.render(readme, address.blob(""), address.resolve("")) if readme else None,
    )


_FACTS = {
    "Task": "pipeline_tag",
    "Library": "library_name",
    "License": "license",
    "Language": "language",
    "Base model": "base_model",
    "Datasets": "datasets",
    "Tags": "tags",
}


def folder(hub: Hub, request: Request, repo: Repo, revision: str, path: str) -> Response:
    commit, path = repo.at(revision), path.strip("/")
    files, folders = _children(commit.files, path)
    if path and not files and not folders:
        raise EntryNotFound(f"There is no folder '{path}' in {repo.id} at '{revision}'.")
    rows: list[tuple[str, str, Entry | None]] = [(name, f"{path}/{name}".strip("/"), None) for name in sorted(folders)]
    rows += [(name, f"{path}/{name}".strip("/"), files[name]) for name in sorted(files)]
    shown: dict[str, Any] = {"path": path, "rows": rows[:_MOST_FILES], "hidden": len(rows[_MOST_FILES:])}
    return page(hub, request, "folder.html", **about(request, repo, revision, commit, "files"), **shown)


def _children(files: Mapping[str, Entry], path: str) -> tuple[dict[str, Entry], set[str]]:
    prefix = f"{path}/" if path else ""
    direct, folders = {}, set()
    for name, entry in files.items():
        if name.startswith(prefix):
            head, _, below = name[len(prefix) :].partition("/")
            if below:
                folders.add(head)
            else:
                direct[head] = entry
    return direct, folders


def file(hub: Hub, request: Request, repo: Repo, revision: str, path: str) -> Response:
    commit = repo.at(revision)
    entry = commit.files.get(path)
    if entry is None:
        raise EntryNotFound(f"There is no file '{path}' in {repo.id} at '{revision}'.")
    shown = about(request, repo, revision, commit, "files")
    image = path.lower().endswith(_IMAGES)
    return page(hub, request, "file.html", **shown, path=path, entry=entry, text=_content(repo, entry), image=image)


def history(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    start, commits = request.number("from", 0), []
    for number, commit in enumerate(repo.history(revision)):
        if start <= number <= start + PAGE:
            commits.append(commit)
        elif number > start + PAGE:
            break
    shown = about(request, repo, revision, repo.at(revision), "history")
    more = start + PAGE if len(commits) > PAGE else None
    return page(hub, request, "history.html", **shown, commits=commits[:PAGE], more=more)


def commit(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    new = repo.at(revision)
    before: Mapping[str, Entry] = repo.load(new.parent).files if new.parent else {}
    changes = [(path, "changed" if path in before else "added") for path in new.files]
    changes = [change for change in changes if before.get(change[0]) != new.files[change[0]]]
    changes += [(path, "removed") for path in before if path not in new.files]
    shown = about(request, repo, new.id, new, "history")
    return page(hub, request, "commit.html", **shown, changes=sorted(changes)[:_MOST_FILES])


def about(request: Request, repo: Repo, revision: str, commit: Commit, tab: str) -> dict[str, Any]:
    """Return what all pages of one repository show."""
    return {
        "repo": repo,
        "meta": repo.meta,
        "revision": revision,
        "commit": commit,
        "tab": tab,
        "to": _Address(web_path(repo.kind, repo.id), revision),
        "size": sum(entry.size for entry in commit.files.values()),
        "branches": sorted(repo.refs("heads")),
        "tags": sorted(repo.refs("tags")),
    }


class _Address:
    """Addresses of one repository's pages at one revision."""

    def __init__(self, root: str, revision: str) -> None:
        self.root, self._revision = root, quote(revision, safe="")

    def at(self, revision: str) -> str:
        return f"{self.root}?{urlencode({'revision': revision})}"

    def tree(self, path: str = "", revision: str | None = None) -> str:
        return self._to("tree", path, revision)

    def blob(self, path: str) -> str:
        return self._to("blob", path) + ("/" if not path else "")

    def resolve(self, path: str) -> str:
        return self._to("resolve", path) + ("/" if not path else "")

    def discussions(self) -> str:
        return f"{self.root}/discussions"

    def commits(self) -> str:
        return self._to("commits", "")

    def commit(self, oid: str) -> str:
        return self._to("commit", "", oid)

    def _to(self, verb: str, path: str, revision: str | None = None) -> str:
        revision = self._revision if revision is None else quote(revision, safe="")
        return f"{self.root}/{verb}/{revision}" + (f"/{quote(path)}" if path else "")


def _body(readme: str) -> str:
    """Return a README without its front matter."""
    lines = readme.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return readme
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    return "\n".join(lines[end + 1 :])


def _content(repo: Repo, entry: Entry) -> str | None:
    """Return a file as text if it is short text."""
    if entry.size > _TEXT_LIMIT:
        return None
    content = repo.large(entry).read_bytes() if entry.lfs else repo.content(entry)
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _texts(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list) else [value])][:50]


def _text(value: Any) -> str:
    return str(value)[:200] if isinstance(value, str | int | float) else ""


# signing in


def sign_in_form(hub: Hub, request: Request) -> Response:
    return page(hub, request, "sign_in.html", wrong=False)


def sign_in(hub: Hub, request: Request) -> Response:
    """Open a session for a token. Another web page cannot post this form: `server` compares the origin."""
    fields = form(request.body.all(4096).decode("utf-8", "replace"))
    token = fields.get("token", [""])[-1].strip()
    if not hub.accounts or hub.accounts.authenticate(token) is None:
        return page(hub, request, "sign_in.html", status=403, wrong=True)
    return _redirect(_cookie(request, hub.accounts.sessions.open(token), LIFETIME))


def sign_out(hub: Hub, request: Request) -> Response:
    for part in request.headers.get("Cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name in COOKIES:
            hub.accounts.sessions.close(value)
    return _redirect(_cookie(request, "", 0))


def _cookie(request: Request, value: str, seconds: int) -> str:
    secure = request.base.startswith("https:")
    settings = f"Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")
    return f"{COOKIES[secure]}={value}; {settings}"


def _redirect(cookie: str) -> Response:
    return Response(303, headers={"Location": "/", "Set-Cookie": cookie, "Cache-Control": "no-store"})


# the rest


def style(hub: Hub, request: Request) -> Response:
    headers = {"Content-Type": "text/css; charset=utf-8", "Cache-Control": "max-age=3600"}
    return Response(200, _templates().get_template("style.css").render().encode(), headers)


def health(hub: Hub, request: Request) -> Response:
    return Response.of({"status": "ok"})


def refusal(error: HubError) -> Response:
    """Return the page for a request that was refused."""
    sign_in = isinstance(error, RepoHidden | Unauthorized) or error.status == 401
    text = (
        _templates()
        .get_template("error.html")
        .render(
            message=error.message, status=error.status, sign_in=sign_in, account=None, signed_in=False, accounts=sign_in
        )
    )
    return Response(error.status, text.encode(), dict(_HEADERS))


def page(hub: Hub, request: Request, name: str, status: int = 200, **values: Any) -> Response:
    signed_in = bool(hub.accounts) and request.account is not None
    common = {"account": request.account, "signed_in": signed_in, "accounts": bool(hub.accounts), "base": request.base}
    text = _templates().get_template(name).render(**common, **values)
    return Response(status, text.encode("utf-8", "replace"), dict(_HEADERS))


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmhub_hubserver", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"size": _size, "day": _day, "web_path": lambda repo: web_path(repo.kind, repo.id)}
    return environment


def _size(count: int) -> str:
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "bytes" else f"{value:.1f} {units[0]}"


def _day(date: str) -> str:
    return datetime.fromisoformat(date).strftime("%d %b %Y").lstrip("0")


PAGES = "/(?!api/|-/)(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
TABLE = (
    route("GET", "/", models, Need.ANYONE),
    route("GET", "/(?P<tab>models|datasets|spaces)", listing, Need.ANYONE),
    route("GET", "/-/style.css", style, Need.NOTHING),
    route("GET", "/-/health", health, Need.NOTHING),
    route("GET", "/-/sign-in", sign_in_form, Need.ANYONE),
    route("POST", "/-/sign-in", sign_in, Need.ANYONE),
    route("POST", "/-/sign-out", sign_out, Need.ANYONE),
    route("GET", f"/(?!api$|-){NAME}", namespace, Need.ANYONE),
    route("GET", f"{PAGES}/tree/{REVISION}(?:/(?P<path>.*))?", folder, Need.SEE),
    route("GET", f"{PAGES}/blob/{REVISION}/(?P<path>.+)", file, Need.READ),
    route("GET", f"{PAGES}/commits/{REVISION}", history, Need.SEE),
    route("GET", f"{PAGES}/commit/{REVISION}", commit, Need.SEE),
    route("GET", PAGES, card, Need.SEE),
)
