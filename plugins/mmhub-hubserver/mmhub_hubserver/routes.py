"""Which path does what: the Hub's HTTP API over a `Store`, as functions from a request to a response.

The table at the end is the whole surface; whatever is not in it answers 404. No user is checked: the server listens on
loopback only. Pull requests, spaces, Xet and multipart uploads are not offered.
"""

import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urlencode

from mmhub_hubserver import names, views
from mmhub_hubserver.errors import (
    Conflict,
    EntryNotFound,
    Forbidden,
    HubError,
    Invalid,
    MethodNotAllowed,
    RouteNotFound,
)
from mmhub_hubserver.store import LFS_SUFFIXES, Add, Change, Delete, Repo, Store
from mmhub_hubserver.wire import Request, Response, form, json_object, member

USER = "local"
LFS_THRESHOLD = 1 << 20  # bytes; larger files are uploaded apart from the commit
UPLOAD_SECONDS = 12 * 3600  # how long an upload URL may be used
COMMIT_LIMIT = 1 << 30  # bytes of one commit request
PAGE = 1000  # entries of one listing

_LOCAL_USER = {
    "type": "user",
    "id": USER,
    "name": USER,
    "fullname": "Local user",
    "isPro": False,
    "orgs": [],
    "auth": {"type": "access_token", "accessToken": {"displayName": USER, "role": "write"}},
}
_LFS_JSON = "application/vnd.git-lfs+json"


class Routes:
    """Answers requests from one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def handle(self, request: Request) -> Response:
        """Find the route of a request and run it.

        Raises:
            HubError: the refusal to send to the client.
        """
        method = "GET" if request.method == "HEAD" else request.method
        known = False
        for verb, pattern, handler in _TABLE:
            if (match := pattern.fullmatch(request.path)) is None:
                continue
            known = True
            if verb == method:
                return self._call(handler, request, match.groupdict())
        if known:
            raise MethodNotAllowed(f"{request.method} is not possible here.")
        raise RouteNotFound(f"This hub has no {request.path[:200]}.")

    def _call(self, handler: Callable[..., Response], request: Request, raw: dict[str, str | None]) -> Response:
        values = {name: _decoded(value or "") for name, value in raw.items()}
        if "repo" in values:
            values["repo"] = self.store.repo(values.pop("kind") or "models", values["repo"])  # type: ignore[assignment]
        return handler(self, request, **values)

    # accounts and repositories

    def whoami(self, request: Request) -> Response:
        return Response.of(_LOCAL_USER)

    def create_repo(self, request: Request) -> Response:
        data = request.json()
        kind, repo_id = _named_repo(data)
        url = request.base + _web_path(kind, repo_id)
        private = data.get("private") is True or data.get("visibility") == "private"
        try:
            self.store.create(kind, repo_id, private=private)
        except Conflict as error:
            return Response.of({"error": error.message, "url": url}, 409)
        return Response.of({"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self, request: Request) -> Response:
        self.store.delete(self.store.repo(*_named_repo(request.json())))
        return Response.of({})

    def list_repos(self, request: Request, kind: str) -> Response:
        wanted, text = request.query.get("filter", []), (request.option("search") or "").lower()
        author, pipeline = request.option("author"), request.option("pipeline_tag")
        found = []
        for repo in self.store.repos(kind):
            if text not in repo.id.lower() or (author and repo.id.split("/")[0].lower() != author.lower()):
                continue
            try:
                info = views.repo_info(repo, repo.at("main"))
            except HubError:
                continue  # deleted meanwhile, or damaged: the others are still worth listing
            tags = {*info["tags"], kind.removesuffix("s")}
            if tags.issuperset(wanted) and (not pipeline or pipeline == info.get("pipeline_tag")):
                found.append(info)
        found.sort(key=lambda info: info["createdAt" if request.option("sort") == "createdAt" else "lastModified"])
        brief = [] if request.flag("full") else ["siblings", "usedStorage"]
        brief += [] if request.flag("full") or request.flag("cardData") else ["cardData"]
        shown = [_expanded(request, info, brief) for info in reversed(found)]
        return _page(request, shown)

    def info(self, request: Request, repo: Repo, revision: str = "main") -> Response:
        info = views.repo_info(repo, repo.at(revision), blobs=request.flag("blobs"))
        return Response.of(_expanded(request, info, []))

    # reading a repository

    def tree(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        entries = views.tree(repo.at(revision), path.strip("/"), recursive=request.flag("recursive"))
        return _page(request, list(entries))

    def paths_info(self, request: Request, repo: Repo, revision: str) -> Response:
        commit = repo.at(revision)
        body = request.body.all()
        if "json" in request.headers.get("Content-Type", ""):
            paths = member(json_object(body), "paths", list)
        else:
            paths = form(body.decode("utf-8", "replace")).get("paths", [])
        wanted = {path.strip("/") for path in paths if isinstance(path, str)}
        return Response.of([entry for entry in views.tree(commit, "", recursive=True) if entry["path"] in wanted])

    def refs(self, request: Request, repo: Repo) -> Response:
        branches = [_ref(name, "heads", oid) for name, oid in repo.refs("heads").items()]
        tags = [_ref(name, "tags", oid) for name, oid in repo.refs("tags").items()]
        return Response.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, request: Request, repo: Repo, revision: str) -> Response:
        return _page(request, [views.commit_summary(commit) for commit in repo.history(revision)])

    def resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Response:
        commit = repo.at(revision)
        entry = commit.files.get(path)
        if entry is None:
            raise EntryNotFound(f"There is no file '{path}' in {repo.id} at '{revision}'.", commit=commit.id)
        headers = {
            "ETag": f'"{entry.etag}"',
            "X-Repo-Commit": commit.id,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "X-Content-Type-Options": "nosniff",
        }
        if entry.lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(entry.size)}
        if request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            asked = request.headers.get("Range")
        else:
            asked = None
        status, start, count = _range(asked, entry.size)
        if status != 200:
            end = f"{start}-{start + count - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {end}/{entry.size}"
        return Response(status, headers=headers, file=(self.store.blob(entry.sha256), start, count))

    # writing to a repository

    def create_branch(self, request: Request, repo: Repo, name: str) -> Response:
        repo.create_ref("heads", name, member(request.json(), "startingPoint", str, "main"))
        return Response.of({})

    def delete_branch(self, request: Request, repo: Repo, name: str) -> Response:
        repo.delete_ref("heads", name)
        return Response.of({})

    def create_tag(self, request: Request, repo: Repo, name: str) -> Response:
        repo.create_ref("tags", member(request.json(), "tag", str), name)
        return Response.of({})

    def delete_tag(self, request: Request, repo: Repo, name: str) -> Response:
        repo.delete_ref("tags", name)
        return Response.of({})

    def validate_yaml(self, request: Request) -> Response:
        try:
            views.front_matter(member(request.json(), "content", str))
        except views.CardError as error:
            return Response.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return Response.of({"errors": [], "warnings": []})

    def preupload(self, request: Request, repo: Repo, revision: str) -> Response:
        _refuse_pull_request(request)
        current, files = repo.at(revision).files, []
        for file in member(request.json(), "files", list):
            path, size = names.check_path(member(file, "path", str)), member(file, "size", int)
            large = size > LFS_THRESHOLD or (size > 0 and path.lower().endswith(LFS_SUFFIXES))
            shown: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in current:
                shown["oid"] = current[path].etag
            files.append(shown)
        return Response.of({"files": files})

    def commit(self, request: Request, repo: Repo, revision: str) -> Response:
        _refuse_pull_request(request)
        repo.resolve(revision)
        header: dict[str, Any] = {}
        changes: list[Change] = []
        for line in request.body.lines(COMMIT_LIMIT):
            if not line.strip():
                continue
            operation = json_object(line)
            key, value = member(operation, "key", str), member(operation, "value", dict)
            if key == "header":
                header = value
            else:
                changes.append(self._change(repo, key, value))
        title, message = member(header, "summary", str), member(header, "description", str, "")
        parent = member(header, "parentCommit", str) if header.get("parentCommit") else None
        oid = repo.commit(revision, changes, title, message, parent)
        url = f"{request.base}{_web_path(repo.kind, repo.id)}/commit/{oid}"
        return Response.of({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _change(self, repo: Repo, key: str, value: dict[str, Any]) -> Change:
        path = member(value, "path", str)
        if key == "deletedFolder":
            return Delete(names.check_path(path.rstrip("/")), folder=True)
        names.check_path(path)
        if key == "deletedFile":
            return Delete(path, folder=False)
        if key == "file":
            return Add(path, self.store.add_content(_content(value)))
        if key == "lfsFile":
            oid = _sha256(value)
            if (entry := repo.uploaded(oid)) is None:
                raise Invalid(f"The content of '{path}' ({oid}) was not uploaded to {repo.id}.")
            return Add(path, entry)
        raise Invalid(f"Unknown commit operation '{key[:50]}'.")

    # large files

    def lfs_batch(self, request: Request, repo: Repo) -> Response:
        data = request.json()
        if data.get("operation") != "upload" or data.get("hash_algo", "sha256") != "sha256":
            raise Invalid("This hub offers LFS uploads with sha256 only; download files from .../resolve/...")
        objects = [self._lfs_object(request, repo, item) for item in member(data, "objects", list)]
        return Response.of({"transfer": "basic", "objects": objects}, Content_Type=_LFS_JSON)

    def _lfs_object(self, request: Request, repo: Repo, item: Any) -> dict[str, Any]:
        oid, size = _sha256(item), member(item, "size", int)
        if size < 0:
            raise Invalid("'size' is negative.")
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if (known := repo.uploaded(oid)) is not None:
            error = {"code": 422, "message": f"this file has {known.size} bytes"}
            return answer if known.size == size else {**answer, "error": error}
        url = f"{request.base}{_web_path(repo.kind, repo.id)}.git/info/lfs/objects"
        expires = str(int(time.time()) + UPLOAD_SECONDS)
        query = {"size": size, "expires": expires, "signature": self._signature(repo, oid, str(size), expires)}
        answer["actions"] = {"upload": {"href": f"{url}/{oid}?{urlencode(query)}"}, "verify": {"href": f"{url}/verify"}}
        return answer

    def lfs_upload(self, request: Request, repo: Repo, oid: str) -> Response:
        size, expires, given = (request.option(name) or "" for name in ("size", "expires", "signature"))
        expected = self._signature(repo, oid, size, expires)
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise Forbidden("This upload URL is not valid.")
        if int(expires) < time.time():
            raise Forbidden("This upload URL has expired; ask for a new one.")
        if request.body.length not in (None, int(size)):
            raise Invalid(f"The upload has {request.body.length} bytes instead of the announced {size}.")
        self.store.add_stream(request.body.chunks(), oid, int(size))
        repo.add_object(oid)
        return Response.of({}, ETag=f'"{oid}"')

    def lfs_verify(self, request: Request, repo: Repo) -> Response:
        data = request.json()
        known = repo.uploaded(_sha256(data))
        if known is None or known.size != member(data, "size", int):
            raise EntryNotFound("This file was not uploaded.")
        return Response.of({})

    def _signature(self, repo: Repo, oid: str, size: str, expires: str) -> str:
        text = f"PUT\n{repo.kind}\n{repo.id}\n{oid}\n{size}\n{expires}"
        return hmac.new(self.store.secret, text.encode(), hashlib.sha256).hexdigest()

    def no_xet(self, request: Request, repo: Repo) -> Response:
        raise RouteNotFound("This hub has no Xet storage: set HF_HUB_DISABLE_XET=1 to upload large files.")


def _decoded(value: str) -> str:
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("The address is not valid UTF-8.") from None


def _named_repo(data: dict[str, Any]) -> tuple[str, str]:
    """Return kind and id from the body of repos/create and repos/delete; without organization it is the user's own."""
    name = member(data, "name", str)
    if "/" not in name:
        name = f"{member(data, 'organization', str, USER) or USER}/{name}"
    return member(data, "type", str, "model") + "s", name


def _web_path(kind: str, repo_id: str) -> str:
    return f"/{repo_id}" if kind == "models" else f"/{kind}/{repo_id}"


def _page(request: Request, items: list[dict[str, Any]]) -> Response:
    """Return one page of a listing and, in `Link`, the address of the next."""
    start, limit = _number(request, "cursor", 0), _number(request, "limit", PAGE)
    limit = min(max(limit, 1), PAGE)
    response = Response.of(items[start : start + limit])
    if start + limit < len(items):
        query = urlencode({**request.query, "cursor": [start + limit]}, doseq=True)
        response.headers["Link"] = f'<{request.base}{request.path}?{query}>; rel="next"'
    return response


def _number(request: Request, name: str, default: int) -> int:
    text = request.option(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Invalid(f"'{name}' is not a number.")
    return int(text)


def _expanded(request: Request, info: dict[str, Any], hidden: list[str]) -> dict[str, Any]:
    """Keep what `?expand=` asks for; without it, all but `hidden`."""
    if expand := request.query.get("expand"):
        return {name: value for name, value in info.items() if name in ("_id", "id", *expand)}
    return {name: value for name, value in info.items() if name not in hidden}


def _ref(name: str, kind: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}


def _range(header: str | None, size: int) -> tuple[int, int, int]:
    """Return status, first byte and number of bytes; a range that is not understood is ignored, as HTTP asks."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (header or "").strip(), re.ASCII)
    if match is None or not any(match.groups()):
        return 200, 0, size
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size - 1
    else:
        start, end = int(first), min(int(last or size), size - 1)
        if last and int(last) < start:
            return 200, 0, size
    return (206, start, end - start + 1) if start <= end else (416, 0, 0)


def _refuse_pull_request(request: Request) -> None:
    if request.flag("create_pr"):
        raise Invalid("This hub has no pull requests: commit to a branch instead.")


def _content(value: dict[str, Any]) -> bytes:
    text = member(value, "content", str)
    try:
        if member(value, "encoding", str, "utf-8") == "base64":
            return base64.b64decode(text, validate=True)
        return text.encode()
    except ValueError:
        raise Invalid("The content of a file is not valid base64 or Unicode.") from None


def _sha256(data: Any) -> str:
    oid = member(data, "oid", str)
    if not names.SHA256.fullmatch(oid):
        raise Invalid("'oid' is not a sha256 in lower-case hexadecimal.")
    return oid


def _table() -> Iterator[tuple[str, re.Pattern[str], Callable[..., Response]]]:
    # The namespace is optional so that `gpt2` is answered with RepoNotFound and not as an unknown address.
    repo = "(?P<repo>[^/]+(?:/[^/]+)?)"
    api = f"/api/(?P<kind>models|datasets|spaces)/{repo}"
    web = f"/(?:(?P<kind>datasets|spaces)/)?{repo}"
    revision, name = "(?P<revision>[^/]+)", "(?P<name>[^/]+)"
    lfs = rf"{web}\.git/info/lfs/objects"
    for verb, pattern, handler in (
        ("GET", "/api/whoami-v2", Routes.whoami),
        ("POST", "/api/validate-yaml", Routes.validate_yaml),
        ("POST", "/api/repos/create", Routes.create_repo),
        ("DELETE", "/api/repos/delete", Routes.delete_repo),
        ("GET", "/api/(?P<kind>models|datasets)", Routes.list_repos),
        ("GET", api, Routes.info),
        ("GET", f"{api}/revision/{revision}", Routes.info),
        ("GET", f"{api}/tree/{revision}(?:/(?P<path>.*))?", Routes.tree),
        ("POST", f"{api}/paths-info/{revision}", Routes.paths_info),
        ("GET", f"{api}/refs", Routes.refs),
        ("GET", f"{api}/commits/{revision}", Routes.commits),
        ("POST", f"{api}/branch/{name}", Routes.create_branch),
        ("DELETE", f"{api}/branch/{name}", Routes.delete_branch),
        ("POST", f"{api}/tag/{name}", Routes.create_tag),
        ("DELETE", f"{api}/tag/{name}", Routes.delete_tag),
        ("POST", f"{api}/preupload/{revision}", Routes.preupload),
        ("POST", f"{api}/commit/{revision}", Routes.commit),
        ("GET", f"{api}/xet-(?:read|write)-token/[^/]+", Routes.no_xet),
        ("POST", f"{lfs}/batch", Routes.lfs_batch),
        ("POST", f"{lfs}/verify", Routes.lfs_verify),
        ("PUT", f"{lfs}/(?P<oid>[0-9a-f]{{64}})", Routes.lfs_upload),
        ("GET", f"{web}/resolve/{revision}/(?P<path>.+)", Routes.resolve),
    ):
        yield verb, re.compile(pattern), handler


_TABLE = tuple(_table())
