"""What a model is, read without its weights: from a folder, the cache, the Hub or a registry's composition.

Of a Hub repository the configuration, the card, the results and the index of the weights are fetched, nothing else.
Everything in them was written by strangers: it is taken as text and numbers, and what has another form is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmhub.errors import MmhubError, NetworkError, PluginError, TrustError, UsageError
from mmhub.hub.cache import as_table, read_json, snapshot
from mmhub.hub.client import api, hub_errors, is_offline
from mmhub.hub.download import Remote, check_commit, fetch, in_cache
from mmhub.hub.foreign import recognise, why_not
from mmhub.hub.licences import Link, chain, warnings
from mmhub.hub.readme import Card, card_of, read_card
from mmhub.hub.search import modalities_of, read_modalities, unmet_text
from mmhub.names import Resolved, resolve
from mmhub.plugins import get_index
from mmhub.registry import find_component
from mmhub.requirements import explain_unmet, unmet_requirements

_TEXT_BYTES = 16 * 2**20
_HEADER_BYTES = 10 * 2**20
_RESULTS = re.compile(r"eval/[\w.-]+\.json")
_DESCRIBING = re.compile(
    rf"config\.json|modules\.json|README\.md|provenance\.json|model\.safetensors\.index\.json|{_RESULTS.pattern}"
)
_SECONDS = 10
_MOST_PARTS = 100  # of a model, as for loading it
FORMAT = 3  # of checkpoints; `mmhub.checkpoint` has it from where importing it costs seconds


@dataclass(kw_only=True)
class Description:
    """A model as `mmhub models show` prints it. Sizes in bytes; None or empty is what nobody says."""

    library: str = ""
    task: str = ""
    summary: str = ""
    license: str = ""
    modalities: list[str] = field(default_factory=list)
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    bases: list[dict[str, Any]] = field(default_factory=list)  # what its adapters are for, fetched with it
    requires: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    install: str = ""
    loadable: str = ""
    size: int | None = None
    files: dict[str, int | None] = field(default_factory=dict)
    licences: list[Link] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    updated: str = ""
    downloads: int | None = None
    cached: str = ""
    note: str = ""


def describe(found: Resolved) -> Description:
    """Describe what a name leads to.

    Raises:
        NotFoundError, NetworkError: the Hub has no such repository or is out of reach, and nothing is cached.
        UsageError: a local folder holds no model. TrustError: its requirements are malformed, or it has more parts
        than any model.
    """
    if found.kind == "compose":
        return _composition(found)
    if found.kind == "local":
        assert found.path
        return _described(found, _Folder(found.path), Description(cached=str(found.path)))
    files, facts = _open_hub(found)
    return _described(found, files, facts)


# --- where files are read from


class _Files(Protocol):
    @property
    def folder(self) -> Path:
        """Where the small ones are."""

    def sizes(self) -> dict[str, int | None]:
        """Every file with its bytes."""

    def read(self, name: str) -> Path | None:
        """A small file, None if there is none."""

    def tensors(self, name: str) -> dict[str, int]:
        """The bytes of each tensor, from the header of a safetensors file; {} if it cannot be read."""


@dataclass(frozen=True)
class _Folder:
    folder: Path

    def sizes(self) -> dict[str, int | None]:
        files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}

    def read(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() and path.stat().st_size <= _TEXT_BYTES else None

    def tensors(self, name: str) -> dict[str, int]:
        try:
            if not (self.folder / name).is_file():  # to open a pipe would wait for ever
                return {}
            with (self.folder / name).open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size)) if size <= _HEADER_BYTES else {}
            offsets = {key: one["data_offsets"] for key, one in header.items() if key != "__metadata__"}
            return {key: end - start for key, (start, end) in offsets.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}


@dataclass(frozen=True)
class _Remote:
    """The files of a commit; those that describe it were fetched into the cache."""

    repo: str
    commit: str
    listed: Mapping[str, int | None]

    @property
    def folder(self) -> Path:
        return in_cache(self.repo).snapshot(self.commit)

    def sizes(self) -> dict[str, int | None]:
        return dict(self.listed)

    def read(self, name: str) -> Path | None:
        return _Folder(self.folder).read(name) if name in self.listed else None

    def tensors(self, name: str) -> dict[str, int]:
        if name not in self.listed:
            return {}
        try:
            with hub_errors(self.repo, self.commit):
                found = api().parse_safetensors_file_metadata(self.repo, name, revision=self.commit, timeout=_SECONDS)
            return {key: one.data_offsets[1] - one.data_offsets[0] for key, one in found.tensors.items()}
        except Exception:  # a header is a nicety, and this parser raises whatever a malformed one leads to
            return {}


def _open_hub(found: Resolved) -> tuple[_Files, Description]:
    """The files at one commit: from the cache where the commit is known and cached, or the Hub is out of reach."""
    repo = found.repo_id or ""
    cached = snapshot(repo, found.commit or found.revision)
    if cached and not (cached / "config.json").is_file():
        cached = None
    if cached and found.commit and _is_whole(cached):
        return _Folder(cached), Description(commit=cached.name, cached=str(cached))
    problem = "HF_HUB_OFFLINE is set" if is_offline() else ""
    if not problem:
        try:
            with hub_errors(repo, found.revision):
                info = api().model_info(
                    repo, revision=found.commit or found.revision, files_metadata=True, timeout=_SECONDS
                )
        except NetworkError as error:
            problem = error.message
    if problem:
        if not cached:
            raise NetworkError(f"'{repo}' is not in the cache, and {problem}", "pull it once to have it offline")
        here = str(cached) if _is_whole(cached) else ""
        return _Folder(cached), Description(commit=cached.name, cached=here, note=f"{problem}: from the cache")
    return _published(repo, info, found.commit)


def _is_whole(folder: Path) -> bool:
    """Does a snapshot hold every file that its config.json lists?"""
    return all((folder / name).is_file() for name in as_table(as_table(read_json(folder / "config.json")).get("files")))


def _published(repo: str, info: Any, asked: str | None) -> tuple[_Files, Description]:
    commit = check_commit(repo, info.sha, asked)
    cached = snapshot(repo, commit)
    facts = Description(
        library=info.library_name if isinstance(info.library_name, str) else "",
        task=info.pipeline_tag if isinstance(info.pipeline_tag, str) else "",
        commit=commit,
        updated=info.last_modified.isoformat() if info.last_modified else "",
        downloads=info.downloads if isinstance(info.downloads, int) else None,
    )
    sizes = {str(file.rfilename): _size_of(file) for file in info.siblings or ()}
    fetch_small(repo, commit, info.siblings or (), _DESCRIBING)
    if cached and all((cached / name).is_file() for name in sizes if name.endswith(".safetensors")):
        facts.cached = str(cached)  # another library's files need not all be here
    return _Remote(repo, commit, sizes), facts


def fetch_small(repo: str, commit: str, siblings: Sequence[Any], names: re.Pattern[str]) -> None:
    """Fetch those files of moderate size whose names match into the cache, verified.

    Raises:
        NetworkError, TrustError: the Hub stalls, or delivers something else than it lists.
    """
    wanted = [one for one in siblings if names.fullmatch(str(one.rfilename)) and (_size_of(one) or 0) <= _TEXT_BYTES]
    remotes = [
        Remote(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id or "") for one in wanted[:40]
    ]
    with hub_errors(repo, commit):
        fetch(in_cache(repo), commit, remotes)


def _size_of(file: Any) -> int | None:
    return file.size if isinstance(file.size, int) else None


# --- a repository or folder


def _described(found: Resolved, files: _Files, about: Description) -> Description:
    config = _config(files, found)
    path = files.read("README.md")
    card = read_card(path.parent) if path else Card()
    entry = found.entry
    about.summary = card.summary or (entry.summary if entry else "")
    about.license = card.license or (entry.license if entry else "")
    about.card = card.metadata
    about.files = files.sizes()
    if "mmhub_format" in config:
        _add_checkpoint(about, config, files, found)
    else:
        _add_foreign(about, config, files, found)
    about.size = _total(about.files)
    about.results = _results(files, about.files)
    own = found.repo_id or found.name
    bases = [(one["name"], f"base of the {one['part'].replace('_', ' ')}") for one in about.bases]
    parents = _unique([*bases, *card.parents, *_origins(files)])
    about.licences = chain(own, about.license, parents, _look_up)
    about.warnings = warnings(about.licences)
    return about


def _config(files: _Files, found: Resolved) -> dict[str, Any]:
    where = f"{found.path}" if found.kind == "local" else f"{found.repo_id}"
    path = files.read("config.json")
    if path is None:
        if found.kind == "hub" or files.read("modules.json"):
            return {}
        raise UsageError(f"'{where}' is not a checkpoint: it has no config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UsageError(f"the config.json of '{where}' cannot be read: it is not a table in JSON")
    if found.kind == "local" and not {"mmhub_format", "model_type", "architecture", "architectures"} & set(config):
        raise UsageError(f"the config.json of '{where}' is not an mmhub checkpoint's, nor one of a known library")
    return config


def _total(files: Mapping[str, int | None]) -> int | None:
    sizes = [size for size in files.values() if size is not None]
    return sum(sizes) if sizes else None


def _unique(parents: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return list({name: (name, relation) for name, relation in reversed(parents)}.values())[::-1]


def _add_checkpoint(about: Description, config: dict[str, Any], files: _Files, found: Resolved) -> None:
    about.library = "mmhub"
    about.task = config["task"] if isinstance(config.get("task"), str) else about.task
    about.modalities = modalities_of(config)
    records = config.get("requires")
    requires = [one for one in records if isinstance(one, dict)] if isinstance(records, list) else []
    about.requires = [f"{one.get('distribution')} {one.get('specifier', '')}".strip() for one in requires]
    unmet = unmet_requirements(requires, get_index())
    about.unmet = [unmet_text(one) for one in unmet]
    about.install = (explain_unmet(found.name, unmet).hint or "") if unmet else ""
    for name, one in as_table(config.get("files")).items():  # what a partly fetched copy lacks, too
        size = as_table(one).get("bytes")
        about.files.setdefault(name, size if isinstance(size, int) else None)
    parts = {role: one for role, one in as_table(config.get("components")).items() if isinstance(one, dict)}
    if len(parts) > _MOST_PARTS:
        raise TrustError(f"its config.json holds more than {_MOST_PARTS} components", "do not use it")
    sizes_by_role = _role_sizes(parts, files, about.files)
    about.components = {
        role: {"use": str(one.get("use", "")), "config": one.get("config") or {}, "bytes": sizes_by_role.get(role)}
        for role, one in parts.items()
    }
    listed = config.get("guards")
    about.guards = [str(as_table(one).get("use", "")) for one in listed] if isinstance(listed, list) else []
    about.bases = [base for role, one in parts.items() if (base := _base(role, one))]
    about.loadable = _unreadable(config, set(parts)) or ("not before what it needs is installed" if unmet else "yes")


def _base(role: str, part: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weights that a part's adapter is for, with their bytes; None for a part that holds its own."""
    adapter = as_table(part.get("adapter"))
    base = as_table(adapter.get("base"))
    name, commit = base.get("name"), base.get("commit", "")
    if not adapter.get("weights") or not isinstance(name, str) or not isinstance(commit, str):
        return None
    folder = Path(name)
    with suppress(MmhubError):
        if commit:
            resolve(f"hub:{name}@{commit}")  # a stranger wrote it
            folder = in_cache(name).snapshot(commit)
        here = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        sizes: dict[str, int | None] = {**here} or (_remote_sizes(name, commit) if commit else {})
        return {"part": role, "name": name, "commit": commit, "bytes": _total(sizes), "cached": bool(here)}
    return {"part": role, "name": name, "commit": commit, "bytes": None, "cached": False}


def _remote_sizes(repo: str, commit: str) -> dict[str, int | None]:
    """The weights of a commit with their bytes, {} where the Hub cannot be asked."""
    if is_offline():
        return {}
    with hub_errors(repo, commit):
        info = api().model_info(repo, revision=commit, files_metadata=True, timeout=_SECONDS)
    files = {str(file.rfilename): _size_of(file) for file in info.siblings or ()}
    return {name: size for name, size in files.items() if name.endswith(".safetensors")}


def _unreadable(config: Mapping[str, Any], parts: set[str]) -> str:
    version = config["mmhub_format"]
    if isinstance(version, int) and version > FORMAT:
        return f"no: it has format {version}, this mmhub reads up to {FORMAT}; upgrade mmhub"
    complete = {"fusion", "decoder"} < parts and isinstance(config.get("files"), dict)
    return "" if complete else "no: its config.json is malformed"


def _role_sizes(parts: Mapping[str, Any], files: _Files, sizes: Mapping[str, int | None]) -> dict[str, int]:
    """Bytes of each component: of its own weight files or its tensors in the one file, and of its adapter's file."""
    total = _weight_sizes(parts, files, sizes)
    for role, part in parts.items():
        weights = as_table(part.get("adapter")).get("weights")
        if isinstance(weights, str) and (size := sizes.get(weights)):
            total[role] = total.get(role, 0) + size
    return total


def _weight_sizes(parts: Mapping[str, Any], files: _Files, sizes: Mapping[str, int | None]) -> dict[str, int]:
    if "model.safetensors.index.json" in sizes:
        path = files.read("model.safetensors.index.json")
        index = as_table(read_json(path)) if path else {}
        owners: dict[str, set[str]] = {}
        for tensor, file in as_table(index.get("weight_map")).items():
            owners.setdefault(str(file), set()).add(str(tensor).partition(".")[0])
        total: dict[str, int] = {}
        for file, roles in owners.items():
            if len(roles) == 1:
                role = next(iter(roles))
                total[role] = total.get(role, 0) + (sizes.get(file) or 0)
        return total
    total = dict.fromkeys(parts, 0)
    tensors = files.tensors("model.safetensors")
    for tensor, size in tensors.items():
        role = tensor.partition(".")[0]
        total[role] = total.get(role, 0) + size
    return total if tensors else {}


def _results(files: _Files, names: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name in [name for name in sorted(names) if _RESULTS.fullmatch(name)][:20]:
        path = files.read(name)
        result = as_table(read_json(path)) if path else {}
        if as_table(result.get("metrics")):
            found.append({key: result.get(key) for key in ("data", "task", "rows", "metrics", "subsets")})
    return found


# --- other libraries' models


def _add_foreign(about: Description, config: Mapping[str, Any], files: _Files, found: Resolved) -> None:
    library, kind, use = recognise(config, about.files)
    own = about.library if library in ("transformers", "") else ""  # a Hub knows of others that have such a config.json
    about.library = own or library or "unknown"
    name = found.repo_id if found.kind == "hub" else str(found.path)
    if not kind:
        about.loadable = "no: no part of mmhub reads this library's models"
    elif config.get("auto_map"):
        about.loadable = "no: it brings code of its own, which mmhub never runs"
    elif not any(file.endswith(".safetensors") for file in about.files):
        about.loadable = "no: it has no safetensors weights, and mmhub reads no pickle; convert it first"
    else:
        part = kind.replace("_", " ")
        start = f'as the start of an {part}: use = "{use}", init = "{name}"'.replace("an text", "a text").replace(
            "an decoder", "a decoder"
        )
        about.loadable = f"yes, and {start}"
        _need(about, kind, use)
        if about.unmet:
            about.loadable = "not before what it needs is installed"
        elif reason := why_not(files.folder):
            about.loadable = f"no: {reason}"


def _need(about: Description, kind: str, use: str) -> None:
    """Say whether the plugin that provides a component is here."""
    try:
        component = find_component(kind, use)
        about.requires = list(dict.fromkeys([*about.requires, component.distribution]))
    except PluginError as error:
        about.unmet.append(error.message)
        about.install = error.hint or about.install
    except MmhubError as error:
        about.unmet.append(error.message)


# --- compositions


def _composition(found: Resolved) -> Description:
    assert found.entry
    entry, table = found.entry, found.entry.compose
    about = Description(
        library="mmhub",
        task=entry.task or str(table.get("task", "")),
        summary=entry.summary,
        license=entry.license,
        loadable="by composing it: its parts are fetched or made, and untrained ones need training",
    )
    encoders = as_table(table.get("encoders"))
    about.modalities = read_modalities([f"{one}_encoder" for one in encoders], about.task)
    parts = {f"{modality}_encoder": part for modality, part in encoders.items()}
    parts |= {role: table[role] for role in ("fusion", "decoder") if role in table}
    origins = []
    for role, part in parts.items():
        record = part if isinstance(part, dict) else {"use": str(part)}
        use, init = str(record.get("use", "")), str(record.get("init", ""))
        about.components[role] = {"use": use, "config": record.get("config") or {}, "bytes": None}
        if init:
            about.components[role]["init"] = init
            origins.append((init, f"starts the {role.replace('_', ' ')}"))
        if use:
            _need(about, role, use)
    about.licences = chain(found.name, entry.license, origins, _look_up)
    about.warnings = warnings(about.licences)
    return about


# --- where it came from


def _origins(files: _Files) -> list[tuple[str, str]]:
    """The models whose weights this one started from, as provenance.json records them."""
    path = files.read("provenance.json")
    model = as_table(as_table(read_json(path)).get("model")) if path else {}
    base = model.get("base")
    found = [(base, "base model")] if isinstance(base, str) and base else []
    for modality, part in as_table(model.get("encoders")).items():
        init = as_table(part).get("init")
        if isinstance(init, str) and init:
            found.append((init.partition("#")[0], f"starts the {modality} encoder"))
    return found


def _look_up(name: str) -> tuple[str, Sequence[tuple[str, str]]]:
    """The licence and parents of another model, from its folder, the cache or the Hub; unknown if it is not there."""
    try:
        found = resolve(name, to_pin=True)
    except MmhubError:
        return "", ()
    known = found.entry.license if found.entry else ""
    if found.kind == "compose":
        return known, ()
    folder = found.path if found.kind == "local" else snapshot(found.repo_id or "", found.commit or found.revision)
    if folder and (folder / "README.md").is_file():
        card = read_card(folder)
        return card.license or known, card.parents
    if found.kind == "local" or is_offline():
        return known, ()
    with suppress(MmhubError), hub_errors(found.repo_id or ""):
        revision = found.commit or found.revision
        info = api().model_info(found.repo_id, revision=revision, expand=["cardData"], timeout=_SECONDS)
        card = card_of(info.card_data.to_dict() if info.card_data else {})
        return card.license or known, card.parents
    return known, ()
