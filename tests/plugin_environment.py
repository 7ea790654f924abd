"""A throw-away Python environment in which the tests install, and what they need to make it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.package_index import PackageIndex, make_wheel

ROOT = Path(__file__).parents[1]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
# What the mmhub of an environment imports, borrowed without its metadata, so that nothing else counts as installed.
BORROWED = ("click", "msgspec", "packaging", "pluggy", "tomlkit")
HELD = {"torch": "2.0", "numpy": "1.0", "transformers": "4.0", "mmhub": "0.1.0"}


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

    def run(self, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `mmhub plugins ARGS` in a process."""
        process = self.start(*args, **more)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def __call__(self, *args: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run `mmhub plugins ARGS` in this process, which is told that it is the environment's: quicker."""
        from mmhub.cli.main import main

        out, err, words = StringIO(), StringIO(), ["plugins", *map(str, args)]
        standard = [path for path in sys.path if path.startswith(sys.base_prefix) and "site-packages" not in path]
        path = [str(self.folder / "borrowed"), str(ROOT), *standard, str(self.site)]
        with ExitStack() as stack:
            replaced = {"sys.prefix": str(self.root), "sys.executable": str(self.python), "sys.path": path}
            known: dict[str, Any] = {"mmhub.plugins._index": None, "mmhub.discovery._found": None}
            for name, value in (replaced | known).items():
                stack.enter_context(patch(name, value))
            stack.enter_context(patch("sysconfig.get_path", lambda key: str(self.site)))
            stack.enter_context(patch.dict(os.environ, self.variables(**more), clear=True))
            stack.enter_context(patch("sys.stdin", stack.enter_context(open(os.devnull))))
            stack.enter_context(chdir(self.work))
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
            importlib.invalidate_caches()
            with pytest.raises(SystemExit) as end:
                main(words)
        return subprocess.CompletedProcess(words, int(str(end.value.code)), out.getvalue(), err.getvalue())

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
