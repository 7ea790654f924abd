"""Recognise what must never be published: keys and tokens in text, by their well-known forms or by this user's own.

A net with wide meshes, not a proof: it knows the forms below, and the values of this process's own secrets.
"""

from __future__ import annotations

import os
import re

_KINDS = {  # what to call it: (a piece that every one of them contains, the form)
    "a Hugging Face token": ("hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    "a Hugging Face organisation token": ("api_org_", r"\bapi_org_[A-Za-z0-9]{30,}"),
    "an AWS key": ("AKIA", r"\bAKIA[0-9A-Z]{16}\b"),
    "a temporary AWS key": ("ASIA", r"\bASIA[0-9A-Z]{16}\b"),
    "a GitHub token": ("gh", r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "a GitHub access token": ("github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{40,}"),
    "a GitLab token": ("glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "an API key": ("sk-", r"\bsk-[A-Za-z0-9_-]{32,}"),
    "a Slack token": ("xox", r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a Google key": ("AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
    "a private key": ("PRIVATE KEY", r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----"),
    "a web token": ("eyJ", r"\beyJ[A-Za-z0-9_-]{20,}\.eyJ[A-Za-z0-9_-]{20,}\."),
    "a password in an address": ("://", r"://[^\s/:@\"'<>]{1,64}:[^\s/:@\"'<>{}$]{3,128}@[\w.-]"),
    "a package index token": ("pypi-AgE", r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
}
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)S?($|_)")
_SHORTEST = 12  # characters of an environment variable's value that is looked for


def find_secret(text: str) -> str | None:
    """Say what the first secret in a text looks like and where it stands, without repeating it; None if there is none.

    >>> find_secret("nothing here")
    >>> find_secret("a\\nkey: " + "hf_" + "x" * 34)
    'a Hugging Face token (line 2)'
    """
    for kind, (piece, pattern) in _KINDS.items():
        found = re.search(pattern, text) if piece in text else None
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
    return {name: value for name, value in found.items() if len(value) >= _SHORTEST and not os.path.exists(value)}
