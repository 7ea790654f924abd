"""One model in memory: requests come in on the event loop, are computed together in a thread of the model's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmhub.interfaces import Generation, TextDecoder
from mmhub.model import Model
from mmhub_serve.settings import Settings

Sample = Mapping[str, Any]
Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model before it is loaded.

    `writes`: answers are texts, written token by token; `converses`: it takes conversations; `hears`: its answers are
    transcripts. `modalities` are the keys that a sample may have.
    """

    name: str
    task: str
    modalities: tuple[str, ...]
    writes: bool = False
    converses: bool = False
    hears: bool = False


def info_of(name: str, model: Model) -> ModelInfo:
    """Describe a model that is loaded."""
    writes = isinstance(model.decoder, TextDecoder)
    hears = model.task.name == "speech-recognition"
    return ModelInfo(
        name=name,
        task=model.task.name,
        modalities=model.modalities,
        writes=writes,
        converses=model.converses,
        hears=hears,
    )


class Served:
    """Answers samples; what it answers equals what the model says without a server, whoever else asks meanwhile.

    Every method raises `mmhub.errors.MmhubError` for what the client did wrong (`InputError.row`: which sample) and
    `Refused` where there is no room (429) or no time (503).
    """

    def __init__(self, name: str, model: Model, settings: Settings) -> None:
        self.name, self.model, self.info = name, model, info_of(name, model)
        self._settings, self._policy = settings, settings.limits.policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"mmhub {name}")

    async def predict(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answer samples in order, as `Model.predict`."""
        return await self._run(self.model.predict, samples, policy=self._policy)

    async def embed(self, samples: Sequence[Sample]) -> dict[str, list[list[float]]]:
        """Return by stream ("" where there is one) a vector a sample, as `Model.embed`."""
        found = await self._run(self.model.embed, samples, policy=self._policy)
        streams = found if isinstance(found, dict) else {"": found}
        return {name: vectors.tolist() for name, vectors in streams.items()}

    async def write(self, samples: Sequence[Sample], settings: Generation, n: int = 1) -> list[Answer]:
        """Write a text for each sample, as `Model.generate`; "messages" are a conversation, as in `Model.chat`."""
        return await self._run(self.model.generate, samples, settings, n=n, policy=self._policy)

    async def stream(self, sample: Sample, settings: Generation) -> AsyncIterator[str | Answer]:
        """Yield the text piece by piece, then the whole answer. Writing stops when the iterator is closed."""
        pieces: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def told(row: int, number: int, text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        task = asyncio.ensure_future(
            self._run(self.model.generate, [sample], settings, policy=self._policy, stream=told)
        )
        while not task.done() or not pieces.empty():
            piece = asyncio.ensure_future(pieces.get())
            await asyncio.wait({piece, task}, return_when=asyncio.FIRST_COMPLETED)
            if piece.done():
                yield piece.result()
            else:
                piece.cancel()
        yield task.result()[0]

    async def transcribe(self, sample: Sample, **options: Any) -> Answer:
        """Write down one recording; options as of `mmhub.speech.transcribe`: timestamps, language, translate."""
        from mmhub.speech import transcribe

        found = await self._run(transcribe, self.model, [sample], policy=self._policy, **options)
        return found[0]

    async def close(self) -> None:
        """Answer what waits, then let go of the model."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, call: Any, *args: Any, **options: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(*args, **options))
