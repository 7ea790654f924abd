"""RESULTS.md: the newest whole run of each mode, one row each, and why tests fail. `run.py --record` writes it."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("huggingface-hub", "hf-xet", "dulwich", "pytest")
_HEAD = """# huggingface_hub's own tests against `mmhub hub serve`

Written by `run.py --record`. An *error* is a test whose preparation failed, mostly because it makes something that this
hub does not have. The last column is the JavaScript client, which is run with `--npm`.

| mode | date | commit | versions | command | passed | failed | errors | skipped | @huggingface/hub |
|---|---|---|---|---|---:|---:|---:|---:|---|
"""
_WHY = """
## What fails, and why

Each test is named in `out_of_scope.txt`; another one that fails makes the run fail.

| tests | reason |
|---:|---|
"""


def write(path: Path, *, mode: str, options: str, counts: Sequence[int], npm: str, reasons: Mapping[str, int]) -> None:
    """Replace the row of this mode, and the reasons."""
    old = path.read_text().splitlines() if path.exists() else []
    rows = {line.split(" | ")[0].strip("| "): line for line in old if line.startswith(("| Xet |", "| LFS |"))}
    today = datetime.now(UTC).date().isoformat()
    facts = [mode, today, f"`{_commit(path.parent)}`", _versions(), f"`run.py{options}`", *map(str, counts), npm]
    rows[mode] = f"| {' | '.join(facts)} |"
    table = "\n".join(rows[name] for name in ("Xet", "LFS") if name in rows)
    why = "\n".join(f"| {count} | {reason} |" for reason, count in sorted(reasons.items()))
    path.write_text(f"{_HEAD}{table}\n{_WHY}{why}\n")


def _commit(folder: Path) -> str:
    """Return the short id of the commit, marked where the working tree differs from it, but for the results."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)**/RESULTS.md")
    return (git("rev-parse", "--short=7", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _versions() -> str:
    found = [f"python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
