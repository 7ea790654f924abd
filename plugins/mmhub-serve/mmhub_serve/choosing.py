"""Which of the jobs that wait are computed next, and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmhub_serve.batcher import Job


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How much is computed together.

    Attributes:
        samples: at most. positions: of a batch at most, padding included. wait: seconds that a job may wait for others
        that are being read. queue: samples that may wait. held: bytes of memory that these may take.
    """

    samples: int
    positions: int
    wait: float
    queue: int
    held: int = 2**30


class Costs:
    """What a call costs beside one position, learned from the batches so far: seconds = call + each * positions.

    A line of least squares in which older batches count less and less.
    """

    _LEAST, _MOST, _BEGIN = 16.0, 4096.0, 48.0  # positions
    _DECAY, _ENOUGH = 0.99, 8.0

    def __init__(self) -> None:
        self._sums = [0.0] * 5

    def learn(self, positions: int, seconds: float) -> None:
        new = (1.0, positions, seconds, positions * positions, positions * seconds)
        self._sums = [self._DECAY * old + one for old, one in zip(self._sums, new, strict=True)]

    @property
    def waste(self) -> float:
        """How many positions of padding cost as much as a call of its own."""
        count, x, y, xx, xy = self._sums
        spread = count * xx - x * x
        if count < self._ENOUGH or spread <= 0.01 * x * x:
            return self._BEGIN
        each = (count * xy - x * y) / spread
        call = (y - each * x) / count
        return self._MOST if each <= 0 else min(max(call / each, self._LEAST), self._MOST)


def choose(waiting: Sequence[Job], bounds: Bounds, waste: float) -> list[Job]:
    """Return the jobs to compute next: the oldest, and those of its key and of like length that go well with it.

    Jobs in the order of their costs are cut where a batch is full, or where more than `waste` positions would be
    padding. The oldest is always among them, so that a job is in the n-th batch at the latest, n - 1 being the number
    of jobs that waited before it.
    """
    run: list[Job] = []
    oldest, samples, real = waiting[0], 0, 0
    for job in sorted((job for job in waiting if job.key == oldest.key), key=lambda job: job.cost):
        count = len(job.payloads)
        padded = (samples + count) * job.cost
        full = samples + count > bounds.samples or padded > bounds.positions
        if run and (full or padded - real - count * job.cost > waste):
            if oldest in run:
                break
            run, samples, real = [], 0, 0
        run.append(job)
        samples, real = samples + count, real + count * job.cost
    return run
