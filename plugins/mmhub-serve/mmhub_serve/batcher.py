"""Requests to one model, computed together: a bounded queue, and the threads that empty it.

What waits is taken the moment a thread is free, like lengths together. What computing means is left to others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmhub.errors import InputError, MmhubError
from mmhub_serve.choosing import Bounds, Costs, choose
from mmhub_serve.errors import Refused

log = logging.getLogger("mmhub.serve")
Answers = list[Any]


class Watch(Protocol):
    """What is told how full the queue is, and how large batches are: `mmhub_serve.metrics.Metrics`."""

    def set_queue(self, model: str, waiting: int) -> None: ...

    def observe_batch(self, model: str, samples: int, seconds: float) -> None: ...


class Gone(Exception):
    """Nobody waits any more for what is being computed."""


class Ask:
    """One request: jobs that are answered apart, and a future that gets all answers in order, or the first error.

    It belongs to an event loop. Threads look at `gone`, and leave the rest to `Deliveries`.
    """

    def __init__(self, jobs: int, seconds: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Answers] = self.loop.create_future()
        self._answers: list[Answers] = [[] for _ in range(jobs)]
        self._left = jobs
        self.held = 0  # bytes of memory that its inputs have taken
        self._timer = self.loop.call_later(seconds, self.fail, Refused(503, f"no answer within {seconds:g} s"))
        self.future.add_done_callback(lambda _: self._timer.cancel())

    @property
    def gone(self) -> bool:
        """Has it been answered, refused, or given up by its client?"""
        return self.future.done()

    def settle(self, place: int, answers: Answers) -> None:
        self._answers[place] = answers
        self._left -= 1
        if not self._left and not self.gone:
            self.future.set_result([answer for part in self._answers for answer in part])

    def fail(self, error: Exception) -> None:
        if not self.gone:
            self.future.set_exception(error)

    def give_up(self) -> None:
        """Let what is not computed yet be forgotten; an error that nobody has read is nobody's concern."""
        if not self.future.cancel() and not self.future.cancelled():
            self.future.exception()


@dataclass(eq=False)
class Job:
    """Samples that are computed in one go, alone or with the jobs of equal `key`.

    Attributes:
        payloads: what is computed, one a sample. cost: positions of the longest. place: its number in the request.
        row: the number of its first sample there. told: gets pieces of the answer as they come. held: bytes of memory.
    """

    ask: Ask
    key: Hashable
    payloads: list[Any]
    cost: int = 1
    place: int = 0
    row: int = 0
    told: Callable[[str], None] | None = None
    held: int = 0
    came: float = field(default_factory=time.monotonic)
    _said: int = 0  # characters that were passed on
    _at: int = 0  # and those written since its batch was tried last

    def begin(self) -> None:
        self._at = 0

    def tell(self, text: str) -> None:
        """Pass on a piece of the answer, but nothing again when a batch is tried again."""
        self._at += len(text)
        new = max(0, self._at - self._said)
        if self.told is not None and new:
            self._said = self._at
            self.told(text[-new:])


class Turns:
    """A lock that is handed on in the order in which it is asked for; who holds it long can let others go first."""

    def __init__(self, seconds: float = 0.05) -> None:
        self._seconds, self._since = seconds, 0.0
        self._lock, self._held = threading.Lock(), False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            mine = threading.Event() if self._held else None
            self._held = True
            if mine is not None:
                self._waiting.append(mine)
        if mine is not None:
            mine.wait()
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

    def yield_now(self) -> float:
        """Let those that wait go first, if the turn has lasted long enough; return the seconds until the next turn."""
        began = time.monotonic()
        if not self._waiting or began - self._since <= self._seconds:
            return 0.0
        self.__exit__()
        self.__enter__()
        return self._since - began


Compute = Callable[[Sequence[Job], Callable[[], None]], Sequence[Answers]]


class Batcher:
    """Computes jobs in threads of its own; answers are handed to the event loop, those of a batch at once.

    `compute(jobs, step)` returns the answers of each job; what takes long calls `step` now and then, which lets others
    go first, and raises `Gone` once nobody waits for these jobs. One of the threads computes at a time; there are more,
    `threads` at most, where jobs last so long that they have to take turns: one begins when the others are busy.
    """

    def __init__(self, name: str, compute: Compute, bounds: Bounds, *, threads: int = 1, watch: Watch | None = None):
        self._name, self._compute, self._bounds, self._watch = name, compute, bounds, watch
        self._changed = threading.Condition()
        self._queue: list[Job] = []
        self._coming = 0  # samples that are being read
        self._open = True
        self._turns, self._costs = Turns(), Costs()
        self._most, self._busy = threads, 0
        self._threads: list[threading.Thread] = []
        self._grow()

    def admit(self, samples: int) -> None:
        """Reserve places in the queue for samples, which are then `put`, or given up with `leave`.

        Raises:
            Refused: 429, the queue is full; 503, the server is stopping.
        """
        with self._changed:
            if not self._open:
                raise Refused(503, "the server is stopping")
            waiting = self._waiting()
            if waiting + samples > self._bounds.queue:
                self._drop()
                waiting = self._waiting()
            if waiting and waiting + samples > self._bounds.queue:
                raise Refused(
                    429, f"{waiting} samples wait for this model already", "ask again later", code="queue_full"
                )
            self._coming += samples
            self._tell()

    def put(self, jobs: Sequence[Job]) -> None:
        """Queue jobs that were admitted; called from any thread.

        Raises:
            Refused: 429, what waits holds too much memory; their places are given up.
        """
        with self._changed:
            self._coming -= sum(len(job.payloads) for job in jobs)
            held = sum(job.held for job in self._queue)
            full = bool(held) and held + sum(job.held for job in jobs) > self._bounds.held
            if not full:
                self._queue += jobs
            self._tell()
            self._changed.notify(max(1, len(jobs)))
            self._grow_if_busy()
        if full:
            what = f"what waits for this model takes {held / 2**20:.0f} MiB already"
            raise Refused(429, what, "ask again later", code="queue_full")

    def leave(self, samples: int) -> None:
        """Give up places of samples that could not be read."""
        with self._changed:
            self._coming -= samples
            self._tell()
            self._changed.notify()

    def close(self) -> None:
        """Compute what was admitted, then end. Blocks."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        for thread in self._threads:  # others may begin meanwhile
            thread.join()

    def _grow(self) -> None:
        name = f"mmhub {self._name} {len(self._threads)}"
        self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
        self._threads[-1].start()

    def _grow_if_busy(self) -> None:
        """Let there be a free thread for each key that waits; the lock is held."""
        if len(self._threads) < self._most:
            wanted = self._busy + len({job.key for job in self._queue})
            while len(self._threads) < min(wanted, self._most):
                self._grow()

    def _work(self) -> None:
        while self._wait():
            with self._turns:
                if jobs := self._take():
                    self._run(jobs)
                    with self._changed:
                        self._busy -= 1
            jobs = []  # a thread that waits holds nobody's samples

    def _wait(self) -> bool:
        """Wait until something is to be computed; False: nothing will come any more."""
        with self._changed:
            while True:
                self._drop()
                if self._queue:
                    patience = self._queue[0].came + self._bounds.wait - time.monotonic()
                    if not self._coming or patience <= 0 or len(self._queue) >= self._bounds.samples:
                        return True
                    self._changed.wait(patience)
                elif not self._open and not self._coming:
                    self._changed.notify_all()
                    return False
                else:
                    self._changed.wait()

    def _take(self) -> list[Job]:
        with self._changed:
            self._drop()
            if not self._queue:
                return []
            jobs = choose(self._queue, self._bounds, self._costs.waste)
            taken = set(map(id, jobs))
            self._queue = [job for job in self._queue if id(job) not in taken]
            self._busy += 1
            self._grow_if_busy()
            self._tell()
            return jobs

    def _drop(self) -> None:
        """Forget those for which nobody waits; the lock is held."""
        if any(job.ask.gone for job in self._queue):
            self._queue = [job for job in self._queue if not job.ask.gone]
            self._tell()

    def _waiting(self) -> int:
        return self._coming + sum(len(job.payloads) for job in self._queue)

    def _tell(self) -> None:
        if self._watch is not None:
            self._watch.set_queue(self._name, self._waiting())

    def _run(self, jobs: list[Job]) -> None:
        """Compute jobs together; where that fails, find those at fault."""
        pending, done = [jobs], Deliveries()
        while pending:
            part = [job for job in pending.pop() if not job.ask.gone]
            if not part:
                continue
            for job in part:
                job.begin()
            step = _Step(part, self._turns)
            began = time.monotonic()
            try:
                found = self._compute(part, step)
            except Gone:
                continue
            except BaseException as error:  # a library's panic is no Exception, and this thread must live
                pending += self._blame(part, error, done)
                continue
            self._learn(part, time.monotonic() - began - step.waited)
            for job, answers in zip(part, found, strict=True):
                done.settle(job, answers)
            done.send()

    def _learn(self, jobs: Sequence[Job], seconds: float) -> None:
        samples = sum(len(job.payloads) for job in jobs)
        self._costs.learn(samples * max(job.cost for job in jobs), seconds)
        if self._watch is not None:
            self._watch.observe_batch(self._name, samples, seconds)

    def _blame(self, jobs: list[Job], error: BaseException, done: Deliveries) -> list[list[Job]]:
        """Fail the job at fault and return the others, or, where it is not known, parts to try again."""
        if len(jobs) == 1:
            done.fail(jobs[0], _placed(told_of(error), jobs[0], 0))
            done.send()
            return []
        if isinstance(error, InputError) and error.row is not None:
            job, before = _owner(jobs, error.row)
            done.fail(job, _placed(error, job, before))
            done.send()
            return [[other for other in jobs if other is not job]]
        if _is_memory(error):
            half = len(jobs) // 2
            return [jobs[half:], jobs[:half]]
        return [[job] for job in jobs]


class _Step:
    """What is called while jobs are computed; `waited` are the seconds in which others had their turns."""

    def __init__(self, jobs: Sequence[Job], turns: Turns) -> None:
        self._jobs, self._turns, self.waited = jobs, turns, 0.0

    def __call__(self) -> None:
        if all(job.ask.gone for job in self._jobs):
            raise Gone
        self.waited += self._turns.yield_now()


class Deliveries:
    """What a thread has to tell event loops, sent at once: waking a loop costs more than telling it."""

    def __init__(self) -> None:
        self._calls: list[tuple[Ask, Callable[[], None]]] = []

    def settle(self, job: Job, answers: Answers) -> None:
        self._calls.append((job.ask, lambda: job.ask.settle(job.place, answers)))

    def fail(self, job: Job, error: Exception) -> None:
        self._calls.append((job.ask, lambda: job.ask.fail(error)))

    def send(self) -> None:
        calls, self._calls = self._calls, []
        for loop in {ask.loop for ask, _ in calls}:
            tell(loop, _all([call for ask, call in calls if ask.loop is loop]))


def tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call something in an event loop, from any thread; a loop that is closed has nobody who waits."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        log.debug("the event loop is closed")


def _all(calls: Iterable[Callable[[], None]]) -> Callable[[], None]:
    def every() -> None:
        for call in calls:
            call()

    return every


def _owner(jobs: Sequence[Job], row: int) -> tuple[Job, int]:
    """The job that a row of a batch belongs to, and how many rows stand before it."""
    before = 0
    for job in jobs:
        if row < before + len(job.payloads):
            return job, before
        before += len(job.payloads)
    return jobs[-1], before - len(jobs[-1].payloads)


def _placed(error: Exception, job: Job, before: int) -> Exception:
    """Let an error name the row of the request, not of the batch, of which `before` stand before the job."""
    if isinstance(error, InputError) and error.row is not None:
        error.row += job.row - before
        error.__notes__ = []
    return error


def told_of(error: BaseException) -> Exception:
    """What the client is told of a failure that is not its own; the log has the rest."""
    if isinstance(error, (MmhubError, Refused)):
        return error
    log.error("a model failed", exc_info=error)
    if _is_memory(error):
        return Refused(503, "there is not enough memory for this request", "make it smaller", code="out_of_memory")
    return Refused(500, "the model failed on this input", code="model_error")


def _is_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
