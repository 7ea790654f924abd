"""Batches: who is computed with whom, who waits, and what a failure costs the others."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from mmhub.errors import InputError
from mmhub_serve.batcher import Ask, Batcher, Gone, Job
from mmhub_serve.choosing import Bounds, Costs, choose
from mmhub_serve.errors import Refused

BOUNDS = Bounds(samples=8, positions=1000, wait=0.0, queue=16)


class Waiting:
    gone = False


def job(cost: int, key: str = "", size: int = 1) -> Job:
    return Job(Waiting(), key, [cost] * size, cost)  # type: ignore[arg-type]


def test_the_oldest_job_is_in_every_batch_whatever_else_waits() -> None:
    draw = random.Random(0)
    for _ in range(200):
        waiting = [job(draw.randint(1, 300), draw.choice("ab")) for _ in range(draw.randint(1, 40))]
        batch = choose(waiting, BOUNDS, waste=draw.choice([0, 20, 500]))
        assert waiting[0] in batch
        assert {one.key for one in batch} == {waiting[0].key}
        assert len(batch) <= BOUNDS.samples
        assert len(batch) == 1 or len(batch) * max(one.cost for one in batch) <= BOUNDS.positions


def test_like_lengths_are_computed_together() -> None:
    waiting = [job(50), job(5), job(51), job(6), job(49), job(5)]
    assert sorted(one.cost for one in choose(waiting, BOUNDS, waste=16)) == [49, 50, 51]
    assert len(choose(waiting, BOUNDS, waste=10_000)) == 6  # where calls are dear, padding is not


def test_a_job_of_several_samples_counts_as_many() -> None:
    assert len(choose([job(3, size=5), job(3, size=3), job(3, size=1)], BOUNDS, waste=100)) == 2
    assert len(choose([job(3, size=99)], BOUNDS, waste=100)) == 1  # what is too large is computed alone


def test_what_a_call_costs_in_padding_is_learned_from_batches() -> None:
    costs, draw = Costs(), random.Random(0)
    before = costs.waste
    for _ in range(100):
        positions = draw.randint(10, 1000)
        costs.learn(positions, 0.03 + 0.0001 * positions * draw.uniform(0.98, 1.02))
    assert before == 48
    assert costs.waste == pytest.approx(300, rel=0.1)


def test_batches_of_one_size_teach_nothing() -> None:
    costs = Costs()
    for seconds in (0.1, 0.2) * 20:
        costs.learn(64, seconds)
    assert costs.waste == 48


class Machine:
    """Answers a payload with itself, doubled; it can be stopped, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.free = threading.Event()
        self.free.set()
        self.fails: Callable[[list[Any]], BaseException | None] = lambda payloads: None

    def __call__(self, jobs: Sequence[Job], step: Callable[[], None]) -> list[list[Any]]:
        payloads = [payload for one in jobs for payload in one.payloads]
        self.batches.append(payloads)
        assert self.free.wait(20)
        if (error := self.fails(payloads)) is not None:
            raise error
        return [[2 * payload for payload in one.payloads] for one in jobs]


@contextmanager
def batching(compute: Any, **bounds: Any) -> Iterator[Batcher]:
    made = Bounds(**({"samples": 8, "positions": 1000, "wait": 0.0, "queue": 16} | bounds))
    batcher = Batcher("m", compute, made)
    try:
        yield batcher
    finally:
        if isinstance(compute, Machine):
            compute.free.set()
        batcher.close()


def ask(batcher: Batcher, *payloads: Any, seconds: float = 20.0) -> asyncio.Future[list[Any]]:
    batcher.admit(len(payloads))
    found = Ask(len(payloads), seconds)
    batcher.put([Job(found, "k", [payload], place=place, row=place) for place, payload in enumerate(payloads)])
    return found.future


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def in_loop(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scene())  # type: ignore[arg-type]


def test_what_comes_while_a_batch_is_computed_makes_the_next_one() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            first = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            others = [ask(batcher, number) for number in range(2, 6)]
            machine.free.set()
            assert await first == [2]
            assert await asyncio.gather(*others) == [[4], [6], [8], [10]]

    in_loop(scene)
    assert machine.batches == [[1], [2, 3, 4, 5]]


def test_a_lone_sample_waits_for_nobody() -> None:
    async def scene() -> None:
        with batching(Machine(), wait=30.0) as batcher:
            async with asyncio.timeout(5):
                assert await ask(batcher, 1) == [2]

    in_loop(scene)


def test_a_sample_waits_for_others_that_are_being_read_but_not_longer_than_it_may() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine, wait=30.0) as batcher:
            batcher.admit(1)  # somebody else is being read
            first = ask(batcher, 1)
            await asyncio.sleep(0.05)
            assert machine.batches == []
            late = Ask(1, 20)
            batcher.put([Job(late, "k", [2])])
            assert await asyncio.gather(first, late.future) == [[2], [4]]
        with batching(machine, wait=0.02) as batcher:
            batcher.admit(1)
            assert await ask(batcher, 3) == [6]
            batcher.leave(1)

    in_loop(scene)
    assert machine.batches == [[1, 2], [3]]


def test_a_full_queue_refuses_with_429_and_takes_again_what_clients_gave_up() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine, queue=3) as batcher:
            machine.free.clear()
            running = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            waiting = ask(batcher, 2, 3)
            with pytest.raises(Refused, match="2 samples wait") as caught:
                ask(batcher, 4, 5)
            assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
            waiting.cancel()
            again = ask(batcher, 4, 5)
            machine.free.set()
            assert await running == [2]
            assert await again == [8, 10]

    in_loop(scene)
    assert machine.batches == [[1], [4, 5]]


def test_a_request_larger_than_the_queue_is_taken_when_nobody_waits() -> None:
    async def scene() -> None:
        with batching(Machine(), queue=2) as batcher:
            assert await ask(batcher, 1, 2, 3) == [2, 4, 6]

    in_loop(scene)


def test_what_waits_too_long_is_refused_with_503_and_never_computed() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            running = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            with pytest.raises(Refused, match=r"no answer within 0.02 s") as caught:
                await ask(batcher, 2, seconds=0.02)
            assert caught.value.status == 503
            machine.free.set()
            assert await running == [2]

    in_loop(scene)
    assert machine.batches == [[1]]


def test_only_the_sample_at_fault_fails() -> None:
    machine = Machine()

    def fails(payloads: list[Any]) -> BaseException | None:
        if 13 not in payloads:
            return None
        error = InputError("an unlucky number")
        error.row = payloads.index(13)
        return error

    machine.fails = fails

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            first = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            others = [ask(batcher, 2), ask(batcher, 3, 4, 13), ask(batcher, 5)]
            machine.free.set()
            found = await asyncio.gather(first, *others, return_exceptions=True)
        assert found[:2] == [[2], [4]]
        assert isinstance(found[2], InputError)
        assert found[2].row == 2  # of its own request
        assert found[3] == [10]

    in_loop(scene)


class Panic(BaseException):
    """As libraries written in Rust raise it."""


@pytest.mark.parametrize("kind", [ValueError, Panic])
def test_where_nobody_knows_who_is_at_fault_each_is_tried_alone(kind: type[BaseException]) -> None:
    machine = Machine()
    machine.fails = lambda payloads: kind("odd") if 13 in payloads else None

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            first = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            others = [ask(batcher, number) for number in (2, 13, 3)]
            machine.free.set()
            found = await asyncio.gather(first, *others, return_exceptions=True)
            assert await ask(batcher, 4) == [8]  # the thread lives
        assert [found[0], found[1], found[3]] == [[2], [4], [6]]
        assert isinstance(found[2], Refused)
        assert (found[2].status, found[2].code) == (500, "model_error")
        assert "odd" not in str(found[2].body())

    in_loop(scene)


def test_what_does_not_fit_into_memory_is_halved_and_refused_with_503_where_one_sample_does_not() -> None:
    machine = Machine()
    machine.fails = lambda payloads: MemoryError() if len(payloads) > 2 or 13 in payloads else None

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            first = ask(batcher, 1)
            await until(lambda: bool(machine.batches))
            others = [ask(batcher, number) for number in (2, 3, 4, 5, 6, 13)]
            machine.free.set()
            found = await asyncio.gather(first, *others, return_exceptions=True)
        assert found[:-1] == [[2], [4], [6], [8], [10], [12]]
        assert isinstance(found[-1], Refused)
        assert found[-1].status == 503

    in_loop(scene)
    assert [1, 2] not in machine.batches
    assert max(map(len, machine.batches[2:])) == 3  # not one by one


def test_closing_answers_what_was_admitted_and_refuses_the_rest() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine) as batcher:
            machine.free.clear()
            first, second = ask(batcher, 1), ask(batcher, 2)
            batcher.admit(1)
            closing = asyncio.create_task(asyncio.to_thread(batcher.close))
            await until(lambda: not batcher._open)
            with pytest.raises(Refused, match="stopping") as caught:
                ask(batcher, 4)
            assert caught.value.status == 503
            machine.free.set()
            third = Ask(1, 20)
            batcher.put([Job(third, "k", [3])])  # it was being read
            assert await asyncio.gather(first, second, third.future) == [[2], [4], [6]]
            await closing

    in_loop(scene)


def test_what_takes_long_lets_others_go_first_and_ends_when_nobody_waits_for_it() -> None:
    order: list[str] = []
    ended = threading.Event()

    def compute(jobs: Sequence[Job], step: Callable[[], None]) -> list[list[Any]]:
        (name,) = jobs[0].payloads
        order.append(f"{name} begins")
        try:
            while name == "long":
                time.sleep(0.001)
                step()
        except Gone:
            ended.set()
            raise
        return [[name] for _ in jobs]

    async def scene() -> None:
        batcher = Batcher("m", compute, BOUNDS, threads=2)
        long = ask(batcher, "long")
        await until(lambda: bool(order))
        async with asyncio.timeout(20):
            assert await ask(batcher, "short") == ["short"]
            assert not long.done()
            long.cancel()
            await asyncio.to_thread(ended.wait, 20)
            assert await ask(batcher, "next") == ["next"]
        batcher.close()

    in_loop(scene)
    assert ended.is_set()
    assert order == ["long begins", "short begins", "next begins"]


def test_what_a_stream_was_told_is_not_told_again_when_its_batch_is_tried_again() -> None:
    tries = 0

    def compute(jobs: Sequence[Job], step: Callable[[], None]) -> list[list[Any]]:
        nonlocal tries
        tries += 1
        for end in range(1, 3 if len(jobs) > 1 else 5):
            for one in jobs:
                one.tell("abcd"[end - 1 : end])
        if len(jobs) > 1:
            raise MemoryError
        return [["abcd"] for _ in jobs]

    async def scene() -> None:
        told: list[str] = []
        with batching(compute) as batcher:
            batcher._turns.__enter__()  # until both wait
            asks = [Ask(1, 20), Ask(1, 20)]
            batcher.admit(2)
            batcher.put([Job(one, "k", [number], told=told.append) for number, one in enumerate(asks)])
            batcher._turns.__exit__()
            await asyncio.gather(*(one.future for one in asks))
        assert sorted(told) == sorted("abcd" * 2)

    in_loop(scene)
    assert tries == 3


def test_what_waits_is_bounded_in_memory_too() -> None:
    machine = Machine()

    async def scene() -> None:
        with batching(machine, held=100) as batcher:
            machine.free.clear()
            first, second, third, last = (Ask(1, 20) for _ in range(4))
            batcher.admit(4)
            batcher.put([Job(first, "k", [1], held=500)])  # nothing else waits
            await until(lambda: bool(machine.batches))
            batcher.put([Job(second, "k", [2], held=60)])
            refused: list[Refused] = []
            for one, held in ((third, 60), (last, 40)):
                try:
                    batcher.put([Job(one, "k", [4], held=held)])
                except Refused as error:
                    refused.append(error)
            assert [(error.status, error.code) for error in refused] == [(429, "queue_full")]
            assert batcher._waiting() == 2  # the place is free again
            machine.free.set()
            assert await asyncio.gather(first.future, second.future, last.future) == [[2], [4], [8]]

    in_loop(scene)


def compute_by_name(jobs: Sequence[Job], step: Callable[[], None]) -> list[list[Any]]:
    """ "long" lasts until the event beside it is set, "sleeps" keeps its turn for 0.2 s."""
    name, over = jobs[0].payloads[0]
    if name == "sleeps":
        time.sleep(0.2)
    while name == "long" and not over.is_set():
        time.sleep(0.001)
        step()
    return [one.payloads for one in jobs]


def test_many_that_last_long_do_not_keep_a_short_one_waiting() -> None:
    async def scene() -> None:
        batcher, over = Batcher("m", compute_by_name, BOUNDS, threads=32), threading.Event()
        asks = [Ask(1, 20) for _ in range(7)]
        batcher.admit(7)
        for number, one in enumerate(asks):
            batcher.put([Job(one, number, [("long" if number < 6 else "short", over)])])
        async with asyncio.timeout(10):
            await asks[6].future
            over.set()
            await asyncio.gather(*(one.future for one in asks[:6]))
        await asyncio.to_thread(batcher.close)
        assert len(batcher._threads) <= 7

    in_loop(scene)


def test_what_a_batch_costs_leaves_out_the_turns_of_others() -> None:
    seconds: list[float] = []

    class Told:
        def set_queue(self, model: str, waiting: int) -> None: ...

        def observe_batch(self, model: str, samples: int, taken: float) -> None:
            seconds.append(taken)

    async def scene() -> None:
        batcher, over = Batcher("m", compute_by_name, BOUNDS, threads=2, watch=Told()), threading.Event()
        long, other = Ask(1, 20), Ask(1, 20)
        batcher.admit(2)
        began = time.monotonic()
        batcher.put([Job(long, "long", [("long", over)])])
        batcher.put([Job(other, "sleeps", [("sleeps", over)])])
        await other.future
        over.set()
        await long.future
        took = time.monotonic() - began
        await asyncio.to_thread(batcher.close)
        assert seconds[0] >= 0.2
        assert seconds[1] < took - 0.19

    in_loop(scene)
