"""Plugins are found however they were installed, and what an installer left behind costs one line at most."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pwd
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path
from site import addsitedir
from typing import Any
from zipfile import ZipFile

import pytest

from mmhub import discovery
from mmhub.discovery import find_plugins, problem_lines
from mmhub.plugins import Plugin, get_index
from mmhub.registry import find_component
from tests.fake_plugins import Site, component, fresh_process, make_site, run

# What setuptools writes for an editable install whose layout a path alone cannot express, shortened.
FINDER = """
import sys
from importlib.util import spec_from_file_location
class _EditableFinder:
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "mmhub_fake":
            rest = "/".join(fullname.split(".")[1:])
            for end in ("__init__.py", ".py"):
                file = "{source}/" + (rest + "/" if rest and end[0] == "_" else rest) + end
                try:
                    open(file).close()
                except OSError:
                    continue
                return spec_from_file_location(fullname, file)
def install():
    sys.meta_path.append(_EditableFinder)
    sys.path.append("__editable__.mmhub_fake-0.1.0.finder.__path_hook__")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return make_site(tmp_path, monkeypatch)


@pytest.fixture
def second(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Another folder of packages, behind the first on sys.path."""
    (tmp_path / "second").mkdir()
    other = Site(tmp_path / "second")
    monkeypatch.setattr(sys, "path", [sys.path[0], str(other.packages), *sys.path[1:]])
    return other


def plugin(name: str = "mmhub-fake") -> Plugin:
    found = get_index().plugin(name)
    assert found
    return found


def lines() -> list[str]:
    return [line for line in problem_lines() if "fake" in line]


def info(site: Site, name: str = "mmhub_fake-0.1.0") -> Path:
    return site.packages / f"{name}.dist-info"


def works(name: str = "nose") -> bool:
    return find_component("smell_encoder", name).load().__name__ == "Nose"


# --- ways to install


def test_an_editable_install_by_a_path_file_is_found_where_its_source_is(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.move(site.install("mmhub-fake"), source / "mmhub_fake")
    (site.packages / "_editable_impl_mmhub_fake.pth").write_text(f"{source}\n")
    addsitedir(str(site.packages))
    assert plugin().manifest == str(source / "mmhub_fake" / "mmhub.toml")
    assert works() and lines() == []


def test_an_editable_install_by_a_finder_is_found_and_its_cache_holds_in_every_folder(
    site: Site, tmp_path: Path, monkeypatch: Any
) -> None:
    source = tmp_path / "elsewhere"
    shutil.move(site.install("mmhub-fake"), source)
    (site.packages / "__editable___mmhub_fake_finder.py").write_text(FINDER.replace("{source}", str(source)))
    (site.packages / "__editable__.mmhub_fake-0.1.0.pth").write_text(
        "import __editable___mmhub_fake_finder as f; f.install()\n"
    )
    addsitedir(str(site.packages))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert plugin().manifest == str(source / "mmhub.toml")
    assert works() and lines() == []
    fresh_process(monkeypatch)
    monkeypatch.setattr(discovery, "_scan", no_scan)
    monkeypatch.chdir("/")
    assert plugin().status == "ok"


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_metadata_in_a_source_tree_counts_as_a_duplicate_only_if_the_version_differs(
    site: Site, second: Site, version: str
) -> None:
    site.install("mmhub-fake")
    (site.packages / "mmhub-fake.egg-link").write_text(f"{second.packages}\n.")
    egg = second.packages / "mmhub_fake.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: mmhub-fake\nVersion: {version}\n")
    shutil.copy(info(site) / "entry_points.txt", egg)
    assert plugin().version == "0.1.0"
    assert len(lines()) == (version != "0.1.0")
    shutil.rmtree(info(site))  # as an old `setup.py develop` leaves it
    assert get_index(rescan=True).plugin("mmhub-fake").version == version  # type: ignore[union-attr]
    assert works() and lines() == []


def zipped(site: Site, target: Path, folders: bool = False) -> Path:
    """Move everything in a site into a zip file, as a wheel is one; wheels have no entries for folders."""
    with ZipFile(target, "w") as file:
        for path in sorted(site.packages.rglob("*")):
            if path.is_file() or folders:
                file.write(path, path.relative_to(site.packages))
    shutil.rmtree(site.packages)
    site.packages.mkdir()
    return target


def test_a_wheel_on_the_path_is_read_through_its_loader_and_replaced_by_a_newer_one(
    site: Site, tmp_path: Path, monkeypatch: Any
) -> None:
    site.install("mmhub-fake")
    wheel = zipped(site, tmp_path / "mmhub_fake-0.1.0-py3-none-any.whl")
    monkeypatch.syspath_prepend(str(wheel))
    first = plugin()
    assert (first.version, first.status, first.location) == ("0.1.0", "ok", f"{wheel}/mmhub_fake-0.1.0.dist-info")
    assert works() and lines() == []
    fresh_process(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(discovery, "_scan", no_scan)
        assert plugin() == first and works()
    site.install("mmhub-fake", component("beak"), version="0.2")
    zipped(site, tmp_path / "new.zip").replace(wheel)
    fresh_process(monkeypatch)
    assert plugin().version == "0.2"
    assert works("beak")


def test_a_zip_file_that_is_none_and_one_with_a_damaged_manifest_hide_nothing(
    site: Site, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no zip")
    site.install("mmhub-fake-zip", b"x" * 1000)
    zipped(site, tmp_path / "damaged.zip")
    damaged = (tmp_path / "damaged.zip").read_bytes()
    (tmp_path / "damaged.zip").write_bytes(damaged.replace(b"x" * 1000, b"y" * 1000))
    site.install("mmhub-fake")
    for name in ("broken.zip", "damaged.zip"):
        monkeypatch.syspath_prepend(str(tmp_path / name))
    assert works()
    assert [line.split()[1] for line in lines()] == ["mmhub-fake-zip"]


def test_a_namespace_package_over_two_folders_keeps_each_plugin_with_its_own_manifest(site: Site, second: Site) -> None:
    for where, name in ((site, "left"), (second, "right")):
        where.install(f"mmhub-fake-{name}", component(name))
        folder = where.packages / "mmhub_fake_shared"
        folder.mkdir()
        old = where.packages / f"mmhub_fake_{name}"
        (old / "parts.py").rename(folder / f"{name}.py")
        manifest = (old / "mmhub.toml").read_text().replace(f"mmhub_fake_{name}.parts", f"mmhub_fake_shared.{name}")
        (folder / "mmhub.toml").write_text(manifest)
        shutil.rmtree(old)
        points = f"[mmhub.manifest]\nx = mmhub_fake_shared:mmhub.toml\n[mmhub]\nx = mmhub_fake_shared.{name}\n"
        (info(where, f"mmhub_fake_{name}-0.1.0") / "entry_points.txt").write_text(points)
    assert works("left") and works("right")
    assert plugin("mmhub-fake-right").manifest == str(second.packages / "mmhub_fake_shared" / "mmhub.toml")
    assert lines() == []


def test_a_zipped_part_of_a_namespace_package_is_read(site: Site, tmp_path: Path, monkeypatch: Any) -> None:
    package = site.install("mmhub-fake")
    (package / "__init__.py").unlink()
    (package / "mmhub.toml").rename(package / "other.toml")
    monkeypatch.syspath_prepend(str(zipped(site, tmp_path / "part.zip", folders=True)))
    assert "does not exist" in plugin().problem
    site.install("mmhub-fake", version="0.2")
    (site.packages / "mmhub_fake" / "__init__.py").unlink()
    zipped(site, tmp_path / "new.zip", folders=True).replace(tmp_path / "part.zip")
    fresh_process(monkeypatch)
    (site.packages / "mmhub_fake").mkdir()
    assert plugin().status == "ok"
    assert works()


# --- duplicates


def test_of_two_versions_the_first_on_the_path_is_used_and_one_line_names_both_and_their_places(
    site: Site, second: Site
) -> None:
    site.install("mmhub-fake", version="0.1")
    second.install("mmhub-fake", component("beak"), version="0.2")
    assert (plugin().version, works("nose")) == ("0.1", True)
    assert lines()[0] == (
        f"plugin mmhub-fake 0.1: {info(site, 'mmhub_fake-0.1')} hides version 0.2 in"
        f" {info(second, 'mmhub_fake-0.2')}; uninstall one, or delete what is left of it"
        " (mmhub plugins show mmhub-fake)"
    )
    assert len(lines()) == 1 and plugin().warning in lines()[0]


def test_a_broken_plugin_that_hides_another_version_costs_one_line(site: Site, second: Site) -> None:
    site.install("mmhub-fake", b"?", version="0.1")
    second.install("mmhub-fake", version="0.2")
    assert len(lines()) == 1
    assert lines()[0].startswith("plugin mmhub-fake 0.1 broken: its manifest ")
    assert "hides version 0.2 in" in lines()[0]


def test_a_disabled_plugin_says_nothing_of_its_duplicates(site: Site, second: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake", version="0.1")
    second.install("mmhub-fake", version="0.2")
    monkeypatch.setenv("MMHUB_DISABLE_PLUGINS", "mmhub-fake")
    assert lines() == []


@pytest.mark.parametrize("old", ["0.1", "0.3"])
def test_of_two_metadata_folders_that_an_upgrade_left_the_newer_one_counts(site: Site, old: str) -> None:
    site.install("mmhub-fake", version="0.2")
    site.install("mmhub-fake", version=old)
    os.utime(info(site, f"mmhub_fake-{old}"), (1, 1))
    assert plugin().version == "0.2"
    assert len(lines()) == 1
    assert f"hides version {old} in {info(site, f'mmhub_fake-{old}')};" in lines()[0]


def test_a_damaged_metadata_folder_beside_a_whole_one_does_not_count(site: Site) -> None:
    site.install("mmhub-fake", version="0.2")
    os.utime(info(site, "mmhub_fake-0.2"), (1, 1))
    site.install("mmhub-fake", version="0.3")
    (info(site, "mmhub_fake-0.3") / "METADATA").unlink()
    assert (plugin().version, plugin().status) == ("0.2", "ok")
    assert len(lines()) == 1


def test_what_pip_moved_aside_and_never_deleted_is_no_duplicate(site: Site) -> None:
    site.install("mmhub-fake", version="0.2")
    shutil.copytree(info(site, "mmhub_fake-0.2"), site.packages / "~mhub_fake-0.1.dist-info")
    old = site.packages / "~mhub_fake-0.1.dist-info" / "METADATA"
    old.write_text(old.read_text().replace("0.2", "0.1"))
    assert (plugin().version, lines()) == ("0.2", [])


def test_the_same_version_twice_costs_nothing(site: Site, tmp_path: Path, monkeypatch: Any) -> None:
    site.install("mmhub-fake")
    (tmp_path / "lib64").symlink_to(site.packages)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "lib64"), str(site.packages)])
    assert [record["distribution"] for record in find_plugins()].count("mmhub-fake") == 1
    assert lines() == []


# --- damaged metadata


def rewrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def make_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def make_dangling(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("nowhere")


def make_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def rename_to_bytes(folder: Path) -> None:
    os.rename(os.fsencode(folder), os.fsencode(folder.parent) + b"/mmhub_fake\xff-0.1.0.dist-info")


GROUPS = b"[mmhub.manifest]\nx = mmhub_fake_bad:mmhub.toml\n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove("METADATA"), "has no Name and no Version; reinstall it"),
        (rewrite("METADATA", b""), "has no Name and no Version; reinstall it"),
        (rewrite("METADATA", b"\xff\xfe\x00binary"), "its METADATA cannot be read: UnicodeDecodeError"),
        (rewrite("METADATA", b"Metadata-Version: 2.1\nVersion: 0.1.0\n"), "has no Name; reinstall it"),
        (rewrite("METADATA", b"Metadata-Version: 2.1\nName: mmhub-fake-bad\n\nbody"), "has no Version; reinstall it"),
        (rewrite("METADATA", b"Name: \x1b[31mred\nVersion: 0.1.0\n"), ""),
        (rewrite("entry_points.txt", b"[mmhub]\n\xff"), "its entry points cannot be read: UnicodeDecodeError"),
        (rewrite("entry_points.txt", GROUPS + b"[mmhub]\nnonsense\n"), "has a line 'nonsense', which is not 'name ="),
        (rewrite("entry_points.txt", GROUPS + b"[mmhub]\nx = os; print(1)\n"), "is not the name of a module"),
        (rewrite("entry_points.txt", GROUPS + b"[other]\nnonsense\n= =\n[["), ""),
        (rewrite("entry_points.txt", GROUPS + b"# a comment\n; another\n\n"), ""),
        (rewrite("entry_points.txt", b""), ""),
        (remove("entry_points.txt"), ""),
        (make_file, ""),
        (make_dangling, ""),
        (make_loop, "its entry points cannot be read: OSError"),
        (rename_to_bytes, ""),
    ],
)
def test_damaged_metadata_costs_one_line_at_most_and_hides_nothing(
    site: Site, capsys: Any, damage: Callable[[Path], object], problem: str
) -> None:
    site.install("mmhub-fake")
    site.install("mmhub-fake-bad", component("beak"))
    damage(info(site, "mmhub_fake_bad-0.1.0"))
    code, out, err = run(capsys, "plugins", "ls", "--json")
    assert code == 0
    states = {row["distribution"]: row["status"] for row in json.loads(out)["plugins"]}
    assert states["mmhub-fake"] == "ok" and works()
    assert all(name.isprintable() for name in states)
    told = [line for line in err.splitlines() if "fake" in line]
    assert len(told) == bool(problem)
    assert all(line.startswith("plugin mmhub-fake-bad 0.1.0 broken: ") and problem in line for line in told)


def test_metadata_that_may_not_be_read_costs_one_line(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake")
    site.install("mmhub-fake-bad")
    denied, read, access = str(info(site, "mmhub_fake_bad-0.1.0")), PathDistribution.read_text, os.access

    def read_text(self: PathDistribution, name: str) -> str | None:  # the tests may run as root, who may read all
        return None if str(self._path) == denied else read(self, name)  # type: ignore[attr-defined]

    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", read_text)
    monkeypatch.setattr(os, "access", lambda path, mode: path != denied and access(path, mode))
    assert plugin().status == "ok"
    assert len(lines()) == 1
    assert lines()[0].startswith("plugin mmhub-fake-bad 0.1.0 broken: its entry points cannot be read: PermissionError")


def test_a_record_file_is_not_needed_and_bytes_in_names_are_no_trouble(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake")
    os.mkdir(os.fsencode(site.packages) + b"/caf\xe9-1.0.dist-info")
    assert not (info(site) / "RECORD").exists()
    assert run(capsys, "plugins", "ls")[0] == 0
    assert works() and lines() == []


def test_a_folder_on_the_path_whose_name_is_no_text_holds_plugins_like_any_other(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    site = make_site(Path(folder), monkeypatch)
    site.install("mmhub-fake")
    site.install("mmhub-fake-bad", b"?")
    code, _, err = run(capsys, "plugins", "ls", "--json")
    assert code == 0 and works()
    assert err.count("\n") == 1
    fresh_process(monkeypatch)
    monkeypatch.setattr(discovery, "_scan", no_scan)
    assert plugin().status == "ok"


def test_a_finder_that_fails_hides_no_plugins_of_others(site: Site, monkeypatch: Any, capsys: Any) -> None:
    class Finder:
        def find_distributions(self, context: Any) -> Any:
            print("looking")
            raise RuntimeError("no")

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            return None

    site.install("mmhub-fake")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert plugin().status == "ok"
    assert capsys.readouterr() == ("", "looking\n")


# --- the cache, and other processes


def no_scan() -> list[Any]:
    raise AssertionError("scanned")


def test_a_plugin_that_pip_was_still_writing_is_found_by_the_next_process(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake")
    points = (info(site) / "entry_points.txt").read_text()
    (info(site) / "entry_points.txt").unlink()
    assert get_index().plugin("mmhub-fake") is None
    before = site.packages.stat().st_mtime_ns
    (info(site) / "entry_points.txt").write_text(points)
    assert site.packages.stat().st_mtime_ns == before  # what a process looks at
    fresh_process(monkeypatch)
    assert plugin().status == "ok"


def test_old_metadata_is_not_looked_at_on_a_warm_start(site: Site) -> None:
    site.install("mmhub-fake")
    os.utime(info(site), (time.time() - 60,) * 2)
    find_plugins()
    text = next(site.cache.glob("index-*.json")).read_text()
    watched = json.loads(text.partition("\n")[2])["files"]
    assert str(info(site)) not in [path for path, _ in watched]


def test_eight_processes_at_once_all_succeed_and_leave_a_valid_cache(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake")
    site.install("mmhub-fake-bad", b"?")
    command = [sys.executable, "-c", "from mmhub.cli.main import main; main(['--help'])"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=site.work, env=site.environment(), **pipes) for _ in range(8)]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err.count("\n")) == (0, 1), err
        assert "Commands:" in out
    assert [path.name.split("-")[0] for path in site.cache.iterdir()] == ["index"]
    script = "from mmhub import discovery; discovery._scan = None; print(len(discovery.find_plugins()))"
    assert int(site.python("-c", script).stdout) > 2


def test_a_full_disk_costs_nothing_but_the_cache(site: Site) -> None:
    site.install("mmhub-fake")
    done = subprocess.run(
        [sys.executable, "-B", "-m", "mmhub", "plugins", "ls"],
        cwd=site.work,
        env=site.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mmhub-fake" in done.stdout
    assert list(site.cache.iterdir()) == []


def test_without_a_home_nothing_is_written_into_the_current_folder(site: Site, monkeypatch: Any) -> None:
    def nobody(user: int) -> None:
        raise KeyError(user)

    site.install("mmhub-fake")
    for name in ("HOME", "MMHUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert plugin().status == "ok"
    assert list(site.work.iterdir()) == []


def test_a_home_that_does_not_exist_and_a_cache_that_is_a_file_cost_nothing_else(site: Site) -> None:
    site.install("mmhub-fake")
    (site.work / "file").write_text("")
    for variables in ({"HOME": str(site.work / "gone" / "x")}, {"HOME": str(site.work / "file")}, {"HOME": "/proc"}):
        done = site.python("-m", "mmhub", "plugins", "ls", MMHUB_CACHE="", XDG_CACHE_HOME="", **variables)
        assert (done.returncode, done.stderr) == (0, "")
        assert "mmhub-fake" in done.stdout
