"""`mmhub plugins install` and its kin: run for real, with uv and with pip, in throw-away environments."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mmhub.errors import MmhubError, NotFoundError, TrustError, UsageError
from mmhub.install.request import read_request
from tests.package_index import PackageIndex, make_wheel

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
# What the mmhub of an environment imports, borrowed without its metadata, so that nothing else counts as installed.
BORROWED = ("click", "msgspec", "packaging", "pluggy", "tomlkit")
HELD = {"torch": "2.0", "numpy": "1.0", "transformers": "4.0", "mmhub": "0.1.0"}
needs_uv = pytest.mark.skipif(UV is None, reason="uv is not on PATH")


class Environment:
    """A virtual environment with an mmhub of this checkout, and its own settings, working folder and PATH."""

    def __init__(self, folder: Path, index: PackageIndex, tool: str) -> None:
        self.folder, self.index, self.work, self.bin = folder, index, folder / "work", folder / "path"
        for made in (self.work, self.bin):
            made.mkdir(parents=True)
        self.root = folder / "env"
        venv.create(self.root, symlinks=True)
        self.python = self.root / "bin" / "python"
        (self.site,) = self.root.glob("lib/python*/site-packages")
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for name in (*BORROWED, *(["pip"] if tool == "pip" else [])):
            (borrowed / name).symlink_to(Path(str(find_spec(name).origin)).parent)  # type: ignore[union-attr]
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n{ROOT}\n")
        if tool == "uv":
            assert UV
            (self.bin / "uv").symlink_to(UV)
        self.tool = tool
        for name, version in HELD.items():
            self.put(name, version)

    def put(self, name: str, version: str, installer: str = "pip", **content: Any) -> None:
        """Install a made-up wheel by hand."""
        import zipfile

        wheel = make_wheel(self.folder / "wheels", name, version, **content)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)
        info = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        (info / "INSTALLER").write_text(installer)
        if name == "mmhub":
            shutil.rmtree(self.site / "mmhub")

    def variables(self, **more: str) -> dict[str, str]:
        """The variables of a process in it: nothing of the developer's settings."""
        foreign = ("MMHUB_", "HF_", "PYTHON", "UV_", "PIP_", "VIRTUAL_ENV", "XDG_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        own = {
            "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.folder),
            "MMHUB_CACHE": str(self.folder / "cache"),
            "MMHUB_CONFIG": str(self.folder / "config"),
            "UV_CACHE_DIR": str(self.folder / "uv-cache"),
            "UV_DEFAULT_INDEX": self.index.url,
            "UV_NO_CONFIG": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": self.index.url,
            "PIP_CACHE_DIR": str(self.folder / "pip-cache"),
            "NO_PROXY": "127.0.0.1",
        }
        return kept | own | more

    def start(self, *args: object, **more: str) -> subprocess.Popen[str]:
        """Start `mmhub plugins ARGS` in a session of its own."""
        command = [str(self.python), "-m", "mmhub", "plugins", *map(str, args)]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command, cwd=self.work, env=self.variables(**more), text=True, start_new_session=True, **pipes
        )

    def __call__(self, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def json(self, *args: object, **more: str) -> Any:
        """Run a command that succeeds, with --json."""
        done = self(*args, "--json", **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ok(self, *args: object, **more: str) -> str:
        """Run a command that succeeds, and return what it prints."""
        done = self(*args, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, code: int, *args: object, **more: str) -> str:
        """Run a command that is refused with this exit code and changes nothing, and return what it says."""
        before = self.state()
        done = self(*args, **more)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert self.state() == before
        return done.stderr

    def versions(self) -> dict[str, str]:
        """What is installed, by the names of metadata folders."""
        found = (path.name.removesuffix(".dist-info").split("-") for path in self.site.glob("*.dist-info"))
        return {name.replace("_", "-"): version for name, version in found}

    def freeze(self) -> str:
        """What uv or pip say is installed."""
        freeze = [str(self.bin / "uv"), "pip", "freeze", "--python", str(self.python)]
        command = freeze if self.tool == "uv" else [str(self.python), "-m", "pip", "freeze", "--all"]
        return subprocess.run(command, env=self.variables(), capture_output=True, text=True, check=True).stdout

    def state(self) -> dict[str, str]:
        """Every file of the environment with its hash, but for mmhub's and uv's own records and compiled code."""
        paths = (path for path in self.root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        own = self.root / "share" / "mmhub"
        digests = ((path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
        return {
            str(path.relative_to(self.root)): digest
            for path, digest in digests
            if own not in path.parents and path.name != ".lock"
        }


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PackageIndex]:
    served = PackageIndex(tmp_path / "index")
    for name in ("torch", "numpy", "transformers"):
        served.wheel(name, HELD[name])
        served.wheel(name, f"{HELD[name][0]}.9")
    served.wheel("helper", "1.0")
    served.wheel("mmhub-good", "1.0", plugin=True, requires=["helper", "numpy>=1", "mmhub>=0.1"])
    yield served
    served.close()


@pytest.fixture(params=[pytest.param("uv", marks=needs_uv), "pip"])
def env(request: pytest.FixtureRequest, tmp_path: Path, index: PackageIndex) -> Environment:
    return Environment(tmp_path / "one", index, request.param)


@pytest.fixture
def uv_env(tmp_path: Path, index: PackageIndex) -> Environment:
    if UV is None:
        pytest.skip("uv is not on PATH")
    return Environment(tmp_path / "one", index, "uv")


def test_a_plugin_is_installed_with_what_it_needs(env: Environment) -> None:
    done = env.json("install", "mmhub-good", "--yes")
    assert done["applied"] and done["transaction"] == 1
    assert [(row["name"], row["action"], row["new"]) for row in done["changes"]] == [
        ("helper", "install", "1.0"),
        ("mmhub-good", "install", "1.0"),
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) for row in done["changes"])
    assert {row["distribution"]: row["status"] for row in done["plugins"]}["mmhub-good"] == "ok"
    assert env.versions() == {**HELD, "helper": "1.0", "mmhub-good": "1.0"}


def test_a_dry_run_shows_the_diff_and_changes_nothing(uv_env: Environment) -> None:
    before = uv_env.state()
    looked = uv_env.ok("install", "mmhub-good", "--dry-run").splitlines()
    assert looked[0] == f"+ helper 1.0  (uploaded {days_ago(30)})"
    assert looked[1] == f"+ mmhub-good 1.0  (in no registry, uploaded {days_ago(30)})"
    assert uv_env.state() == before and not (uv_env.root / "share" / "mmhub").exists()


def days_ago(days: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() - 86400 * days))


@pytest.mark.slow
def test_pip_refuses_to_move_numpy_and_takes_it_with_leave_and_gives_it_back(
    tmp_path: Path, index: PackageIndex
) -> None:
    env = Environment(tmp_path / "one", index, "pip")
    index.wheel("mmhub-greedy", plugin=True, requires=["numpy>1.5"])
    said = env.refused(4, "install", "mmhub-greedy", "--yes")
    assert "numpy 1.0 -> 1.9" in said and "--allow-change numpy" in said and "cannot hold back" in said
    before, frozen = env.state(), env.freeze()
    env.ok("install", "mmhub-greedy", "--yes", "--allow-change", "numpy")
    assert env.versions()["numpy"] == "1.9"
    env.ok("rollback", "--yes")
    assert env.state() == before and env.freeze() == frozen


def test_an_install_that_would_move_what_others_need_is_refused_with_the_diff(
    uv_env: Environment, index: PackageIndex
) -> None:
    for name in ("torch", "numpy", "transformers"):
        index.wheel(f"mmhub-wants-{name}", plugin=True, requires=[f"{name}>{HELD[name]}"])
        said = uv_env.refused(4, "install", f"mmhub-wants-{name}", "--yes")
        moved = f"{name} {HELD[name]} -> {HELD[name][0]}.9"
        assert f"~ {moved}" in said and f"+ mmhub-wants-{name} 1.0" in said
        assert f"error: it would move what others need: {moved}" in said and f"--allow-change {name}" in said
    assert "did you mean 'numpy'" in uv_env.refused(2, "install", "mmhub-good", "--yes", "--allow-change", "numpi")


@pytest.mark.parametrize(
    "name", ["numpy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "transformers"))]
)
def test_an_allowed_move_is_taken_back_exactly(uv_env: Environment, index: PackageIndex, name: str) -> None:
    index.wheel("mmhub-greedy", plugin=True, requires=[f"{name}>{HELD[name]}"])
    before, frozen = uv_env.state(), uv_env.freeze()
    uv_env.ok("install", "mmhub-greedy", "--yes", "--allow-change", name)
    assert uv_env.versions() == HELD | {name: f"{HELD[name][0]}.9", "mmhub-greedy": "1.0"}
    data = uv_env.json("rollback", "--yes")
    assert [(row["name"], row["old"], row["new"]) for row in data["changes"]] == [
        ("mmhub-greedy", "1.0", ""),
        (name, f"{HELD[name][0]}.9", HELD[name]),
    ]
    assert uv_env.freeze() == frozen and uv_env.state() == before
    assert "no change of plugins is recorded" in uv_env.refused(3, "rollback", "--yes")


def test_what_is_installed_keeps_what_it_needs(uv_env: Environment, index: PackageIndex) -> None:
    uv_env.put("helper", "1.0")
    uv_env.put("other", "3.0", requires=["helper<2"])
    index.wheel("helper", "2.0")
    index.wheel("mmhub-greedy", plugin=True, requires=["helper>=2"])
    said = uv_env.refused(4, "install", "mmhub-greedy", "--yes")
    assert "it would break what is installed; other 3.0 needs helper<2, and not helper 2.0" in said
    done = uv_env("install", "mmhub-greedy", "--yes", "--allow-change", "helper")
    assert done.returncode == 0 and "note: other 3.0 needs helper<2, and not helper 2.0" in done.stderr


def test_an_older_version_that_fits_is_taken(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("helper", "2.0", requires=["numpy>1.5"])
    assert uv_env.json("install", "mmhub-good", "--dry-run")["changes"][0]["new"] == "1.0"


@pytest.mark.slow
def test_odd_metadata_of_others_is_no_hindrance(uv_env: Environment, index: PackageIndex) -> None:
    uv_env.put("timm", "1.0", requires=["helper<9", "no requirement at all", "helper>0 ; extra == 'x'"])
    (uv_env.site / "old.egg-info").write_text("Metadata-Version: 1.0\nName: old\n")
    (uv_env.site / "~umpy-1.0.dist-info").mkdir()
    done = uv_env("install", "mmhub-good", "--yes")
    assert (done.returncode, done.stdout.count("+")) == (0, 2), done.stderr


@pytest.mark.slow
def test_code_that_runs_at_every_start_is_named(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-eager", plugin=True, files={"eager.pth": "import sys\n"})
    assert (
        "note: mmhub-eager 1.0: eager.pth runs whenever Python starts"
        in uv_env("install", "mmhub-eager", "--yes").stderr
    )


def test_wheels_alone_are_installed_and_nothing_is_built(uv_env: Environment, index: PackageIndex) -> None:
    source = write_source(uv_env.folder / "source")
    make_sdist(source, index.folder)
    said = uv_env.refused(5, "install", "mmhub-built", "--yes")
    assert "no wheels" in said and "--allow-source" in said
    assert "building it runs its code" in uv_env.refused(5, "install", source, "--yes")


@pytest.mark.slow
def test_source_is_built_where_that_is_allowed(uv_env: Environment, index: PackageIndex) -> None:
    source = write_source(uv_env.folder / "source")
    make_sdist(source, index.folder)
    for what in ("mmhub-built", source):
        assert uv_env.json("install", what, "--yes", "--allow-source")["plugins"][-1]["status"] == "ok"
        uv_env.ok("rollback", "--yes")


@pytest.mark.slow
def test_an_editable_folder_is_installed_locked_and_rolled_back(uv_env: Environment) -> None:
    source, before = write_source(uv_env.folder / "source"), uv_env.state()
    uv_env.ok("install", "-e", source, "--yes")
    assert (uv_env.site / "mmhub_built.pth").exists()
    uv_env.ok("lock")
    (row,) = tomllib.loads((uv_env.work / "pylock.mmhub.toml").read_text())["packages"]
    assert row == {"name": "mmhub-built", "directory": {"path": "../source", "editable": True}}
    assert uv_env.ok("restore", "pylock.mmhub.toml") == "nothing to do: everything is there\n"
    uv_env.ok("rollback", "--yes")
    assert uv_env.state() == before


def test_uploads_of_the_last_days_are_held_back(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-good", "1.1", plugin=True, days_old=1)
    index.wheel("mmhub-young", plugin=True, days_old=2)
    said = uv_env.refused(5, "install", "mmhub-young", "--yes")
    assert "mmhub-young 1.0 (or what it needs) was uploaded less than 7 days ago" in said and "--fresh" in said
    assert uv_env.json("install", "mmhub-good", "--dry-run")["changes"][-1]["new"] == "1.0"
    uv_env.ok("install", "mmhub-good", "--yes")
    assert uv_env.json("install", "mmhub-good", "--fresh", "--dry-run")["changes"] == []
    assert uv_env.json("install", "mmhub-good", "-U", "--fresh", "--yes")["changes"][-1]["new"] == "1.1"
    index.dated = False
    said = uv_env.refused(5, "install", "mmhub-young", "--yes", UV_NO_CACHE="1")
    assert "has no upload date in this index" in said and "--fresh" in said
    assert (
        uv_env.ok("install", "mmhub-young", "--fresh", "--yes", UV_NO_CACHE="1")
        == "+ mmhub-young 1.0  (in no registry)\n"
    )


def test_another_file_than_the_index_promised_is_refused(uv_env: Environment, index: PackageIndex) -> None:
    other = make_wheel(uv_env.folder / "other", "mmhub-good", plugin=True, files={"mmhub_good/evil.py": "1"})
    index.forged["mmhub_good-1.0-py3-none-any.whl"] = other.read_bytes()
    said = uv_env.refused(5, "install", "mmhub-good", "--yes")
    assert "its hash differs" in said


def test_names_are_those_of_the_registry_or_refused_when_nearly_so(uv_env: Environment, index: PackageIndex) -> None:
    for name in ("mmhub-image", "mmhub-imagee"):
        index.wheel(name, "0.5", plugin=True)
    index.wheel("mmhub-image", "2.0", plugin=True)
    (row,) = uv_env.json("install", "image", "--dry-run")["changes"]
    assert (row["name"], row["new"], row["trust"]) == ("mmhub-image", "0.5", "official")
    said = uv_env.refused(5, "install", "mmhub-imagee", "--yes")
    assert "did you mean 'mmhub-image'?" in said
    assert "did you mean 'mmhub-image'?" in uv_env.refused(5, "install", "imagee", "--yes")
    registry = 'schema = 1\n[plugins.mmhub-imagee]\nrequirement = "mmhub-imagee"\nsha256 = "%s"\n'
    (uv_env.work / "registry.toml").write_text(registry % ("0" * 64))
    assert "registry.toml demands 0000" in uv_env.refused(5, "install", "mmhub-imagee", "--yes")
    digest = hashlib.sha256((index.folder / "mmhub_imagee-0.5-py3-none-any.whl").read_bytes()).hexdigest()
    (uv_env.work / "registry.toml").write_text(registry % digest)
    assert uv_env.ok("install", "imagee", "--yes").startswith("+ mmhub-imagee 0.5  (community, uploaded")


def test_a_broken_plugin_is_installed_named_and_can_be_removed(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-bad", plugin=True, manifest="api = [")
    before = uv_env.state()
    done = uv_env("install", "mmhub-bad", "--yes")
    assert done.returncode == 4 and "mmhub-bad 1.0 is broken" in done.stderr and "rollback" in done.stderr
    assert "mmhub-bad" in uv_env.versions()
    info = uv_env.site / "mmhub_bad-1.0.dist-info"
    record = (info / "RECORD").read_text()
    (info / "RECORD").unlink()
    said = uv_env.refused(1, "uninstall", "bad", "--yes")
    assert f"delete by hand: '{uv_env.site / 'mmhub_bad'}' '{info}'" in said
    (info / "RECORD").write_text(record)
    (info / "METADATA").write_bytes(b"\xff\xfe")
    assert uv_env.ok("uninstall", "bad", "--yes") == "- mmhub-bad 1.0\n"
    assert uv_env.state() == before


def test_uninstall_removes_plugins_and_only_those_that_nobody_needs(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-more", plugin=True, requires=["mmhub-good"])
    uv_env.ok("install", "mmhub-more", "--yes")
    full = uv_env.state()
    assert "the plugin mmhub-more 1.0 needs mmhub-good" in uv_env.refused(4, "uninstall", "mmhub-good", "--yes")
    assert "mmhub itself is no plugin" in uv_env.refused(2, "uninstall", "mmhub", "--yes")
    assert "'torch 2.0' is no plugin" in uv_env.refused(2, "uninstall", "torch", "--yes")
    assert "did you mean 'mmhub-good'" in uv_env.refused(3, "uninstall", "mmhub-goood", "--yes")
    uv_env.ok("uninstall", "good", "more", "--yes")
    assert uv_env.versions() == HELD | {"helper": "1.0"}
    assert not (uv_env.site / "mmhub_good").exists()
    uv_env.ok("rollback", "--yes")
    assert uv_env.state() == full
    uv_env.ok("rollback", "--yes")
    assert uv_env.versions() == HELD


def test_a_lock_is_restored_exactly_elsewhere(tmp_path: Path, uv_env: Environment, index: PackageIndex) -> None:
    from packaging.pylock import Pylock

    uv_env.ok("install", "mmhub-good", "--yes")
    assert uv_env.json("lock", "--out", "pylock.toml")["file"] == "pylock.toml"
    document = tomllib.loads((uv_env.work / "pylock.toml").read_text())
    Pylock.from_dict(document).validate()
    assert [row["name"] for row in document["packages"]] == ["helper", "mmhub-good"]
    assert document["tool"]["mmhub"]["protected"] == {"mmhub": "0.1.0", "numpy": "1.0"}
    index.wheel("helper", "1.1")
    other = Environment(tmp_path / "two", index, "uv")
    other.put("helper", "1.1")
    shutil.copy(uv_env.work / "pylock.toml", other.work)
    assert "2 changes" not in other.ok("restore", "pylock.toml", "--dry-run")
    assert other.ok("install", "-r", "pylock.toml", "--yes").splitlines()[0].startswith("~ helper 1.1 -> 1.0")
    assert other.versions() == uv_env.versions() and other.freeze() == uv_env.freeze()
    forged = make_wheel(other.folder / "forged", "helper", files={"evil.py": "1"})
    index.forged["helper-1.0-py3-none-any.whl"] = forged.read_bytes()
    other.ok("rollback", "--yes")
    assert "its hash differs" in other.refused(5, "restore", "pylock.toml", "--yes", UV_NO_CACHE="1")


@pytest.mark.slow
def test_a_lock_does_not_move_what_others_need(uv_env: Environment, index: PackageIndex) -> None:
    wheel = index.folder / "numpy-1.9-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (uv_env.work / "pylock.toml").write_text(
        f'lock-version = "1.0"\ncreated-by = "x"\n[[packages]]\nname = "numpy"\nversion = "1.9"\n'
        f'wheels = [{{path = "{wheel}", hashes = {{sha256 = "{digest}"}}}}]\n'
    )
    said = uv_env.refused(4, "restore", "pylock.toml", "--yes")
    assert "~ numpy 1.0 -> 1.9" in said and "--allow-change numpy" in said
    uv_env.ok("restore", "pylock.toml", "--yes", "--allow-change", "numpy")
    assert uv_env.versions()["numpy"] == "1.9"


def test_plugins_that_a_rebuild_wiped_come_back(uv_env: Environment, index: PackageIndex) -> None:
    assert "no plugins are on record" in uv_env.refused(3, "restore", "--yes")
    uv_env.ok("install", "mmhub-good>=1", "--yes")
    for path in uv_env.site.glob("mmhub_good*"):
        shutil.rmtree(path)
    assert uv_env.ok("restore", "--yes").startswith("+ mmhub-good 1.0")
    uv_env.ok("uninstall", "good", "--yes")
    assert "mmhub-good" not in (uv_env.folder / "config" / "plugins.toml").read_text()


def test_an_installer_that_is_killed_half_way_changes_nothing(uv_env: Environment) -> None:
    wrap_uv(uv_env, 'case "$*" in *--prefix*) "$real" "$@"; kill -9 $$;; esac')
    said = uv_env.refused(1, "install", "mmhub-good", "--yes")
    assert "was ended by signal 9" in said and "nothing was changed" in said
    assert not list((uv_env.root / "share" / "mmhub" / "transactions" / "0001").glob("*w*"))


@pytest.mark.slow
def test_a_full_disk_changes_nothing(uv_env: Environment) -> None:
    wrap_uv(uv_env, 'case "$*" in *--prefix*) echo "error: No space left on device (os error 28)" >&2; exit 2;; esac')
    said = uv_env.refused(1, "install", "mmhub-good", "--yes")
    assert "no space left on the device" in said and "nothing was changed" in said


KILLER = """
import os, signal
if "MMHUB_TEST_KILL" in os.environ:
    left, real = [int(os.environ["MMHUB_TEST_KILL"])], os.replace
    def replace(source, target, **more):
        if "share/mmhub/transactions" in f"{source}{target}" and not str(target).endswith("record.json"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        real(source, target, **more)
    os.replace = replace
"""


@pytest.mark.parametrize(
    "moves", [4, *(pytest.param(moves, marks=pytest.mark.slow) for moves in (0, 1, 7, 11, 17, 19))]
)
def test_an_mmhub_that_is_killed_half_way_is_repaired_by_the_next_command(
    uv_env: Environment, index: PackageIndex, moves: int
) -> None:
    (uv_env.folder / "borrowed" / "sitecustomize.py").write_text(KILLER)
    index.wheel("mmhub-greedy", plugin=True, requires=["numpy>1.5"])
    command, before = ["install", "mmhub-greedy", "--yes", "--allow-change", "numpy"], uv_env.state()
    assert uv_env(*command, MMHUB_TEST_KILL=str(moves)).returncode == -signal.SIGKILL
    assert (uv_env.state() == before) is (moves == 0)
    again = uv_env("rollback", "--yes", MMHUB_TEST_KILL=str(moves // 2))  # the repair is killed, too
    assert again.returncode == (3 if moves == 0 else -signal.SIGKILL)
    done = uv_env("rollback", "--yes")
    assert done.returncode == 3 and uv_env.state() == before
    assert (moves == 0) or "an unfinished `mmhub plugins install` was taken back" in done.stderr
    assert uv_env(*command).returncode == 0


def test_two_installs_at_once_come_one_after_the_other(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-more", plugin=True, requires=["helper"])
    index.delays["mmhub_good-1.0-py3-none-any.whl"] = index.delays["mmhub_more-1.0-py3-none-any.whl"] = 0.5
    two = [uv_env.start("install", name, "--yes") for name in ("mmhub-good", "mmhub-more")]
    ends = [process.communicate(timeout=120)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], ends
    assert sum("waiting for another mmhub" in text for text in ends) == 1
    assert uv_env.versions() == HELD | {"helper": "1.0", "mmhub-good": "1.0", "mmhub-more": "1.0"}


def test_ctrl_c_while_it_downloads_changes_nothing(uv_env: Environment) -> None:
    begun, before = uv_env.folder / "begun", uv_env.state()
    wrap_uv(uv_env, f'case "$*" in *--prefix*) touch "{begun}"; exec sleep 60;; esac')
    process = uv_env.start("install", "mmhub-good", "--yes")
    while not begun.exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; nothing was changed" in err
    assert uv_env.state() == before


def test_without_uv_and_pip_it_says_what_to_do(tmp_path: Path, index: PackageIndex) -> None:
    env = Environment(tmp_path / "one", index, "neither")
    assert "python -m ensurepip" in env.refused(1, "install", "mmhub-good", "--yes")
    env.put("mmhub-good", "1.0", plugin=True)
    assert env.ok("uninstall", "good", "--yes") == "- mmhub-good 1.0\n"


def test_what_conda_installed_stays(uv_env: Environment, index: PackageIndex) -> None:
    (uv_env.root / "conda-meta").mkdir()
    uv_env.put("helper", "1.0", installer="conda")
    index.wheel("helper", "2.0")
    index.wheel("mmhub-greedy", plugin=True, requires=["helper>=2"])
    said = uv_env.refused(4, "install", "mmhub-greedy", "--yes")
    assert "it would move what others need: helper 1.0 -> 2.0" in said


def test_the_installer_gets_no_token_and_the_users_own_settings(uv_env: Environment) -> None:
    wrap_uv(uv_env, f'env >> "{uv_env.folder}/seen"')
    uv_env.ok("install", "mmhub-good", "--dry-run", HF_TOKEN="hf_secret", MY_API_KEY="k_secret", UV_HTTP_TIMEOUT="77")
    seen = (uv_env.folder / "seen").read_text()
    assert "secret" not in seen and "UV_HTTP_TIMEOUT=77" in seen


def test_what_cannot_be_is_one_line(uv_env: Environment) -> None:
    for code, message, words in (
        (2, "nobody can be asked", ["mmhub-good", "--json"]),
        (3, "has a package 'nosuch'", ["nosuch", "--yes"]),
        (4, "no set of versions fits", ["mmhub-good>9", "--yes"]),
    ):
        assert message in uv_env.refused(code, "install", *words)
    offline = uv_env.refused(6, "install", "mmhub-good", "--yes", UV_OFFLINE="1", UV_NO_CACHE="1")
    assert offline.count("\n") == 2 and "cannot reach the package index" in offline


@pytest.mark.parametrize(
    ("error", "message", "words", "files"),
    [
        (NotFoundError, "there is no file or folder './nowhere.whl'", ["./nowhere.whl"], []),
        (NotFoundError, "there is no file 'nowhere.txt'", [], ["nowhere.txt"]),
        (UsageError, "'empty.txt' lists no requirement", [], ["empty.txt"]),
        (UsageError, "the option '--index-url https://example.org' cannot stand", [], ["options.txt"]),
        (UsageError, "'a b' is no requirement", ["a b"], []),
        (UsageError, "'./empty.txt' is neither a wheel nor a source archive", ["./empty.txt"], []),
        (UsageError, "'./odd.whl' is not named as a wheel is", ["./odd.whl"], []),
        (UsageError, "'.' holds no Python package", ["."], []),
        (UsageError, "nothing to install was named", [], []),
        (TrustError, "building it runs its code", ["git+https://example.org/x.git"], []),
        (TrustError, "building it runs its code", ["x @ https://example.org/x-1.0.tar.gz"], []),
    ],
)
def test_what_is_no_request_says_why(
    error: type[MmhubError],
    message: str,
    words: list[str],
    files: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "odd.whl").write_text("")
    (tmp_path / "options.txt").write_text("--index-url https://example.org\n")
    with pytest.raises(error, match=re.escape(message)):
        read_request(words, files=files)


def test_wheels_and_lists_on_disk_are_installed(uv_env: Environment, index: PackageIndex) -> None:
    make_wheel(uv_env.work, "mmhub-mine", plugin=True, requires=["helper"])
    index.wheel("plain")
    (uv_env.work / "list.txt").write_text("# mine\n./mmhub_mine-1.0-py3-none-any.whl\nplain  # not a plugin\n")
    done = uv_env("install", "-r", "list.txt", "--yes")
    assert done.returncode == 0 and "note: plain is no plugin of mmhub" in done.stderr
    assert "+ mmhub-mine 1.0  (in no registry, from file://" in done.stdout
    assert uv_env.versions() == HELD | {"helper": "1.0", "mmhub-mine": "1.0", "plain": "1.0"}
    uv_env.ok("lock")
    packages = tomllib.loads((uv_env.work / "pylock.mmhub.toml").read_text())["packages"]
    assert packages[1]["archive"]["path"] == "mmhub_mine-1.0-py3-none-any.whl"


def test_no_package_replaces_files_of_torch_or_of_mmhub(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-evil", "1.0", plugin=True, files={"torch/__init__.py": "evil"})
    assert "would replace" in uv_env.refused(5, "install", "mmhub-evil", "--yes")
    index.wheel("mmhub-worse", "1.0", plugin=True, files={"mmhub/errors.py": "evil"})
    assert "a place of mmhub's own" in uv_env.refused(5, "install", "mmhub-worse", "--yes")


def test_a_change_after_which_mmhub_does_not_start_is_taken_back(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-evil", "1.0", plugin=True, files={"click.py": "raise RuntimeError('not click')"})
    said = uv_env.refused(1, "install", "mmhub-evil", "--yes")
    assert "mmhub does not start any more" in said and "not click" in said and "nothing was changed" in said


def test_a_python_of_the_operating_system_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sysconfig

    from mmhub.install.environment import check_changeable

    check_changeable()
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    with pytest.raises(UsageError, match="managed by the operating system; make an environment"):
        check_changeable()


def wrap_uv(env: Environment, script: str) -> None:
    """Put shell code before every run of uv."""
    uv = env.bin / "uv"
    uv.unlink()
    uv.write_text(f'#!/bin/sh\nreal="{UV}"\n{script}\nexec "$real" "$@"\n')
    uv.chmod(0o755)


BACKEND = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.package_index import make_wheel

def build_wheel(folder, config_settings=None, metadata_directory=None):
    return make_wheel(Path(folder), "mmhub-built", plugin=True).name

def build_editable(folder, config_settings=None, metadata_directory=None):
    files = {{"mmhub_built.pth": str(Path.cwd())}}
    return make_wheel(Path(folder), "mmhub-built", plugin=True, files=files).name
"""


def write_source(folder: Path) -> Path:
    """Write a source folder that builds itself without anything to download."""
    folder.mkdir()
    (folder / "backend.py").write_text(BACKEND.format(root=str(ROOT)))
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "mmhub-built"\nversion = "1.0"\n'
        '[build-system]\nrequires = []\nbackend-path = ["."]\nbuild-backend = "backend"\n'
    )
    return folder


def make_sdist(source: Path, folder: Path) -> None:
    import tarfile

    with tarfile.open(folder / "mmhub_built-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "mmhub_built-1.0")
        text = source.parent / "PKG-INFO"
        text.write_text("Metadata-Version: 2.2\nName: mmhub-built\nVersion: 1.0\n")
        archive.add(text, "mmhub_built-1.0/PKG-INFO")
