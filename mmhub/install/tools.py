"""Drive uv or pip: resolve requirements, look hashes up, and unpack exact versions into a folder of their own.

Neither is ever told to change the environment; that is `journal`'s work. Both get the user's own UV_* and PIP_*
settings (indexes, proxies, certificates), and no token or password of anything else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError
from mmhub.install.pins import Pin, merge, pin_of_url, read_pins
from mmhub.install.request import Request, near_names
from mmhub.records import canonical

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|CREDENTIAL|PRIVATE", re.IGNORECASE)
_ELSEWHERE = (
    "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_DRY_RUN", "PIP_REPORT", "PIP_QUIET",
    "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_REQUIRE_HASHES", "PIP_REQUIRE_HASHES", "UV_NO_VERIFY_HASHES", "UV_QUIET",
    "PYTHONPATH",
)  # fmt: skip


_UV_INDEXES = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX", "UV_FIND_LINKS", "UV_NO_INDEX", "UV_CONFIG_FILE")
_SAME = (  # pip's variable, uv's, and what separates several values there
    ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", " "),
    ("PIP_EXTRA_INDEX_URL", "UV_INDEX", " "),
    ("PIP_FIND_LINKS", "UV_FIND_LINKS", ","),
    ("PIP_NO_INDEX", "UV_NO_INDEX", " "),
    ("PIP_TRUSTED_HOST", "UV_INSECURE_HOST", " "),
)


class Unsolvable(Exception):
    """No set of versions fits; the text is the tool's own explanation."""


class Tool(ABC):
    """uv or pip, working on this interpreter's environment."""

    def __init__(self, command: Sequence[str], version: tuple[int, ...]) -> None:
        self.command, self.version = tuple(command), version

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @abstractmethod
    def cools(self) -> bool:
        """Can it leave out very new uploads?"""

    @abstractmethod
    def resolve(self, request: Request, constraints: Sequence[str], before: str) -> list[Pin]:
        """Return what would be installed; what stays as it is is left out. `before` is a date, '' for no limit.

        Raises:
            Unsolvable: the requirements contradict each other or the constraints.
            NotFoundError, NetworkError, TrustError, MmhubError
        """

    @abstractmethod
    def locate(self, pins: Sequence[Pin], source: bool = False) -> list[Pin]:
        """Return the pins with address, hash and upload date, as far as the indexes give them."""

    @abstractmethod
    def unpack(self, pins: Sequence[Pin], folder: Path, *, source: bool, show: bool) -> None:
        """Install exactly `pins` below `folder`, laid out as this environment is, checking hashes.

        Raises:
            TrustError: a file has another hash. NetworkError, MmhubError.
        """

    def environment(self) -> dict[str, str]:
        """Return the variables the tool gets."""
        return scrubbed(os.environ)

    def _run(self, args: Sequence[str], show: bool = False) -> str:
        """Run it and return what it printed; a failure becomes an error that names the cause."""
        command, lines = [*self.command, *args], []
        with subprocess.Popen(
            command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        ) as process:  # fmt: skip
            assert process.stdout
            try:
                for line in process.stdout:
                    lines.append(line)
                    if show:
                        print(line, end="", file=sys.stderr, flush=True)
            except BaseException:
                process.kill()
                raise
        text = "".join(lines)
        if process.returncode:
            raise _failure(self.name, text, process.returncode)
        return text


class Uv(Tool):
    """`uv pip`."""

    name = "uv"

    def cools(self) -> bool:
        return True

    def environment(self) -> dict[str, str]:
        """Return its variables; who has told only pip where packages are means uv as well."""
        variables = scrubbed(os.environ)
        if not any(value and name.startswith(_UV_INDEXES) for name, value in variables.items()):
            for pip, uv, separator in _SAME:
                if variables.get(pip):
                    variables[uv] = separator.join(variables[pip].split())
        return variables

    def resolve(self, request: Request, constraints: Sequence[str], before: str) -> list[Pin]:
        with _files(requirements=request.lines, constraints=constraints) as (wanted, limits):
            args = [*self._install(), "--dry-run", "-c", limits, "-r", wanted, *_wheels(request.source)]
            args += [word for path in os.environ.get("UV_CONSTRAINT", "").split() for word in ("-c", path)]
            args += ["--exclude-newer", before] if before else []
            args += [f"--upgrade-package={name}" for name in request.names] if request.upgrade else []
            pins = [_uv_pin(match, request) for match in _UV_LINE.finditer(self._run(args))]
        return self.locate(pins, request.source)

    def locate(self, pins: Sequence[Pin], source: bool = False) -> list[Pin]:
        if not any(pin.kind in ("index", "file") for pin in pins):
            return list(pins)
        lines = [pin.line() for pin in pins if pin.kind in ("index", "file")]
        with _files(requirements=lines) as (wanted,):
            out = Path(wanted).with_name("pylock.toml")
            args = ["pip", "compile", "--python", sys.executable, "-q", "--no-header", "--no-deps", "--generate-hashes"]
            self._run([*args, "--format", "pylock.toml", "-o", str(out), *_wheels(source), *_links(pins), wanted])
            found = {pin.name: pin for pin in read_pins(tomllib.loads(out.read_text(encoding="utf-8")), out.parent)}
        return [merge(pin, found.get(pin.name)) for pin in pins]

    def unpack(self, pins: Sequence[Pin], folder: Path, *, source: bool, show: bool) -> None:
        for lines, options in _portions(pins, source):
            with _files(requirements=lines) as (wanted,):
                args = [*self._install(), "--prefix", str(folder), "--no-deps", "-r", wanted, *options, *_links(pins)]
                self._run(args, show)
        (folder / ".lock").unlink(missing_ok=True)

    @staticmethod
    def _install() -> list[str]:
        return ["pip", "install", "--python", sys.executable, "--color", "never"]


class Pip(Tool):
    """`python -m pip`."""

    name = "pip"

    def cools(self) -> bool:
        return self.version >= (26,)

    def resolve(self, request: Request, constraints: Sequence[str], before: str) -> list[Pin]:
        with _files(requirements=request.lines, constraints=constraints, report=()) as (wanted, limits, report):
            args = ["install", "--dry-run", "--report", report, "-c", limits, "-r", wanted, *_wheels(request.source)]
            args += ["--uploaded-prior-to", before] if before and self.cools() else []
            args += ["--upgrade"] if request.upgrade else []
            self._run(args)
            return [_pip_pin(row) for row in json.loads(Path(report).read_text(encoding="utf-8"))["install"]]

    def locate(self, pins: Sequence[Pin], source: bool = False) -> list[Pin]:
        lines = [pin.line() for pin in pins if pin.kind == "index"]
        if not lines:
            return list(pins)
        with _files(requirements=lines, report=()) as (wanted, report):
            args = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--report", report, "-r", wanted]
            self._run([*args, *_wheels(source), *_links(pins)])
            rows = json.loads(Path(report).read_text(encoding="utf-8"))["install"]
        found = {pin.name: pin for pin in map(_pip_pin, rows)}
        return [merge(pin, found.get(pin.name)) for pin in pins]

    def unpack(self, pins: Sequence[Pin], folder: Path, *, source: bool, show: bool) -> None:
        for lines, options in _portions(pins, source):
            with _files(requirements=lines) as (wanted,):
                args = ["install", "--prefix", str(folder), "--no-deps", "--ignore-installed", "--no-compile"]
                self._run([*args, "--no-warn-script-location", "-r", wanted, *options, *_links(pins)])


def find_tool() -> Tool:
    """Return uv if it can be had, else pip.

    Raises:
        MmhubError: neither is there, or pip is too old to say what it would do.
    """
    here = [sys.executable, "-P", "-m"]  # not from the user's folder
    for command in ([shutil.which("uv") or ""], [*here, "uv"] if find_spec("uv") else [""]):
        version = _version([*command, "--version"]) if command[0] else ()
        if version:
            return Uv(command, version)
    version = _pip_version()
    if version >= (22, 3):
        return Pip([*here, "pip"], version)
    if version:
        raise MmhubError(
            f"pip {version[0]}.{version[1]} cannot say what it would change", "python -m pip install -U pip"
        )
    raise MmhubError(
        f"neither uv nor pip can be had in {sys.prefix}",
        "install uv (https://docs.astral.sh/uv), or run `python -m ensurepip` in this environment",
    )


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables an installer gets: no secrets but its own, nothing that sends it to another environment."""
    kept = {}
    for name, value in environment.items():
        foreign = _SECRET.search(name) and not name.startswith(("UV_", "PIP_"))
        if not foreign and not name.startswith(("HF_", "HUGGING")) and name not in _ELSEWHERE:
            kept[name] = value
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1"}


# --- what the tools say


_UV_LINE = re.compile(r"^ [+~] (?P<name>[\w.-]+)(?:==(?P<version>\S+))?(?: @ (?P<at>\S+)| \(from (?P<of>.*)\))?$", re.M)


def _uv_pin(match: re.Match[str], request: Request) -> Pin:
    name, url = canonical(match["name"]), match["at"] or match["of"] or ""
    if not url:
        return Pin(name=name, version=match["version"])
    if f"-e {url}" in request.lines:
        return Pin(name=name, url=url, kind="editable")
    return pin_of_url(name, match["version"] or "", url)


def _pip_pin(row: Mapping[str, Any]) -> Pin:
    name, version = canonical(row["metadata"]["name"]), row["metadata"]["version"]
    info = row["download_info"]
    if "dir_info" in info:
        editable = info["dir_info"].get("editable", False)
        return Pin(name=name, version=version, url=info["url"], kind="editable" if editable else "folder")
    if "vcs_info" in info:
        url = f"{info['vcs_info']['vcs']}+{info['url']}@{info['vcs_info']['commit_id']}"
        return Pin(name=name, version=version, url=url, kind="vcs")
    archive = info.get("archive_info", {})
    digest = archive.get("hashes", {}).get("sha256", "") or archive.get("hash", "").removeprefix("sha256=")
    kind: Literal["file", "index"] = "file" if row.get("is_direct") else "index"
    return Pin(name=name, version=version, url=info["url"], sha256=digest, kind=kind)


# --- what they are told


def _wheels(source: bool) -> list[str]:
    return [] if source else ["--only-binary", ":all:"]


def _links(pins: Sequence[Pin]) -> list[str]:
    return [word for folder in sorted({pin.links for pin in pins if pin.links}) for word in ("--find-links", folder)]


def _portions(pins: Sequence[Pin], source: bool) -> list[tuple[list[str], list[str]]]:
    """Split pins into those with hashes, which are required, and those of which nobody can know one."""
    hashed = [pin.line() for pin in pins if pin.kind in ("index", "file")]
    others = [pin.line() for pin in pins if pin.kind not in ("index", "file")]
    portions = [(hashed, ["--require-hashes", *_wheels(source)])] if hashed else []
    return portions + ([(others, _wheels(source))] if others else [])


class _files:
    """Write lines into files of a temporary folder, and give their paths."""

    def __init__(self, **texts: Sequence[str]) -> None:
        self.texts = texts

    def __enter__(self) -> list[str]:
        self.folder = tempfile.TemporaryDirectory(prefix="mmhub-install-")
        paths = []
        for name, lines in self.texts.items():
            path = Path(self.folder.name, f"{name}.txt")
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            paths.append(str(path))
        return paths

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


def _pip_version() -> tuple[int, ...]:
    """Read it from its source: starting pip takes a second."""
    found = find_spec("pip")
    text = Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""
    match = re.search(r"__version__ = .(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else ()


def _version(command: Sequence[str]) -> tuple[int, ...]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=scrubbed(os.environ), timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\b(\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match and done.returncode == 0 else ()


_NETWORK = re.compile(
    r"network was disabled|error sending request|dns error|connection broken|Connection refused|NewConnectionError"
    r"|Max retries exceeded|name resolution|Name or service not known|timed out|ProxyError|Failed to fetch",
    re.IGNORECASE,
)
_DAMAGED = re.compile(
    r"zip file|Wheel '.*' located at .* is invalid|BadZipFile|has an invalid wheel|Failed to extract archive",
    re.IGNORECASE,
)
_MISSING = re.compile(
    r"(?:Because |cause: )?([\w.-]+) was not found in the|requirement ([\w.-]+)[^\n]*from versions: none"
)
_NO_WHEEL = re.compile(r"no usable wheels|no wheels with a matching|building from source is disabled", re.IGNORECASE)


def _failure(tool: str, text: str, code: int) -> Exception:
    said = _detail(text)
    if "Hash mismatch" in text or "DO NOT MATCH THE HASHES" in text:
        name = re.search(r"(?:Hash mismatch for `?|^\s+)([\w.-]+==[^\s`]+)", text, re.MULTILINE)
        what = f"the file of {name[1]}" if name else "a file"
        return TrustError(f"{what} is not the one that the index or lock promised: its hash differs", "do not use it")
    if re.search(r"no space left on device", text, re.IGNORECASE):
        return MmhubError("no space left on the device", "free some space and try again")
    if _DAMAGED.search(text):
        return TrustError(f"a file is damaged: {said}", "nothing was changed; get or build it again")
    if _NETWORK.search(text):
        return NetworkError(
            f"{tool} cannot reach the package index: {said}", "check the network, or UV_*/PIP_* settings"
        )
    if _NO_WHEEL.search(text):
        return TrustError(f"there are no wheels for this Python: {said}", "--allow-source builds it, and runs its code")
    missing = _MISSING.search(text)
    if missing:
        package = str(missing[1] or missing[2])
        where = "check the name, and that your index has it (UV_INDEX, PIP_INDEX_URL); a wheel is installed by its path"
        hint = near_names(canonical(package)) or f"{where}; what has no wheel needs --allow-source"
        return NotFoundError(f"no package index has a package '{package}' that can be used here", hint)
    if "No solution found" in text or "ResolutionImpossible" in text or "No matching distribution" in text:
        return Unsolvable(said)
    ended = f"was ended by signal {-code}" if code < 0 else "failed"
    return MmhubError(f"{tool} {ended}: {said}" if said else f"{tool} {ended}", "nothing was changed")


def _detail(text: str) -> str:
    """Return what matters of a tool's complaint as one line."""
    lines = [line.strip() for line in text.splitlines()]
    causes = [line.removeprefix("cause:").strip() for line in lines if line.startswith(("cause:", "Because", "And "))]
    errors = [re.sub(r"^(error|ERROR):?\s*", "", line) for line in lines if re.match(r"error|ERROR", line)]
    chosen = causes[:3] or errors[:2] or [line for line in lines if line][-1:]
    return " ".join(chosen)[:500]
