"""What the tabs of the app share: names, settings, and models that are loaded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mmhub.errors import InputError, MmhubError, NotFoundError, did_you_mean
from mmhub.interfaces import Policy
from mmhub.interfaces.raw import Bounds

if TYPE_CHECKING:
    from mmhub.model import Model

_KEPT = 2  # models in memory: those that are compared
UPLOAD_BYTES = 64 * 2**20
TEXT_CHARS = 100_000
_LABELS = 1000
_TOKENS = 1024  # that a locked app writes
_Stamp = tuple[int, int, int] | None


def policy_of(decoders: int) -> Policy:
    """Bounds of what people hand over, decoded in so many processes of their own, 0 = in the app's."""
    worker = Bounds(workers=decoders) if decoders else None
    return Policy(max_bytes=UPLOAD_BYTES, max_pixels=25_000_000, worker=worker)


@dataclass
class _Slot:
    """A name, its model once that is loaded with its config.json as it was then, and whose turn it is."""

    turn: Lock = field(default_factory=Lock)
    model: Model | None = None
    stamp: _Stamp = None
    users: int = 0  # who have it or wait for it


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
    policy: Policy = field(default_factory=lambda: policy_of(decoders=2))
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
        """Lend a model to one caller at a time; one whose folder was written anew is loaded again.

        Raises:
            As `model`.
        """
        name = self.check(name)
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
            self._slots.move_to_end(name)
            slot.users += 1
        try:
            with slot.turn:
                yield self._loaded(name, slot)
        finally:
            with self._lock:
                slot.users -= 1
            self._forget()

    def _loaded(self, name: str, slot: _Slot) -> Model:
        import mmhub

        stamp = _stamp(name)
        if slot.model is None or slot.stamp != stamp:
            slot.model = None
            slot.model, slot.stamp = mmhub.load(name, device=self.device), stamp
            self._forget()
        return slot.model

    def _forget(self) -> None:
        """Forget models beyond the number that is kept, the longest unused first, but none that somebody uses."""
        with self._lock:
            idle = [name for name, slot in self._slots.items() if not slot.users]
            for name in [name for name in idle if self._slots[name].model is None]:
                del self._slots[name]
            for name in idle:
                if name in self._slots and len(self._slots) > _KEPT:
                    del self._slots[name]

    def check(self, name: str) -> str:
        """Return a name as it is loaded by.

        Raises:
            NotFoundError: there is none, or the app is locked, and the model none of its own.
        """
        name = (name or "").strip()
        self.check_length(name)
        if not name:
            raise NotFoundError("no model is chosen", "choose one, or type its name")
        if self.locked and name not in self.names:
            hint = did_you_mean(name, self.names) or f"choose one of {', '.join(self.names)}"
            raise NotFoundError(f"{name!r} is not offered here", hint)
        return name

    def check_length(self, *texts: str | None, labels: int = 0) -> None:
        """Refuse what would keep the machine busy for long.

        Raises:
            InputError: a text is too long, or there are too many labels.
        """
        longest = max(len(text or "") for text in texts)
        if longest > TEXT_CHARS:
            raise InputError(f"a text has {longest} characters, more than the limit of {TEXT_CHARS}", "shorten it")
        if labels > _LABELS:
            raise InputError(f"{labels} labels are more than the limit of {_LABELS}", "leave some out")

    @property
    def tokens(self) -> int | None:
        """The most tokens that may be written at once; None for any number."""
        return _TOKENS if self.locked else None

    def bounds(self, model: Model) -> Policy:
        """Return the policy for what a model reads: of speech it reads as much as on the command line."""
        if model.task.name != "speech-recognition":
            return self.policy
        from mmhub.speech import LONGEST

        return replace(self.policy, max_seconds=LONGEST)


def _stamp(name: str) -> _Stamp:
    """What tells whether a model's folder was written anew; None for what is in none."""
    from mmhub.names import resolve

    try:
        folder = resolve(name).path
        found = (folder / "config.json").stat() if folder else None
    except (MmhubError, OSError):
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None
