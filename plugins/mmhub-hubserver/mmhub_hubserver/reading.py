"""Routes that read a repository: its tree, history and refs, and the contents of its files."""

import re
from urllib.parse import quote

from mmhub_hubserver import views
from mmhub_hubserver.errors import EntryNotFound
from mmhub_hubserver.routing import API, REVISION, WEB, Hub, Need, route, web_path
from mmhub_hubserver.store import Commit, Entry, Repo, lfs_pointer
from mmhub_hubserver.wire import Request, Response, form, json_object, member

EXPANDED_PAGE = 50  # entries of a listing for each of which the history is searched


def tree(hub: Hub, request: Request, repo: Repo, revision: str, path: str) -> Response:
    commit, expand = repo.at(revision), request.flag("expand")
    paths = views.tree(commit, path.strip("/"), recursive=request.flag("recursive"))
    page, headers = request.page(paths, EXPANDED_PAGE if expand else views.PAGE)
    shown = views.entries(repo, commit, page, expand=expand, xet_hash=hub.xet_hash)
    return Response.of(list(shown), headers=headers)


def paths_info(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    commit, body = repo.at(revision), request.body.all()
    if "json" in request.headers.get("Content-Type", ""):
        data = json_object(body)
        asked, expand = member(data, "paths", list), data.get("expand") is True
    else:
        fields = form(body.decode("utf-8", "replace"))
        asked = fields.get("paths", [])
        expand = fields.get("expand", [""])[-1].lower() in ("1", "true")
    wanted = {path.strip("/") for path in asked if isinstance(path, str)}
    folders = {f"{path}/" for path in wanted if path and path in commit.folders}
    found = sorted({path for path in wanted if path in commit.files} | folders)
    return Response.of(list(views.entries(repo, commit, found, expand=expand, xet_hash=hub.xet_hash)))


def refs(hub: Hub, request: Request, repo: Repo) -> Response:
    found = {
        "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in repo.refs("heads").items()],
        "tags": [_ref(name, f"refs/tags/{name}", oid) for name, oid in repo.refs("tags").items()],
        "converts": [],
    }
    if request.flag("include_prs"):
        pulls = repo.refs("pr").items()
        found["pullRequests"] = [_ref(f"refs/pr/{number}", f"refs/pr/{number}", oid) for number, oid in pulls]
    return Response.of(found)


def commits(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    formatted = "formatted" in request.values("expand")
    page, headers = request.page(repo.history(revision), views.PAGE)
    return Response.of([views.commit_summary(commit, formatted=formatted) for commit in page], headers=headers)


def resolve(hub: Hub, request: Request, repo: Repo, revision: str, path: str) -> Response:
    """Send a file. Its ETag names its content: the sha256 of a large file, git's id of a small one."""
    asked = request.parts["repo"]
    if asked.lower() != repo.id.lower():
        place = f"{web_path(repo.kind, repo.id)}/resolve/{quote(revision, safe='')}/{quote(path)}"
        return Response(307, headers={"Location": place})
    commit = repo.at(revision)
    entry = _entry(repo, commit, revision, path)
    headers = _content_headers(commit, path)
    headers["ETag"] = f'"{entry.etag}"'
    if entry.lfs:
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(entry.size)}
        headers |= _xet_headers(hub, request, repo, entry, revision)
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(304, headers=headers)
    return _ranged(request, repo, entry, headers)


def raw(hub: Hub, request: Request, repo: Repo, revision: str, path: str) -> Response:
    """Send what git holds: the text of small files, the pointer of large ones."""
    commit = repo.at(revision)
    entry = _entry(repo, commit, revision, path)
    headers = _content_headers(commit, path) | {"Content-Type": "text/plain; charset=utf-8"}
    content = lfs_pointer(str(entry.sha256), entry.size) if entry.lfs else repo.content(entry)
    return Response(200, content, headers | {"ETag": f'"{entry.git_oid}"'})


def _entry(repo: Repo, commit: Commit, revision: str, path: str) -> Entry:
    entry = commit.files.get(path)
    if entry is None:
        raise EntryNotFound(f"There is no file '{path}' in {repo.id} at '{revision}'.", commit=commit.id)
    return entry


def _content_headers(commit: Commit, path: str) -> dict[str, str]:
    """Headers of any file: never something that a browser would run."""
    name = quote(path.rpartition("/")[2])
    return {
        "X-Repo-Commit": commit.id,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{name}",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "X-Content-Type-Options": "nosniff",
    }


def _xet_headers(hub: Hub, request: Request, repo: Repo, entry: Entry, revision: str) -> dict[str, str]:
    xet = hub.xet_hash(repo, entry)
    if xet is None:
        return {}
    place = f"{request.base}/api/{repo.kind}/{repo.id}/xet-read-token/{quote(revision, safe='')}"
    return {"X-Xet-Hash": xet, "Link": f'<{place}>; rel="xet-auth"'}


def _ranged(request: Request, repo: Repo, entry: Entry, headers: dict[str, str]) -> Response:
    asked = (
        request.headers.get("Range") if request.headers.get("If-Range", headers["ETag"]) == headers["ETag"] else None
    )
    status, start, count = _range(asked, entry.size)
    if status != 200:
        end = f"{start}-{start + count - 1}" if status == 206 else "*"
        headers = {**headers, "Content-Range": f"bytes {end}/{entry.size}"}
    if entry.lfs:
        return Response(status, headers=headers, file=(repo.large(entry), start, count))
    return Response(status, repo.content(entry)[start : start + count], headers)


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


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


TABLE = (
    route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.*))?", tree, Need.SEE),
    route("POST", f"{API}/paths-info/{REVISION}", paths_info, Need.SEE),
    route("GET", f"{API}/refs", refs, Need.SEE),
    route("GET", f"{API}/commits/{REVISION}", commits, Need.SEE),
    route("GET", f"{WEB}/resolve/{REVISION}/(?P<path>.+)", resolve, Need.READ),
    route("GET", f"{WEB}/raw/{REVISION}/(?P<path>.+)", raw, Need.READ),
)
