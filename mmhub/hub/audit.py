"""What a model is made of, for those who must trust it: files, hashes, signature, licences, plugins, where it is from.

Nothing of the model is run, and of a Hub repository no weights are fetched unless asked for. Whatever stands in it was
written by strangers: it is shown as text, and what cannot be read is a finding and no error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError, UsageError
from mmhub.hashes import git_sha1_of, sha256_of
from mmhub.hub.cache import as_table, read_json, snapshot
from mmhub.hub.client import api, hub_errors, is_offline
from mmhub.hub.describe import Description, describe
from mmhub.hub.download import Place, Remote, check_commit, check_names, fetch, in_cache, list_files
from mmhub.hub.formats import TEXT_BYTES, Finding, Severity, check_content, check_name, format_of, is_config
from mmhub.hub.integrity import read_index
from mmhub.hub.readme import strings
from mmhub.hub.signed import GIT, check_folder, check_repo, is_cached, signers_of
from mmhub.hub.signing import NAME, Signer, key_hint, signed_name
from mmhub.hub.statements import overlap_line
from mmhub.names import Resolved, resolve
from mmhub.plugins import get_index
from mmhub.records import canonical
from mmhub.registry import read_registries

_TEXTS = ("json", "text", "template", "yaml", "signature")  # formats that are fetched of a repository, if small
_NEVER = ("pickle", "code", "archive")  # formats whose names are enough
_FIRST = ("config.json", "README.md", NAME, "provenance.json", "modules.json", "model.safetensors.index.json")
_MOST_SMALL, _MOST_BYTES = 200, 2**28  # of a repository's files beside its weights that are fetched
_MOST_MISSING = 100  # recorded files that are named if they are not there
_MOST_TABLES = 20  # that are told of a list which a stranger wrote
_CLIPPED = 200  # characters of what a stranger wrote
_LARGE = 2**30  # bytes
_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class File:
    """One file: its bytes, what it is, its SHA-256 ('' if only the Hub's git hash is known), and config.json's word.

    `recorded` is "equal", "differs", "missing" or, where config.json does not list it, "". `read` is whether it was
    looked into here.
    """

    name: str
    bytes: int | None
    format: str
    sha256: str = ""
    recorded: str = ""
    read: bool = False


@dataclass(kw_only=True)
class Audit:
    """What `mmhub audit` prints."""

    name: str
    kind: str = ""
    commit: str = ""
    files: list[File] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    signature: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    licences: list[dict[str, str]] = field(default_factory=list)
    datasets: list[dict[str, str]] = field(default_factory=list)
    plugins: list[dict[str, str]] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    watermark: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    full: bool = False

    def add(self, severity: Severity, rule: str, message: str, file: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(severity=severity, rule=rule, message=message, file=file))

    @property
    def is_bad(self) -> bool:
        """Is there something because of which this model should not be used?"""
        return any(one.severity == "bad" for one in self.findings)


def audit(found: Resolved, signer: Signer | None = None, *, full: bool = False) -> Audit:
    """Look at what a name leads to. `signer` must have signed it; `full` fetches the weights and reads all numbers.

    Raises:
        NotFoundError: there is no such folder or repository. UsageError: it is a composition.
        NetworkError: the Hub cannot be reached, and nothing is cached.
    """
    if found.kind == "compose":
        raise UsageError(f"'{found.name}' is a composition, which has no files", "see `mmhub models show`")
    report = Audit(name=found.repo_id or found.name, full=full)
    if found.kind == "local":
        assert found.path
        if not found.path.is_dir():
            raise NotFoundError(f"'{found.path}' is no folder", "name the folder of a model")
        folder, listed = found.path, _read_folder(report, found.path)
    else:
        folder, listed = _open_repo(report, found, full)
    config = as_table(_json(folder, "config.json"))
    _add_files(report, folder, listed, as_table(config.get("files")))
    _check_config(report, folder, config)
    _check_index(report, folder)
    _add_signature(report, found, folder, listed, signer)
    _add_origin(report, found, folder, config)
    if full:
        _check_numbers(report, folder)
    order = {"bad": 0, "warning": 1, "note": 2}
    report.findings = sorted(dict.fromkeys(report.findings), key=lambda one: (order[one.severity], one.file, one.rule))
    return report


# -- files ------------------------------------------------------------------------------------------------------


def _read_folder(report: Audit, folder: Path) -> dict[str, Remote]:
    """The files of a folder as a Hub would list them, without their hashes; links that lead out are not followed."""
    listed = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not is_cached(path, folder):
            report.add("bad", "link", "is a symbolic link, which may lead anywhere", name)
        elif path.is_file():
            listed[name] = Remote(name, path.stat().st_size, "")
        elif not path.is_dir():
            report.add("bad", "kind", "is neither a file nor a folder", name)
    return listed


def _open_repo(report: Audit, found: Resolved, full: bool) -> tuple[Path, dict[str, Remote]]:
    """The snapshot of a commit with its small files fetched, and what the Hub lists of it."""
    repo, revision = found.repo_id or "", found.commit or found.revision
    try:
        if is_offline():
            raise NetworkError("HF_HUB_OFFLINE is set")
        with hub_errors(repo, revision):
            commit = check_commit(repo, api().model_info(repo, revision=revision, timeout=_SECONDS).sha, found.commit)
    except NetworkError as error:
        cached = snapshot(repo, revision)
        if cached is None:
            raise NetworkError(f"'{repo}' is not in the cache, and {error.message}", error.hint) from None
        report.add("note", "offline", f"{error.message}: what is in the cache was looked at")
        report.commit = cached.name
        return cached, _read_folder(report, cached)
    report.commit = commit
    place = in_cache(repo)
    with hub_errors(repo, commit):
        listed = list_files(repo, commit)
        _fetch_some(report, place, commit, listed, full)
    return place.snapshot(commit), listed


def _fetch_some(report: Audit, place: Place, commit: str, listed: Mapping[str, Remote], full: bool) -> None:
    """Fetch what is small and text, configurations first; with `full` also weights, and whatever else is small."""
    unsafe = [one for one in listed.values() if format_of(one.path) not in _NEVER and one.size <= TEXT_BYTES]
    small = [one for one in unsafe if format_of(one.path) in _TEXTS or (full and format_of(one.path) != "safetensors")]
    small.sort(key=lambda one: (one.path not in _FIRST, not is_config(one.path), format_of(one.path) not in _TEXTS))
    weights = [one for one in listed.values() if full and one.path.endswith(".safetensors")]
    left = _MOST_BYTES
    for remote in (*small[:_MOST_SMALL], *weights):
        left -= 0 if remote in weights else remote.size
        try:
            if left >= 0 or remote in weights:
                check_names(place.repo, [remote.path], listed)
                fetch(place, commit, [remote])
        except TrustError as error:
            report.add("bad", "delivery", error.message, remote.path)


def _add_files(report: Audit, folder: Path, listed: Mapping[str, Remote], records: Mapping[str, Any]) -> None:
    absent = {name for name in listed if not (folder / name).is_file()}
    for name, remote in listed.items():
        path = folder / name
        here = path.is_file() and (not path.is_symlink() or is_cached(path, folder))
        report.findings += check_name(name)
        unsound = list(check_content(path, name)) if here else []
        report.findings += unsound
        read = here and _is_worth_reading(format_of(name), path.stat().st_size, unsound)
        known = sha256_of(path, fresh=not remote.hash) if read else remote.hash if len(remote.hash) == 64 else ""
        if read and len(remote.hash) == 40 and git_sha1_of(path) != remote.hash:
            report.add("bad", "delivery", "is not what the Hub lists", name)
        word = _compare(known, remote.size, as_table(records.get(name))) if name in records else ""
        if word == "differs":
            report.add("bad", "hash", "is not what config.json records", name)
        report.files.append(
            File(name=name, bytes=remote.size, format=format_of(name), sha256=known, recorded=word, read=here)
        )
    for name in sorted(set(records) - set(listed))[:_MOST_MISSING]:
        report.files.append(File(name=name, bytes=None, format=format_of(name), recorded="missing"))
        report.add("bad", "hash", "is recorded in config.json and is not there", name)
    _add_unread(report, [one for one in report.files if not one.read and one.name in absent])


def _add_unread(report: Audit, unread: Sequence[File]) -> None:
    """Say what was not looked into, for nothing is known of it; a configuration may ask for anything."""
    for one in unread:
        if is_config(one.name):
            report.add("bad", "unread", f"has {one.bytes:,} bytes and was not looked into", one.name)
    weights = [one for one in unread if one.format == "safetensors"]
    others = [one.name for one in unread if one.format not in (*_NEVER, "safetensors") and not is_config(one.name)]
    if weights:
        report.add("note", "unread", f"{len(weights)} weight files were not fetched, so not looked into (--full does)")
    if others:
        what = f"{len(others)} other files were not looked into (--full looks into small ones), first {others[0]}"
        report.add("warning", "unread", what)


def _is_worth_reading(kind: str, size: int, found: Iterable[Finding]) -> bool:
    """Sound weights may be of any size; whatever else is that large would only keep its reader waiting."""
    return size <= _LARGE or (kind == "safetensors" and not any(one.severity == "bad" for one in found))


def _compare(sha256: str, size: int, record: Mapping[str, Any]) -> str:
    if record.get("bytes") != size:
        return "differs"
    return "" if not sha256 else "equal" if record.get("sha256") == sha256 else "differs"


def _check_numbers(report: Audit, folder: Path) -> None:
    """Say which weights hold NaN or infinity."""
    from mmhub.weights import all_finite, read_tensors

    for one in report.files:
        if one.format == "safetensors" and one.read and not any(f.file == one.name for f in report.findings):
            try:
                odd = [name for name, tensor in read_tensors(folder / one.name) if not all_finite([tensor])]
            except TrustError as error:
                report.add("bad", "weights", error.message, one.name)
                continue
            if odd:
                report.add(
                    "warning", "numbers", f"has NaN or infinity in {len(odd)} tensors, first in {odd[0]}", one.name
                )


# -- what config.json says --------------------------------------------------------------------------------------


def _json(folder: Path, name: str) -> Any:
    path = folder / name
    return read_json(path) if path.is_file() and path.stat().st_size <= TEXT_BYTES else None


def _check_config(report: Audit, folder: Path, config: Mapping[str, Any]) -> None:
    from mmhub.checkpoint import ALLOWED, parse_config

    if "mmhub_format" not in config:
        report.kind = "another library's"
        if not config:
            report.add("warning", "config", "there is no config.json that can be read: no library is named")
        return
    report.kind = "mmhub"
    try:
        parse_config((folder / "config.json").read_bytes(), "config.json")
    except MmhubError as error:
        report.add("bad" if isinstance(error, TrustError) else "warning", "config", error.message, "config.json")
    for one in report.files:
        if not ALLOWED.fullmatch(one.name) and one.name != GIT:
            report.add("warning", "foreign", "belongs to no checkpoint of mmhub, and is never fetched", one.name)
    guards = config.get("guards")
    report.guards = [_word(one.get("use", "?")) for one in _tables(guards)]
    report.watermark = any(key.startswith("watermark") and value for key, value in _settings(config))
    _add_plugins(report, config.get("requires"))


def _check_index(report: Audit, folder: Path) -> None:
    try:
        read_index(folder)
    except TrustError as error:
        report.add("bad", "weights", error.message.replace(f"{folder}/", ""), "model.safetensors.index.json")


def _settings(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The settings of all parts, two tables deep: where a language model keeps how it writes."""
    for part in as_table(config.get("components")).values():
        for key, value in as_table(as_table(part).get("config")).items():
            yield key, value
            yield from as_table(value).items()


def _add_plugins(report: Audit, records: Any) -> None:
    index, registries = get_index(), read_registries()
    for record in _tables(records):
        name = _word(record.get("distribution", "?"))
        plugin = index.plugin(name)
        entries = (
            entry for file in registries.files for key, entry in file.plugins.items() if key_of(key) == key_of(name)
        )
        entry = next(entries, None)
        own = name == "mmhub"
        trust = "official" if own else entry.trust if entry else "unknown"
        if trust not in ("official", "verified"):
            message = (
                f"needs {name}, which no registry vouches for" if trust == "unknown" else f"needs {name} ({trust})"
            )
            report.add("warning", "plugin", message)
        report.plugins.append(
            {
                "distribution": name,
                "required": _word(record.get("specifier", "")),
                "saved_with": _word(record.get("saved_with", "")),
                "installed": plugin.version if plugin else _own_version() if own else "",
                "trust": trust,
            }
        )


def key_of(distribution: str) -> str:
    """A distribution's name as it is compared; of what is no name, the text itself."""
    try:
        return canonical(distribution)
    except Exception:
        return distribution


def _own_version() -> str:
    from mmhub import __version__

    return __version__


# -- who signed it ----------------------------------------------------------------------------------------------


def _add_signature(
    report: Audit, found: Resolved, folder: Path, listed: Mapping[str, Remote], signer: Signer | None
) -> None:
    """ "none", "unchecked" (nobody says who should have signed), "valid" or "invalid"."""
    try:
        signers = signers_of(found.repo_id or "", signer) if found.kind == "hub" else [signer] if signer else []
    except TrustError as error:
        report.add("bad", "signature", error.message)
        signers = []
    hint = key_hint(folder / NAME) if NAME in listed else ""
    report.signature = {"state": "unchecked" if NAME in listed else "none", "key": hint, "by": None, "problem": None}
    report.signature["name"] = None
    if not signers:
        what = "is signed; --verify KEY.pub checks by whom" if NAME in listed else "is not signed"
        report.add("note", "signature", what)
        return
    try:
        others: tuple[str, ...] = ()
        if found.kind == "local":
            check_folder(folder, signers[0])
        else:
            from mmhub.hub.pull import is_known

            place = in_cache(found.repo_id or "")
            signed = check_repo(place, report.commit, signers, is_known, fresh=True)
            others = signed.others
            signed.check(folder, [one.name for one in report.files if one.read and one.name in signed.digests])
        report.signature |= {"state": "valid", "by": [str(one) for one in signers]}
        report.signature["name"] = signed_name(folder / NAME, report.name)
        if others:
            report.add(
                "warning", "signature", f"{len(others)} files were not signed; they are never fetched", others[0]
            )
    except TrustError as error:
        report.signature |= {"state": "invalid" if NAME in listed else "none", "problem": error.message}
        report.add("bad", "signature", error.message)


# -- where it comes from ----------------------------------------------------------------------------------------


def _add_origin(report: Audit, found: Resolved, folder: Path, config: Mapping[str, Any]) -> None:
    about = Description()
    try:
        if not any(one.rule in ("link", "kind") for one in report.findings):  # a pipe would be waited for
            about = describe(found)
    except MmhubError as error:
        report.add("bad" if isinstance(error, TrustError) else "warning", "description", error.message)
    except RecursionError:
        report.add("bad", "description", "what it says of itself is nested too deeply")
    _check_bases(report, found, about)
    report.kind = about.library or report.kind
    report.license = about.license
    report.licences = [
        {"name": one.name, "relation": one.relation, "license": one.license or "unknown"} for one in about.licences[1:]
    ]
    for warning in about.warnings or ([] if about.license else ["no licence is given"]):
        report.add("warning", "licence", warning)
    for need in about.unmet:
        report.add("warning", "plugin", f"cannot be loaded here: {need}")
    report.datasets = [
        {"name": name, "license": _data_license(name)} for name in strings(about.card.get("datasets"))[:8]
    ]
    unknown = [one["name"] for one in report.datasets if one["license"] == "unknown"]
    if unknown:
        report.add("note", "licence", f"the licence of the data {', '.join(unknown)} is not known here")
    report.provenance = _provenance(report, as_table(_json(folder, "provenance.json")))


def _check_bases(report: Audit, found: Resolved, about: Description) -> None:
    """An adapter of a repository must say at which commit its base is; one of a folder may be for another folder."""
    for base in about.bases:
        if base["commit"]:
            try:
                resolve(f"hub:{base['name']}@{base['commit']}")
            except MmhubError as error:
                report.add("bad", "base", f"the {base['part']} is an adapter for what cannot be: {error.message}")
            continue
        what = f"the {base['part']} is an adapter for weights outside, '{_word(base['name'])}'"
        here = found.kind == "local" and Path(base["name"]).exists()
        report.add("warning" if here else "bad", "base", what if here else f"{what}, which are not here")


def _data_license(name: str) -> str:
    """The licence that a Hub gives for a data set, 'unknown' if it does not."""
    if is_offline() or not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
        return "unknown"
    try:
        with hub_errors(name):
            card = api().dataset_info(name, timeout=_SECONDS).card_data
        return ", ".join(strings(card.to_dict().get("license") if card else None)) or "unknown"
    except MmhubError:
        return "unknown"


def _provenance(report: Audit, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance.json says in short."""
    if not facts:
        report.add("note", "provenance", "nothing is recorded of how it was made")
        return {}
    code = as_table(facts.get("code"))
    forced = [_word(one.get("finding", "?")) for one in _tables(facts.get("forced"))]
    if forced:
        report.add("warning", "forced", f"was published with --force, in spite of: {'; '.join(forced)}")
    overlap = {split: overlap_line(one) for split, one in _parts(facts.get("overlap"))}
    data = {split: _hashes(one.get("files")) for split, one in _parts(facts.get("data"))}
    return {
        "code": _words(code, "commit", "dirty") or None,
        "parents": [_words(one, *_PARENT) for one in _tables(facts.get("parents"))],
        "data": data,
        "forced": forced,
        "overlap": overlap,
    }


def _hashes(files: Any) -> list[dict[str, Any]]:
    return [{"name": None, "sha256": None} | _words(one, "name", "sha256") for one in _tables(files)]


def _parts(value: Any) -> list[tuple[str, dict[str, Any]]]:
    """The first tables of a table that a stranger wrote, with their keys."""
    return [(_word(key), as_table(one)) for key, one in list(as_table(value).items())[:_MOST_TABLES]]


_PARENT = ("part", "name", "repo", "commit", "sha256")


def _words(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of a stranger's entries that are texts, clipped, or yes and no."""
    found = {key: table[key] for key in keys if key in table}
    return {key: one if isinstance(one, bool) else _word(one) for key, one in found.items()}


def _word(value: Any) -> str:
    return value[:_CLIPPED] if isinstance(value, str) else "?"


def _tables(value: Any) -> list[dict[str, Any]]:
    """The first tables of a list that a stranger wrote."""
    return [one for one in value if isinstance(one, dict)][:_MOST_TABLES] if isinstance(value, list) else []
