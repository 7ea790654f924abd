"""The models of a server: known from the start, loaded when they are first asked, and let go when room is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mmhub
from mmhub_serve.errors import Refused
from mmhub_serve.served import ModelInfo, Served
from mmhub_serve.settings import Settings


class Pool:
    """Hands out models by name; one that is in use is not let go."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._served: dict[str, Served] = {}
        self._lock = asyncio.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return self.settings.models

    @property
    def ready(self) -> bool:
        """Can requests be answered without loading a model first?"""
        return bool(self._served)

    async def start(self) -> None:
        """Load what is loaded at the start."""
        async with self.use(self.names[0]):
            pass

    async def info(self, name: str) -> ModelInfo:
        """Describe a model.

        Raises:
            Refused: 404, no model of this server has that name.
        """
        async with self.use(name) as served:
            return served.info

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """Lend the model called `name`, the only one where that is None, loading it if it is not in memory.

        Raises:
            Refused: 404, no model of this server has that name; 400, several models and no name.
        """
        if name is None and len(self.names) > 1:
            raise Refused(400, "no model is named", f"name one of {', '.join(self.names)}", param="model")
        name = name or self.names[0]
        if name not in self.names:
            known = f"this server has {', '.join(self.names)}"
            raise Refused(404, f"no model {name!r}", known, code="model_not_found", param="model")
        async with self._lock:
            if name not in self._served:
                options: dict[str, Any] = {"device": self.settings.device, "quantize": self.settings.quantize}
                model = await asyncio.to_thread(mmhub.load, name, **options)
                self._served[name] = Served(name, model, self.settings)
        yield self._served[name]

    async def close(self) -> None:
        for served in self._served.values():
            await served.close()
