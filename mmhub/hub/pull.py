"""Fetch a checkpoint by name and load it: config.json first, then, if its plugins are here, the rest, checked.

Every file is compared with config.json and with the server's own record, when it is fetched and when it is loaded from
the cache. How bytes travel is left to `mmhub.hub.download`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mmhub.adapters import BaseRecord
from mmhub.checkpoint import (
    ALLOWED,
    CheckpointConfig,
    check_requirements,
    find_encoder,
    find_part,
    is_checkpoint,
    load_encoder,
    part_files,
    read_config,
    stored_weights,
)
from mmhub.checkpoint import load as load_folder
from mmhub.device import find_device
from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError, UsageError
from mmhub.files import disk_errors, new_folder
from mmhub.hashes import facts_of, remember, sha256_of
from mmhub.hub.client import api, cache_dir, endpoint, hub_errors, is_offline
from mmhub.hub.download import (
    REPUBLISH,
    Place,
    Remote,
    beside,
    check_commit,
    check_names,
    contradiction,
    fetch,
    find_file,
    in_cache,
    list_files,
)
from mmhub.hub.foreign import VOCABULARIES, find_reader, join, load_foreign
from mmhub.hub.integrity import blob_name, check_blob
from mmhub.hub.signed import Signed, check_folder, check_repo, signers_of
from mmhub.hub.signing import Signer, read_signer
from mmhub.interfaces import ForeignParts
from mmhub.lineage import digest, parent_of
from mmhub.model import Model
from mmhub.names import Resolved, resolve
from mmhub.quantize import quantize as _quantized
from mmhub.weights import weight_files

_EXTRAS = re.compile(r"README\.md|LICENSE(\.txt|\.md)?|provenance\.json|eval/[\w.-]+\.json|model\.sig")
_LIBRARY_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
    "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "added_tokens.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "0_Transformer/*.json", "0_Transformer/*.safetensors", "[0-9]_*/config.json", "[0-9]_Dense/model.safetensors",
    *VOCABULARIES, "0_Transformer/merges.txt", *(f"0_Transformer/{name}" for name in VOCABULARIES),
)  # fmt: skip
_AGAIN = "fetch the checkpoint again"


def load(
    name: str | os.PathLike[str],
    *,
    device: str = "cpu",
    revision: str | None = None,
    allow_partial: bool = False,
    quantize: str | None = None,
) -> Model:
    """Load the model called `name`: a registry name, `org/name[@revision]` on the Hub, or a checkpoint folder.

    A `Path` is always a folder. `NAME#image` fetches and reads the image encoder alone, as a model that embeds. A model
    of another library (transformers, sentence-transformers, timm) is loaded by the plugin that reads it. `quantize` is
    "int8" or "int4", what the weights of a language model are kept in; see `mmhub.quantize`.

    Raises:
        NotFoundError, PluginError, TrustError, NetworkError: see `pull` and `mmhub.checkpoint.load`.
    """
    target = find_device(device)
    resolved = resolve_name(name, revision)
    folder, verified = locate(name, resolved)
    ours = is_checkpoint(folder)
    if resolved.component:
        model = _load_part(os.fspath(name), folder, resolved.component)
    elif ours:
        model = load_folder(folder, allow_partial=allow_partial, name=os.fspath(name), verified=verified)
    else:
        model = load_foreign(os.fspath(name), folder)
    if resolved.kind == "hub" or not ours:
        model.parents = [parent_of(resolved, folder, "model")]
    model = model.to(target) if target.type != "cpu" else model
    return _quantized(model, quantize) if quantize else model


def _load_part(name: str, folder: Path, component: str) -> Model:
    """One encoder of a checkpoint as a model that embeds, built and read without the other parts."""
    role = find_encoder(read_config(folder), component, name)
    encoder, source = load_encoder(folder, role)
    return join(ForeignParts(encoder=encoder, encoder_id=source.id), name)


def pull(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_dir: str | Path | None = None,
    verify: str | os.PathLike[str] | None = None,
) -> Path:
    """Make the checkpoint called `name` available and return its folder, every file checked against its hash.

    A local checkpoint is returned as it is. `local_dir` puts the files there instead of into the cache, replacing an
    older checkpoint at once or not at all. `revision` is what `name@revision` says. `name#component` fetches only what
    that part needs. A download that was interrupted goes on from where it ended.

    `verify` is the file of the public key that must have signed every file, or "sigstore:IDENTITY,ISSUER". The bases
    of adapters are checked as registries ask. A signature does not tell an older version from the newest.

    Raises:
        PluginError: a plugin it needs is missing; nothing but config.json was fetched.
        TrustError: a file is damaged, also after fetching it again, or server and config.json disagree about it; or it
            is not signed, as `verify` or a registry asks for, or not what was signed.
        NetworkError: the server cannot be reached or stalls, and the files are not in the cache.
    """
    signer = None if verify is None else read_signer(verify)
    return locate(name, resolve_name(name, revision), Path(local_dir) if local_dir else None, signer)[0]


def resolve_name(name: str | os.PathLike[str], revision: str | None = None) -> Resolved:
    """Return what a name or `Path` means; `revision` replaces what the name says after '@'."""
    return resolve(_at_revision(name if isinstance(name, str) else f"local:{os.fspath(name)}", revision))


def locate(
    name: str | os.PathLike[str], resolved: Resolved, local_dir: Path | None = None, signer: Signer | None = None
) -> tuple[Path, bool]:
    """Return the folder of a checkpoint as `pull` does, and whether its files were verified just now."""
    if resolved.kind == "local":
        assert resolved.path is not None
        if local_dir is not None:
            raise UsageError(f"'{os.fspath(name)}' is a local folder already", "leave out --out, or copy the folder")
        if signer:
            check_folder(resolved.path, signer)
        return resolved.path, False
    if resolved.kind != "hub":
        raise UsageError(f"'{os.fspath(name)}' is a composition, not a checkpoint", "train it from a recipe first")
    return pull_repo(os.fspath(name), resolved, local_dir, signer), True


def _at_revision(name: str, revision: str | None) -> str:
    """`name` with its revision replaced, so that pins and `require_pinned` are checked for what is asked."""
    if revision is None:
        return name
    if name.startswith((".", "/", "~", "\\", "local:", "local-dir:")):
        raise UsageError(f"'{name}' is a local folder, which has no revision", "leave out --revision")
    plain, mark, component = name.partition("#")
    return f"{plain.partition('@')[0]}@{revision}{mark}{component}"


def at_commit(resolved: Resolved) -> tuple[Resolved, Path]:
    """Return a Hub name pinned to the commit it means now, and the folder with its config.json: all that is fetched."""
    folder = _fetch_config(in_cache(resolved.repo_id or ""), resolved.commit or resolved.revision).parent
    return replace(resolved, commit=folder.name), folder


def pull_repo(name: str, resolved: Resolved, local_dir: Path | None = None, signer: Signer | None = None) -> Path:
    """Fetch a checkpoint repository, or what one part of it needs; `signer` must have signed it."""
    place = in_cache(resolved.repo_id or "")
    folder, signed = _begin(place, resolved, signer)
    if not is_checkpoint(folder):
        return _pull_foreign(name, resolved, place, folder, local_dir, signed)
    config = read_config(folder)
    role = None
    if resolved.component:
        role = find_encoder(config, resolved.component, name)
        if local_dir is not None:
            raise UsageError(f"'{name}' is one part, and a folder holds a whole checkpoint", "leave out '#...'")
    check_requirements(name, config, role)
    bases = _bases(name, config, role)
    if local_dir is not None:
        _check_target(local_dir)
        _pull_into(place, folder, config, local_dir, signed)
    else:
        _make_sound(place, folder.name, config, _first_files(config, role), role is None)
        if role is not None:
            _make_sound(place, folder.name, config, weight_files(stored_weights(folder, config), {role}), False)
        if signed:
            signed.check(folder, _present(folder) | (_promised(signed) if role is None else set()))
    for owner, base in bases.items():
        find_base(base, owner)
    return local_dir or folder


def _begin(place: Place, resolved: Resolved, signer: Signer | None = None) -> tuple[Path, Signed | None]:
    """The snapshot with its config.json and, where a signature is asked for, what was signed, before any of it is used.

    Raises:
        TrustError: it is not signed, or not what was signed; also where the configuration was removed.
    """
    signers, revision = signers_of(place.repo, signer), resolved.commit or resolved.revision
    try:
        commit = _fetch_config(place, revision).parent.name
    except NotFoundError:
        if not signers or is_offline():
            raise
        with hub_errors(place.repo, revision):
            commit = check_commit(place.repo, api().model_info(place.repo, revision=revision).sha)
        check_repo(place, commit, signers, is_known, fresh=True)
        raise
    folder = place.snapshot(commit)
    if not signers:
        return folder, None
    signed = check_repo(place, commit, signers, is_known, fresh=signer is not None)
    if signer and signed.others:
        names = ", ".join(map(ascii, signed.others[:20]))
        print(f"note: '{place.repo}' also holds what nobody signed and nothing fetches: {names}", file=sys.stderr)
    return folder, signed


def is_known(name: str) -> bool:
    """May a file of this name be fetched?"""
    return bool(ALLOWED.fullmatch(name)) or _matches(name, _LIBRARY_FILES)


def _promised(signed: Signed) -> set[str]:
    """What a whole checkpoint must hold because it was signed."""
    return {name for name in signed.digests if ALLOWED.fullmatch(name)} if signed.fresh else set()


def _bases(name: str, config: CheckpointConfig, role: str | None) -> dict[str, BaseRecord]:
    """What the adapters of a published checkpoint, or of one part of it, are for."""
    records = {one: part.adapter for one, part in config.components.items() if role in (None, one) and part.adapter}
    bases = {one: record.base for one, record in records.items() if record.weights and record.base}
    for one, base in bases.items():
        if not base.commit:
            raise TrustError(
                f"the {one} of '{name}' is an adapter for weights on another machine, '{base.name}'",
                "ask its owner to merge it (mmhub models merge) and publish it again",
            )
    return bases


def find_base(base: BaseRecord, role: str) -> Path:
    """Return the folder or file of the weights that the adapter of a part is for, fetched if need be, and checked.

    Raises:
        NotFoundError, NetworkError: it is not here, or the Hub out of reach. TrustError: it is not what it was.
    """
    if not base.commit:
        path = Path(base.name)
        if not path.exists():
            raise NotFoundError(
                f"the {role} is an adapter for '{base.name}', which is not there", "put it back where it was"
            )
        if digest(path) != base.sha256:
            raise TrustError(
                f"the {role} is an adapter for '{base.name}', whose weights have changed since", "restore them"
            )
        return path
    part = find_part(base, role)
    name = f"hub:{base.name}@{base.commit}" + (f"#{part}" if part.endswith("_encoder") else "")
    try:
        return find_pretrained(name)[1]
    except MmhubError as error:
        what = f"the {role} is an adapter for '{base.name}' at {base.commit[:12]}: {error.message}"
        raise type(error)(what, error.hint) from None


def _first_files(config: CheckpointConfig, role: str | None) -> set[str]:
    """What is needed of a whole checkpoint, or, for a part, all but the shards its index names."""
    if role is None:
        return set(config.files)
    return part_files(config.components[role])


def _fetch_config(place: Place, revision: str | None) -> Path:
    """The cached file if a commit is asked for or the Hub cannot be reached, else what the Hub has now."""
    cached = _cached_config(place, revision)
    pinned = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    sound = cached is not None and not _problem(cached, None)
    if cached and sound and (pinned or is_offline()):
        return cached
    with hub_errors(place.repo, revision):
        try:
            commit, remote = _find_config(place.repo, revision or "main", hurry=sound)
        except Exception as error:
            problem = _no_answer(place.repo, revision, error)
            if problem is None:
                raise
            if cached and sound:
                _say_cached(problem, cached)
                return cached
            raise (_damaged(cached, None) if cached else problem) from None
        path = place.snapshot(commit) / remote.path
        if not (path.is_file() and blob_name(path) in (remote.hash, None) and not _problem(path, None)):
            fetch(place, commit, [remote])
    place.name_commit(revision or "main", commit)
    return path


_CONFIGS = ("config.json", "modules.json")  # old sentence-transformers models have the second alone


def _find_config(repo: str, revision: str, *, hurry: bool) -> tuple[str, Remote]:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return find_file(repo, _CONFIGS[0], revision, hurry=hurry)
    except EntryNotFoundError:
        with suppress(EntryNotFoundError):
            return find_file(repo, _CONFIGS[1], revision, hurry=hurry)
        raise


def _cached_config(place: Place, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in _CONFIGS:
        cached = try_to_load_from_cache(place.repo, name, cache_dir=cache_dir(), revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _no_answer(repo: str, revision: str | None, error: Exception) -> NetworkError | None:
    """What `error` means, if it means that the Hub cannot be asked now."""
    try:
        with hub_errors(repo, revision):
            raise error
    except NetworkError as problem:
        return problem
    except Exception:
        return None


def _say_cached(problem: NetworkError, cached: Path) -> None:
    print(f"warning: {problem.message}; using the copy pulled before ({cached.parent.name[:12]})", file=sys.stderr)


def _make_sound(place: Place, commit: str, config: CheckpointConfig, names: Iterable[str], whole: bool) -> None:
    """Fetch those of the files that are missing or damaged; of a whole checkpoint also card, licence and results."""
    folder = place.snapshot(commit)
    problems = {name: _problem(folder / name, config.files[name].sha256) for name in names}
    problems |= {name: _problem(folder / name, None) for name in _present(folder) - set(config.files)}
    todo = {name: problem for name, problem in problems.items() if problem}
    if not todo:
        return
    damaged = next((name for name, problem in todo.items() if problem == "damaged"), None)
    if is_offline():
        if damaged:
            raise _damaged(folder / damaged, config.files.get(damaged))
        what = f"'{place.repo}' is not wholly in the cache, and HF_HUB_OFFLINE is set"
        raise NetworkError(what, "unset it, or pull it first")
    try:
        with hub_errors(place.repo, commit):
            listed = _listing(place.repo, commit, config, folder)
            extras = {name for name in listed if _EXTRAS.fullmatch(name)} if whole else set()
            files = [listed[name] for name in listed if name in todo or (name in extras - problems.keys())]
            check_names(place.repo, [remote.path for remote in files], listed)
            fetch(place, commit, files, {name: record.sha256 for name, record in config.files.items()})
    except NetworkError as error:
        if damaged is None:
            raise
        raise TrustError(f"'{folder / damaged}' is damaged, and {error.message}", "load it again when online") from None


def _present(folder: Path) -> set[str]:
    """The files of a snapshot that a checkpoint may hold; other libraries may keep theirs there, too."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if ALLOWED.fullmatch(name)}


def _problem(path: Path, sha256: str | None) -> str | None:
    """Say "missing" or "damaged" of a cached file that is not what its blob's name and config.json say."""
    try:
        if not path.is_file():
            return "missing"
        name = blob_name(path) or ""
        if len(name) == 64 or sha256 is not None:
            found = sha256_of(path)
            sound = found == (sha256 or name) and (len(name) != 64 or found == name)
        else:
            sound = True
        sound = sound and (len(name) != 40 or check_blob(path))
    except OSError:
        return "damaged"
    return None if sound else "damaged"


def _damaged(path: Path, record: object) -> TrustError:
    what = f"the cached file '{path}' is damaged"
    why = "and HF_HUB_OFFLINE is set" if is_offline() else f"and {endpoint()} cannot be reached"
    return TrustError(f"{what}, {why}", "load it again when online: it is fetched anew")


def _listing(repo: str, commit: str, config: CheckpointConfig, folder: Path) -> dict[str, Remote]:
    """The server's record of all files, held against config.json: a contradiction shows before weights are fetched.

    Raises:
        TrustError: they differ.
    """
    listed = list_files(repo, commit)
    mine = blob_name(folder / "config.json")
    if "config.json" not in listed or listed["config.json"].hash != (mine or listed["config.json"].hash):
        raise TrustError(f"'{repo}' at {endpoint()} lists another config.json than it delivered", _AGAIN)
    for name, record in config.files.items():
        remote = listed.get(name)
        if remote is None:
            raise TrustError(f"'{repo}' at {endpoint()} lacks '{name}', which its config.json lists", _AGAIN)
        if len(remote.hash) == 64 and remote.hash != record.sha256:
            raise contradiction(repo, name, record.sha256, remote.hash)
        if remote.size != record.bytes:
            what = f"config.json gives '{name}' {record.bytes:,} bytes, the server {remote.size:,}"
            raise TrustError(f"'{repo}' at {endpoint()} contradicts itself: {what}", REPUBLISH)
    return listed


# -- into a folder of one's own ---------------------------------------------------------------------------------


def _pull_into(cached: Place, snapshot: Path, config: CheckpointConfig, target: Path, signed: Signed | None) -> None:
    """Fill `target`, replacing an older checkpoint at once; only config.json goes through the cache."""
    staging = beside(cached.repo, Path(os.path.realpath(target)))
    names = _present(snapshot)
    whole = set(config.files) <= names and not any(
        _problem(snapshot / name, config.files[name].sha256 if name in config.files else None) for name in names
    )
    with disk_errors("the checkpoint", target):
        if not whole:
            staged = staging.snapshot(snapshot.name)
            staged.mkdir(parents=True, exist_ok=True)
            _copy_known(cached, staging, snapshot, config)
            _make_sound(staging, snapshot.name, config, set(config.files), True)
            snapshot, names = staged, _present(staged)
        if signed:
            signed.check(snapshot, names | _promised(signed))
        with new_folder(target) as aside:
            for name in sorted(names):
                (aside / name).parent.mkdir(exist_ok=True)
                _move(snapshot / name, aside / name, copy=whole)
    shutil.rmtree(staging.folder, ignore_errors=True)
    for name, record in config.files.items():
        remember(target / name, {"sha256": record.sha256}, written_by_us=True)


def _copy_known(cached: Place, staging: Place, snapshot: Path, config: CheckpointConfig) -> None:
    """Begin with config.json and whatever else of this commit is in the cache."""
    for name in _present(snapshot):
        blob = blob_name(snapshot / name)
        if blob is None or _problem(snapshot / name, None):
            if name == "config.json":
                shutil.copyfile(snapshot / name, staging.snapshot(snapshot.name) / name)
            continue
        (staging.folder / "blobs").mkdir(exist_ok=True)
        if not (staging.folder / "blobs" / blob).exists():
            aside = staging.folder / "blobs" / f"{blob}.incomplete"
            shutil.copyfile(snapshot / name, aside)
            os.replace(aside, staging.folder / "blobs" / blob)
        staging.point(snapshot.name, Remote(name, 0, blob))


def _move(source: Path, target: Path, *, copy: bool) -> None:
    """Give `target` the content of a staged file without copying it, where the system can."""
    if not copy:
        real = source.resolve()
        try:
            if real.stat().st_nlink == 1:
                os.link(real, target)
                return
        except OSError:
            pass
    shutil.copyfile(source, target)


def _check_target(folder: Path) -> None:
    """Only a checkpoint and nothing else may be replaced."""
    if not folder.exists():
        return
    if folder.samefile(Path.cwd()):
        raise UsageError(f"'{folder}' is the current folder, which cannot be replaced", "name another folder")
    inside = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    if not folder.is_dir() or (inside and not is_checkpoint(folder)):
        raise UsageError(f"'{folder}' exists and is no mmhub checkpoint", "name another folder")
    own = [name for name in inside if not ALLOWED.fullmatch(name)]
    if own:
        raise UsageError(f"'{folder}' also holds {own[0]!r}, which would be lost", "name another folder")


# -- other libraries' models ------------------------------------------------------------------------------------


def _pull_foreign(
    name: str, resolved: Resolved, place: Place, folder: Path, local_dir: Path | None, signed: Signed | None
) -> Path:
    """Fetch a model of another library for the plugin that reads it, which is asked before the weights are fetched."""
    listed = _ask_for_list(place, folder, _LIBRARY_FILES)
    if listed and "modules.json" in listed:
        with hub_errors(place.repo, folder.name):
            fetch(place, folder.name, [listed["modules.json"]])
    find_reader(name, folder)
    if resolved.component or local_dir is not None:
        what = "has no parts by name" if resolved.component else "is kept in the cache alone"
        raise UsageError(f"'{name}' is another library's model, which {what}", "load it, then save it to a folder")
    fetch_known_files(name, place, folder, _LIBRARY_FILES, listed)
    if signed:
        signed.check(folder, _known(folder, _LIBRARY_FILES))
    return folder


def fetch_library_model(name: str, resolved: Resolved) -> Path:
    """Fetch another library's model (transformers, timm): known data files only, never code or pickle."""
    place = in_cache(resolved.repo_id or "")
    folder, signed = _begin(place, resolved)
    fetch_known_files(name, place, folder, _LIBRARY_FILES, _ask_for_list(place, folder, _LIBRARY_FILES))
    if signed:
        signed.check(folder, _known(folder, _LIBRARY_FILES))
    return folder


def fetch_known_files(
    name: str, place: Place, folder: Path, patterns: Sequence[str], listed: Mapping[str, Remote] | None
) -> Path:
    """Complete the snapshot `folder` with the files that match, each verified against the server's record.

    `listed` is what `_ask_for_list` gave: with None, what is here is verified, and only damage costs a request.
    """
    here = _known(folder, patterns)
    damaged = [path for path in here.values() if _problem(path, None)]
    if damaged and is_offline():
        raise _damaged(damaged[0], None)
    if listed is None and not damaged:
        return folder
    with hub_errors(place.repo, folder.name):
        listed = list_files(place.repo, folder.name) if listed is None else listed
        wanted = [remote for path, remote in listed.items() if _matches(path, patterns)]
        weights = [remote for remote in wanted if remote.path.endswith(".safetensors")]
        if not weights:
            hint = "mmhub does not read pickle files; convert it first"
            raise MmhubError(f"'{name}' has no safetensors weights", hint)
        check_names(place.repo, [remote.path for remote in wanted], listed)
        fetch(place, folder.name, [remote for remote in wanted if remote not in weights])
        fetch(place, folder.name, weights)
    _note_complete(folder, patterns, [remote.path for remote in wanted])
    return folder


def _ask_for_list(place: Place, folder: Path, patterns: Sequence[str]) -> dict[str, Remote] | None:
    """The server's record of all files; None where nothing is missing, or nobody can say what is.

    Another library that shares the cache leaves what it asked for: weights without a tokenizer, or without the modules
    that follow them. So its copy is taken as complete only where the Hub cannot be asked.
    """
    if _is_complete(folder, patterns):
        return None
    whole = _is_whole(_known(folder, patterns))
    if whole and is_offline():
        return None
    try:
        with hub_errors(place.repo, folder.name):
            return list_files(place.repo, folder.name, hurry=whole)
    except NetworkError:
        if not whole:
            raise
        return None


def _note_complete(folder: Path, patterns: Sequence[str], names: list[str]) -> None:
    """Remember with the configuration, which every snapshot has, what else belongs to this commit."""
    facts = {_completed(folder, patterns): sorted(names)}
    for path in filter(Path.is_file, (folder / name for name in _CONFIGS)):
        remember(path, facts, written_by_us=True)


def _is_complete(folder: Path, patterns: Sequence[str]) -> bool:
    """Did mmhub itself fetch all there is for these patterns, and is it still here?"""
    configs = [path for name in _CONFIGS if (path := folder / name).is_file()]
    names = facts_of(configs[0]).get(_completed(folder, patterns)) if configs else None
    return isinstance(names, list) and all((folder / str(name)).is_file() for name in names)


def _completed(folder: Path, patterns: Sequence[str]) -> str:
    return f"complete {folder.name} {zlib.crc32(' '.join(patterns).encode()):08x}"


def _known(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: path for name, path in names.items() if _matches(name, patterns)}


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def _is_whole(here: Mapping[str, Path]) -> bool:
    """Are the weights here, and what the modules of a sentence-transformers model are made of?"""
    if not _has_all_weights(here):
        return False
    try:
        modules = json.loads(here["modules.json"].read_bytes()) if "modules.json" in here else []
        paths = [one["path"] for one in modules if str(one.get("type")).endswith((".Pooling", ".Dense"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return all(f"{path}/config.json" in here for path in paths)


def _has_all_weights(here: Mapping[str, Path]) -> bool:
    """Are the weights here, and every shard that an index names?"""
    for name, path in here.items():
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads(path.read_bytes())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return False
            return shards <= {Path(other).name for other in here}
    return any(name.endswith(".safetensors") and "_Dense/" not in name for name in here)


def find_pretrained(name: str) -> tuple[str, Path, str | None]:
    """Locate what an `init` names: ("mmhub" | "library", path, component).

    Ours are checkpoint folders or repositories with an mmhub config.json; anything else is the library's own format.
    """
    resolved = resolve(name)
    if resolved.kind == "local":
        assert resolved.path is not None
        return ("mmhub" if is_checkpoint(resolved.path) else "library"), resolved.path, resolved.component
    if resolved.kind != "hub":
        raise UsageError(f"init = {name!r} is a composition, not a checkpoint", "name a checkpoint")
    resolved, folder = at_commit(resolved)
    if is_checkpoint(folder):
        return "mmhub", pull_repo(name, resolved), resolved.component
    return "library", fetch_library_model(name, resolved), resolved.component


__all__ = [
    "at_commit", "fetch_known_files", "fetch_library_model", "find_base", "find_pretrained", "is_known", "load",
    "locate", "pull", "pull_repo", "resolve_name",
]  # fmt: skip
