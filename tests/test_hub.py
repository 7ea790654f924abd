"""Publishing and loading through a Hub on loopback: what is sent, what is fetched, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from mmhub.checkpoint import ALLOWED, read_config
from mmhub.errors import MmhubError, NetworkError, NotFoundError, PluginError, TrustError, UsageError
from mmhub.hub import client, load, pull, push
from tests.conftest import flac, png

pytestmark = [
    pytest.mark.usefixtures("client"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub uploads
]

REPO = "team/shapes"


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "model")


@pytest.fixture
def requests(hub: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, str]]]:
    """Every request the loopback Hub gets: method, path, headers."""
    from mmhub_hubserver.routes import Routes

    seen: list[tuple[str, str, dict[str, str]]] = []
    real = Routes.handle

    def handle(self: Any, request: Any) -> Any:
        seen.append((request.method, request.path, {k.lower(): v for k, v in request.headers.items()}))
        return real(self, request)

    monkeypatch.setattr(Routes, "handle", handle)
    return seen


def new_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def commit(hub: str, files: dict[str, bytes], message: str = "by hand") -> str:
    api = HfApi(endpoint=hub, token=False)
    api.create_repo(REPO, exist_ok=True)
    additions = [CommitOperationAdd(path, io.BytesIO(content)) for path, content in files.items()]
    return str(api.create_commit(REPO, additions, commit_message=message).oid)


def readme(hub: str) -> str:
    return HfApi(endpoint=hub, token=False).hf_hub_download(REPO, "README.md", force_download=True)


def test_what_is_pushed_is_pulled_into_a_fresh_cache_and_predicts_the_same(
    hub: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[dict[str, Any]] = [{"image": png(1)}, {"audio": flac(2)}, {"image": png(3), "audio": flac(3)}]
    before = load(f"./{model.name}").predict(samples)
    pushed = push(model, REPO, license="mit")
    assert pushed.url == f"{hub}/{REPO}"
    new_cache(monkeypatch, tmp_path / "fresh")
    assert load(REPO).predict(samples) == before
    folder = pull(REPO)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == set(pushed.files)
    assert all(ALLOWED.fullmatch(name) for name in files)


def test_only_files_of_the_layout_are_sent(hub: str, model: Path) -> None:
    for name in ("notes.txt", "model.py", "optimizer.pt", ".env", "eval/notes.csv"):
        (model / name).write_text("token")
    pushed = push(model, REPO, license="mit")
    remote = {file.rfilename for file in HfApi(endpoint=hub, token=False).model_info(REPO).siblings or []}
    assert remote - {".gitattributes"} == set(pushed.files)
    assert all(ALLOWED.fullmatch(name) for name in pushed.files)


def test_pushing_again_is_one_more_commit_and_keeps_text_and_unknown_metadata(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    card = Path(readme(hub)).read_text()
    card = card.replace("library_name: mmhub", "library_name: mmhub\nco2_eq_emissions: 3\nthumbnail: x.png")
    card = card.replace("tags:", "tags:\n- mine") + "\n## Thanks\n\nTo everybody.\n"
    commit(hub, {"README.md": card.encode()})
    path = model / "eval" / "classification.json"
    path.write_text(path.read_text().replace('"data": "valid.parquet"', '"data": "other.parquet"'))
    push(model, REPO, message="Again")  # the licence is known by now
    text = Path(readme(hub)).read_text()
    assert "## Thanks\n\nTo everybody." in text
    for line in ("co2_eq_emissions: 3", "thumbnail: x.png", "license: mit", "- mine", "- mmhub"):
        assert line in text, line
    assert text.count("## Results on") == text.count("## Results on other.parquet") == 1
    assert text.count("# team/shapes") == 1
    commits = [entry.title for entry in HfApi(endpoint=hub, token=False).list_repo_commits(REPO)]
    assert commits == ["Again", "by hand", "Publish with mmhub", "initial commit"]


def test_the_text_the_user_wrote_in_the_folder_is_published(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    path = model / "README.md"
    path.write_text(path.read_text() + "\n## Data\n\nDrawn by hand.\n")
    push(model, REPO)
    assert "## Data\n\nDrawn by hand." in Path(readme(hub)).read_text()


def test_weights_and_results_that_a_new_version_lacks_are_deleted(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    commit(hub, {"eval/old.json": b"{}", "model-fusion.safetensors": b"x", "figure.png": b"mine"})
    pushed = push(model, REPO)
    assert set(pushed.deleted) == {"eval/old.json", "model-fusion.safetensors"}
    remote = {file.rfilename for file in HfApi(endpoint=hub, token=False).model_info(REPO).siblings or []}
    assert "figure.png" in remote


def test_a_dry_run_sends_nothing(requests: list[Any], model: Path) -> None:
    pushed = push(model, REPO, license="mit", dry_run=True)
    assert requests == []
    assert pushed.dry_run
    assert pushed.files["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert set(pushed.files) >= {"README.md", "config.json", "provenance.json", "eval/classification.json"}


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_a_licence_nothing_is_made(hub: str, model: Path, dry_run: bool) -> None:
    with pytest.raises(UsageError, match="no licence") as caught:
        push(model, REPO, dry_run=dry_run)
    assert "--license" in str(caught.value.hint)
    assert not HfApi(endpoint=hub, token=False).repo_exists(REPO)


@pytest.mark.parametrize("name", ["README.md", "provenance.json", "eval/classification.json"])
def test_a_secret_is_never_sent(requests: list[Any], model: Path, name: str) -> None:
    path = model / name
    path.write_text(path.read_text() + "\nhf_" + "a" * 34 + "\n")
    with pytest.raises(TrustError, match=f"{path.name}.*looks like a secret") as caught:
        push(model, REPO, license="mit")
    assert "a" * 20 not in str(caught.value), "the message does not repeat it"
    assert requests == []


def test_a_damaged_checkpoint_is_never_sent(requests: list[Any], model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(TrustError, match="damaged"):
        push(model, REPO, license="mit")
    assert requests == []


def test_a_link_out_of_the_folder_is_never_sent(requests: list[Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "private.md").write_text("mine")
    (model / "LICENSE").symlink_to(tmp_path / "private.md")
    with pytest.raises(TrustError, match="symbolic link"):
        push(model, REPO, license="mit")
    assert requests == []


@pytest.mark.parametrize("repo", ["shapes", "a/b/c", "a b/c", ""])
def test_a_bad_repository_name_is_a_usage_error(model: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="repository name"):
        push(model, repo, license="mit")


def test_a_folder_that_is_no_checkpoint_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no mmhub checkpoint"):
        push(tmp_path, REPO, license="mit")


def test_a_push_that_somebody_else_overtook_says_so_and_changes_nothing(
    hub: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmhub.hub import push as module

    push(model, REPO, license="mit")
    push_module = __import__("sys").modules["mmhub.hub.push"]
    real = push_module._find_head

    def overtaken(*args: Any) -> Any:
        head = real(*args)
        commit(hub, {"README.md": b"---\nlicense: mit\n---\ntheirs"}, "theirs")
        return head

    monkeypatch.setattr(push_module, "_find_head", overtaken)
    with pytest.raises(MmhubError, match="changed by somebody else") as caught:
        module(model, REPO)
    assert "push again" in str(caught.value.hint)
    assert HfApi(endpoint=hub, token=False).list_repo_commits(REPO)[0].title == "theirs"


def test_a_tag_names_a_version_for_good(hub: str, model: Path) -> None:
    first = push(model, REPO, license="mit", tag="v1")
    commit(hub, {"README.md": b"---\nlicense: mit\n---\nchanged"})
    assert pull(f"{REPO}@v1").name == first.commit
    assert pull(REPO, revision="v1").name == first.commit
    assert pull(f"{REPO}@{first.commit}").name == first.commit
    assert pull(REPO).name != first.commit
    with pytest.raises(UsageError, match="already has a tag 'v1'"):
        push(model, REPO, license="mit", tag="v1")


def test_a_push_to_a_branch_leaves_main_alone(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    main = pull(REPO).name
    done = push(model, REPO, revision="next", message="Try")
    assert pull(REPO).name == main
    assert pull(f"{REPO}@next").name == done.commit


# -- pulling ----------------------------------------------------------------------------------------------------


def needs(folder: Path, distribution: str) -> bytes:
    config = json.loads((folder / "config.json").read_text())
    config["requires"].append({"distribution": distribution, "specifier": ">=0.1,<1", "components": ["x:y"]})
    return json.dumps(config).encode()


def test_a_missing_plugin_is_named_before_any_weights_are_asked_for(
    requests: list[Any], hub: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit")
    commit(hub, {"config.json": needs(model, "mmhub-lidar")})
    cache = new_cache(monkeypatch, tmp_path / "fresh")
    requests.clear()
    with pytest.raises(PluginError) as caught:
        pull(REPO)
    assert caught.value.exit_code == 4
    assert "mmhub-lidar" in str(caught.value.hint)
    assert "install" in str(caught.value.hint)
    assert "\n" not in str(caught.value)
    assert {path.name for path in cache.rglob("snapshots/*/*")} == {"config.json"}
    assert not [path for _, path, _ in requests if "safetensors" in path]


def test_code_and_pickles_in_a_repository_are_never_asked_for(requests: list[Any], hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    commit(hub, {"modeling.py": b"boom", "pytorch_model.bin": b"boom", "x.pkl": b"boom", "eval/a.py": b"boom"})
    requests.clear()
    folder = pull(REPO)
    assert not [path for _, path, _ in requests if path.endswith((".py", ".bin", ".pkl"))]
    assert all(ALLOWED.fullmatch(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file())


def test_a_config_that_lists_forbidden_files_is_refused(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    config = json.loads((model / "config.json").read_text())
    config["files"]["../evil.py"] = {"sha256": "0" * 64, "bytes": 1}
    commit(hub, {"config.json": json.dumps(config).encode()})
    with pytest.raises(TrustError, match=r"evil\.py"):
        pull(REPO)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_in_the_cache_is_fetched_again(hub: str, model: Path, damage: str) -> None:
    push(model, REPO, license="mit")
    folder = pull(REPO)
    blob = (folder / "model.safetensors").resolve()
    good = blob.read_bytes()
    bad = {"flip": good[:-1] + bytes([good[-1] ^ 1]), "truncate": good[:-9], "empty": b""}[damage]
    blob.write_bytes(bad)
    assert (pull(REPO) / "model.safetensors").read_bytes() == good


def test_a_file_that_is_wrong_on_the_server_is_refused(hub: str, model: Path) -> None:
    push(model, REPO, license="mit")
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    commit(hub, {"model.safetensors": bytes(content)})
    with pytest.raises(TrustError, match=r"contradicts itself: config\.json gives 'model\.safetensors'") as caught:
        load(REPO)
    assert caught.value.exit_code == 5


def test_pulling_into_a_folder_replaces_an_older_checkpoint_and_nothing_else(
    hub: str, model: Path, tmp_path: Path
) -> None:
    push(model, REPO, license="mit")
    out = tmp_path / "out"
    assert pull(REPO, local_dir=out) == out
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() == (
        read_config(out).files["model.safetensors"].sha256
    )
    assert not (out / ".cache").exists()
    (out / "model-stale.safetensors").write_bytes(b"old")
    pull(REPO, local_dir=out)
    assert not (out / "model-stale.safetensors").exists()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        pull(REPO, local_dir=out)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="no mmhub checkpoint"):
        pull(REPO, local_dir=tmp_path / "own")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["team/nothing", f"{REPO}@v9"])
def test_an_unknown_repository_or_revision_is_not_found(hub: str, model: Path, name: str) -> None:
    push(model, REPO, license="mit")
    with pytest.raises(NotFoundError) as caught:
        pull(name)
    assert caught.value.exit_code == 3


def test_a_repository_without_a_config_is_not_found(hub: str) -> None:
    commit(hub, {"README.md": b"---\nlicense: mit\n---\nhello"})
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        pull(REPO)


def test_a_repository_of_no_known_library_is_refused(hub: str) -> None:
    commit(hub, {"config.json": b'{"kind": "bert"}'})
    with pytest.raises(TrustError, match="not an mmhub checkpoint"):
        pull(REPO)


# -- networks ---------------------------------------------------------------------------------------------------


def test_a_hub_that_is_gone_is_told_within_seconds_and_the_cache_still_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmhub_hubserver import HubServer

    with HubServer(tmp_path / "hub-data") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        push(model, REPO, license="mit")
        load(REPO)
    begin = time.monotonic()
    assert load(REPO).modalities == ("image", "audio")
    for action in (lambda: pull("team/other"), lambda: push(model, REPO, license="mit"), lambda: pull(f"{REPO}@v2")):
        with pytest.raises(NetworkError) as caught:
            action()
        assert caught.value.exit_code == 6
        assert server.url in caught.value.message
    assert time.monotonic() - begin < 5


def test_offline_a_cached_model_loads_without_a_request_and_another_is_a_network_error(
    requests: list[Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit")
    pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests.clear()
    load(REPO)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        pull("team/other")
    assert requests == []


def test_a_pinned_and_cached_model_needs_no_request(requests: list[Any], model: Path) -> None:
    done = push(model, REPO, license="mit")
    pull(REPO)
    requests.clear()
    load(f"{REPO}@{done.commit}")
    assert requests == []


def test_two_hubs_do_not_share_a_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_hubserver import HubServer

    with HubServer(tmp_path / "a") as first, HubServer(tmp_path / "b") as second:
        monkeypatch.setenv("HF_ENDPOINT", first.url)
        push(model, REPO, license="mit")
        pull(REPO)
        monkeypatch.setenv("HF_ENDPOINT", second.url)
        with pytest.raises(NotFoundError):
            pull(REPO)


def test_an_upload_that_breaks_off_is_a_network_error(hub: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import _commit_api

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(_commit_api, "lfs_upload", broken)
    with pytest.raises(NetworkError, match="connection reset"):
        push(model, REPO, license="mit")


# -- tokens, endpoints, pins ------------------------------------------------------------------------------------


def test_the_stored_token_stays_at_home_and_hf_token_is_sent(
    requests: list[Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_stored")
    push(model, REPO, license="mit")
    pull(REPO)
    assert requests
    assert [(path, headers["authorization"]) for _, path, headers in requests if "authorization" in headers] == []
    requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    (model / "LICENSE").write_text("MIT")
    push(model, REPO)
    pull(REPO, revision="main")
    signed = [path for _, path, headers in requests if headers.get("authorization") != "Bearer hf_given"]
    assert [path for path in signed if not path.startswith("/lfs/")] == [], "all but uploads to signed addresses"


def registry(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "registry.toml").write_text(f"schema = 1\n{text}")


def test_the_endpoint_of_a_project_registry_is_used_but_gets_no_token(
    requests: list[Any], hub: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit")
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    assert client.endpoint() == "https://huggingface.co"
    registry(tmp_path, f'[hub]\nendpoint = "{hub}/"\n')
    assert client.endpoint() == hub
    assert client.token() is False
    requests.clear()
    pull(REPO)
    assert requests
    assert not [headers for _, _, headers in requests if "authorization" in headers]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert client.endpoint() == "http://127.0.0.1:9", "HF_ENDPOINT wins"


def test_the_endpoint_of_the_users_own_registry_gets_hf_token_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry(tmp_path / "config", '[hub]\nendpoint = "https://hub.example"\n')
    monkeypatch.setenv("MMHUB_CONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text("hf_stored")
    assert client.endpoint() == "https://hub.example"
    assert client.token() is False
    monkeypatch.setenv("HF_TOKEN", "hf_given")
    assert client.token() == "hf_given"


def test_a_revision_argument_does_not_get_around_require_pinned(hub: str, model: Path, tmp_path: Path) -> None:
    done = push(model, REPO, license="mit", tag="v1")
    registry(tmp_path, f'[hub]\nrequire_pinned = true\n[models.shapes]\nref = "hub:{REPO}"\ncommit = "{done.commit}"\n')
    assert pull("shapes").name == done.commit
    assert pull("shapes", revision=done.commit).name == done.commit
    assert pull(REPO, revision=done.commit).name == done.commit
    for name in ("shapes", REPO):
        with pytest.raises(TrustError, match="not pinned"):
            pull(name, revision="v1")
        with pytest.raises(TrustError, match="not pinned"):
            load(name, revision="main")


def test_a_repository_that_is_not_allowed_is_not_asked_for(requests: list[Any], model: Path, tmp_path: Path) -> None:
    registry(tmp_path, '[hub]\nallow = ["good/*"]\n')
    with pytest.raises(TrustError, match="not allowed"):
        pull(REPO)
    assert requests == []


def test_a_local_folder_has_no_revision(model: Path) -> None:
    with pytest.raises(UsageError, match="no revision"):
        pull(f"./{model.name}", revision="v1")


def test_no_log_line_or_error_shows_a_token(
    hub: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with caplog.at_level(logging.DEBUG), pytest.raises(NotFoundError) as caught:
        pull("team/nothing")
    assert "verysecret" not in str(caught.value)
    assert "verysecret" not in caplog.text


def test_a_path_is_always_a_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent.parent)
    folder = Path(trained.parent.name, trained.name)  # as a text it could also be a repository
    assert pull(folder) == folder
    assert load(folder).name == str(folder)
    with pytest.raises(UsageError, match="could also be a Hub repository"):
        load(str(folder))
