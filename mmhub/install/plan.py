"""What an installation would change, and whether it may: resolved under constraints that hold what others need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from packaging.version import InvalidVersion, Version

from mmhub.errors import MmhubError, NotFoundError, PluginError, TrustError, UsageError, did_you_mean
from mmhub.install.environment import Installed, broken_by, installed, meets
from mmhub.install.pins import Pin
from mmhub.install.request import Request, check_name, known_plugins
from mmhub.install.tools import Tool, Unsolvable
from mmhub.records import CORE, canonical
from mmhub.registry import read_registries

COOL_DOWN = timedelta(days=7)
_LINES = 3  # of what would break, in one message
_UNKNOWN = "(built when installed)"
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One distribution that comes (`old` is ''), goes (`new` is ''), or changes; `pin` says what comes."""

    name: str
    old: str = ""
    new: str = ""
    pin: Pin | None = None
    trust: str = ""

    def line(self) -> str:
        """Return it as a line of a diff."""
        if not self.new:
            return f"- {self.name} {self.old}"
        versions = f"{self.old} -> {self.new}" if self.old else self.new
        versions = f"{self.new} again" if self.old == self.new else versions
        pin = self.pin
        uploaded = f"uploaded {pin.uploaded}" if pin and pin.uploaded else ""
        origin = f"from {pin.public_url}" if pin and pin.kind != "index" else ""
        about = ", ".join(filter(None, [self.trust, uploaded, origin]))
        return f"{'~' if self.old else '+'} {self.name} {versions}" + (f"  ({about})" if about else "")

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        pin = self.pin or Pin(name=self.name)
        action = "remove" if not self.new else "update" if self.old else "install"
        origin = {"source": pin.kind, "url": pin.public_url, "sha256": pin.sha256, "uploaded": pin.uploaded}
        row = {"name": self.name, "action": action, "old": self.old, "new": self.new, "trust": self.trust}
        return row | (origin if self.new else {})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The changes, what the user asked for by name, and the distributions that go."""

    changes: tuple[Change, ...]
    names: tuple[str, ...] = ()
    leaving: tuple[Installed, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)  # name: requirement to remember
    source: bool = False

    @property
    def pins(self) -> list[Pin]:
        return [change.pin for change in self.changes if change.pin]


def make_plan(request: Request, tool: Tool, note: Note) -> Plan:
    """Resolve a request and check the result against the policies.

    Raises:
        PluginError: something protected would move; names it, and the options that allow it.
        TrustError: a name, hash or upload date is suspicious. NotFoundError, NetworkError, MmhubError.
    """
    registries, dists = read_registries(), installed()
    for name in sorted(request.allowed - set(dists)):
        raise UsageError(f"--allow-change {name}: it is not installed", did_you_mean(name, dists))
    for name, line in request.names.items():
        if " @ " not in line and name not in dists:
            check_name(name, known_plugins(registries))
    pins = [pin for pin in _resolve(request, tool, dists, note) if not _in_place(pin, dists)]
    if not request.fresh and not tool.cools() and any(pin.kind == "index" for pin in pins):
        note(f"{tool.name} {'.'.join(map(str, tool.version))} cannot hold back uploads of the last 7 days (pip 26 can)")
    plan = _plan(pins, request, dists)
    check_moves(plan, request.allowed, dists, requested=request.names)
    _check_pins(pins, dists)
    return plan


def check_moves(
    plan: Plan, allowed: Iterable[str], dists: Mapping[str, Installed], requested: Iterable[str] = ()
) -> None:
    """Refuse a plan that moves what is protected; `requested` plugins may move.

    Raises:
        PluginError: with the options that allow it. Its hint is shown after the diff.
    """
    free = {*allowed, *(name for name in requested if name in dists and dists[name].plugin)}
    moved = [one for one in plan.changes if one.old and one.name not in free and dists[one.name].protected]
    broken = {line: name for line, name in _newly_broken(plan, dists).items() if name not in free}
    if not moved and not broken:
        return
    named = [f"{one.name} {one.old} -> {one.new or 'nothing'}" for one in moved]
    what = f"it would move what others need: {', '.join(named)}" if named else "it would break what is installed"
    options = " ".join(f"--allow-change {name}" for name in sorted({*(one.name for one in moved), *broken.values()}))
    lines = [*list(broken)[:_LINES], *([f"and {len(broken) - _LINES} more"] if len(broken) > _LINES else [])]
    raise PluginError("; ".join([what, *lines]), f"nothing was changed; to have it all the same: {options}")


def warnings(plan: Plan, dists: Mapping[str, Installed]) -> list[str]:
    """Return what a plan breaks although it is allowed."""
    return list(_newly_broken(plan, dists))


def _newly_broken(plan: Plan, dists: Mapping[str, Installed]) -> dict[str, str]:
    changing = {change.name for change in plan.changes}
    staying = [one for one in dists.values() if one.name not in changing]
    already = broken_by({name: one.version for name, one in dists.items()}, staying)
    found = broken_by(_versions(plan, dists), staying)
    return {line: name for line, name in found.items() if name in changing and line not in already}


def make_changes(pins: Sequence[Pin], dists: Mapping[str, Installed]) -> tuple[Change, ...]:
    """Return what installing `pins` changes, sorted by name."""
    known = known_plugins(read_registries())
    changes = []
    for pin in sorted(pins, key=lambda pin: pin.name):
        old = dists[pin.name].version if pin.name in dists and dists[pin.name].own else ""
        trust = known[pin.name].trust if pin.name in known else "in no registry" if _is_named_so(pin) else ""
        changes.append(Change(name=pin.name, old=old, new=pin.version or _UNKNOWN, pin=pin, trust=trust))
    return tuple(changes)


def _is_named_so(pin: Pin) -> bool:
    return pin.name.startswith(f"{CORE}-")


def _plan(pins: Sequence[Pin], request: Request, dists: Mapping[str, Installed]) -> Plan:
    direct = {pin.name: pin for pin in pins if pin.kind != "index"}
    asked = dict(request.names)
    for name, pin in direct.items():
        if name not in asked and (f"-e {pin.url}" in request.lines or pin.url in request.lines):
            asked[name] = replace(pin, sha256="").line()
    leaving = tuple(dists[pin.name] for pin in pins if pin.name in dists and dists[pin.name].own)
    changes = make_changes(pins, dists)
    return Plan(changes=changes, names=tuple(asked), leaving=leaving, asked=asked, source=request.source)


def _resolve(request: Request, tool: Tool, dists: Mapping[str, Installed], note: Note) -> list[Pin]:
    before = "" if request.fresh else (datetime.now(UTC) - COOL_DOWN).strftime("%Y-%m-%dT%H:%M:%SZ")
    limits = constraints(dists, request)
    try:
        return tool.resolve(request, limits, before)
    except (Unsolvable, NotFoundError, TrustError) as error:
        undated = _without_dates(request, tool, limits, before, error) if before and tool.cools() else None
        if undated is not None:
            note("this index gives no upload dates, so that very new uploads could not be held back")
            return undated
        if not isinstance(error, Unsolvable):
            raise
        said = str(error)
    try:
        pins = tool.resolve(request, (), before)
    except Unsolvable as error:
        raise PluginError(f"no set of versions fits: {error}", "nothing was changed") from None
    raise _refusal([pin for pin in pins if not _in_place(pin, dists)], request, dists, said)


class Refused(PluginError):
    """A protected distribution would move; `plan` is what would have to change."""

    def __init__(self, plan: Plan, message: str, hint: str | None) -> None:
        super().__init__(message, hint)
        self.plan = plan


def _refusal(pins: list[Pin], request: Request, dists: Mapping[str, Installed], said: str) -> MmhubError:
    plan = _plan(pins, request, dists)
    try:
        check_moves(plan, request.allowed, dists, requested=request.names)
    except PluginError as error:
        return Refused(plan, error.message, error.hint)
    return PluginError(f"no set of versions fits beside what is installed: {said}", "nothing was changed")


def _without_dates(
    request: Request, tool: Tool, limits: Sequence[str], before: str, error: Exception
) -> list[Pin] | None:
    """Resolve without a cool-down what failed with it: an index without dates is no reason to refuse.

    Returns None where that fails, too.

    Raises:
        TrustError: what would be installed is too new.
    """
    try:
        pins = tool.resolve(request, limits, "")
    except (Unsolvable, MmhubError):
        return None
    day = before.partition("T")[0]
    young = [f"{pin.name} {pin.version}" for pin in pins if pin.uploaded > day]
    says_so = tool.name == "uv" or "upload-time" in f"{error} {error.__cause__}"  # pip reports no dates, but their lack
    if not young and says_so:
        return pins
    young = young or [f"{pin.name} {pin.version}" for pin in pins if pin.name in request.names]
    raise TrustError(
        f"uploaded less than 7 days ago: {', '.join(young) or 'what it needs'}",
        "very new uploads are held back, as most malicious ones are found within days; --fresh takes them",
    )


def constraints(dists: Mapping[str, Installed], request: Request) -> list[str]:
    """Return constraint lines: protected distributions stay, and met requirements of all that is installed stay met."""
    free = {*request.allowed, *(name for name in request.names if name in dists and dists[name].plugin)}
    held = {one.name: one for one in dists.values() if one.protected and one.name not in free}
    lines = {f"{name}=={one.version}" for name, one in held.items() if _is_version(one.version)}
    for dist in dists.values():
        for need in dist.requires if dist.name not in request.names else ():
            name = canonical(need.name)
            if name in held or name in free or name not in dists or not need.specifier:
                continue
            if meets(dists[name].version, need):
                lines.add(f"{name}{need.specifier}")
    return sorted(lines)


def _is_version(text: str) -> bool:
    try:
        return bool(Version(text))
    except InvalidVersion:  # conda and old tools have others, which no resolver takes
        return False


def _check_pins(pins: Sequence[Pin], dists: Mapping[str, Installed]) -> None:
    known = known_plugins(read_registries())
    for pin in pins:
        wanted = known[pin.name].sha256 if pin.name in known else ""
        if wanted and pin.sha256 != wanted.removeprefix("sha256:"):
            raise TrustError(
                f"the wheel of {pin.name} {pin.version} has the hash {pin.sha256 or 'unknown'}, "
                f"and registry.toml demands {wanted}",
                "ask who wrote the registry; nothing was changed",
            )
        if pin.kind == "index" and not pin.sha256:
            raise TrustError(
                f"no index gives a hash for {pin.name} {pin.version}", "use an index that has sha256 hashes"
            )
        if pin.kind == "index" and pin.name not in dists and pin.name.startswith("mmhub-"):
            check_name(pin.name, known)


def _in_place(pin: Pin, dists: Mapping[str, Installed]) -> bool:
    """Is it installed outside this environment in the same version? uv looks into this environment alone."""
    dist = dists.get(pin.name)
    return dist is not None and not dist.own and dist.version == pin.version and pin.kind == "index"


def _versions(plan: Plan, dists: Mapping[str, Installed]) -> dict[str, str]:
    after = {name: one.version for name, one in dists.items()}
    for change in plan.changes:
        after.pop(change.name, None)
        if change.pin:
            after[change.name] = "" if change.new == _UNKNOWN else change.new
    return after
