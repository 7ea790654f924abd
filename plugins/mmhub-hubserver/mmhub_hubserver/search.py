"""What a listing of repositories asks for: `?search= &author= &filter= &pipeline_tag= &sort= ...`, checked."""

import re
from dataclasses import dataclass

from mmhub_hubserver.errors import Invalid
from mmhub_hubserver.views import Described
from mmhub_hubserver.wire import Request

_SORTS = {"createdAt": "createdAt", "lastModified": "lastModified"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_RANGE = re.compile(r"(min|max):(\d{1,15}(?:\.\d{1,6})?)([KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    text: str
    author: str
    tags: frozenset[str]
    pipeline: str
    gated: bool | None
    parameters: tuple[float, float]  # smallest and largest number of parameters
    sort: str
    hidden: frozenset[str]  # fields that a listing leaves out unless asked

    @classmethod
    def of(cls, request: Request) -> "Wanted":
        tags = [tag for name in ("filter", "library", "tags") for tag in request.values(name)]
        gated = request.option("gated")
        full = request.flag("full")
        hidden = set() if full else {"siblings", "usedStorage", "safetensors"}
        hidden |= set() if full or request.flag("cardData") else {"cardData", "model-index"}
        hidden |= set() if request.flag("config") else {"config"}
        return cls(
            text=(request.option("search") or "").lower(),
            author=(request.option("author") or "").lower(),
            tags=frozenset(part for tag in tags for part in tag.split(",") if part),
            pipeline=request.option("pipeline_tag") or "",
            gated=None if gated is None else request.flag("gated"),
            parameters=_parameters(request.option("num_parameters")),
            sort=_SORTS.get(request.option("sort") or "", "lastModified"),
            hidden=frozenset(hidden),
        )

    def name(self, repo_id: str) -> bool:
        """Say whether a repository can match, by its id alone: cheaper than to open it."""
        lower = repo_id.lower()
        return self.text in lower and (not self.author or lower.split("/")[0] == self.author)

    def matches(self, described: Described) -> bool:
        info = described.info
        if self.tags and not self.tags <= {*described.tags(), described.repo.kind.removesuffix("s")}:
            return False
        if self.pipeline and info.get("pipeline_tag") != self.pipeline:
            return False
        if self.gated is not None and bool(info["gated"]) != self.gated:
            return False
        if self.parameters == (0, float("inf")):
            return True
        weights = described.safetensors()
        return weights is not None and self.parameters[0] <= weights["total"] <= self.parameters[1]

    def order(self, described: Described) -> tuple[str, str]:
        """Return what to sort by; git knows the time of a change to the second only."""
        return str(described.info[self.sort]), str(described.info["createdAt"])


def _parameters(text: str | None) -> tuple[float, float]:
    """Read `min:6B,max:128B`."""
    limits = {"min": 0.0, "max": float("inf")}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        if (match := _RANGE.fullmatch(part.strip())) is None:
            raise Invalid("'num_parameters' is like min:500M,max:7B.")
        limits[match[1].lower()] = float(match[2]) * _UNITS[match[3].upper()]
    return limits["min"], limits["max"]
