"""What a user asked to install, as requirement lines that uv and pip both understand."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from mmhub.errors import NotFoundError, TrustError, UsageError, did_you_mean
from mmhub.records import canonical
from mmhub.registry import PluginEntry, Registries, read_registries

_SOURCE = re.compile(r"\.(tar\.\w+|tgz|zip)$")
_VCS = re.compile(r"(git|hg|svn|bzr)\+")

_SHORT = 4  # letters behind `mmhub-`


@dataclass(frozen=True, kw_only=True)
class Request:
    """Requirement lines, and by name those that are known; `allowed` may move although they are protected."""

    lines: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)  # name: its line
    allowed: frozenset[str] = frozenset()
    upgrade: bool = False
    source: bool = False  # may something be built, which runs its code?
    fresh: bool = False  # are uploads of the last days welcome?


def read_request(
    words: Sequence[str],
    editable: Sequence[str] = (),
    files: Sequence[str] = (),
    *,
    allowed: Iterable[str] = (),
    upgrade: bool = False,
    source: bool = False,
    fresh: bool = False,
) -> Request:
    """Read names, paths, URLs, folders to install as editable, and files of requirements.

    Raises:
        UsageError: something is no requirement, or a file holds none. NotFoundError: there is no such path.
        TrustError: it would have to be built and `source` is not set, or its name is nearly that of a known plugin.
    """
    registries = read_registries()
    given = [*words, *(line for path in files for line in _read_file(Path(path)))]
    if not given and not editable:
        raise UsageError("nothing to install was named", "give a name, a path, `-e PATH` or `-r FILE`")
    lines, names = [], {}
    for word in given:
        name, line = _read_word(word, registries, source)
        lines.append(line)
        names.update({name: line} if name else {})
    for path in editable:
        name, line = _read_editable(path)
        lines.append(line)
        names.update({name: line} if name else {})
    return Request(
        lines=tuple(dict.fromkeys(lines)),
        names=names,
        allowed=frozenset(canonical(name) for name in allowed),
        upgrade=upgrade,
        source=source,
        fresh=fresh,
    )


def known_plugins(registries: Registries) -> dict[str, PluginEntry]:
    """Return the plugins that the registries list, by name; the first scope wins."""
    found: dict[str, PluginEntry] = {}
    for file in registries.files:
        for name, entry in file.plugins.items():
            found.setdefault(canonical(name), entry)
    return found


def check_name(name: str, known: Iterable[str]) -> None:
    """Raise TrustError for a name that is one or two letters off a plugin that a registry knows.

    Of a short one only one letter: two of them would make any other short name.
    """
    known = set(known)
    if name in known:
        return
    full, tolerance = (name, 2) if name.startswith("mmhub") else (f"mmhub-{name}", 1)
    for other in sorted(known):
        short = len(other.removeprefix("mmhub-")) < _SHORT
        if other != full and _distance(full, other) <= (1 if short else tolerance):
            raise TrustError(
                f"'{name}' is no plugin that a registry knows, and looks like '{other}'",
                f"did you mean `mmhub plugins install {other}`? if not, add [plugins.{name}] to registry.toml",
            )


def _read_word(word: str, registries: Registries, source: bool) -> tuple[str, str]:
    """Return (name or '', requirement line) of one argument."""
    word = word.strip()
    if word.startswith("-"):
        options = ("-e ", "--editable ")
        if word.startswith(options):
            return _read_editable(word.split(None, 1)[1])
        raise UsageError(f"'{word}' is an option, and only requirements can stand here", "give options to mmhub itself")
    if _is_path(word):
        return _read_path(word, source)
    bare = word.partition("@")[2].strip() if " @ " in word or re.match(r"[\w.\[\]-]+@\w+[:+]", word) else word
    if _VCS.match(bare) or "://" in bare:
        return _read_url(word, bare, source)
    return _read_name(word, registries)


def _read_name(word: str, registries: Registries) -> tuple[str, str]:
    try:
        one = Requirement(word)
    except InvalidRequirement:
        raise UsageError(f"'{word}' is no requirement such as 'mmhub-image>=0.1,<1', and no path") from None
    name, known = canonical(one.name), known_plugins(registries)
    if name not in known and f"mmhub-{name}" in known:
        name = f"mmhub-{name}"
    plain = not (one.specifier or one.extras or one.marker)
    if plain and name in known:
        return name, known[name].requirement
    extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
    return name, f"{name}{extras}{one.specifier}" + (f" ; {one.marker}" if one.marker else "")


def _read_path(word: str, source: bool) -> tuple[str, str]:
    path = Path(word).expanduser()
    if not path.exists():
        raise NotFoundError(f"there is no file or folder '{word}'", "a name from an index has no '/' in it")
    uri = path.resolve().as_uri()
    if path.suffix == ".whl":
        try:
            name = canonical(parse_wheel_filename(path.name)[0])
        except (InvalidWheelFilename, ValueError) as error:
            raise UsageError(f"'{word}' is not named as a wheel is: {error}") from None
        return name, f"{name} @ {uri}"
    if path.is_dir() and not any((path / name).is_file() for name in ("pyproject.toml", "setup.py")):
        raise UsageError(f"'{word}' holds no Python package (pyproject.toml)", "give the folder that has one")
    if path.is_file() and not _SOURCE.search(path.name):
        raise UsageError(f"'{word}' is neither a wheel nor a source archive", "for a list of requirements: -r FILE")
    if not source:
        hint = "add --allow-source, or build a wheel first" + (f"; to work on it: -e {word}" if path.is_dir() else "")
        raise TrustError(f"'{word}' is source code, and building it runs its code", hint)
    name = _project_name(path) if path.is_dir() else ""
    return name, f"{name} @ {uri}" if name else uri


def _read_url(word: str, bare: str, source: bool) -> tuple[str, str]:
    if not bare.partition("#")[0].endswith(".whl") and not source:
        raise TrustError(f"'{bare}' is source code, and building it runs its code", "add --allow-source")
    try:
        return canonical(Requirement(word).name), word
    except InvalidRequirement:
        pass
    try:
        name = canonical(parse_wheel_filename(unquote(os.path.basename(urlsplit(bare).path)))[0])
    except (InvalidWheelFilename, ValueError):
        return "", word
    return name, f"{name} @ {bare}"


def _read_editable(path: str) -> tuple[str, str]:
    folder = Path(path.removeprefix("file://")).resolve()
    if not (folder / "pyproject.toml").is_file() and not (folder / "setup.py").is_file():
        what = "holds no Python package (pyproject.toml)" if folder.is_dir() else "is no folder"
        raise NotFoundError(f"'{path}' {what}", "give the folder of the plugin's source")
    return _project_name(folder), f"-e {folder.as_uri()}"


def _project_name(folder: Path) -> str:
    """Return the name that a source folder's pyproject.toml gives it, '' where it does not say."""
    try:
        table = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        return canonical(table["project"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_path(word: str) -> bool:
    if "://" in word or _VCS.match(word) or " @ " in word:
        return False
    return word.startswith((".", "/", "~")) or os.sep in word or word.endswith((".whl", ".tar.gz", ".zip"))


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"there is no file '{path}'") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"'{path}' cannot be read: {error}") from None
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UsageError(f"'{path}' lists no requirement")
    for line in lines:
        if line.startswith("-") and not line.startswith(("-e ", "--editable ")):
            raise UsageError(f"{path}: the option '{line}' cannot stand in a list of plugins", "give it to uv or pip")
    beside = path.resolve().parent
    return [str(beside / line) if line.startswith((".", "..")) and _is_path(line) else line for line in lines]


def near_names(name: str) -> str | None:
    """Return a did-you-mean from the short names of the plugins that the registries know."""
    known = known_plugins(read_registries())
    return did_you_mean(name.removeprefix("mmhub-"), [one.removeprefix("mmhub-") for one in known])


def _distance(one: str, other: str) -> int:
    """Count the letters to add, drop, change or swap with their neighbour to turn one word into the other."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row = row, [i]
        for j, b in enumerate(other, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = previous
    return row[-1]
