"""Xet uploads: the token that lets a client in, and what the Rust client then asks of the "CAS" server.

Files are received in chunks here but served over plain HTTP. There is no global deduplication (a client only learns of
chunks that it sent itself), no reading, no upload grants: unknown addresses answer 404, after which clients do without.
"""

import hashlib
import hmac
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmhub_hubserver.errors import Forbidden, StorageFailed, TooLarge, Unauthorized
from mmhub_hubserver.routing import API, REVISION, Hub, Need, Route, route
from mmhub_hubserver.store import Repo
from mmhub_hubserver.wire import Request, Response
from mmhub_hubserver.writing import check_may_commit
from mmhub_hubserver.xet.area import Area
from mmhub_hubserver.xet.formats import SHARD_LIMIT, XORB_LIMIT, read_shard, read_xorb

TOKEN_SECONDS = 900  # clients ask for a new token by themselves


def write_token(hub: Hub, request: Request, repo: Repo, revision: str) -> Response:
    """Tell a client where to upload, and until when."""
    check_may_commit(hub, request, repo, revision)
    member = hub.access.writes(request.account, repo)
    area = Area.current(repo, guest=None if member or request.account is None else request.account.name)
    address = f"{request.base}/api/xet/{repo.kind}/{repo.id}/{area.epoch}"
    expires = str(int(time.time()) + TOKEN_SECONDS)
    token = f"xet_{expires}_{_signature(hub, area.epoch, expires)}"
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Token-Expiration": expires, "X-Xet-Access-Token": token}
    return Response.of({"casUrl": address, "exp": int(expires), "accessToken": token}, headers=headers)


def upload_xorb(hub: Hub, request: Request, area_kind: str, area_repo: str, epoch: str, xorb: str) -> Response:
    area = _area(hub, request, area_kind, area_repo, epoch)
    _limit(request, XORB_LIMIT)
    if area.has(xorb):
        request.body.drain(XORB_LIMIT)
        return Response.of({"was_inserted": False})
    with _refusing_for_good():
        hub.store.check_room(request.body.length or 0)  # the exact size is known when it is unpacked
        area.add(xorb, read_xorb(request.body.read))
    return Response.of({"was_inserted": True})


def upload_shard(hub: Hub, request: Request, area_kind: str, area_repo: str, epoch: str) -> Response:
    """Put together the files that a shard describes; a commit may then name them."""
    area = _area(hub, request, area_kind, area_repo, epoch)
    _limit(request, SHARD_LIMIT)
    files = read_shard(request.body.read)
    request.body.drain(SHARD_LIMIT)
    with _refusing_for_good(), area.changing():
        area.register_all(files)
    return Response.of({"result": 1})


def telemetry(hub: Hub, request: Request, area_kind: str, area_repo: str, epoch: str) -> Response:
    """Take no notice of a client's statistics; without an answer it would complain."""
    return Response.of({})


def _area(hub: Hub, request: Request, kind: str, repo_id: str, epoch: str) -> Area:
    """Return the area that a request's token is for."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    expires, _, signature = token.removeprefix("xet_").partition("_")
    expected = _signature(hub, epoch, expires)
    if scheme.lower() != "bearer" or not hmac.compare_digest(signature.encode(), expected.encode()):
        raise Unauthorized("This is not a token for uploads to this repository.")
    if int(expires) < time.time():
        raise Unauthorized("The token for this upload has expired; ask for a new one.")
    area = Area(hub.store.repo(kind, repo_id), epoch)
    if not area.exists:
        raise Forbidden("The hub has forgotten the chunks of this upload meanwhile. Push again.")
    return area


@contextmanager
def _refusing_for_good() -> Iterator[None]:
    """Say 413 where the disk is full: the client would repeat a 507, like any 5xx, for minutes."""
    try:
        yield
    except StorageFailed as error:
        raise TooLarge(error.message) from None


def _signature(hub: Hub, epoch: str, expires: str) -> str:
    """Sign for one epoch, which belongs to one repository."""
    return hmac.new(hub.store.secret, f"xet-write\n{epoch}\n{expires}".encode(), hashlib.sha256).hexdigest()


def _limit(request: Request, limit: int) -> None:
    if (request.body.length or 0) > limit:
        raise TooLarge(f"The request has {request.body.length} bytes; at most {limit} are accepted.")


# The names of the groups keep these addresses out of the access check: the token was given after it.
_EPOCH = "(?P<epoch>[0-9a-f]{32}(?:[0-9a-f]{16})?)"
_CAS = f"/api/xet/(?P<area_kind>models|datasets|spaces)/(?P<area_repo>[^/]+/[^/]+)/{_EPOCH}"
TABLE: tuple[Route, ...] = (
    route("GET", f"{API}/xet-write-token/{REVISION}", write_token, Need.READ),
    route("POST", f"{_CAS}/v1/xorbs/default/(?P<xorb>[0-9a-f]{{64}})", upload_xorb, Need.NOTHING),
    route("POST", f"{_CAS}/(?:v1/)?shards", upload_shard, Need.NOTHING),
    route("POST", f"{_CAS}/v1/telemetry", telemetry, Need.NOTHING),
)
