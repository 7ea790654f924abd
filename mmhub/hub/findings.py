"""What was found in something that is to be published: what forbids it, what its owner should know, and the refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmhub.errors import TrustError, UsageError

Kind = Literal["damage", "link", "secret", "path", "licence", "statement", "overlap"]
_OF_FILES = ("damage", "link", "secret", "path")
_TRUST = (*_OF_FILES, "overlap")
_SHOWN = 20  # names in one message


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        message, hint: what it is, and what to do. public: the same without what must not be published itself.
        severity: does it forbid publishing? forceable: not if its owner insists. forced: that is what happened.
    """

    kind: Kind
    message: str
    hint: str
    severity: Literal["refuse", "note"] = "refuse"
    forceable: bool = False
    forced: bool = False
    public: str = ""

    def table(self) -> dict[str, Any]:
        """Return it as JSON shows it."""
        shown = {"kind": self.kind, "message": self.message, "hint": self.hint, "severity": self.severity}
        return shown | {"forceable": self.forceable, "forced": self.forced}


class Untrusted(TrustError):
    """Something may not be published as it is; `findings` are all that was found."""

    findings: tuple[Finding, ...] = ()


class Unstated(UsageError):
    """Something may not be published without being told more; `findings` are all that was found."""

    findings: tuple[Finding, ...] = ()


def refusal(where: str, found: Sequence[Finding], left_out: Sequence[str] = ()) -> Untrusted | Unstated:
    """Return the error that names all that forbids publishing the folder `where`.

    It is a TrustError, or a UsageError where nothing but the licence or a statement is missing.
    """
    refused = [one for one in found if one.severity == "refuse"]
    error = Untrusted if any(one.kind in _TRUST for one in refused) else Unstated
    insist = ', or insist with --force "WHY"' if all(one.forceable for one in refused) else ""
    if len(refused) == 1 and refused[0].kind not in _OF_FILES:
        made = error(refused[0].message, refused[0].hint + insist)
    else:
        texts = [one.message + ("" if one.kind in _OF_FILES else f" ({one.hint})") for one in refused]
        also = f"; never sent are {listed(left_out)}" if left_out else ""
        hint = f"correct {'it' if len(refused) == 1 else 'them'}, then push again{insist}"
        made = error(f"nothing of '{where}' was sent: {'; '.join(texts)}{also}", hint)
    made.findings = tuple(found)
    return made


def listed(names: Sequence[str]) -> str:
    """Name files in a message, not more than a screen takes."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
