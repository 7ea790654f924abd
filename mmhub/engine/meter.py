"""How fast a run goes: samples, tokens, images and audio seconds a second, waiting, padding, memory, FLOP/s and MFU.

Per step it only keeps a few numbers; what costs time, or waits for a GPU, is done once a log line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.engine.flops import Sizes, TrainingCost, peak_flops, present
from mmhub.engine.ranks import Ranks
from mmhub.model import Model
from mmhub.records import cause

_MOST = 1000  # batches whose sizes are kept before they are added up
_WIDE = 4096  # positions; NumPy counts long rows of a mask ten times as fast as PyTorch


@dataclass
class _Interval:
    """What was seen since the last log line."""

    start: float
    samples: int = 0
    steps: int = 0
    waited: float = 0.0  # seconds for data
    paused: float = 0.0  # seconds of something else, such as an evaluation
    padded: dict[str, int] = field(default_factory=dict)  # positions by modality, padding included
    sizes: list[Sizes] = field(default_factory=list)  # of batches that are not in what follows yet
    real: dict[str, float] = field(default_factory=dict)  # positions by modality
    images: int = 0
    flops: float = 0.0


class Meter:
    """Measure a run from log line to log line.

    All processes call `values` at the same steps, for it adds up what they saw. `problem` says why there is no count of
    FLOPs on a GPU whose peak is known.
    """

    def __init__(
        self, model: Model, device: torch.device, ranks: Ranks, precision: torch.dtype = torch.float32
    ) -> None:
        self.problem = ""
        self._model, self._device, self._ranks = model, device, ranks
        self._peak = _peak_of(device, precision)
        self._cost = TrainingCost(model, precision)
        self._known: set[str] = set()  # modalities whose cost is, or is about to be, measured
        self._new: list[Batch] = []
        self._interval = _Interval(time.perf_counter())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the fetching of a batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._interval.waited += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave out what is not training: an evaluation, a checkpoint."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._interval.paused += time.perf_counter() - start

    def count(self, batch: Batch) -> None:
        """Note a micro-batch that is trained on; not one that only stands in for an empty share."""
        seen = self._interval
        sizes = Sizes(batch.size)
        for name, items in batch.items.items():
            sizes.items[name] = _lengths(items.mask), items.rows
            self._pad(name, items.mask)
        for name, part in batch.features.items():
            sizes.features[name] = _lengths(part.features.mask), part.rows
        seen.samples += batch.size
        seen.sizes.append(sizes)
        if self._peak and not self._known.issuperset(found := present(batch)):
            self._known |= found
            self._new.append(batch)
        if len(seen.sizes) >= _MOST:
            self._add_up(seen)

    def step(self) -> None:
        """Note an optimizer step."""
        self._interval.steps += 1

    def measure(self, batch: Batch) -> None:
        """Learn what the parts cost from this batch now; to be called before the weights are split over processes."""
        if not self._peak:
            return
        self._known |= present(batch)
        try:
            self._cost.measure(batch)
        except Exception as error:  # a figure to look at is no reason to stop a run
            self.problem = f"FLOPs are not counted: {cause(error)}"

    def values(self) -> dict[str, float]:
        """Return the rates of all processes together since the last call, and begin anew.

        Units: `*_per_second` of all processes; shares from 0 to 1; `memory_gb` 10^9 bytes of the fullest process, on a
        GPU the peak that tensors took, else what the process takes now.
        """
        seen = self._interval
        self._add_up(seen)
        totals = self._totals(seen)
        own = {
            "seconds": max(time.perf_counter() - seen.start - seen.paused, 1e-9),
            "waited": seen.waited,
            "memory": _memory(self._device),
            "padding": _padding(seen),
        }
        found = self._ranks.gather([own, totals])
        self._interval = _Interval(time.perf_counter())
        seconds = sum(each["seconds"] for each, _ in found) / len(found)
        sums = {name: sum(each[name] for _, each in found) for name in totals}
        values = {f"{name}_per_second": total / seconds for name, total in sums.items() if total or name == "samples"}
        values["steps_per_second"] = seen.steps / seconds
        values["padding_share"] = sum(each["padding"] for each, _ in found) / len(found)
        values["data_wait_share"] = min(1.0, sum(each["waited"] for each, _ in found) / seconds / len(found))
        values["memory_gb"] = max(each["memory"] for each, _ in found)
        if self._peak and "flops_per_second" in values:
            values["mfu"] = values["flops_per_second"] / (self._peak * len(found))
        return {name: float(f"{value:.5g}") for name, value in values.items()}

    def _totals(self, seen: _Interval) -> dict[str, float]:
        """Amounts by name; the same names on every process."""
        totals: dict[str, float] = {"samples": seen.samples}
        for name in self._model.modalities:
            if name == "text":
                totals["tokens"] = seen.real.get(name, 0.0)  # features no longer tell how long a text or clip was
            if name == "image":
                totals["images"] = seen.images
            rate = getattr(getattr(self._model.processors[name], "config", None), "sample_rate", 0)
            if name == "audio" and rate:
                totals["audio_seconds"] = seen.real.get(name, 0.0) / rate
        if self._peak:
            totals["flops"] = seen.flops
        return totals

    def _add_up(self, seen: _Interval) -> None:
        """Turn the sizes of batches into numbers; this waits for a GPU."""
        for name in self._model.modalities:
            items = [sizes.items[name][0] for sizes in seen.sizes if name in sizes.items]
            encoded = [sizes.features[name][0] for sizes in seen.sizes if name in sizes.features]
            seen.real[name] = seen.real.get(name, 0.0) + (float(torch.cat(items).sum()) if items else 0.0)
            if name == "image":
                seen.images += sum(map(len, [*items, *encoded]))
        if self._peak:
            self._measure_new()
            seen.flops += sum(self._cost.of(sizes) for sizes in seen.sizes)
        seen.sizes = []

    def _pad(self, name: str, mask: Tensor) -> None:
        if mask.shape[1] > 1:
            padded = self._interval.padded
            padded[name] = padded.get(name, 0) + mask.numel()

    def _measure_new(self) -> None:
        new, self._new = self._new, []
        with self.pausing():
            for batch in new:
                if not _is_split(self._model):
                    self.measure(batch)


def _padding(seen: _Interval) -> float:
    """The mean share of padding in the modalities whose items differ in length."""
    shares = [1 - seen.real[name] / padded for name, padded in seen.padded.items() if padded]
    return sum(shares) / len(shares) if shares else 0.0


def _lengths(mask: Tensor) -> Tensor:
    """Real positions of each row of a mask (N, S): (N,)."""
    if mask.device.type != "cpu" or mask.shape[1] < _WIDE:
        return mask.sum(1)
    return torch.tensor([np.count_nonzero(row) for row in mask.numpy()])


def _is_split(model: Model) -> bool:
    """Whether the weights are spread over processes, so that no process can run a part by itself."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _peak_of(device: torch.device, precision: torch.dtype) -> float | None:
    if device.type != "cuda":
        return None
    fast = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, fast)


def _memory(device: torch.device) -> float:
    """GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e9
    except ImportError:
        return 0.0
    except OSError:  # no Linux: the peak must do
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
