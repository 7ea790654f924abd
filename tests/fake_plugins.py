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

    def python(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in this site."""
        environment = self.environment() | variables
        command = [sys.executable, *args]
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=60)


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
    for name in [key for key in sys.modules if key.startswith("mmhub_fake")]:
        monkeypatch.delitem(sys.modules, name)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    out, err = capsys.readouterr()
    return int(exit_info.value.code or 0), out, err
