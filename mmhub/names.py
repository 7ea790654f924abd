"""What a name means: `[scheme:]name[@revision][#component]` to a local folder, a Hub repository or a composition.

Nothing is fetched here. Order: an explicit scheme; a path (`./x`, `/x`, `~/x`), which never falls through to the Hub; a
registered name (project, user, plugins, shipped); `org/name` on the Hub.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mmhub.errors import MmhubError, NotFoundError, PluginError, UsageError, did_you_mean
from mmhub.plugins import get_index, install_line, newer_index
from mmhub.registry import Named, Pin, Registries, read_lock, read_registries
from mmhub.spec import ModelSpec

_SCHEMES = ("hub", "hf-hub", "hf", "local", "local-dir", "plugin")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}(?:/{_PART})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Where a name leads. `kind` says which fields are set: local: path; hub: repo_id (and more); compose: entry.

    Attributes:
        name: the name as `mmhub.lock` keys it, without its `#component`.
        scope: what decided: "scheme", "path", "project", "user", "plugins", "shipped" or "hub".
        source: the file that defines the name, if one does.
        revision: branch, tag or commit as asked for. commit: the exact commit, where it is known without a request.
        component: the part asked for with `#`.
        entry: the registered record.
    """

    kind: Literal["local", "hub", "compose"]
    name: str
    scope: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    component: str | None = None
    source: str | None = None
    entry: ModelSpec | None = None


@dataclass(frozen=True, kw_only=True)
class Look:
    """One scope in which a bare name was looked for; `found` is the entry there, '' if it has none."""

    scope: str
    source: str
    found: str = ""
    alias: bool = False


def resolve(name: str, *, to_pin: bool = False) -> Resolved:
    """Resolve a model name as a user writes it. With `to_pin`, mmhub.lock is not looked at: the name is to be pinned.

    >>> resolve("hub:org/digits@v1#image").repo_id
    'org/digits'

    Raises:
        UsageError: the name is malformed or ambiguous, or a registry is invalid.
        NotFoundError: nothing has this name; close matches are suggested.
        PluginError: the plugin that provides it is missing, or two provide it.
        TrustError: `[hub]` in a registry does not allow it.
    """
    registries = read_registries()
    found = _resolve(name, registries)
    if found.kind == "hub":
        assert found.repo_id
        commit = found.commit or (None if to_pin else _pinned(found))
        registries.check_allowed(found.repo_id, commit, to_pin=to_pin)
        found = replace(found, commit=commit)
    if found.entry and found.entry.deprecated:
        print(f"note: '{name}' is deprecated: {found.entry.deprecated}", file=sys.stderr)
    return found


def definitions(name: str, registries: Registries) -> list[Named]:
    """Return every entry of a bare name or alias, in order of precedence: the first is used and hides the others."""
    return [named for named in registries.named() if name == named.name or name in named.entry.aliases]


def looked_at(bare: str, registries: Registries) -> list[Look]:
    """Return every scope in which a bare name or alias is looked for, in order, with what each of them says."""
    files = {file.scope: str(file.path) for file in registries.files}
    plugins = [plugin.distribution for plugin in get_index().usable() if plugin.models]
    sources = {
        "project": files.get("project", "no registry.toml in this folder or above it"),
        "user": files.get("user", "no registry.toml in the user's settings"),
        "plugins": f"models of {', '.join(plugins)}" if plugins else "no installed plugin names a model",
        "shipped": files["shipped"],
    }
    looks = []
    for scope, source in sources.items():
        hits = [named for named in definitions(bare, registries) if named.scope == scope]
        looks += [Look(scope=scope, source=n.source, found=n.name, alias=n.name != bare) for n in hits] or [
            Look(scope=scope, source=source)
        ]
    return looks


def repository_of(named: Named) -> tuple[str, str]:
    """Return the Hub repository and revision that an entry leads to, '' for what it does not name."""
    try:
        found = _follow_ref(named, named.name)
    except MmhubError:
        return "", ""
    return found.repo_id or "", found.revision or ""


def pin_of(found: Resolved) -> tuple[Pin | None, bool]:
    """Return what mmhub.lock says of a Hub name, and whether it holds: the name may lead elsewhere by now."""
    pin = read_lock().get(found.name)
    return pin, pin is not None and _pinned(found) == pin.commit


def _resolve(name: str, registries: Registries) -> Resolved:
    if not name.strip() or "\0" in name or "\n" in name:
        raise UsageError(f"{name!r} is not a model name", "expected [scheme:]name[@revision][#component]")
    if name.startswith(("https://", "http://")):
        return _from_url(name)
    scheme, colon, rest = name.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):  # one letter is a Windows drive
        return _from_scheme(name, scheme.lower(), rest)
    if name.startswith((".", "/", "~", "\\")) or (colon and len(scheme) == 1 and scheme.isalpha()):
        return _local(name, scope="path")
    plain = re.split("[@#]", name, maxsplit=1)[0]
    if "/" not in plain:
        return _registered(name, registries)
    if plain.count("/") > 1:  # never a Hub name, so a folder of that name cannot be confused with one
        return _local(name, scope="path")
    if os.path.exists(plain) or os.path.exists(name):
        raise UsageError(
            f"'{name}' is a local folder and could also be a Hub repository",
            f"write './{name}' for the folder or 'hub:{name}' for the Hub",
        )
    return _hub(name, scope="hub")


def _from_scheme(name: str, scheme: str, rest: str) -> Resolved:
    if scheme == "hf":
        return _from_hf_uri(name, rest)
    if scheme in ("hub", "hf-hub"):
        return _hub(rest, scope="scheme")
    if scheme in ("local", "local-dir"):
        return _local(rest, scope="scheme")
    if scheme == "plugin":
        return _from_plugin(name, rest)
    hint = did_you_mean(scheme, _SCHEMES) or f"schemes: {', '.join(_SCHEMES)}"
    raise UsageError(f"unknown scheme '{scheme}:' in '{name}'", hint)


# --- local folders


def _local(text: str, scope: str) -> Resolved:
    """A path is taken literally where it exists; otherwise what follows the last `#` is the component."""
    path, component = _existing(text), None
    if path is None and "#" in text:
        front, _, component = text.rpartition("#")
        path = _existing(front)
    if path is None:
        raise NotFoundError(f"no folder '{text}'", _path_hint(text))
    return Resolved(kind="local", name=str(path), scope=scope, path=path, component=component or None)


def _existing(text: str) -> Path | None:
    path = Path(os.path.expanduser(text)) if text else None
    try:
        return path if path and path.exists() else None
    except (OSError, ValueError):
        return None


def _path_hint(text: str) -> str:
    folder, _, last = text.rstrip("/").rpartition("/")
    try:
        near = did_you_mean(last, os.listdir(os.path.expanduser(folder or ("/" if text.startswith("/") else "."))))
    except OSError:
        near = None
    return near or "check the path; a path never falls through to the Hub (write 'hub:org/name' for that)"


# --- the Hub


def _hub(text: str, scope: str, name: str | None = None) -> Resolved:
    plain, component = _cut(text, "#")
    repo_id, revision = _cut(plain, "@")
    if not _REPO.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith(".git"):
        raise UsageError(f"'{repo_id}' is not a Hub repository", "expected org/name, as in 'hub:org/name@revision'")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"'{revision}' in '{text}' is not a revision", "expected a branch, tag or commit after '@'")
    return Resolved(
        kind="hub",
        name=name or plain,
        scope=scope,
        repo_id=repo_id,
        revision=revision,
        commit=revision if revision and _COMMIT.fullmatch(revision) else None,
        component=component,
    )


def _cut(text: str, mark: str) -> tuple[str, str | None]:
    front, found, back = text.partition(mark)
    if found and not back:
        raise UsageError(f"nothing follows '{mark}' in '{text}'", "expected [scheme:]name[@revision][#component]")
    return front, back if found else None


def _from_hf_uri(name: str, rest: str) -> Resolved:
    """`hf://[models/]org/name[@revision][#component]`."""
    from urllib.parse import unquote

    if not rest.startswith("//"):
        raise UsageError(f"'{name}' is not an hf:// address", "expected hf://org/name or hub:org/name")
    path = rest[2:].removeprefix("models/")
    if path.startswith(("datasets/", "spaces/", "buckets/")):
        raise UsageError(f"'{name}' is not a model repository", "only models can be loaded")
    plain, component = _cut(path, "#")
    repo, at, tail = plain.partition("@")
    if not at and repo.count("/") > 1:
        raise UsageError(f"'{name}' names a file inside a repository", "name the repository: hf://org/name")
    revision = f"@{unquote(tail)}" if at else ""
    return _hub(f"{repo}{revision}" + (f"#{component}" if component else ""), scope="scheme")


def _from_url(name: str) -> Resolved:
    """A page of the Hub: `https://huggingface.co/org/name[/tree/revision]`."""
    from urllib.parse import unquote, urlsplit

    try:
        url = urlsplit(name)
        endpoint = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError:
        raise UsageError(f"'{name}' is not a valid address") from None
    if url.netloc not in (*_HOSTS, endpoint.netloc):
        raise UsageError(
            f"'{name}' is not an address of the Hugging Face Hub", f"hosts: {_HOSTS[0]}, or the one HF_ENDPOINT names"
        )
    parts = [unquote(part) for part in url.path.removeprefix(endpoint.path.rstrip("/")).split("/") if part]
    if parts[:1] == ["models"]:
        parts = parts[1:]
    if parts[:1] in (["datasets"], ["spaces"]) or len(parts) < 2:
        raise UsageError(f"'{name}' is not the address of a model", f"expected https://{url.netloc}/org/name")
    repo, verb, revision = "/".join(parts[:2]), parts[2:3], "/".join(parts[3:])
    if verb and (verb[0] not in ("tree", "commit") or not revision):
        raise UsageError(f"'{name}' is not the address of a model", f"expected https://{url.netloc}/{repo}")
    text = repo + (f"@{revision}" if verb else "") + (f"#{url.fragment}" if url.fragment else "")
    return _hub(text, scope="scheme")


def _pinned(found: Resolved) -> str | None:
    """The commit mmhub.lock gives a name, provided that it still means what it meant then."""
    pin = read_lock().get(found.name)
    if pin is None:
        return None
    repo, at, revision = pin.ref.removeprefix("hub:").partition("@")
    same = repo == found.repo_id and (not at or revision == found.revision)
    return pin.commit if same else None


# --- registered names


def _registered(name: str, registries: Registries) -> Resolved:
    plain, component = _cut(name, "#")
    bare, revision = _cut(plain, "@")
    found = definitions(bare, registries)
    if not found:
        raise _unknown(bare, registries)
    same_scope = [named for named in found if named.scope == found[0].scope]
    if len(same_scope) > 1:
        owners = " and ".join(named.owner for named in same_scope)
        raise PluginError(f"the model '{bare}' is provided by {owners}", f"write 'plugin:{found[0].owner}/{bare}'")
    return _follow(found[0], revision, component)


def _from_plugin(name: str, rest: str) -> Resolved:
    """`plugin:distribution/name[@revision][#component]`."""
    plain, component = _cut(rest, "#")
    path, revision = _cut(plain, "@")
    owner, slash, bare = path.partition("/")
    if not slash or not bare:
        raise UsageError(f"'{name}' names no plugin model", "expected plugin:distribution/name")
    plugin = newer_index(get_index()).plugin(owner)
    if plugin is None:
        requirement = read_registries().plugin_requirement(owner)
        hint = install_line([requirement]) if requirement else did_you_mean(owner, _plugin_names())
        raise PluginError(f"the plugin {owner} is not installed", hint or "see `mmhub plugins ls`")
    if plugin.status != "ok":
        hint = f"see `mmhub plugins show {plugin.distribution}`"
        raise PluginError(f"{plugin} is {plugin.status}: {plugin.problem}", hint)
    for key, entry in plugin.models.items():
        if bare == key or bare in entry.aliases:
            named = Named(name=key, entry=entry, scope="plugins", source=plugin.manifest, owner=plugin.distribution)
            return _follow(named, revision, component)
    hint = did_you_mean(bare, plugin.models) or f"models: {', '.join(plugin.models) or 'none'}"
    raise NotFoundError(f"{plugin} provides no model '{bare}'", hint)


def _plugin_names() -> list[str]:
    return [plugin.distribution for plugin in get_index().plugins]


def _follow(named: Named, revision: str | None, component: str | None) -> Resolved:
    """Turn an entry into what it refers to; `revision` and `component` as the user wrote them win over the entry's."""
    entry, key = named.entry, named.name if revision is None else f"{named.name}@{revision}"
    if entry.compose:
        if revision or component:
            raise UsageError(f"'{named.name}' is a composition, which has no revision and no #component")
        target = Resolved(kind="compose", name=key, scope=named.scope)
    else:
        target = _follow_ref(named, key)
    if revision is not None:
        if target.kind != "hub":
            raise UsageError(f"'{named.name}' is a local folder, which has no revision")
        target = _hub(f"{target.repo_id}@{revision}", target.scope, name=key)
    elif entry.commit:
        target = replace(target, commit=entry.commit)
    part = component or target.component
    return replace(target, scope=named.scope, source=named.source, entry=entry, component=part)


def _follow_ref(named: Named, key: str) -> Resolved:
    ref = named.entry.ref
    scheme, _, rest = ref.partition(":")
    where = f"{named.source}: [models.{named.name}]"
    try:
        if scheme in ("local", "local-dir"):
            return _local(_beside(named.source, rest), named.scope)
        if ref.startswith((".", "/", "~")):
            return _local(_beside(named.source, ref), named.scope)
        if scheme in ("hub", "hf-hub"):
            return _hub(rest, named.scope, name=key)
        if scheme in ("hf", "https", "http"):
            found = _from_url(ref) if scheme != "hf" else _from_hf_uri(ref, rest)
            return replace(found, name=key)
        if ref.count("/") == 1 and ":" not in ref:
            return _hub(ref, named.scope, name=key)
    except MmhubError as error:
        raise type(error)(f"{where}: ref: {error.message}", error.hint) from None
    raise UsageError(
        f"{where}: ref {ref!r} names neither a repository nor a folder", "expected hub:org/name or local:./folder"
    )


def _beside(source: str, path: str) -> str:
    """A relative path in a registry starts at the registry's own folder."""
    return os.path.join(os.path.dirname(source), os.path.expanduser(path))


def _unknown(bare: str, registries: Registries) -> PluginError | NotFoundError:
    requirement = registries.requirement(f"model:{bare}")
    if requirement:
        return PluginError(f"the model '{bare}' comes with a plugin that is not installed", install_line([requirement]))
    if os.path.exists(bare):
        return NotFoundError(f"no model is registered as '{bare}'", f"for the local folder write './{bare}'")
    known = [word for named in registries.named() for word in (named.name, *named.entry.aliases)]
    return NotFoundError(f"no model is registered as '{bare}'", did_you_mean(bare, known) or _elsewhere(known))


def _elsewhere(known: Sequence[str]) -> str:
    ls = "see `mmhub models ls`, or " if known else ""
    return f"{ls}write 'org/name' for a Hub repository, './folder' for a local one"
