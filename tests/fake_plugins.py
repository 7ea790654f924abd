"""Fake installed plugins: a folder on sys.path with packages and dist-info, as pip would leave it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from mmhub import discovery, plugins
from mmhub.cli.main import main

ROOT = Path(__file__).parents[1]
NOSE = """
api = 1
[[components]]
kind = "smell_encoder"
name = "nose"
factory = "{package}.parts:Nose"
summary = "Smells"
"""
MORE = """
modalities = ["smell"]
example = { width = 8, layers = [2, 2], name = "small" }
[[commands]]
name = "sniff-{number}"
factory = "{package}.parts:sniff"
summary = "Sniff at something, the way number {number} does"
[models.smell-{number}]
ref = "hub:org/smell-{number}"
task = "classification"
license = "apache-2.0"
summary = "A model"
"""
MARK = "import os\nwith open(os.environ.get('FAKE_IMPORTS', os.devnull), 'a') as file: file.write(__name__ + '\\n')\n"
PARTS = "class Nose:\n    class Config: pass\n"


class Site:
    """A private site-packages, cache, configuration and working folder."""

    def __init__(self, folder: Path) -> None:
        self.packages, self.cache, self.config, self.work = (
            folder / name for name in ("site", "cache", "config", "work")
        )
        for made in (self.packages, self.config, self.work):
            made.mkdir()

    def install(
        self,
        name: str,
        manifest: str | bytes | None = NOSE,
        *,
        version: str = "0.1.0",
        parts: str = PARTS,
        init: str = "",
        entry_points: str | None = None,
    ) -> Path:
        """Install a plugin and return its package folder. `{package}` in the manifest is its module name."""
        module = name.replace("-", "_")
        package = self.packages / module
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(init)
        (package / "parts.py").write_text(dedent(parts))
        if isinstance(manifest, str):
            (package / "mmhub.toml").write_text(manifest.replace("{package}", module))
        elif manifest is not None:
            (package / "mmhub.toml").write_bytes(manifest)
        info = self.packages / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: a fake\n")
        points = f"[mmhub.manifest]\n{name} = {module}:mmhub.toml\n[mmhub]\n{name} = {module}.parts\n"
        (info / "entry_points.txt").write_text(points if entry_points is None else entry_points)
        return package

    def registry(self, text: str, scope: str = "project") -> Path:
        """Write the registry.toml of the project or the user."""
        path = (self.work if scope == "project" else self.config) / "registry.toml"
        path.write_text(text)
        return path

    def environment(self) -> dict[str, str]:
        """The variables of a process that sees this site and nothing of the developer's own settings."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MMHUB_", "HF_", "PYTHON"))}
        path = f"{self.packages}{os.pathsep}{ROOT}"
        return kept | {"PYTHONPATH": path, "MMHUB_CACHE": str(self.cache), "MMHUB_CONFIG": str(self.config)}

    def mmhub(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in this site."""
        return self.python("-m", "mmhub", *args, **variables)

    def python(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in this site."""
        environment = self.environment() | variables
        command = [sys.executable, *args]
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=60)


def install_many(site: Site, count: int) -> None:
    """Install plugins that are well: a component with settings, a command and a model each.

    A plugin that is imported writes its name to the file that FAKE_IMPORTS names.
    """
    for number in range(count):
        manifest = NOSE.replace('"nose"', f'"nose-{number}"') + MORE.replace("{number}", str(number))
        site.install(f"mmhub-fake-{number:03}", manifest, init=MARK)


def install_bad(site: Site, second: Site) -> None:
    """Install seven plugins that are not well, and another copy of one of them in a second folder."""
    site.install("mmhub-fake-raises", component("raises"), version="0.3", init=MARK + "raise OSError('no libnose')")
    site.install("mmhub-fake-slow", component("slow"), version="0.4", init=MARK + "import time, torch; time.sleep(2)")
    site.install("mmhub-fake-corrupt", b"api = [", version="0.5", init=MARK)
    site.install("mmhub-fake-twice", component("twice"), version="0.7", init=MARK)
    second.install("mmhub-fake-twice", component("twice"), version="0.6", init=MARK)
    site.install("mmhub-fake-left", component("hand"), init=MARK)
    site.install("mmhub-fake-right", component("hand"), init=MARK)
    site.install("mmhub-fake-newer", "api = 99", version="9.0", init=MARK)


def component(name: str) -> str:
    """A manifest that offers one component, called `name`."""
    return NOSE.replace('"nose"', f'"{name}"')


def make_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Make a site and let this process see it, too."""
    site = Site(folder)
    for name in [key for key in os.environ if key.startswith(("MMHUB_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MMHUB_CACHE", str(site.cache))
    monkeypatch.setenv("MMHUB_CONFIG", str(site.config))
    monkeypatch.chdir(site.work)
    monkeypatch.syspath_prepend(str(site.packages))
    fresh_process(monkeypatch)
    return site


def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process knows of plugins."""
    monkeypatch.setattr(discovery, "_found", None)
    monkeypatch.setattr(plugins, "_index", None)
    monkeypatch.setattr(plugins, "_manager", None)
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.setattr(plugins, "_told", set())
    for name in [key for key in sys.modules if key.startswith("mmhub_fake")]:
        monkeypatch.delitem(sys.modules, name)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    out, err = capsys.readouterr()
    return int(exit_info.value.code or 0), out, err
