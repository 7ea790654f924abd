"""What the tabs of the app share: names, settings, and models that are loaded once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mmhub.interfaces import Policy

if TYPE_CHECKING:
    from mmhub.model import Model

_KEPT = 2  # models in memory: those that are compared


@dataclass
class Context:
    """One app.

    Attributes:
        names: models given on the command line, offered first. runs: the folder whose training runs are watched.
        policy: bounds of what people hand over; they upload files, so paths are those of uploads.
    """

    names: tuple[str, ...] = ()
    runs: Path = Path("runs")
    device: str = "auto"
    policy: Policy = field(default_factory=lambda: Policy(max_bytes=64 * 2**20, max_pixels=25_000_000))
    _models: OrderedDict[str, Model] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def model(self, name: str) -> Model:
        """Load a model, or return it where it is loaded already.

        Raises:
            MmhubError: see `mmhub.load`.
        """
        import mmhub

        with self._lock:
            if name not in self._models:
                self._models[name] = mmhub.load(name, device=self.device)
            self._models.move_to_end(name)
            while len(self._models) > max(_KEPT, 1):
                self._models.popitem(last=False)
            return self._models[name]
