"""What the tabs of the app share: names, settings, and models that are loaded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mmhub.errors import NotFoundError, did_you_mean
from mmhub.interfaces import Policy

if TYPE_CHECKING:
    from mmhub.model import Model

_KEPT = 2  # models in memory: those that are compared
UPLOAD_BYTES = 64 * 2**20


@dataclass
class _Slot:
    """A name, its model once that is loaded, and whose turn it is."""

    turn: Lock = field(default_factory=Lock)
    model: Model | None = None


@dataclass
class Context:
    """One app.

    Attributes:
        names: models given on the command line, offered first. runs: the folder whose training runs are watched.
        locked: only those models may be tried, and nothing else of this machine is shown: for apps that strangers use.
        policy: bounds of what people hand over; they upload files, so paths are those of uploads.
    """

    names: tuple[str, ...] = ()
    runs: Path = Path("runs")
    device: str = "auto"
    locked: bool = False
    policy: Policy = field(default_factory=lambda: Policy(max_bytes=UPLOAD_BYTES, max_pixels=25_000_000))
    _slots: OrderedDict[str, _Slot] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def model(self, name: str) -> Model:
        """Load a model, or return it where it is loaded already.

        Raises:
            MmhubError: see `mmhub.load`. NotFoundError: the app is locked, and the model none of its own.
        """
        with self.use(name) as model:
            return model

    @contextmanager
    def use(self, name: str) -> Iterator[Model]:
        """Lend a model to one caller at a time.

        Raises:
            As `model`.
        """
        name = self.check(name)
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
            self._slots.move_to_end(name)
        with slot.turn:
            if slot.model is None:
                slot.model = self._load(name)
            yield slot.model

    def _load(self, name: str) -> Model:
        """Load a model and forget those beyond the number that is kept; who uses one of them keeps it until then."""
        import mmhub

        try:
            model = mmhub.load(name, device=self.device)
        except BaseException:
            with self._lock:
                self._slots.pop(name, None)
            raise
        with self._lock:
            while len(self._slots) > _KEPT:
                self._slots.popitem(last=False)
        return model

    def check(self, name: str) -> str:
        """Return a name as it is loaded by.

        Raises:
            NotFoundError: there is none, or the app is locked, and the model none of its own.
        """
        name = (name or "").strip()
        if not name:
            raise NotFoundError("no model is chosen", "choose one, or type its name")
        if self.locked and name not in self.names:
            hint = did_you_mean(name, self.names) or f"choose one of {', '.join(self.names)}"
            raise NotFoundError(f"{name!r} is not offered here", hint)
        return name

    def bounds(self, model: Model) -> Policy:
        """Return the policy for what a model reads: of speech it reads as much as on the command line."""
        if model.task.name != "speech-recognition":
            return self.policy
        from mmhub.speech import LONGEST

        return replace(self.policy, max_seconds=LONGEST)
