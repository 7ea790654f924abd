"""One model in memory: requests come in on the event loop, are read in a pool of threads, and computed together."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from mmhub.errors import UsageError
from mmhub.interfaces import Generation, TextDecoder
from mmhub.model import Model
from mmhub_serve.batcher import Answers, Ask, Batcher, Job, Watch, tell, told_of
from mmhub_serve.choosing import Bounds
from mmhub_serve.computing import Call, Computer
from mmhub_serve.errors import Refused
from mmhub_serve.reading import Reader
from mmhub_serve.settings import Settings

Sample = Mapping[str, Any]
Answer = dict[str, Any]
Read = Callable[[Sample, int], tuple[Any, int]]  # a sample and its row -> what is computed, and its cost

_READERS = min(4, os.cpu_count() or 1)
_WRITERS = 32  # what lasts, such as writing a text, goes on by turns, so that it does not keep the others waiting
_SHARE = 0.02  # seconds of reading for one request, then others are read
_PROMPT = 256  # characters; prompts that differ by fewer are alike
_POSITIONS = {"cpu": 1_024}  # of a batch: more are no faster a position, and keep the others waiting
_MANY = 65_536  # likewise of other devices, which are as fast with many as with few


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What is known of a model before it is loaded.

    `writes`: answers are texts, written token by token; `converses`: it takes conversations; `hears`: its answers are
    transcripts. `modalities` are the keys that a sample may have; `labels` the classes that answers name, () where
    there are none; `streams` the names of the vectors that `embed` gives, "" where there is one; `context` how many
    tokens prompt and answer may have together, None for no limit.
    """

    name: str
    task: str
    modalities: tuple[str, ...]
    writes: bool = False
    converses: bool = False
    hears: bool = False
    labels: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    context: int | None = None


def info_of(name: str, model: Model) -> ModelInfo:
    """Describe a model, which may be without weights."""
    decoder: Any = model.decoder
    streams = tuple(model.fusion.outputs)
    return ModelInfo(
        name=name,
        task=model.task.name,
        modalities=model.modalities,
        writes=isinstance(decoder, TextDecoder),
        converses=model.converses,
        hears=model.task.name == "speech-recognition",
        labels=tuple(getattr(decoder.config, "labels", None) or ()),
        streams=streams if len(streams) > 1 else ("",),
        context=getattr(decoder, "context", None),
    )


class Served:
    """Answers samples; what it answers equals what the model says without a server, whoever else asks meanwhile.

    Every method raises `mmhub.errors.MmhubError` for what the client did wrong (`InputError.row`: which sample) and
    `Refused` where there is no room (429) or no time (503).
    """

    def __init__(self, name: str, model: Model, settings: Settings, watch: Watch | None = None) -> None:
        self.name, self.model, self.info = name, model, info_of(name, model)
        self._settings, self._limits = settings, settings.limits
        self._reader = Reader(model, settings.limits)
        self._plain = not (self.info.writes or self.info.hears or model.has_guards)
        kind = model.device.type
        bounds = Bounds(
            samples=settings.batch,
            positions=_POSITIONS.get(kind, _MANY),
            wait=settings.wait,
            queue=settings.limits.queue,
            held=settings.limits.waiting,
        )
        computer = Computer(model, settings.limits.policy, settings.batch)
        threads = _WRITERS if self.info.writes or self.info.hears else 1
        self._batcher = Batcher(name, computer, bounds, threads=threads, watch=watch)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix=f"mmhub reads {name}")

    async def predict(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answer samples in order, as `Model.predict`."""
        if self.info.hears:
            return await self._hear(samples)
        if self.info.writes:
            return await self.write(samples, None)
        return await self._ask(Call("predict" if self._plain else "answer"), samples)

    async def embed(self, samples: Sequence[Sample]) -> dict[str, list[list[float]]]:
        """Return by stream ("" where there is one) a vector a sample, as `Model.embed`."""
        rows = await self._ask(Call("vectors" if self.model.converses else "embed"), samples)
        streams = tuple(self.model.fusion.outputs)
        return {"" if len(streams) == 1 else name: [row[name] for row in rows] for name in streams}

    async def write(self, samples: Sequence[Sample], settings: Generation | None, n: int = 1) -> list[Answer]:
        """Write a text for each sample, as `Model.generate`; "messages" are a conversation, as in `Model.chat`."""
        return await self._ask(self._writing(settings, n, samples), samples)

    async def stream(self, sample: Sample, settings: Generation | None) -> AsyncIterator[str | Answer]:
        """Yield the text piece by piece, then the whole answer. Writing stops when the iterator is closed.

        It never waits for who reads: what is written and not read yet is kept, `Limits.new_tokens` at most.
        """
        call = self._writing(settings, 1, [sample])
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def told(text: str) -> None:
            tell(loop, lambda: pieces.put_nowait(text))

        ask = self._begin(call, [sample], told)
        ask.future.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield (await ask.future)[0]
        finally:
            ask.give_up()

    async def transcribe(self, sample: Sample, **options: Any) -> Answer:
        """Write down one recording; options as of `mmhub.speech.transcribe`: timestamps, language, translate."""
        return (await self._hear([sample], **options))[0]

    async def close(self) -> None:
        """Answer what waits, then let go of the model."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._batcher.close()
        self._readers.shutdown()

    async def _hear(
        self, samples: Sequence[Sample], settings: Generation | None = None, **options: Any
    ) -> list[Answer]:
        if not self.info.hears:
            raise UsageError(f"{self.name!r} is for {self.info.task} and hears no speech", "name a model that does")
        decoder: Any = self.model.decoder
        drawn = self.info.writes and (settings or decoder.generation).temperature > 0
        alone = object() if drawn else None
        return await self._ask(Call("hear", settings, 1, tuple(sorted(options.items())), alone), samples)

    def _writing(self, settings: Generation | None, n: int, samples: Sequence[Sample]) -> Call:
        """The call that writes, alone where something is drawn: that depends on a sample's number in its request."""
        decoder: Any = self.model.decoder
        if not self.info.writes:
            raise UsageError(f"{self.name!r} is for {self.info.task} and writes no text", "name a model that does")
        said = settings or decoder.generation
        if said.max_new_tokens > self._limits.new_tokens:
            what = f"{said.max_new_tokens} new tokens are more than the limit of {self._limits.new_tokens}"
            raise Refused(400, what, "ask for fewer", param="max_tokens")
        beams = said.beams if said.beams != decoder.generation.beams else 1  # the model's own are no wish of the client
        texts = len(samples) * max(n, beams)
        if texts > max(self._limits.samples, len(samples)):
            what = f"{texts} texts at a time are more than the limit of {self._limits.samples}"
            raise Refused(400, what, "ask for fewer", param="n")
        if self._reader.chats(samples):
            return Call("chat", settings)
        return Call("write", settings, n, alone=object() if said.temperature > 0 else None)

    async def _ask(self, call: Call, samples: Sequence[Sample]) -> Answers:
        if not samples:
            return []
        return await self._begin(call, samples).future

    def _begin(self, call: Call, samples: Sequence[Sample], told: Callable[[str], None] | None = None) -> Ask:
        """Admit a request and let it be read. What is drawn is one job, all else a job for each sample."""
        self._reader.count(samples)
        self._batcher.admit(len(samples))
        size = len(samples) if call.alone is not None else 1
        ask = Ask(math.ceil(len(samples) / size), self._limits.answer_seconds)
        share = size if size > 1 else math.ceil(len(samples) / _READERS)
        for start in range(0, len(samples), share):
            self._readers.submit(self._read, _Part(ask, call, samples[start : start + share], start, size, told))
        return ask

    def _read(self, part: _Part) -> None:
        """Read samples of a request, in a thread, and queue them as jobs; the rest after what others have to read."""
        until, jobs = time.monotonic() + _SHARE, []
        rest = len(part.samples)  # whose places are still held
        try:
            while part.samples and time.monotonic() < until and not part.ask.gone:
                jobs.append(self._job(part))
            if part.ask.gone:
                self._batcher.leave(rest)
                return
            rest = len(part.samples)
            self._batcher.put(jobs)
            if rest:
                self._readers.submit(self._read, part)
        except BaseException as error:  # a library's panic is no Exception
            self._batcher.leave(rest)
            fault = told_of(error)
            tell(part.ask.loop, lambda: part.ask.fail(fault))

    def _job(self, part: _Part) -> Job:
        """Read the next samples of a part."""
        row, call = part.start, part.call
        read = [self._prepared(call, sample, row + at) for at, sample in enumerate(part.samples[: part.size])]
        part.samples, part.start = part.samples[part.size :], row + part.size
        held = sum(self._reader.held(payload) for payload, _ in read) if call.kind in ("predict", "embed") else 0
        part.ask.held += held
        if part.ask.held > self._limits.waiting:
            what = f"the inputs of this request take more than {self._limits.waiting / 2**20:.0f} MiB once decoded"
            raise Refused(400, what, "ask for fewer or smaller ones at a time", param="samples")
        key = replace(call, alone=object()) if call.kind == "chat" else call
        payloads, cost = [payload for payload, _ in read], max(cost for _, cost in read)
        return Job(part.ask, key, payloads, cost, place=row // part.size, row=row, told=part.told, held=held)

    def _prepared(self, call: Call, sample: Sample, row: int) -> tuple[Any, int]:
        if call.kind in ("predict", "embed"):
            return self._reader.tensors(sample, row)
        if call.kind == "hear":
            return sample, self._reader.recording(sample, row)
        return sample, 1 + self._reader.check(sample, row) // _PROMPT


@dataclass
class _Part:
    """Samples of a request that are not read yet: they become jobs of `size` samples each."""

    ask: Ask
    call: Call
    samples: Sequence[Sample]
    start: int
    size: int
    told: Callable[[str], None] | None
