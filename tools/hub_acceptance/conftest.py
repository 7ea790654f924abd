"""What huggingface_hub's own tests take from their conftest, for a hub on loopback.

`run.py` copies this file next to the tests of huggingface_hub's source distribution, which come without a conftest. The
hub's address is in `HF_ENDPOINT`; it knows the accounts of `testing_constants`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, RepoUrl, constants
from huggingface_hub.errors import HfHubHTTPError

from . import testing_constants

testing_constants.ENDPOINT_STAGING = os.environ["HF_ENDPOINT"]  # before any test module copies it

from .testing_constants import ENDPOINT_STAGING, TOKEN, USER  # noqa: E402
from .testing_utils import repo_name  # noqa: E402

RepoFactory = Callable[..., RepoUrl]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("no_xet"):
        pytest.skip("hf_xet is installed")
    if item.get_closest_marker("git_lfs"):
        pytest.skip("needs the git-lfs program and files of another host")


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each test starts with an empty cache, no saved token, and Xet as its marks ask."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
            patch.setattr(constants, name, str(home / name.lower()))
        if request.node.get_closest_marker("xet"):
            patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        yield


@pytest.fixture(scope="session")
def api() -> HfApi:
    return HfApi(endpoint=ENDPOINT_STAGING, token=TOKEN)


@pytest.fixture(scope="session")
def api_prod() -> HfApi:
    pytest.skip("needs the public Hub")


@pytest.fixture
def repo_factory(api: HfApi) -> Iterator[RepoFactory]:
    """Create repositories that are deleted after the test."""
    made: list[tuple[RepoUrl, Any]] = []

    def create(repo_type: str = "model", repo_id: str | None = None, token: Any = None, **options: Any) -> RepoUrl:
        url = api.create_repo(repo_id or repo_name(), repo_type=repo_type, token=token, **options)
        made.append((url, token))
        return url

    yield create
    for url, token in made:
        _delete(api, url.repo_id, repo_type=url.repo_type, token=token)


@pytest.fixture
def new_repo_id(api: HfApi) -> Iterator[str]:
    """A repo id that the test itself creates."""
    repo_id = f"{USER}/{repo_name()}"
    yield repo_id
    _delete(api, repo_id)


def _delete(api: HfApi, repo_id: str, **options: Any) -> None:
    try:
        api.delete_repo(repo_id, missing_ok=True, **options)
    except HfHubHTTPError as error:
        print(f"could not delete {repo_id}: {error}")


@pytest.fixture(autouse=True)
def _in_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some tests save into the working folder."""
    monkeypatch.chdir(tmp_path)
