"""The models of a server: described, loaded once, lent, and let go."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import mmhub
import mmhub_serve.pool
from mmhub.errors import NotFoundError, TrustError
from mmhub_serve.errors import Refused
from mmhub_serve.naming import public_names
from mmhub_serve.pool import Pool
from mmhub_serve.settings import Limits, Settings

TEXTS = ["one two", "two three four", "five"]
Scene = Callable[[Pool], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Folders of three small models; the last one writes."""
    folder = tmp_path_factory.mktemp("models")
    encoders = {"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}}
    for name, labels in (("a", ["no", "yes"]), ("b", ["red", "blue"])):
        decoder = {"use": "classification", "config": {"labels": labels}}
        mmhub.compose(encoders=encoders, decoder=decoder, texts=TEXTS).eval().save(folder / name)
    lm = {"use": "lstm-lm", "config": {"dim": 8, "embedding_dim": 8}}
    mmhub.compose("language-modelling", decoder=lm, tokenizer={"kind": "byte"}, texts=TEXTS).save(folder / "lm")
    return tuple(str(folder / name) for name in ("a", "b", "lm"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models whose weights were loaded."""
    seen: list[str] = []
    load = mmhub.load

    def watched(name: str, **options: Any) -> Any:
        seen.append(Path(name).name)
        return load(name, **options)

    monkeypatch.setattr(mmhub_serve.pool.mmhub, "load", watched)
    return seen


def in_pool(scene: Scene, *names: str, **settings: Any) -> None:
    async def run() -> None:
        pool = Pool(Settings(models=names, **settings))
        try:
            await scene(pool)
        finally:
            await pool.close()

    asyncio.run(run())


async def ask(pool: Pool, name: str | None) -> Any:
    async with pool.use(name) as served:
        return (await served.predict([{"text": "one two"}]))[0]


def test_models_are_described_without_their_weights(names: tuple[str, ...], loads: list[str]) -> None:
    async def scene(pool: Pool) -> None:
        assert not pool.ready
        await pool.start()
        assert pool.ready
        assert loads == ["a"]
        a, b, lm = pool.infos()
        assert (a.labels, b.labels) == (("no", "yes"), ("red", "blue"))
        assert (lm.task, lm.writes, lm.modalities) == ("language-modelling", True, ("text",))
        assert await pool.info(names[2]) == lm
        async with pool.use(names[2]) as served:
            assert served.info == lm
        assert loads == ["a", "lm"]

    in_pool(scene, *names)


def test_all_that_may_stay_are_loaded_at_the_start_if_asked(names: tuple[str, ...], loads: list[str]) -> None:
    async def scene(pool: Pool) -> None:
        await pool.start()

    in_pool(scene, *names, preload=True)
    in_pool(scene, *names, preload=True, loaded=2)
    assert loads == ["a", "b", "lm", "a", "b"]


def test_requests_that_come_together_wait_for_one_load(names: tuple[str, ...], loads: list[str]) -> None:
    async def scene(pool: Pool) -> None:
        gone = asyncio.create_task(ask(pool, names[0]))
        await asyncio.sleep(0)
        others = [asyncio.create_task(ask(pool, names[0])) for _ in range(5)]
        await asyncio.sleep(0)
        gone.cancel()  # the load goes on for the others
        found = await asyncio.gather(*others)
        assert {one["label"] for one in found} <= {"no", "yes"}

    in_pool(scene, *names)
    assert loads == ["a"]


@pytest.mark.slow
def test_the_model_used_longest_ago_is_let_go_and_its_memory_freed(names: tuple[str, ...], loads: list[str]) -> None:
    async def scene(pool: Pool) -> None:
        await ask(pool, names[0])
        await ask(pool, names[1])
        async with pool.use(names[0]) as served:
            kept = weakref.ref(served.model)
        async with pool.use(names[1]) as served:
            gone = weakref.ref(served.model)
        await ask(pool, names[0])
        del served
        async with pool.use(names[2]):
            gc.collect()
            assert gone() is None
            assert kept() is not None
        await ask(pool, names[1])

    in_pool(scene, *names, loaded=2)
    assert loads == ["a", "b", "lm", "b"]


def test_a_model_in_use_is_not_let_go(names: tuple[str, ...]) -> None:
    async def scene(pool: Pool) -> None:
        async with pool.use(names[0]) as served:
            other = asyncio.create_task(ask(pool, names[1]))
            await asyncio.sleep(0.05)
            assert not other.done()
            assert (await served.predict([{"text": "one"}]))[0]["label"] in ("no", "yes")
        assert (await other)["label"] in ("red", "blue")

    in_pool(scene, *names, loaded=1)


def test_models_that_make_room_for_each_other_answer_everybody(names: tuple[str, ...]) -> None:
    async def scene(pool: Pool) -> None:
        asked = [names[number % 2] for number in range(12)]
        found = await asyncio.gather(*(ask(pool, name) for name in asked))
        assert [one["label"] in ("no", "yes") for one in found] == [name == names[0] for name in asked]

    in_pool(scene, *names, loaded=1)


def test_a_load_that_fails_is_told_in_one_line_without_paths_and_tried_again(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load, calls = mmhub.load, 0

    def fails(name: str, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise TrustError("'/secret/place' is damaged")
        return load(name, **options)

    monkeypatch.setattr(mmhub_serve.pool.mmhub, "load", fails)

    async def scene(pool: Pool) -> None:
        with caplog.at_level(logging.ERROR, "mmhub.serve"):
            found = await asyncio.gather(ask(pool, names[0]), ask(pool, names[0]), return_exceptions=True)
            found += await asyncio.gather(ask(pool, names[0]), return_exceptions=True)  # not at once again
        assert calls == 1
        assert "/secret/place" in caplog.text
        for error in found:
            assert isinstance(error, Refused)
            assert error.status == 503
            assert "could not be loaded" in error.message
            assert "/secret" not in str(error.body())
        monkeypatch.setattr(mmhub_serve.pool, "_PAUSE", 0.0)
        pool._failed.clear()
        assert (await ask(pool, names[0]))["label"] in ("no", "yes")

    in_pool(scene, names[0])


def test_a_load_that_takes_too_long_is_503_and_goes_on(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    load, go = mmhub.load, []

    def slow(name: str, **options: Any) -> Any:
        import time

        while not go:
            time.sleep(0.005)
        return load(name, **options)

    monkeypatch.setattr(mmhub_serve.pool.mmhub, "load", slow)

    async def scene(pool: Pool) -> None:
        with pytest.raises(Refused, match="still being loaded") as caught:
            await ask(pool, names[0])
        assert caught.value.status == 503
        go.append(True)
        async with asyncio.timeout(20):
            while not pool.ready:
                await asyncio.sleep(0.005)
        assert (await ask(pool, names[0]))["label"] in ("no", "yes")

    in_pool(scene, names[0], limits=Limits(answer_seconds=0.2))


def test_names_that_this_server_does_not_have_are_refused(names: tuple[str, ...]) -> None:
    async def scene(pool: Pool) -> None:
        with pytest.raises(Refused, match="no model 'c'") as caught:
            await ask(pool, "c")
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        with pytest.raises(Refused, match="no model is named") as caught:
            await ask(pool, None)
        assert caught.value.status == 400
        with pytest.raises(Refused, match="no model 'c'"):
            await pool.info("c")

    in_pool(scene, *names)


def test_a_server_does_not_start_with_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    async def scene(pool: Pool) -> None:
        with pytest.raises(NotFoundError):
            await pool.start()

    in_pool(scene, str(tmp_path / "nothing"))


def test_closing_finishes_what_was_accepted(names: tuple[str, ...]) -> None:
    async def scene(pool: Pool) -> None:
        await pool.start()
        asked = [asyncio.create_task(ask(pool, names[0])) for _ in range(20)]
        await asyncio.sleep(0)
        await pool.close()
        assert len(await asyncio.gather(*asked)) == 20
        assert not pool.ready

    in_pool(scene, names[0])


def test_a_request_while_the_server_starts_waits_for_the_same_load(names: tuple[str, ...], loads: list[str]) -> None:
    async def scene(pool: Pool) -> None:
        starting = asyncio.create_task(pool.start())
        found = await asyncio.gather(*(ask(pool, names[0]) for _ in range(3)))
        await starting
        assert {one["label"] for one in found} <= {"no", "yes"}

    in_pool(scene, names[0])
    assert loads == ["a"]


def test_a_server_that_cannot_load_its_first_model_says_why_also_if_it_was_asked_already(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, **options: Any) -> Any:
        raise TrustError("it is damaged")

    monkeypatch.setattr(mmhub_serve.pool.mmhub, "load", fails)

    async def scene(pool: Pool) -> None:
        asked = asyncio.create_task(ask(pool, names[0]))
        await asyncio.sleep(0)
        with pytest.raises(TrustError, match="it is damaged"):
            await pool.start()
        with pytest.raises(Refused, match="could not be loaded"):
            await asked

    in_pool(scene, names[0])


def test_a_model_is_described_once_whoever_asks(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def scene(pool: Pool) -> None:
        own = pool._describe

        def describe(given: str) -> Any:
            seen.append(given)
            return own(given)

        monkeypatch.setattr(pool, "_describe", describe)
        found = await asyncio.gather(*(pool.info(names[0]) for _ in range(6)))
        assert len({id(one) for one in found}) == 1

    in_pool(scene, names[0])
    assert seen == [names[0]]


def test_what_has_to_be_loaded_to_be_described_is_loaded_one_at_a_time(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, now, most = mmhub.load, 0, 0

    def counted(name: str, **options: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return load(name, **options)
        finally:
            now -= 1

    monkeypatch.setattr(mmhub_serve.pool.mmhub, "load", counted)
    monkeypatch.setattr(mmhub_serve.pool, "is_checkpoint", lambda folder: False)

    async def scene(pool: Pool) -> None:
        a, b, answered = await asyncio.gather(pool.info(names[0]), pool.info(names[1]), ask(pool, names[2]))
        assert (a.name, a.labels, b.name, b.labels) == ("a", ("no", "yes"), "b", ("red", "blue"))
        assert answered["text"] is not None

    in_pool(scene, *names)
    assert most == 1


def test_folders_are_called_by_their_own_names_and_found_by_what_was_given(names: tuple[str, ...]) -> None:
    async def scene(pool: Pool) -> None:
        assert pool.names == ("a", "b")
        for name in ("a", names[0]):
            async with pool.use(name) as served:
                assert served.name == served.info.name == "a"
        assert await pool.info(names[1]) == await pool.info("b")
        with pytest.raises(Refused) as caught:
            await pool.info("c")
        assert caught.value.hint == "this server has a, b"

    in_pool(scene, *names[:2])


def test_what_models_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("runs/x/model", "runs/y/model", "old/y/model", "other/a", "a"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = ["runs/x/model", "./runs/y/model/", f"{tmp_path}/old/y/model", "other/a", "a", "org/chat", "hub:org/z@v1"]
    called = public_names([*given, "a"])
    assert list(called.values()) == given
    assert list(called) == ["x", "y", "y-2", "a-2", "a", "org/chat", "hub:org/z@v1"]
