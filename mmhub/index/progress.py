"""Vectors of a build that is not finished, beside the index: an interrupted build goes on from them."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mmhub.files import disk_errors, write_file
from mmhub.index.store import Vectors


class Progress:
    """Vectors by their stamps, written every so many `seconds` as one more file.

    Those of another model, source or modality are passed by: a stamp says what a file is called below its folder, not
    where that lies. A file is written whole or not at all, and one that is damaged costs no more than its vectors.
    """

    def __init__(self, folder: Path, identity: str, source: Path, modality: str, seconds: float = 20.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._of = {"identity": identity, "source": str(source.resolve()), "modality": modality}
        self._stamps: list[str] = []
        self._vectors: list[Vectors] = []
        self._written = time.monotonic()

    def read(self) -> dict[str, Vectors]:
        """Return the vectors by stamp that an earlier build left, each (D,)."""
        found: dict[str, Vectors] = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as part:
                    if all(str(part[name]) == value for name, value in self._of.items()):
                        found |= zip(part["stamps"].tolist(), part["vectors"], strict=True)
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):
                continue
        return found

    def add(self, stamps: Sequence[str], vectors: Vectors) -> None:
        """Take vectors (B, D), and write what has come together if it is time to."""
        self._stamps += stamps
        self._vectors.append(vectors)
        if time.monotonic() - self._written >= self.seconds:
            self.write()

    def write(self) -> None:
        """Write what has come together since the last time.

        Raises:
            MmhubError: the disk is full, or the folder not writable.
        """
        if self._stamps:
            content = io.BytesIO()
            parts: dict[str, Any] = {"stamps": self._stamps, "vectors": np.concatenate(self._vectors)}
            np.savez(content, **parts | self._of)
            with disk_errors("the index", self.folder.parent):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(self.folder / f"{time.time_ns()}.npz", content.getvalue())
        self._stamps, self._vectors, self._written = [], [], time.monotonic()

    def clear(self) -> None:
        """Remove what was written: the index holds it."""
        shutil.rmtree(self.folder, ignore_errors=True)
