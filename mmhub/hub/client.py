"""The Hub client: endpoint and token passed explicitly, one cache per endpoint, errors in our words.

huggingface_hub sends the stored token to whatever endpoint is set, and keys its cache by repository id alone, so that
two hubs would mix; both are settled here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NetworkError, NotFoundError
from mmhub.registry import read_registries

PUBLIC_HUB = "https://huggingface.co"


def endpoint() -> str:
    """Return the Hub's address as it may be shown: HF_ENDPOINT, else what a registry.toml sets, else the public Hub."""
    return without_login(request_address())


def request_address() -> str:
    """Return the Hub's address for requests: with the user and password it was given with, so never to be shown."""
    return read_registries().endpoint().rstrip("/") or PUBLIC_HUB


def without_login(text: str) -> str:
    """Return a text without the `user:password@` of the addresses in it."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


def is_public_hub() -> bool:
    return endpoint() in (PUBLIC_HUB, "https://hf.co")


def is_offline() -> bool:
    """Is HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) set, as huggingface_hub understood it?"""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def token() -> str | bool:
    """Return the token to send, or False for none.

    A token stored by `hf auth login` goes to the public Hub alone. An endpoint that HF_ENDPOINT or the user's own
    registry names gets HF_TOKEN, if that is set; one that a project's registry.toml names gets none: it may have come
    with a download.
    """
    from huggingface_hub import get_token

    if is_public_hub():
        return get_token() or False
    chosen_by_user = os.environ.get("HF_ENDPOINT") or _endpoint_scope() == "user"
    return (os.environ.get("HF_TOKEN") or False) if chosen_by_user else False


def _endpoint_scope() -> str:
    return next((file.scope for file in read_registries().files if file.hub.endpoint), "")


def cache_dir() -> Path:
    """Return the folder model files are cached in: the Hugging Face cache, with a sub-folder for another endpoint."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE)
    return root if is_public_hub() else root / "endpoints" / re.sub(r"[^\w.-]+", "_", endpoint().split("://")[-1])


def api() -> Any:
    from huggingface_hub import HfApi

    from mmhub import __version__

    return HfApi(endpoint=request_address(), token=token(), library_name="mmhub", library_version=__version__)


def download_options() -> dict[str, Any]:
    """Arguments for huggingface_hub's download functions."""
    return {"endpoint": request_address(), "token": token(), "cache_dir": cache_dir()}


def request_headers() -> dict[str, str]:
    """Return the headers of a request that the client does not make for us."""
    from huggingface_hub.utils import build_hf_headers

    from mmhub import __version__

    headers: dict[str, str] = build_hf_headers(token=token(), library_name="mmhub", library_version=__version__)
    return headers


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Call the client inside: its exceptions become ours, one line each, and it sends no token but the one we pass."""
    from huggingface_hub import errors

    at = f"at {endpoint()}"
    try:
        with _no_implicit_token():
            yield
    except errors.GatedRepoError:
        raise MmhubError(f"'{repo}' {at} is gated", "accept its terms on its page, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        hint = "check the name; a private repository needs `hf auth login` or HF_TOKEN"
        raise NotFoundError(f"no repository '{repo}' {at}", hint) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"'{repo}' {at} has no revision '{revision}'", "check the branch, tag or commit") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise _unreachable(repo) from None
    except errors.EntryNotFoundError as error:
        found = re.search(r"/resolve/[^/]+/(\S+?)\.?(\s|$)", str(error))
        file = found[1] if found else "a file"
        raise NotFoundError(f"'{repo}' {at} has no {file}", "it may be no mmhub checkpoint") from None
    except errors.HFValidationError as error:
        raise NotFoundError(f"'{repo}' is no repository name: {str(error).splitlines()[0]}") from None
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, error) from None
    except (ConnectionError, TimeoutError) as error:
        raise NetworkError(f"cannot reach {endpoint()}: {_first_line(error)}", _OFFLINE_HINT) from None
    except RuntimeError as error:  # how the client reports any failed upload
        if error.__cause__ is None or not str(error).startswith("Error while uploading"):
            raise
        with hub_errors(repo, revision):
            raise error.__cause__ from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise NetworkError(f"cannot reach {endpoint()}: {_first_line(error)}", _OFFLINE_HINT) from None
        raise


@contextmanager
def _no_implicit_token() -> Iterator[None]:
    """Even with token=False the client (2.4) sends the stored token when it asks where to upload large files."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = before


_OFFLINE_HINT = "check the network, HF_ENDPOINT and proxy settings; models pulled before still load"


def _unreachable(repo: str) -> NetworkError:
    if is_offline():
        return NetworkError(f"'{repo}' is not in the cache, and HF_HUB_OFFLINE is set", "unset it, or pull it first")
    return NetworkError(f"'{repo}' is not in the cache, and {endpoint()} cannot be reached", _OFFLINE_HINT)


def _http_error(repo: str, error: Any) -> MmhubError:
    status = getattr(error.response, "status_code", 0)
    text = _first_line(getattr(error, "server_message", None) or error)
    if status == 412:
        return MmhubError(f"'{repo}' was changed by somebody else while pushing", "push again to build on their commit")
    if status in (401, 403):
        return MmhubError(f"{endpoint()} does not let you do that to '{repo}': {text}", "check your token's rights")
    if status in (408, 429) or status >= 500:
        return NetworkError(f"{endpoint()} answered {status} for '{repo}': {text}", "try again later")
    return MmhubError(f"{endpoint()} answered {status} for '{repo}': {text}")


def _first_line(error: Any) -> str:
    lines = without_login(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
