"""Recognise what must never be published: keys and tokens in text, by their well-known forms or by this user's own.

A net with wide meshes, not a proof: it knows the forms below, and the values of this process's own secrets.
"""

from __future__ import annotations

import os
import re

_GIVEN = r"[\"']{0,2}[ \t]{0,4}[:=][ \t]{0,4}[\"']{0,2}"  # between a name and its value
_NO_PASSWORD = "pass|password|passwd|pwd|pw|secret|token|user|[x*]+"
_PLACEHOLDER = re.compile(r"([xX0*])\1{15}")  # as instructions write it
_KINDS = {  # what to call it: (a piece that every one of them contains, the form)
    "a Hugging Face token": ("hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    "a Hugging Face organisation token": ("api_org_", r"\bapi_org_[A-Za-z0-9]{30,}"),
    "an AWS key": ("AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
    "a temporary AWS key": ("ASIA", r"\bASIA[0-9A-Z]{16}\b"),
    "a GitHub token": ("gh", r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "a GitHub access token": ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{40,}"),
    "a GitLab token": ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "an API key": (  # with a digit, and in one piece or with capitals: unlike what is named for scikit-learn or Slovak
        "sk-",
        r"(?<![\w-])sk-(?=[a-zA-Z_-]*[0-9])(?:[A-Za-z0-9]{32,}|(?=[a-z0-9_-]*[A-Z])(?=[A-Z0-9_-]*[a-z])[\w-]{32,})",
    ),
    "a Slack token": ("xox", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a Google key": ("AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
    "a private key": ("PRIVATE KEY", r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----"),
    "a web token": ("eyJ", r"(?<![\w-])eyJ[A-Za-z0-9_-]{20,8192}\.eyJ[A-Za-z0-9_-]{20,65536}\."),
    "a password in an address": (
        "://",
        rf"://[^\s/:@\"'<>]{{1,64}}:(?!(?i:{_NO_PASSWORD})@)[^\s/:@\"'<>{{}}$]{{3,128}}@[\w.-]",
    ),
    "an npm token": ("npm_", r"\bnpm_[A-Za-z0-9]{36}"),
    "an address of a Slack hook": (
        "hooks.slack.com/",
        r"\bhooks\.slack\.com/(?:services|workflows|triggers)/[A-Z0-9]{6,16}/[A-Z0-9]{6,20}/\w{16,64}",
    ),
    "an address of a Discord hook": (
        "/api/webhooks/",
        r"\bdiscord(?:app)?\.com/api/webhooks/[0-9]{10,25}/[\w-]{50,100}",
    ),
    "an Azure key": ("AccountKey=", r"\bAccountKey=[A-Za-z0-9+/]{40,120}"),
    "an AWS secret": ("aws_secret", rf"\baws_secret_(?:access_)?key{_GIVEN}[A-Za-z0-9/+]{{40}}(?![A-Za-z0-9/+])"),
    "an AWS secret key": ("AWS_SECRET", rf"\bAWS_SECRET_(?:ACCESS_)?KEY{_GIVEN}[A-Za-z0-9/+]{{40}}(?![A-Za-z0-9/+])"),
    "a secret key of AWS": ("ecretAccessKey", rf"ecretAccessKey{_GIVEN}[A-Za-z0-9/+]{{40}}(?![A-Za-z0-9/+])"),
    "a bearer token": (
        "Bearer ",
        rf"\b[Aa]uthorization{_GIVEN}Bearer [A-Za-z0-9._~+/-]{{20,}}",
    ),
    "a package index token": ("pypi-AgE", r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
}
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)S?($|_)")
_SHORTEST = 12  # characters of an environment variable's value that is looked for


def find_secret(text: str) -> str | None:
    """Say what the first secret in a text looks like and where it stands, without repeating it; None if there is none.

    >>> find_secret("nothing here")
    >>> find_secret("a\\nkey: " + "hf_" + "Ab1" * 12)
    'a Hugging Face token (line 2)'
    """
    for kind, (piece, pattern) in _KINDS.items():
        every = re.finditer(pattern, text) if piece in text else ()
        found = next((one for one in every if not _PLACEHOLDER.search(one[0])), None)
        if found:
            return f"{kind} (line {line_at(text, found.start())})"
    for name, value in _own_secrets().items():
        at = text.find(value)
        if at >= 0:
            return f"the value of {name} (line {line_at(text, at)})"
    return None


def line_at(text: str, at: int) -> int:
    """Return the number of the line, from 1, in which a position of a text lies."""
    return text.count("\n", 0, at) + 1


def _own_secrets() -> dict[str, str]:
    """The secrets this process was given: what its environment calls one, and the stored token."""
    from huggingface_hub import get_token

    found = {name: value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    found["the stored Hugging Face token"] = get_token() or ""
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST and not _is_public(value)}


def _is_public(value: str) -> bool:
    """Is it what names something that a setting is about: an address, a word, a file?"""
    return bool(re.fullmatch(r"[a-z]+|https?://[^\s@?]*", value)) or os.path.exists(value)
