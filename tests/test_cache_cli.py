"""`mmhub cache`: what is listed, what is found damaged, and that nothing but what was named is removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._http import close_session

from mmhub.errors import ExitCode
from mmhub.hub.client import cache_dir
from tests.fake_plugins import Site, make_site, run
from tests.tiny_models import files, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

REPO = "team/digits"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = make_site(tmp_path, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    disable_progress_bars()
    yield made
    enable_progress_bars()
    close_session()


@pytest.fixture
def cached(hub: str) -> tuple[str, str]:
    """Two commits of a model in the cache, of which only config.json differs; the newer is main."""
    first = upload(hub, REPO, files(), tag="v1")
    second = upload(hub, REPO, files(dim=16))
    for revision in ("v1", "main"):
        download(hub, REPO, revision)
    return first, second


def download(hub: str, repo: str, revision: str = "main", **kwargs: Any) -> Path:
    api = HfApi(endpoint=hub, token=False)
    return Path(api.snapshot_download(repo, revision=revision, cache_dir=kwargs.pop("cache", cache_dir()), **kwargs))


def ok(capsys: Any, *args: str) -> dict[str, Any]:
    code, out, err = run(capsys, "cache", *args, "--json")
    assert code == 0, err
    return json.loads(out)


def blob(name: str, commit: str) -> Path:
    """Where the bytes of a cached file are."""
    link = cache_dir() / "models--team--digits" / "snapshots" / commit / name
    return link.resolve()


def flip(path: Path) -> None:
    """Change one bit, as a failing disk does: size and times stay."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# --- ls


def test_ls_tells_repositories_revisions_sizes_and_partial_downloads(cached: tuple[str, str], capsys: Any) -> None:
    part = cache_dir() / "models--team--digits" / "blobs" / ("a" * 64 + ".incomplete")
    part.write_bytes(b"x" * 10)
    data = ok(capsys, "ls")
    (repo,) = data["repos"]
    assert (repo["repo_id"], repo["kind"], repo["library"], repo["problem"]) == (REPO, "model", "mmhub", "")
    assert {tuple(one["refs"]): one["commit"] for one in repo["revisions"]} == {
        ("v1",): cached[0],
        ("main",): cached[1],
    }
    assert (repo["partial"], repo["partial_size"]) == ([str(part)], 10)
    blobs = [path for path in part.parent.iterdir() if path != part]
    assert repo["size"] == sum(path.stat().st_size for path in blobs)
    assert data["size"] == repo["size"] + 10
    text = run(capsys, "cache", "ls")[1]
    for word in (REPO, "mmhub", "v1", "just now", "1 (10 B)"):
        assert word in text, word


def test_an_empty_cache_says_where_it_is(hub: str, capsys: Any) -> None:
    assert ok(capsys, "ls")["repos"] == []
    assert run(capsys, "cache", "ls")[1] == f"nothing is cached in {cache_dir()}\n"


def test_every_endpoint_is_listed(cached: tuple[str, str], hub: str, capsys: Any, monkeypatch: Any) -> None:
    download(hub, REPO, cache=constants.HF_HUB_CACHE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/other")
    endpoints = {repo["endpoint"] for repo in ok(capsys, "ls")["repos"]}
    assert endpoints == {"https://huggingface.co", hub.removeprefix("http://").replace(":", "_")}
    assert ok(capsys, "verify")["repos"] == 2
    code, _, err = run(capsys, "cache", "rm", REPO, "--yes")
    assert code == ExitCode.NOT_FOUND
    assert "set HF_ENDPOINT" in err


@pytest.mark.parametrize(
    "damage", ["ref", "binary ref", "dangling", "no snapshots", "file in snapshots", "stray folder"]
)
def test_a_broken_cache_is_listed_with_a_warning_and_can_be_emptied(
    hub: str, cached: tuple[str, str], capsys: Any, damage: str
) -> None:
    upload(hub, "team/fine", files())
    download(hub, "team/fine")
    folder = cache_dir() / "models--team--digits"
    if damage == "ref":
        (folder / "refs" / "main").write_text("0" * 40)
    elif damage == "binary ref":
        (folder / "refs" / "main").write_bytes(b"\xff\xfe\x00")
    elif damage == "dangling":
        blob("README.md", cached[1]).unlink()
    elif damage == "no snapshots":
        (folder / "snapshots").rename(folder / "gone")
    elif damage == "file in snapshots":
        (folder / "snapshots" / "x").write_text("")
    else:
        (cache_dir() / "models--stray").mkdir()
    code, out, err = run(capsys, "cache", "ls", "--json")
    repos = {repo["repo_id"]: repo for repo in json.loads(out)["repos"]}
    assert (code, {REPO, "team/fine"} <= set(repos)) == (0, True)
    assert err.startswith("warning: ")
    assert damage != "binary ref" or "refs/main cannot be read" in err
    assert run(capsys, "cache", "verify", "team/fine")[0] == 0
    assert ok(capsys, "rm", REPO, "--yes")["freed"] > 0
    assert not folder.exists()
    assert (cache_dir() / "models--team--fine").exists()


def test_hostile_names_in_a_cache_are_printed_as_plain_text(hub: str, capsys: Any) -> None:
    (cache_dir() / "models--evil--x\x1b[2J\u202e" / "snapshots").mkdir(parents=True)
    for args in (["ls"], ["verify"], ["rm", "--all", "--others", "--dry-run"]):
        code, out, err = run(capsys, "cache", *args)
        assert code == 0
        assert all(line.isprintable() for line in (out + err).splitlines()), args


# --- verify


def test_a_sound_cache_verifies(cached: tuple[str, str], capsys: Any) -> None:
    data = ok(capsys, "verify")
    assert (data["damaged"], data["unknown"]) == ([], 0)
    assert data["files"] == len(list((cache_dir() / "models--team--digits" / "blobs").iterdir()))
    assert "all sound" in run(capsys, "cache", "verify", REPO)[1]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_one_flipped_bit_is_found_though_the_file_was_just_checked(
    cached: tuple[str, str], capsys: Any, name: str
) -> None:
    ok(capsys, "verify")
    flip(blob(name, cached[1]))
    code, out, err = run(capsys, "cache", "verify", "--json")
    assert code == ExitCode.TRUST
    damaged = json.loads(out)["damaged"]
    assert {(row["repo_id"], row["file"]) for row in damaged} == {(REPO, name)}
    assert cached[1] in {row["commit"] for row in damaged}
    assert "`mmhub cache verify --repair`" in err


def test_verify_reads_every_file_whatever_is_remembered_of_it(
    cached: tuple[str, str], capsys: Any, monkeypatch: Any
) -> None:
    from mmhub import hashes

    read: list[tuple[Path, bool]] = []

    def spy(path: Path, kind: str, fresh: bool, real: Any = hashes._remembered) -> Any:
        read.append((path, fresh))
        return real(path, kind, fresh)

    monkeypatch.setattr(hashes, "_remembered", spy)
    assert ok(capsys, "verify")["files"] <= len(read)
    assert all(fresh for _, fresh in read)


def test_a_file_that_the_disk_cannot_read_is_damaged(cached: tuple[str, str], capsys: Any, monkeypatch: Any) -> None:
    def fail(path: Path, *, fresh: bool = False) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("mmhub.hashes.git_sha1_of", fail)
    code, out, _ = run(capsys, "cache", "verify", "--json")
    assert code == ExitCode.TRUST
    assert "cannot be read: Input/output error" in {row["problem"] for row in json.loads(out)["damaged"]}


def test_repair_fetches_what_is_damaged_or_missing_again(cached: tuple[str, str], capsys: Any) -> None:
    before = blob("model.safetensors", cached[1]).read_bytes()
    flip(blob("model.safetensors", cached[1]))
    blob("README.md", cached[1]).unlink()
    code, out, _ = run(capsys, "cache", "verify", "--repair", "--json")
    rows = json.loads(out)["damaged"]
    assert (code, {row["repaired"] for row in rows}) == (0, {"fetched again"})
    assert {row["file"] for row in rows} == {"model.safetensors", "README.md"}
    assert ok(capsys, "verify")["damaged"] == []
    for commit in cached:
        assert blob("model.safetensors", commit).read_bytes() == before


def test_repair_without_the_hub_removes_what_is_damaged_so_that_a_pull_fetches_it(
    cached: tuple[str, str], hub: str, capsys: Any, monkeypatch: Any
) -> None:
    damaged = blob("model.safetensors", cached[1])
    flip(damaged)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        rows = ok(capsys, "verify", "--repair")["damaged"]
        assert {row["repaired"] for row in rows} == {"removed; the next pull fetches it"}
    assert not damaged.exists()
    assert ok(capsys, "verify")["damaged"] == []
    assert (download(hub, REPO) / "model.safetensors").is_file()


def test_a_file_that_contradicts_its_checkpoints_own_list_is_found(hub: str, capsys: Any) -> None:
    content = files()
    config = json.loads(content["config.json"])
    config["files"]["model.safetensors"]["sha256"] = "0" * 64
    upload(hub, REPO, content | {"config.json": json.dumps(config).encode()})
    download(hub, REPO)
    code, out, _ = run(capsys, "cache", "verify", REPO, "--json")
    assert (code, json.loads(out)["damaged"][0]["file"]) == (ExitCode.TRUST, "model.safetensors")


def test_verify_of_a_name_looks_at_that_one_alone(cached: tuple[str, str], hub: str, capsys: Any) -> None:
    upload(hub, "team/fine", files())
    download(hub, "team/fine")
    flip(blob("config.json", cached[1]))
    assert ok(capsys, "verify", "team/fine")["repos"] == 1
    code, _, err = run(capsys, "cache", "verify", "team/digitz")
    assert (code, "did you mean 'team/digits'" in err) == (ExitCode.NOT_FOUND, True)


# --- rm


def test_rm_frees_one_revision_and_keeps_what_the_other_shares(cached: tuple[str, str], capsys: Any) -> None:
    first, second = cached
    before = ok(capsys, "ls")["size"]
    own = blob("config.json", first).stat().st_size
    planned = ok(capsys, "rm", f"{REPO}@v1", "--dry-run")
    assert (planned["freed"], planned["dry_run"]) == (own, True)
    assert ok(capsys, "ls")["size"] == before
    assert ok(capsys, "rm", f"{REPO}@{first[:10]}", "--yes")["freed"] == own
    assert ok(capsys, "ls")["size"] == before - own
    assert ok(capsys, "verify")["damaged"] == []
    assert blob("model.safetensors", second).is_file()


def test_rm_of_a_name_frees_all_of_it_and_its_partial_downloads(cached: tuple[str, str], capsys: Any) -> None:
    folder = cache_dir() / "models--team--digits"
    (folder / "blobs" / ("b" * 40 + ".incomplete")).write_bytes(b"x" * 7)
    size = ok(capsys, "ls")["size"]
    assert ok(capsys, "rm", REPO, "--yes")["freed"] == size
    assert not folder.exists()


def test_rm_takes_registered_names_and_several_at_once(
    cached: tuple[str, str], hub: str, site: Site, capsys: Any
) -> None:
    upload(hub, "team/fine", files())
    download(hub, "team/fine")
    site.registry("schema = 1\n[hub]\nallow = []\n[models.digits]\nref = 'hub:team/digits@v1'\n")
    assert len(ok(capsys, "rm", "digits", "team/fine", "--yes")["removed"]) == 2
    assert ok(capsys, "ls")["repos"] == []


def test_without_a_terminal_rm_refuses_to_guess(cached: tuple[str, str], capsys: Any) -> None:
    code, out, err = run(capsys, "cache", "rm", REPO)
    assert (code, out) == (ExitCode.USAGE, "")
    assert "add --yes" in err
    assert ok(capsys, "ls")["repos"]


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 1), ("", 1)])
def test_on_a_terminal_rm_asks(cached: tuple[str, str], capsys: Any, monkeypatch: Any, answer: str, left: int) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt: answer)
    code, _, err = run(capsys, "cache", "rm", REPO)
    assert code == (1 if left else 0)
    assert f"{REPO} (model, 2 revisions)" in err
    assert len(ok(capsys, "ls")["repos"]) == left


def test_all_means_mmhubs_models_and_others_stay_unless_asked_for(
    cached: tuple[str, str], hub: str, capsys: Any
) -> None:
    upload(hub, "team/bert", {"config.json": b'{"model_type": "bert"}'})
    download(hub, "team/bert")
    code, out, err = run(capsys, "cache", "rm", "--all", "--yes", "--json")
    assert (code, len(json.loads(out)["removed"])) == (0, 1)
    assert err.startswith("1 repository of another library (")
    assert [repo["repo_id"] for repo in ok(capsys, "ls")["repos"]] == ["team/bert"]
    ok(capsys, "rm", "--all", "--others", "--yes")
    assert ok(capsys, "ls")["repos"] == []


def test_partial_downloads_are_removed_but_for_one_that_goes_on(cached: tuple[str, str], capsys: Any) -> None:
    blobs = cache_dir() / "models--team--digits" / "blobs"
    dead, live = blobs / ("c" * 64 + ".0123abcd.incomplete"), blobs / ("d" * 64 + ".incomplete")
    for path in (dead, live):
        path.write_bytes(b"x" * 5)
    locks = cache_dir() / ".locks" / "models--team--digits"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / ("d" * 64 + ".lock")):
        data = ok(capsys, "rm", "--partial", "--yes")
    assert (data["removed"], data["freed"]) == ([str(dead)], 5)
    assert (dead.exists(), live.exists()) == (False, True)
    assert ok(capsys, "rm", "--partial", "--yes")["freed"] == 5
    assert ok(capsys, "verify")["damaged"] == []


@pytest.mark.parametrize("args", [[], ["a/b", "--all"], ["--all", "--partial"], ["a/b", "--others"], ["--others"]])
def test_rm_of_nothing_or_of_two_things_is_a_usage_error(hub: str, capsys: Any, args: list[str]) -> None:
    assert run(capsys, "cache", "rm", *args, "--yes")[0] == ExitCode.USAGE


@pytest.mark.parametrize("name", ["team/none", f"{REPO}@v9", f"{REPO}@0123456"])
def test_rm_of_what_is_not_cached_exits_3_and_removes_nothing(cached: tuple[str, str], capsys: Any, name: str) -> None:
    assert run(capsys, "cache", "rm", name, REPO, "--yes")[0] == ExitCode.NOT_FOUND
    assert len(ok(capsys, "ls")["repos"]) == 1


def test_what_may_not_be_removed_is_said_and_not_freed(
    cached: tuple[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("unlink", "remove", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse(path))
    for args in ([REPO], [f"{REPO}@v1"]):
        code, out, err = run(capsys, "cache", "rm", *args, "--yes")
        assert (code, out) == (1, "")
        assert "could not be removed" in err and "Traceback" not in err
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # folders alone may not be removed
    code, out, err = run(capsys, "cache", "rm", REPO, "--yes")
    assert (code, out) == (1, "")
    assert "could not be removed" in err


# --- where


def test_where_prints_the_cache_and_where_a_model_is(cached: tuple[str, str], site: Site, capsys: Any) -> None:
    assert run(capsys, "cache", "where")[1] == f"{cache_dir()}\n"
    snapshots = cache_dir() / "models--team--digits" / "snapshots"
    assert run(capsys, "cache", "where", f"{REPO}@v1")[1] == f"{snapshots / cached[0]}\n"
    assert {one["commit"] for one in ok(capsys, "where", REPO)["revisions"]} == set(cached)
    (site.work / "model").mkdir()
    assert Path(ok(capsys, "where", "./model")["path"]).samefile(site.work / "model")
    assert run(capsys, "cache", "where", "team/none")[0] == ExitCode.NOT_FOUND
