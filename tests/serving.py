"""A server on models in memory, for tests: the real application on a real socket, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def serving(models: Mapping[str, Any], **limits: Any) -> Iterator[str]:
    """Answer requests to models by their names; -> the address. `limits` are those of `mmhub_serve.settings.Limits`."""
    from mmhub_serve.app import build_app
    from mmhub_serve.pool import Pool
    from mmhub_serve.run import Server, listen
    from mmhub_serve.served import info_of
    from mmhub_serve.settings import Limits, Settings

    class InMemory(Pool):
        """A pool whose models stay with the test: looking for their memory would take long."""

        def _describe(self, name: str) -> Any:
            return info_of(name, models[name])

        def _loaded(self, name: str) -> Any:
            return models[name]

        async def close(self) -> None:
            for tenant in self._tenants.values():
                await tenant.served.close()

    settings = Settings(models=tuple(models), limits=Limits(**limits))
    listener = listen("127.0.0.1", 0)
    server = Server(build_app(settings, InMemory(settings)), listener)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.loop.call_soon_threadsafe(server.stop)
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
