"""Routes for large files: the Git LFS batch API with single and multipart uploads, downloads, and their bookkeeping.

An upload goes to an address that only this hub can have made (see `signing`). Parts wait in uploads/ of the data
folder, not in tmp/, so that a large upload goes on after a restart; what nobody finishes in time is swept.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mmhub_hubserver import names, signing
from mmhub_hubserver.errors import EntryNotFound, Forbidden, HubError, Invalid, RepoNotFound
from mmhub_hubserver.pool import MAX_BYTES
from mmhub_hubserver.routing import API, WEB, Hub, Need, kind_of, route, web_path
from mmhub_hubserver.store import Repo, Store
from mmhub_hubserver.views import PAGE
from mmhub_hubserver.wire import Request, Response, member

PART_BYTES = 100 << 20  # files above this are uploaded in parts of it
MAX_PARTS = 1000
MAX_OBJECTS = 10_000  # of one batch request
_JSON = {"Content-Type": "application/vnd.git-lfs+json"}
_CHUNK = 1 << 20


def batch(hub: Hub, request: Request, repo: Repo) -> Response:
    data = request.json()
    if data.get("hash_algo", "sha256") not in ("sha256", "sha_256"):  # as git-lfs, and as the JavaScript client says
        raise Invalid("This hub knows large files by their sha256 only.")
    objects = member(data, "objects", list)
    if len(objects) > MAX_OBJECTS:
        raise Invalid(f"More than {MAX_OBJECTS} objects in one request.")
    wanted = list(dict.fromkeys(_identified(item) for item in objects))  # clients send the same content twice
    operation = data.get("operation")
    if operation == "download":
        found = [_download(request, repo, oid, size) for oid, size in wanted]
    elif operation == "upload":
        account = hub.access.check_login(request.account)  # also not members: for pull requests
        if account.role != "write":
            raise hub.access.refused(account, f"upload to {repo.id}")
        sweep(hub.store)
        parts = "multipart" in member(data, "transfers", list, ["basic"])
        new = [size for oid, size in wanted if repo.uploaded(oid) is None]
        hub.store.check_room(sum(2 * size if parts and size > PART_BYTES else size for size in new))  # parts are joined
        found = [_upload(request, repo, oid, size, parts=parts) for oid, size in wanted]
        parts = any("chunk_size" in one.get("actions", {}).get("upload", {}).get("header", {}) for one in found)
        return Response.of({"transfer": "multipart" if parts else "basic", "objects": found}, headers=_JSON)
    else:
        raise Invalid("'operation' is upload or download.")
    return Response.of({"transfer": "basic", "objects": found}, headers=_JSON)


def put(hub: Hub, request: Request, oid: str, **_: str) -> Response:
    """Store a whole file, sent to a signed address."""
    repo = _unchecked_repo(hub, request)
    size = signing.check(request, "PUT", repo, oid)["size"]
    _check_length(request, size)
    hub.store.add_stream(request.body.chunks(), oid, size)
    repo.add_object(oid)
    return Response.of({}, headers={"ETag": f'"{oid}"'})


def put_part(hub: Hub, request: Request, oid: str, **_: str) -> Response:
    """Keep one part of a file until the upload is completed."""
    repo = _unchecked_repo(hub, request)
    facts = signing.check(request, "PUT", repo, oid, "part", "chunk")
    size, number, chunk = facts["size"], facts["part"], facts["chunk"]
    wanted = min(chunk, size - (number - 1) * chunk)
    _check_length(request, wanted)
    folder = _parts_folder(hub.store, repo, oid)
    with hub.store.disk.promised(wanted), hub.store.disk.staged() as file:
        _save(request, file, number, wanted)
        folder.mkdir(parents=True, exist_ok=True)
        hub.store.disk.keep(file, folder / str(number))
    return Response.of({}, headers={"ETag": f'"{oid[:16]}-{number}"'})


def complete(hub: Hub, request: Request, oid: str, **_: str) -> Response:
    """Put the parts together. May be repeated: the answer to the first try can get lost."""
    repo = _unchecked_repo(hub, request)
    facts = signing.check(request, "POST", repo, oid, "chunk")
    data = request.json()
    if member(data, "oid", str) != oid:
        raise Invalid("'oid' is not the one of this address.")
    folder, size = _parts_folder(hub.store, repo, oid), facts["size"]
    with _only_here(folder):
        if repo.uploaded(oid) is None:
            parts = [folder / str(number) for number in range(1, -(-size // facts["chunk"]) + 1)]
            if missing := [part.name for part in parts if not part.exists()]:
                raise Invalid(f"Parts {', '.join(missing[:10])} were not uploaded; upload the file again.")
            _join(hub.store, repo, oid, size, parts)
        hub.store.disk.discard(folder)
    return Response.of({})


def get(hub: Hub, request: Request, oid: str, **_: str) -> Response:
    """Send a large file to a git-lfs client that was given this address."""
    repo = _unchecked_repo(hub, request)
    signing.check(request, "GET", repo, oid)
    entry = repo.uploaded(oid)
    if entry is None:
        raise EntryNotFound("This file is not there any more.")
    headers = {"Content-Type": "application/octet-stream", "X-Content-Type-Options": "nosniff", "ETag": f'"{oid}"'}
    return Response(200, headers=headers, file=(repo.large(entry), 0, entry.size))


def verify(hub: Hub, request: Request, repo: Repo) -> Response:
    oid, size = _identified(request.json())
    known = repo.uploaded(oid)
    if known is None or known.size != size:
        raise EntryNotFound("This file was not uploaded.")
    return Response.of({})


def listing(hub: Hub, request: Request, repo: Repo) -> Response:
    """List the large files of all branches and pull requests, each at the last commit that brought it in."""
    page, headers = request.page(list(_large_files(repo).values()), PAGE)
    return Response.of(page, headers=headers)


def delete_many(hub: Hub, request: Request, repo: Repo) -> Response:
    """Remove large files for good, also from the history."""
    deletions = member(request.json(), "deletions", dict)
    shas = [sha for sha in member(deletions, "sha", list) if isinstance(sha, str) and names.SHA256.fullmatch(sha)]
    repo.purge(shas, rewrite_history=deletions.get("rewriteHistory") is not False)
    return Response.of({})


def duplicate(hub: Hub, request: Request, repo: Repo) -> Response:
    """Let another repository use large files of this one, without sending them again."""
    data = request.json()
    place = member(data, "target", dict)
    target = hub.repo(kind_of(place), member(place, "name", str), request, Need.WRITE)
    hub.access.check_read(request.account, repo)
    failed = []
    for file in member(data, "files", list)[:MAX_OBJECTS]:
        oid = member(file, "sha256", str)
        if not names.SHA256.fullmatch(oid) or repo.uploaded(oid) is None:
            failed.append({"sha256": oid[:100], "error": f"not a file of {repo.id}"})
        else:
            target.link_object(oid)
    return Response.of({"failed": failed})


def sweep(store: Store, keep_seconds: float = signing.SECONDS) -> int:
    """Remove the parts of uploads that nobody can finish any more; return the number of uploads."""
    dropped = 0
    for folder in store.root.glob("uploads/*"):
        try:
            if folder.stat().st_mtime <= time.time() - keep_seconds:
                store.disk.discard(folder)
                dropped += 1
        except FileNotFoundError:
            continue
    return dropped


def _identified(item: Any) -> tuple[str, int]:
    oid, size = member(item, "oid", str), member(item, "size", int)
    if not names.SHA256.fullmatch(oid):
        raise Invalid("'oid' is not a sha256 in lower-case hexadecimal.")
    if not 0 <= size <= MAX_BYTES:
        raise Invalid(f"'size' is not between 0 and {MAX_BYTES} bytes.")
    return oid, size


def _upload(request: Request, repo: Repo, oid: str, size: int, *, parts: bool) -> dict[str, Any]:
    """Say where to upload a file to; without actions it is there already, which only its own size can claim."""
    answer: dict[str, Any] = {"oid": oid, "size": size}
    if (known := repo.uploaded(oid)) is not None:
        error = {"code": 422, "message": f"this file has {known.size} bytes"}
        return answer if known.size == size else {**answer, "error": error}
    place = f"{_place(request, repo)}/{oid}"
    if parts and size > PART_BYTES:
        upload = _multipart(place, repo, oid, size)
    else:
        upload = {"href": signing.signed(place, "PUT", repo, oid, size)}
    answer["actions"] = {"upload": upload, "verify": {"href": f"{_place(request, repo)}/verify"}}
    return answer


def _multipart(place: str, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    chunk = max(PART_BYTES, -(-size // MAX_PARTS))
    header = {"chunk_size": str(chunk)}
    for number in range(1, -(-size // chunk) + 1):
        header[f"{number:05d}"] = signing.signed(f"{place}/part", "PUT", repo, oid, size, part=number, chunk=chunk)
    return {"href": signing.signed(f"{place}/complete", "POST", repo, oid, size, chunk=chunk), "header": header}


def _download(request: Request, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    known = repo.uploaded(oid)
    if known is None:
        return {"oid": oid, "size": size, "error": {"code": 404, "message": f"not a file of {repo.id}"}}
    href = signing.signed(f"{_place(request, repo)}/{oid}", "GET", repo, oid, known.size)
    return {"oid": oid, "size": known.size, "actions": {"download": {"href": href}}}


def _place(request: Request, repo: Repo) -> str:
    return f"{request.base}{web_path(repo.kind, repo.id)}.git/info/lfs/objects"


def _unchecked_repo(hub: Hub, request: Request) -> Repo:
    """Return the repository of a signed address, which stands for the account that asked for it."""
    try:
        return hub.store.repo(request.parts.get("kind") or "models", request.parts["repo"])
    except RepoNotFound:
        raise Forbidden(signing.NOT_OURS) from None  # not 404, which would tell private from missing


def _check_length(request: Request, wanted: int) -> None:
    if request.body.length not in (None, wanted):
        raise Invalid(f"The upload has {request.body.length} bytes instead of the announced {wanted}.")


def _parts_folder(store: Store, repo: Repo, oid: str) -> Path:
    name = hashlib.sha256(f"{repo.kind}\n{repo.generation}\n{oid}".encode()).hexdigest()
    return store.root / "uploads" / name


def _save(request: Request, file: IO[bytes], number: int, wanted: int) -> None:
    received = 0
    for chunk in request.body.chunks():
        received += len(chunk)
        if received > wanted:
            break
        file.write(chunk)
    if received != wanted:
        raise Invalid(f"Part {number} has {'more' if received > wanted else received} bytes instead of {wanted}.")
    file.flush()


@contextmanager
def _only_here(folder: Path) -> Iterator[None]:
    """Let one request at a time put these parts together. Who comes second finds the folder gone and the file there."""
    with ExitStack() as held:
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)  # the folder itself: a full disk has no room for a lock file
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _join(store: Store, repo: Repo, oid: str, size: int, parts: list[Path]) -> None:
    """Store the file that the parts make up. They are gone afterwards, also where it does not work out."""
    try:
        store.add_stream(_joined(store, parts), oid, size)
        repo.add_object(oid)
    except HubError:
        store.disk.discard(parts[0].parent)
        raise


def _joined(store: Store, parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with open(part, "rb") as file:
            while data := file.read(_CHUNK):
                yield data
        store.disk.discard(part)


def _large_files(repo: Repo) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    heads = {f"refs/heads/{name}": oid for name, oid in repo.refs("heads").items()}
    pulls = {f"refs/pr/{number}": oid for number, oid in repo.refs("pr").items()}
    ordered = sorted({**heads, **pulls}, key=lambda ref: (ref != "refs/heads/main", ref))
    seen: set[str] = set()
    for ref in ordered:
        for commit in repo.history(ref):
            if commit.id in seen:
                break
            seen.add(commit.id)
            for path, entry in commit.files.items():
                if entry.lfs:
                    facts = {"fileOid": entry.sha256, "filename": path, "oid": entry.sha256, "size": entry.size}
                    facts |= {"pushedAt": commit.date, "ref": ref}
                    found.setdefault(str(entry.sha256), facts)["pushedAt"] = commit.date
    return found


_OBJECTS = rf"{WEB}\.git/info/lfs/objects"
_OBJECT = f"{_OBJECTS}/(?P<oid>[0-9a-f]{{64}})"

TABLE = (
    route("POST", f"{_OBJECTS}/batch", batch, Need.READ),
    route("POST", f"{_OBJECTS}/verify", verify, Need.READ),
    route("PUT", _OBJECT, put, Need.NOTHING),
    route("GET", _OBJECT, get, Need.NOTHING),
    route("PUT", f"{_OBJECT}/part", put_part, Need.NOTHING),
    route("POST", f"{_OBJECT}/complete", complete, Need.NOTHING),
    route("GET", f"{API}/lfs-files", listing, Need.WRITE),
    route("POST", f"{API}/lfs-files/batch", delete_many, Need.WRITE),
    route("POST", f"{API}/lfs-files/duplicate", duplicate, Need.READ),
)
