"""The models of a server: known from the start, loaded when they are first asked, and let go when room is needed."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

import mmhub
from mmhub.checkpoint import is_checkpoint, load_structure
from mmhub.errors import MmhubError
from mmhub.hub.pull import locate, resolve_name
from mmhub.model import Model
from mmhub_serve.batcher import Watch
from mmhub_serve.errors import Refused
from mmhub_serve.naming import public_names
from mmhub_serve.served import ModelInfo, Served, info_of
from mmhub_serve.settings import Settings

log = logging.getLogger("mmhub.serve")
_PAUSE = 5.0  # seconds before a model that could not be loaded is tried again


class PoolWatch(Watch, Protocol):
    """What is told, besides, which models are in memory: `mmhub_serve.metrics.Metrics`."""

    def loaded(self, model: str, there: bool) -> None: ...


class _Tenant:
    """A model in memory, and how many requests use it."""

    def __init__(self, served: Served) -> None:
        self.served, self.users, self.used = served, 0, time.monotonic()
        self.idle = asyncio.Event()
        self.idle.set()

    def enter(self) -> None:
        self.users += 1
        self.idle.clear()

    def leave(self) -> None:
        self.users, self.used = self.users - 1, time.monotonic()
        if not self.users:
            self.idle.set()


class _Load:
    """A load that is going on, and how many requests wait for it: they use the model from when it is there.

    `reported`: whoever began it says why it failed.
    """

    def __init__(self, reported: bool) -> None:
        self.waiting, self.reported = 0, reported
        self.tenant: _Tenant | None = None
        self.error: Exception | None = None
        self.task: asyncio.Task[None]

    def give_up(self) -> None:
        if self.tenant is not None:
            self.tenant.leave()
        self.waiting -= 1


class Pool:
    """Hands out models by name; one that is in use is not let go. It belongs to the event loop that starts it.

    A model is called as `public_names` says; the name that was given for it leads to it, too.
    """

    def __init__(self, settings: Settings, watch: PoolWatch | None = None) -> None:
        self.settings, self._watch = settings, watch
        self._given = public_names(settings.models)
        self._called = {given: name for name, given in self._given.items()}
        self._described: dict[str, asyncio.Task[None]] = {}
        self._infos: dict[str, ModelInfo] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._loads: dict[str, _Load] = {}
        self._failed: dict[str, tuple[float, Refused]] = {}
        self._door = asyncio.Lock()  # one model moves in or out at a time

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._given)

    @property
    def ready(self) -> bool:
        """Can requests be answered without loading a model first?"""
        return bool(self._tenants)

    @property
    def busy(self) -> bool:
        """Is a model being loaded, be it that nobody waits for it any more?"""
        return bool(self._loads)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The models in memory."""
        return tuple(self._tenants)

    async def start(self) -> None:
        """Describe all models, and load the first, or with `Settings.preload` those that may stay in memory.

        Raises:
            MmhubError: a name leads to no model, or a model cannot be loaded.
        """
        use_cores()
        for name in self.names:
            await self.info(name)
        most = (self.settings.loaded or len(self.names)) if self.settings.preload else 1
        for name in self.names[:most]:
            await self._bring(name)

    def infos(self) -> tuple[ModelInfo, ...]:
        """Describe all models, in the order of their names; known after `start`."""
        return tuple(self._infos[name] for name in self.names if name in self._infos)

    async def info(self, name: str) -> ModelInfo:
        """Describe a model, which stays as it is: in memory or not.

        Raises:
            Refused: 404, no model of this server has that name.
        """
        name = self._known(name)
        if name not in self._infos:  # once, whoever asks meanwhile
            task = self._described.get(name)
            if task is None:
                task = self._described[name] = asyncio.create_task(self._look(name))
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(task)
        return self._infos[name]

    def called(self, name: str) -> str:
        """Return what the model is called for which `name` was given; any other name as it is."""
        return self._called.get(name, name)

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """Lend the model called `name`, the only one where that is None, loading it if it is not in memory.

        Raises:
            Refused: 404, no model of this server has that name; 400, several models and no name; 503, it could not be
            loaded, or not in time.
        """
        tenant = await self._tenant(self._known(name))
        try:
            yield tenant.served
        finally:
            tenant.leave()

    async def close(self) -> None:
        """Finish what was accepted, and let all models go."""
        for task in (*self._described.values(), *(load.task for load in self._loads.values())):
            task.cancel()
        for name in list(self._tenants):
            await self._move_out(name)

    def _known(self, name: str | None) -> str:
        if name is None and len(self.names) > 1:
            raise Refused(400, "no model is named", f"name one of {', '.join(self.names)}", param="model")
        name = self.names[0] if name is None else self.called(name)
        if name not in self.names:
            known = f"this server has {', '.join(self.names)}"
            raise Refused(404, f"no model {name!r}", known, code="model_not_found", param="model")
        return name

    async def _tenant(self, name: str) -> _Tenant:
        """The model, entered: between finding it in memory and counting its user nothing else happens."""
        if name in self._tenants:
            self._tenants[name].enter()
            return self._tenants[name]
        self._check_pause(name)
        load = self._loads.get(name) or self._begin(name)
        load.waiting += 1
        try:  # others wait for the same load: it goes on when one of them has gone
            async with asyncio.timeout(self.settings.limits.answer_seconds):
                await asyncio.shield(load.task)
        except TimeoutError:
            load.give_up()
            raise Refused(503, f"{name!r} is still being loaded", "ask again later", code="loading") from None
        except BaseException:
            load.give_up()
            raise
        assert load.tenant is not None
        return load.tenant

    async def _bring(self, name: str) -> None:
        """Load a model, unless it is in memory, as if a request had asked for it.

        Raises:
            MmhubError: it cannot be loaded.
        """
        if name in self._tenants:
            return
        load = self._loads.get(name) or self._begin(name, reported=True)
        try:
            await asyncio.shield(load.task)
        except Refused:
            assert load.error is not None
            raise load.error from None

    def _begin(self, name: str, reported: bool = False) -> _Load:
        load = self._loads[name] = _Load(reported)
        load.task = asyncio.create_task(self._load(name, load))
        load.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may outlive who asked
        return load

    def _check_pause(self, name: str) -> None:
        until, error = self._failed.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise Refused(error.status, error.message, error.hint, code=error.code)

    async def _load(self, name: str, load: _Load) -> None:
        try:
            await self._move_in(name, load)
        except Exception as error:
            load.error = error
            if not load.reported:
                log.error("%s cannot be loaded: %s", name, error, exc_info=not isinstance(error, MmhubError))
            refusal = Refused(
                503, f"{name!r} could not be loaded", "the server's log says why", code="model_not_loaded"
            )
            self._failed[name] = (time.monotonic() + _PAUSE, refusal)
            raise refusal from None
        finally:
            del self._loads[name]

    async def _move_in(self, name: str, load: _Load) -> None:
        async with self._door:
            await self._make_room()
            served = await asyncio.to_thread(self._serve, name)
            self._infos[name] = served.info
            tenant = self._tenants[name] = _Tenant(served)
            self._failed.pop(name, None)
            self._tell(name, True)
            load.tenant = tenant
            for _ in range(load.waiting):
                tenant.enter()

    async def _make_room(self) -> None:
        """Let those go that were used longest ago. New requests for them wait, so that the last one ends some time."""
        while self.settings.loaded and len(self._tenants) >= self.settings.loaded:
            name = min(self._tenants, key=lambda name: (self._tenants[name].users > 0, self._tenants[name].used))
            await self._move_out(name)
            await asyncio.to_thread(_free)

    async def _move_out(self, name: str) -> None:
        tenant = self._tenants.pop(name)
        await tenant.idle.wait()
        await tenant.served.close()
        self._tell(name, False)

    def _tell(self, name: str, there: bool) -> None:
        if self._watch is not None:
            self._watch.loaded(name, there)

    def _serve(self, name: str) -> Served:
        return Served(name, self._loaded(self._given[name]), self.settings, self._watch)

    def _loaded(self, name: str) -> Model:
        options: dict[str, Any] = {"device": self.settings.device, "quantize": self.settings.quantize}
        return mmhub.load(name, **options)

    async def _look(self, name: str) -> None:
        """Describe a model: ours by its structure, without weights; any other has to be loaded for that."""
        try:
            found = await asyncio.to_thread(self._describe, self._given[name])
            self._infos[name] = replace(found or await self._inspected(name), name=name)
        finally:
            del self._described[name]

    def _describe(self, given: str) -> ModelInfo | None:
        found = resolve_name(given)
        folder, _ = locate(given, found)
        ours = is_checkpoint(folder) and not found.component
        return info_of(given, load_structure(folder)) if ours else None

    async def _inspected(self, name: str) -> ModelInfo:
        async with self._door:  # which may have let it in meanwhile
            if name not in self._infos:
                self._infos[name] = await asyncio.to_thread(self._inspect, name)
            return self._infos[name]

    def _inspect(self, name: str) -> ModelInfo:
        info = info_of(name, self._loaded(self._given[name]))
        _free()
        return info


def use_cores() -> None:
    """Leave a core to what is not computing, where there are more than two and nobody says how many to use.

    Threads that compute take the number from the process when they begin.
    """
    import torch

    cores = os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ and cores > 2:
        torch.set_num_threads(min(torch.get_num_threads(), cores - 1))


def _free() -> None:
    """Give memory back at once: a model holds itself in circles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
