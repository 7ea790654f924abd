"""`mmhub plugins install` and its kin: run for real, with uv and with pip, in throw-away environments."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from mmhub.errors import MmhubError, NotFoundError, TrustError, UsageError
from mmhub.install import asked, hold, journal, moves, places
from mmhub.install.asked import merged
from mmhub.install.pins import Pin
from mmhub.install.request import read_request
from tests.package_index import PackageIndex, make_wheel
from tests.plugin_environment import HELD, ROOT, UV, Environment

needs_uv = pytest.mark.skipif(UV is None, reason="uv is not on PATH")


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
    done = json.loads(env.run("install", "mmhub-good", "--yes", "--json").stdout)
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
    assert "numpy 1.0 -> 1.9" in said and "--allow-change numpy" in said
    before, frozen = env.state(), env.freeze()
    done = env("install", "mmhub-greedy", "--yes", "--allow-change", "numpy")
    assert done.returncode == 0 and "cannot hold back uploads of the last 7 days" in done.stderr, done.stderr
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
    elsewhere = f"mmhub_eager-1.0.data/data/lib64/{uv_env.site.parent.name}/site-packages/late.pth"
    files = {"eager.pth": "import sys\n", "sitecustomize.py": "", elsewhere: "import os\n"}
    index.wheel("mmhub-eager", plugin=True, files=files)
    said = uv_env("install", "mmhub-eager", "--yes").stderr
    for name in ("eager.pth", "late.pth", "sitecustomize.py"):
        assert f"note: mmhub-eager 1.0: {name} runs whenever Python starts" in said


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


@pytest.mark.slow
def test_uploads_of_the_last_days_are_held_back(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-good", "1.1", plugin=True, days_old=1)
    index.wheel("mmhub-young", plugin=True, days_old=2)
    said = uv_env.refused(5, "install", "mmhub-young", "--yes")
    assert "uploaded less than 7 days ago: mmhub-young 1.0" in said and "--fresh" in said
    assert uv_env.json("install", "mmhub-good", "--dry-run")["changes"][-1]["new"] == "1.0"
    uv_env.ok("install", "mmhub-good", "--yes")
    assert uv_env.json("install", "mmhub-good", "--fresh", "--dry-run")["changes"] == []
    assert uv_env.json("install", "mmhub-good", "-U", "--fresh", "--yes")["changes"][-1]["new"] == "1.1"


@pytest.mark.slow
def test_an_index_without_dates_is_told_of(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-young", plugin=True)
    index.dated = False
    done = uv_env("install", "mmhub-young", "--yes")
    assert (done.returncode, done.stdout) == (0, "+ mmhub-young 1.0  (in no registry)\n"), done.stderr
    assert "this index gives no upload dates, so that very new uploads could not be held back" in done.stderr


def test_where_pip_is_told_to_look_uv_looks_too_if_it_is_told_nothing_itself(
    uv_env: Environment, index: PackageIndex
) -> None:
    index.wheel("mmhub-good", plugin=True)
    (row,) = uv_env.json("install", "mmhub-good", "--dry-run", UV_DEFAULT_INDEX="")["changes"]
    assert row["name"] == "mmhub-good"
    folder = str(make_wheel(uv_env.folder / "shelf", "mmhub-shelved", plugin=True).parent)
    settings = {"UV_DEFAULT_INDEX": "", "PIP_INDEX_URL": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder}
    (row,) = uv_env.json("install", "mmhub-shelved", "--dry-run", **settings)["changes"]
    assert row["name"] == "mmhub-shelved" and row["sha256"]


@pytest.mark.slow
def test_a_bare_index_of_files_will_do(env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-good", plugin=True)
    index.dated = index.hashed = False
    done = env("install", "mmhub-good", "--yes")
    assert done.returncode == 0, done.stderr
    assert "mmhub-good" in env.versions()


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
    assert "did you mean `mmhub plugins install mmhub-image`?" in said
    assert "did you mean `mmhub plugins install mmhub-image`?" in uv_env.refused(5, "install", "imagee", "--yes")
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


def test_among_200_plugins_the_broken_one_is_removed_and_the_others_stay(
    uv_env: Environment, index: PackageIndex
) -> None:
    for number in range(200):
        uv_env.put(f"mmhub-many-{number}", "1.0", plugin=True)
    uv_env.put("mmhub-corrupt", "0.5", plugin=True, manifest="api = ")
    states = {row["distribution"]: row["status"] for row in uv_env.json("ls")["plugins"]}
    assert states.pop("mmhub-corrupt") == "broken" and list(states.values()).count("ok") == 201
    done = uv_env("uninstall", "mmhub-corrupt", "--yes")
    assert (done.returncode, done.stdout) == (0, "- mmhub-corrupt 0.5\n"), done.stderr
    assert {row["distribution"]: row["status"] for row in uv_env.json("ls")["plugins"]} == states


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


@pytest.mark.slow
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
import os
if "MMHUB_TEST_KILL" in os.environ:
    left, real = [int(os.environ["MMHUB_TEST_KILL"])], os.replace
    def replace(source, target, **more):
        if "share/mmhub/transactions" in f"{source}{target}" and not str(target).endswith("record.json"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), int(os.environ.get("MMHUB_TEST_SIGNAL", "9")))
        real(source, target, **more)
    os.replace = replace
"""
GREEDY = ("install", "mmhub-greedy", "--yes", "--allow-change", "numpy")


@pytest.fixture
def killed_env(uv_env: Environment, index: PackageIndex) -> Environment:
    """An environment that was changed before, in which mmhub kills itself after MMHUB_TEST_KILL moves of files."""
    (uv_env.folder / "borrowed" / "sitecustomize.py").write_text(KILLER)
    index.wheel("mmhub-greedy", plugin=True, requires=["numpy>1.5"])
    uv_env.put("mmhub-old", "1.0", plugin=True)
    uv_env.ok("uninstall", "old", "--yes")  # an earlier change, which nothing may touch
    return uv_env


@pytest.mark.parametrize(
    "moves", [4, *(pytest.param(moves, marks=pytest.mark.slow) for moves in (0, 1, 7, 11, 17, 19))]
)
def test_an_mmhub_that_is_killed_half_way_is_repaired_by_the_next_command(killed_env: Environment, moves: int) -> None:
    env, before = killed_env, killed_env.state()
    assert env.run(*GREEDY, MMHUB_TEST_KILL=str(moves)).returncode == -signal.SIGKILL
    assert (env.state() == before) is (moves == 0)
    if moves:  # the repair is killed, too
        assert env.run("rollback", "--yes", MMHUB_TEST_KILL=str(moves // 2)).returncode == -signal.SIGKILL
    done = env("rollback", "--yes")
    assert done.returncode == 0 and env.state() == before, "it rolls back what was unfinished, and nothing before it"
    assert "an unfinished `mmhub plugins install` was taken back" in done.stderr
    assert env(*GREEDY).returncode == 0


def test_an_environment_in_which_mmhub_no_longer_starts_can_be_put_back(killed_env: Environment) -> None:
    before = killed_env.state()
    assert killed_env.run(*GREEDY, MMHUB_TEST_KILL="4").returncode == -signal.SIGKILL
    undo = killed_env.root / "share" / "mmhub" / "transactions" / "undo.py"
    done = subprocess.run([killed_env.python, "-I", "-S", undo], capture_output=True, text=True, check=True)
    assert done.stderr == "change 0002 was taken back\n" and killed_env.state() == before
    assert "`mmhub plugins install` was taken back" in killed_env.refused(3, "uninstall", "nosuch", "--yes")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_while_files_move_leave_nothing_half_done(killed_env: Environment, number: signal.Signals) -> None:
    before = killed_env.state()
    done = killed_env.run(*GREEDY, MMHUB_TEST_KILL="4", MMHUB_TEST_SIGNAL=str(int(number)))
    assert done.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGTERM:
        assert killed_env.run("rollback", "--yes").returncode == 0
    assert killed_env.state() == before


@pytest.mark.slow
def test_two_installs_at_once_come_one_after_the_other(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-more", plugin=True, requires=["helper"])
    index.delays["mmhub_good-1.0-py3-none-any.whl"] = index.delays["mmhub_more-1.0-py3-none-any.whl"] = 0.2
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


@pytest.mark.slow
def test_no_package_replaces_files_of_somebody_else(uv_env: Environment, index: PackageIndex) -> None:
    (uv_env.root / "bin" / "git").write_text("of conda, or of nobody")
    (uv_env.site / "linked").symlink_to(uv_env.work)
    data = "mmhub_evil-1.0.data"
    for file, message in (
        ("torch/__init__.py", "replace a file of torch 2.0"),
        (f"{data}/data/lib64/{uv_env.site.parent.name}/site-packages/torch/__init__.py", "replace a file of torch 2.0"),
        ("mmhub/errors.py", "mmhub's own"),
        ("mmhub.py", "mmhub's own"),
        (f"{data}/data/pyvenv.cfg", "a place of Python's"),
        (f"{data}/data/lib/{uv_env.site.parent.name}/os.py", "a place of Python's"),
        (f"{data}/data/share/mmhub/transactions/0001/record.json", "mmhub's own"),
        (f"{data}/data/bin", "a folder is there"),
        (f"{data}/data/pyvenv.cfg/x", "'pyvenv.cfg' is a file"),
        (f"{data}/scripts/git", "that is no package's; if that is a remnant, move it away"),
        ("linked/x.py", "a link that leads out of this environment"),
    ):
        wheel = make_wheel(uv_env.work, "mmhub-evil", plugin=True, files={file: "evil"})
        said = uv_env.refused(5, "install", f"./{wheel.name}", "--yes")
        assert message in said, (file, said)


def test_uninstall_takes_files_of_its_own_alone(uv_env: Environment) -> None:
    uv_env.put("odd", "1.0")
    (uv_env.site / "odd-1.0.dist-info" / "RECORD").write_text("")
    (uv_env.site / "kept").mkdir()
    (uv_env.site / "kept" / "notes.txt").write_text("mine")
    before = uv_env.state()
    for version in ("1.0", "2.0"):
        uv_env.put("mmhub-bad", version, plugin=True)
    with (uv_env.site / "mmhub_bad-1.0.dist-info" / "RECORD").open("a") as record:
        record.writelines(
            f"{path},,\n" for path in (".", "kept", "../../../bin/python", "../../../pyvenv.cfg", "/etc/hosts")
        )
    compiled = uv_env.site / "mmhub_bad" / "__pycache__"
    compiled.mkdir()
    (compiled / "parts.cpython-39.opt-2.pyc").write_bytes(b"")
    uv_env.put("mmhub-tied", "1.0", plugin=True)
    shutil.move(uv_env.site / "mmhub_tied", uv_env.work / "source")
    (uv_env.site / "mmhub_tied").symlink_to(uv_env.work / "source")
    uv_env.ok("uninstall", "bad", "tied", "--yes")
    assert uv_env.state() == before and not (uv_env.site / "mmhub_bad").exists()
    assert (uv_env.work / "source" / "parts.py").is_file() and not os.path.lexists(uv_env.site / "mmhub_tied")
    uv_env.ok("rollback", "--yes")
    assert (uv_env.site / "mmhub_tied" / "parts.py").is_file() and len(list(uv_env.site.glob("mmhub_bad-*"))) == 2


@pytest.mark.slow
def test_a_rollback_leaves_what_another_package_has_since(uv_env: Environment, index: PackageIndex) -> None:
    index.wheel("mmhub-one", plugin=True, files={"shared.py": "1"})
    uv_env.ok("install", "mmhub-one", "--yes")
    uv_env.put("other", "1.0", files={"shared.py": "2"})
    uv_env.ok("rollback", "--yes")
    assert (uv_env.site / "shared.py").read_text() == "2" and "mmhub-one" not in uv_env.versions()


@pytest.mark.slow
def test_packages_behind_a_link_out_of_the_environment_are_changed_there(uv_env: Environment) -> None:
    shutil.move(uv_env.site, uv_env.folder / "elsewhere")
    uv_env.site.symlink_to(uv_env.folder / "elsewhere")
    scripts = {"mmhub_tool-1!1.0+cu13.data/scripts/tool": "#!python\n"}
    wheel = make_wheel(uv_env.work, "mmhub-tool", "1!1.0+cu13", plugin=True, files=scripts)
    uv_env.ok("install", f"./{wheel.name}", "--yes")
    assert (uv_env.site / "mmhub_tool" / "parts.py").is_file() and (uv_env.root / "bin" / "tool").is_file()
    uv_env.ok("uninstall", "tool", "--yes")
    assert not (uv_env.site / "mmhub_tool").exists() and not (uv_env.root / "bin" / "tool").exists()


def test_modules_in_the_users_folder_are_not_taken_for_mmhubs(uv_env: Environment) -> None:
    uv_env.put("mmhub-good", "1.0", plugin=True)
    (uv_env.work / "click.py").write_text("raise RuntimeError('mine')")
    uv_env.ok("uninstall", "good", "--yes")  # it looks whether mmhub starts
    assert "mmhub-good" not in uv_env.versions()


def test_what_was_asked_for_is_part_of_the_change(
    uv_env: Environment, monkeypatch: pytest.MonkeyPatch, index: PackageIndex
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("mmhub.install.asked.write_file", full)
        said = uv_env.refused(1, "install", "mmhub-good", "--yes")
        assert "cannot write the record of plugins" in said and "nothing was changed" in said
    uv_env.put("helper", "1.0")
    assert uv_env.ok("install", "helper>0") == "nothing to do: everything is there\n"
    assert "helper>0" in (uv_env.folder / "config" / "plugins.toml").read_text()


@pytest.mark.slow
def test_a_full_disk_is_not_kept_full(uv_env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap_uv(uv_env, 'case "$*" in *--prefix*) "$real" "$@"; exit 2;; esac')
    write = journal.Transaction.write

    def full(one: journal.Transaction, **changes: object) -> None:
        if changes.get("state") == "undone":
            raise MmhubError("no space left")
        write(one, **changes)

    monkeypatch.setattr(journal.Transaction, "write", full)
    uv_env.refused(1, "install", "mmhub-good", "--yes")
    assert not (uv_env.root / "share" / "mmhub" / "transactions" / "0001" / "new").exists()


class Killed(Exception):
    """What stands for the end of a process."""


@pytest.mark.parametrize("steps", range(18))
def test_moves_to_another_disk_can_be_cut_short_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    folder, root, left = tmp_path / "0001", tmp_path / "env", [steps]
    record = {"remove": ["a", "b"], "add": ["b", "c"]}
    for path, text in ((root / "a", "1"), (root / "b", "1"), (folder / "new" / "b", "2"), (folder / "new" / "c", "2")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def step(*_: object) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise Killed

    def replace(source: Path, target: Path) -> None:
        if source.parent != target.parent:
            raise OSError(errno.EXDEV, "another disk")
        step()
        os.rename(source, target)

    def copy(source: Path, target: Path, **_: object) -> None:
        target.write_text("")
        step()
        target.write_text(source.read_text())

    unlink = os.unlink

    def remove(path: Path) -> None:
        step()
        unlink(path)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", remove)
    monkeypatch.setattr(shutil, "copy2", copy)
    with pytest.raises(Killed) if steps < 12 else nullcontext():
        for file in record["remove"]:
            moves.move(file, root, folder / "old")
        for file in record["add"]:
            moves.move(file, folder / "new", root)
    with suppress(Killed):
        moves.take_out(record, folder, root)
        moves.put_back(record, folder, root)
    moves.take_out(record, folder, root)
    moves.put_back(record, folder, root)
    assert {path.name: path.read_text() for path in root.iterdir()} == {"a": "1", "b": "1"}


def test_a_lock_is_data_and_builds_nothing_unasked(uv_env: Environment) -> None:
    lock, head = uv_env.work / "pylock.toml", 'lock-version = "1.0"\n'
    row = '[[packages]]\nname = "mmhub-x"\nversion = "1"\n'
    for text, code, message in (
        (f"{row}vcs = {{type = 'git', url = 'https://example.org/x', commit-id = '1'}}", 5, "add --allow-source"),
        (f"{row}directory = {{path = '.', editable = true}}", 5, "source code of mmhub-x"),
        (
            f"{row}sdist = {{url = 'https://x.org/x.tgz', hashes = {{sha256 = '1'}}}}",
            5,
            "building it runs its code",
        ),
        (f"{row}vcs = {{type = 'git', url = 'x', commit-id = '1\\n-e .'}}", 2, "cannot stand in a requirement"),
        ("packages = []\ntool = 3", 2, "cannot be read"),
    ):
        lock.write_text(head + text)
        assert message in uv_env.refused(code, "restore", "pylock.toml", "--yes")


@pytest.mark.parametrize("tool", [pytest.param("uv", marks=needs_uv), pytest.param("pip", marks=pytest.mark.slow)])
def test_a_wheel_that_was_cut_off_is_damaged(tmp_path: Path, index: PackageIndex, tool: str) -> None:
    env = Environment(tmp_path / "one", index, tool)
    wheel = make_wheel(env.work, "mmhub-cut", plugin=True)
    for content in (wheel.read_bytes()[:-30], b""):
        wheel.write_bytes(content)
        assert "a file is damaged" in env.refused(5, "install", f"./{wheel.name}", "--yes")


def test_tokens_in_addresses_are_not_written_down() -> None:
    pin = Pin(name="x", url="git+https://ghp_token@example.org/x.git@1", kind="vcs")
    assert pin.public_url == "git+https://example.org/x.git@1"
    assert merged([], {"x": "x @ https://me:word@example.org/x.whl"}) == ["x @ https://example.org/x.whl"]
    assert Pin(name="x", url="git+ssh://git@example.org/x.git", kind="vcs").public_url.count("git@") == 1


def test_only_who_holds_the_environment_repairs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.cli.plugin_install import _environment

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(hold, "_open", denied)
    monkeypatch.setattr(journal, "repair", lambda: pytest.fail("that is somebody else's change, maybe under way"))
    places.state_folder().mkdir(parents=True)
    (places.state_folder() / ".lock").touch()
    with _environment(True, True) as repaired:
        assert repaired == []
    with pytest.raises(MmhubError, match="permission denied"), _environment(False, True):
        pass


def test_a_file_system_without_locks_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(MmhubError, match="cannot lock files"), hold.held(tmp_path / "lock"):
        pass


def test_two_environments_at_once_both_stay_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = asked._read

    def slow() -> dict[str, list[str]]:
        table = read()
        time.sleep(0.1)
        return table

    monkeypatch.setattr(asked, "_read", slow)
    monkeypatch.setattr(asked, "prefix", lambda: threading.current_thread().name)
    threads = [threading.Thread(target=asked.write_asked, args=(["x"],), name=name) for name in ("/one", "/two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read()) == {"/one", "/two"}


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
