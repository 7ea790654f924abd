"""Find models: those registries name, mmhub's on the Hub, and those in the cache, as one list without duplicates."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmhub import interfaces
from mmhub.errors import NetworkError
from mmhub.hub.cache import Cached, as_table, checkpoints
from mmhub.hub.client import endpoint, hub_errors, is_offline, request_address, request_headers
from mmhub.hub.readme import read_card, strings
from mmhub.names import repository_of
from mmhub.plugins import get_index
from mmhub.registry import Named, Registries
from mmhub.requirements import Unmet, unmet_requirements

TASKS = (
    "classification", "multilabel", "regression", "tagging", "question-answering", "language-modelling", "translation",
    "speech-recognition", "retrieval", "captioning", "visual-question-answering", "chat", "embedding",
)  # fmt: skip
_MODALITIES = ("text", "image", "audio")
_EXPAND = (
    "cardData", "downloads", "gated", "lastModified", "library_name", "pipeline_tag", "private", "safetensors", "sha",
    "tags", "usedStorage",
)  # fmt: skip
_DTYPE_BITS = re.compile(r"[A-Z_]+?(\d+)")
LISTED = 1000  # models of one request
SECONDS = 20.0  # that a Hub may take for all of its answer
_PAGE_BYTES = 64 * 2**20


@dataclass(kw_only=True)
class Hit:
    """One model that was found. Sizes are bytes of weights; None or empty means that nobody says.

    `name` is what to write in a command; `sources` lists where it was found: scopes of registries, "hub", "cache".
    """

    name: str
    repo_id: str = ""
    sources: list[str] = field(default_factory=list)
    task: str = ""
    modalities: list[str] = field(default_factory=list)
    license: str = ""
    size: int | None = None
    requires: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    downloads: int | None = None
    updated: str = ""
    revision: str = ""
    commit: str = ""
    summary: str = ""
    tags: list[str] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    gated: bool = False
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to look for; empty fields ask for nothing. Sizes in bytes."""

    query: str = ""
    task: str = ""
    modalities: tuple[str, ...] = ()
    license: str = ""
    max_size: int | None = None
    plugin: str = ""


def merge(found: Iterable[Hit]) -> list[Hit]:
    """Join hits that are one repository: what the first says stays, and the others fill in what it does not."""
    merged: list[Hit] = []
    by_repo: dict[str, list[Hit]] = {}
    names: set[str] = set()
    for hit in found:
        known = by_repo.get(hit.repo_id, []) if hit.repo_id else []
        if known and hit.name == hit.repo_id:
            for one in known:
                _fill(one, hit)
        elif hit.name not in names:  # a nearer scope hides it
            merged.append(hit)
            names.add(hit.name)
            if hit.repo_id:
                by_repo.setdefault(hit.repo_id, []).append(hit)
    return merged


def _fill(hit: Hit, other: Hit) -> None:
    keys = ["task", "modalities", "downloads", "summary"]
    if other.commit == hit.commit or not (hit.commit or hit.revision):  # else it may have another licence by now
        keys += ["license", "size", "requires", "missing", "updated"]
    for key in keys:
        if getattr(hit, key) in ("", [], None):
            setattr(hit, key, getattr(other, key))
    hit.sources += [source for source in other.sources if source not in hit.sources]
    hit.tags = list(dict.fromkeys([*hit.tags, *other.tags]))
    hit.gated, hit.private = hit.gated or other.gated, hit.private or other.private


def select(hits: Iterable[Hit], wanted: Wanted) -> tuple[list[Hit], int]:
    """Return what matches, best first, and how many matched but for a size that nobody says."""
    unsized = 0
    kept = []
    for hit in hits:
        rank = _rank(hit, wanted.query)
        if rank is None or not _fits(hit, wanted):
            continue
        if wanted.max_size is not None and hit.size is None:
            unsized += 1
        elif wanted.max_size is None or (hit.size or 0) <= wanted.max_size:
            kept.append((rank, hit))
    kept.sort(key=lambda pair: (pair[0], *_order(pair[1])))
    return [hit for _, hit in kept], unsized


def _fits(hit: Hit, wanted: Wanted) -> bool:
    task, license, plugin = wanted.task.lower(), wanted.license.lower(), wanted.plugin.lower().replace("_", "-")
    return (
        (not task or task in {hit.task.lower(), *(tag.lower() for tag in hit.tags)})
        and set(wanted.modalities) <= {*hit.modalities, *hit.tags}  # a plugin's own modality is a tag like any other
        and (not license or license == hit.license.lower())
        and (not plugin or plugin in {distribution(one) for one in hit.requires})
    )


def _rank(hit: Hit, query: str) -> int | None:
    """How well a hit answers a query, 0 best, None not at all: every word must stand somewhere."""
    words = query.lower().split()
    if not words:
        return 0
    names = [name.lower() for name in (hit.name, hit.repo_id, *hit.aliases) if name]
    text = " ".join([*names, hit.task, hit.summary, *hit.tags]).lower()
    if not all(word in text for word in words):
        return None
    whole, shorts = " ".join(words), [name.rpartition("/")[2] for name in names]
    if whole in names or whole in shorts:
        return 0
    if any(name.startswith(whole) for name in (*names, *shorts)):
        return 1
    return 2 if any(all(word in name for word in words) for name in names) else 3


_SCOPES = ("project", "user", "plugins", "shipped")


def _order(hit: Hit) -> tuple[Any, ...]:
    """Registered names first, in the order in which they are looked up; then what people use, then what is new."""
    scope = min((_SCOPES.index(source) for source in hit.sources if source in _SCOPES), default=len(_SCOPES))
    age = [-ord(letter) for letter in hit.updated]
    return scope, -(hit.downloads or 0), "cache" not in hit.sources, age or [0], hit.name


def distribution(requirement: str) -> str:
    """Return the distribution that a requirement names."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


# --- registries


def from_registries(registries: Registries) -> list[Hit]:
    """Return every registered name."""
    return [_registered(named) for named in registries.named()]


def _registered(named: Named) -> Hit:
    entry = named.entry
    requires = list(entry.requires)
    repo_id, revision = repository_of(named)
    task = entry.task or str(entry.compose.get("task", ""))
    encoders = [f"{one}_encoder" for one in as_table(entry.compose.get("encoders"))]
    return Hit(
        name=named.name,
        repo_id=repo_id,
        sources=[named.scope],
        task=task,
        modalities=read_modalities(encoders, task),
        license=entry.license,
        requires=requires,
        missing=missing(requires),
        revision=revision,
        commit=entry.commit,
        summary=entry.summary,
        aliases=list(entry.aliases),
    )


def missing(requirements: Sequence[str]) -> list[str]:
    """Return those of `requirements` that this environment does not meet, each with the reason."""
    from packaging.requirements import InvalidRequirement, Requirement

    records = []
    for text in requirements:
        try:
            parsed = Requirement(text)
        except InvalidRequirement:
            continue
        records.append({"distribution": parsed.name, "specifier": str(parsed.specifier)})
    return [unmet_text(one) for one in unmet_requirements(records, get_index())]


def unmet_text(unmet: Unmet) -> str:
    """Return 'mmhub-image >=1 (not installed)'."""
    return f"{unmet.distribution} {unmet.specifier}".strip() + f" ({unmet.problem})"


# --- the cache


def from_cache() -> list[Hit]:
    """Return the mmhub checkpoints cached for the current endpoint."""
    return [_cached(one) for one in checkpoints()]


def _cached(one: Cached) -> Hit:
    card = read_card(one.path)
    requires = [
        f"{record['distribution']}{record.get('specifier', '')}"
        for record in _records(one.config.get("requires"))
        if isinstance(record.get("distribution"), str)
    ]
    sizes = [as_table(record).get("bytes") for record in as_table(one.config.get("files")).values()]
    return Hit(
        name=one.repo_id,
        repo_id=one.repo_id,
        sources=["cache"],
        task=_text(one.config.get("task")),
        modalities=modalities_of(one.config),
        license=card.license,
        size=sum(size for size in sizes if isinstance(size, int)) if sizes else None,
        requires=requires,
        missing=missing(requires),
        commit=one.commit,
        summary=card.summary,
        tags=card.tags,
    )


def modalities_of(config: Mapping[str, Any]) -> list[str]:
    """Return the modalities that the model of a config.json takes."""
    return read_modalities(as_table(config.get("components")), config.get("task"))


def read_modalities(roles: Iterable[str], task: object) -> list[str]:
    """Return what is read by components of these roles: by the encoders, and by the decoder of a language model."""
    served = interfaces.TASKS
    own = ["text"] if isinstance(task, str) and task in served and served[task].reads_text else []
    found = [role.removesuffix("_encoder") for role in roles if role.endswith("_encoder")]
    return list(dict.fromkeys([*own, *found]))


# --- the Hub


def from_hub(query: str = "") -> list[Hit]:
    """Return mmhub's models on the Hub, the most downloaded first; beyond the first thousand only names are searched.

    Raises:
        NetworkError: it cannot be reached, or does not answer as a Hub does.
    """
    rows = _list({"filter": "mmhub", "sort": "downloads", "limit": LISTED})
    if query and len(rows) >= LISTED:
        words = max(query.split(), key=len)  # a Hub compares the whole text with the name
        rows += _list({"filter": "mmhub", "sort": "downloads", "limit": LISTED, "search": words})
    return merge(hit for row in rows if (hit := _published(row)))


def _list(query: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Ask for a list once, with a deadline: `HfApi.list_models` waits for ever, and tries again for half a minute."""
    if is_offline():
        raise NetworkError("HF_HUB_OFFLINE is set", "unset it to search the Hub")
    address, params = f"{request_address()}/api/models", {**query, "expand": list(_EXPAND)}
    until = time.monotonic() + SECONDS
    rows: list[dict[str, Any]] = []
    with hub_errors("the list of models"):
        while len(rows) < query["limit"]:
            page, address = _page(address, params, until)
            rows += [row for row in page if isinstance(row, dict)]
            params = {}
            if not address.startswith(f"{endpoint()}/"):  # there is no next page, or it would get our token elsewhere
                break
            address = request_address() + address.removeprefix(endpoint())
    return rows[: query["limit"]]


def _page(address: str, params: Mapping[str, Any], until: float) -> tuple[list[Any], str]:
    """One page of a list, and the address of the next."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    options: dict[str, Any] = {"headers": request_headers(), "timeout": SECONDS / 2}
    if params:
        options["params"] = params
    content = bytearray()
    with get_session().stream("GET", address, **options) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            content += block
            if time.monotonic() > until or len(content) > _PAGE_BYTES:
                raise NetworkError(f"{endpoint()} does not end its answer", "try again later, or check HF_ENDPOINT")
        following = response.links.get("next", {}).get("url", "")
    try:
        page = json.loads(content)
    except (ValueError, RecursionError):
        page = None
    if not isinstance(page, list):
        raise NetworkError(f"{endpoint()} does not answer as a Hub does", "check HF_ENDPOINT")
    return page, following


def _published(row: Mapping[str, Any]) -> Hit | None:
    name = _text(row.get("id"))
    if not name:
        return None
    card = as_table(row.get("cardData"))
    tags = strings(row.get("tags"))
    license = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")
    plugins = [tag for tag in tags if tag.startswith("mmhub-")]
    return Hit(
        name=name,
        repo_id=name,
        sources=["hub"],
        task=next((tag for tag in tags if tag in TASKS), _text(row.get("pipeline_tag"))),
        modalities=[tag for tag in tags if tag in _MODALITIES],
        license=_text(card.get("license_name")) or _text(card.get("license")) or license,
        size=_weights(row.get("safetensors")) or _number(row.get("usedStorage")),
        requires=plugins,
        missing=missing(plugins),
        downloads=_number(row.get("downloads")),
        updated=_text(row.get("lastModified")),
        commit=_text(row.get("sha")),
        summary=_text(card.get("summary")) or _text(card.get("description")),
        tags=[*tags, *(text for key in ("datasets", "language") for text in strings(card.get(key)))],
        gated=bool(row.get("gated")),
        private=bool(row.get("private")),
    )


def _weights(safetensors: Any) -> int | None:
    """The bytes of `{"parameters": {"F32": count}}`."""
    total = 0
    for dtype, count in as_table(as_table(safetensors).get("parameters")).items():
        bits = _DTYPE_BITS.match(str(dtype))
        total += (int(bits[1]) if bits else 8) * (_number(count) or 0) // 8
    return total or None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
