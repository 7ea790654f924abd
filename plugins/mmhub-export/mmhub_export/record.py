"""What an export says of itself: `export.json` beside what was written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmhub import __version__
from mmhub.files import sha256, write_file

NAME = "export.json"


@dataclass(kw_only=True)
class Export:
    """One export.

    Attributes:
        checks: what was compared with the original, [{"what", "max_error", "tolerance", "ok"}].
        facts: what is particular to the format, such as inputs and outputs of each graph.
    """

    format: str
    name: str
    task: str
    modalities: tuple[str, ...]
    checks: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the record, with every file's size and sha256, and return it."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in paths
        }
        record = {
            "schema": 1,
            "format": self.format,
            "name": public_name(self.name),
            "task": self.task,
            "modalities": list(self.modalities),
            **self.facts,
            "checks": self.checks,
            "files": files,
            "versions": {"mmhub": __version__, **self.versions},
        }
        write_file(folder / NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record


def public_name(name: str) -> str:
    """Return a model's name as others may read it: of a path on this machine its last part alone."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~", "local:")) or "\\" in name or path.exists()
    return plain_name(str(path)) if local else name


def plain_name(name: str) -> str:
    """Return the last word of a name, fit for a file; of a run's folder `model` that of the run."""
    words = [re.sub(r"[^\w.-]+", "-", word).strip("-.") for word in re.split(r"[/\\]", name)]
    words = [word for word in words if word]
    if len(words) > 1 and words[-1] == "model":
        return words[-2]
    return words[-1] if words else "model"
