"""What a model comes from: the checkpoints its weights started from, and the code that trained it.

Each fact pins something that can be looked up again, and none holds a path or an address of this machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from mmhub.hashes import sha256_of
from mmhub.names import Resolved

_GIT_SECONDS = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def parent_of(resolved: Resolved, found: Path, part: str) -> dict[str, str]:
    """Describe what a part's weights start from: a resolved name, and the folder or file it led to.

    A Hub name has its repository and commit; anything local the last part of its path and a sha256 over its files.
    """
    facts = {"part": part}
    if resolved.kind == "hub":
        component = f"#{resolved.component}" if resolved.component else ""
        facts |= {"name": f"{resolved.repo_id}{component}", "repo": resolved.repo_id or ""}
        return facts | ({"commit": found.name} if _COMMIT.fullmatch(found.name) else {})
    component = f"#{resolved.component}" if resolved.component else ""
    return facts | {"name": found.name + component, "sha256": digest(found)}


def digest(found: Path) -> str:
    """Return the hash of a file; of a folder, the hash over the names and hashes of its configuration and weights."""
    if found.is_file():
        return sha256_of(found)
    lines = hashlib.sha256()
    for path in sorted([*found.glob("*.safetensors"), *found.glob("*/*.safetensors"), *found.glob("config.json")]):
        lines.update(f"{sha256_of(path)}  {path.relative_to(found).as_posix()}\n".encode())
    return lines.hexdigest()


def code_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the git repository around `folder`, and whether tracked files differ; None outside of one.

    Only asks; no command that the repository itself configures is run, for it may have been downloaded.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not _COMMIT.fullmatch(commit):
        return None
    filters = _filters(folder)
    if filters is None:
        return {"commit": commit, "dirty": None}
    quiet = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    changed = _git(folder, *(part for name in filters for part in ("-c", f"{name}=")), *quiet)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _filters(folder: Path) -> list[str] | None:
    """The keys of commands by which the repository wants file contents to pass, None if they cannot be read."""
    found = _git(folder, "config", "--includes", "--show-scope", "--list", "--name-only")
    if found is None:
        return None
    lines = (line.partition("\t") for line in found.splitlines())
    local = (key for scope, _, key in lines if scope in ("local", "worktree"))
    return [key for key in local if re.fullmatch(r"filter\..+\.(clean|smudge|process|required)", key)]


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", "-c", "core.fsmonitor=false"]
    command += ["-c", f"core.hooksPath={os.devnull}", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
