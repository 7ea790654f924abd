"""Addresses that work without a login because the hub signed them: for one method, object, size and time.

The signature also covers the generation of the repository, so that an address does not outlive a repository that was
deleted and made again under the same name. The key is kept in the data folder: addresses survive a restart.
"""

import hashlib
import hmac
import time
from urllib.parse import urlencode

from mmhub_hubserver.errors import Forbidden
from mmhub_hubserver.store import Repo
from mmhub_hubserver.wire import Request

SECONDS = 12 * 3600  # how long an address may be used
NOT_OURS = "This address was not given out by this hub, or was changed."


def signed(address: str, method: str, repo: Repo, oid: str, size: int, **extra: int) -> str:
    """Return `address` with what proves that this hub gave it out."""
    facts = {"size": str(size), "expires": str(int(time.time()) + SECONDS)}
    facts |= {name: str(value) for name, value in extra.items()}
    return f"{address}?{urlencode({**facts, 'signature': _signature(method, repo, oid, facts)})}"


def check(request: Request, method: str, repo: Repo, oid: str, *extra: str) -> dict[str, int]:
    """Return the numbers in a signed address: `size`, and those named in `extra`.

    Raises:
        Forbidden: this hub did not sign exactly this, or the time is over.
    """
    facts = {name: request.option(name) or "" for name in ("size", "expires", *extra)}
    given = (request.option("signature") or "").encode()
    if not hmac.compare_digest(given, _signature(method, repo, oid, facts).encode()):
        raise Forbidden(NOT_OURS)
    if int(facts["expires"]) < time.time():
        raise Forbidden("This address has expired; ask for a new one.")
    return {name: int(value) for name, value in facts.items()}


def _signature(method: str, repo: Repo, oid: str, facts: dict[str, str]) -> str:
    text = "\n".join([method, repo.kind, repo.generation, oid, *(f"{name}={facts[name]}" for name in sorted(facts))])
    return hmac.new(repo.store.secret, text.encode(), hashlib.sha256).hexdigest()
