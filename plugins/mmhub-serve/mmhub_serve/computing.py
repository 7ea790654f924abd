"""What a model does with jobs that were put together; every answer is what the library gives to that sample alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmhub.batch import Batch
from mmhub.interfaces import Generation, Policy
from mmhub.layers import summary
from mmhub.model import Model
from mmhub_serve.batcher import Job

Step = Callable[[], None]
_WINDOWS = 4  # of recordings, heard together before others have their turn


@dataclass(frozen=True)
class Call:
    """What is asked of the model. Jobs with equal calls may be computed together.

    Attributes:
        kind: "predict" or "embed" of what was read, "answer" or "vectors" of raw samples, "write", "chat" or "hear".
        settings, n, options: as `Model.generate` and `mmhub.speech.transcribe` take them. alone: tells apart what must
        not be computed together: what is drawn depends on a sample's number.
    """

    kind: str
    settings: Generation | None = None
    n: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    alone: object = None


class Computer:
    """Computes jobs of one call at a time, `batch` samples at most together."""

    def __init__(self, model: Model, policy: Policy, batch: int) -> None:
        self._model, self._policy, self._batch = model, policy, batch
        self._kinds = {
            "predict": self._predict,
            "embed": self._embed,
            "answer": self._answer,
            "vectors": self._vectors,
            "write": self._write,
            "chat": self._chat,
            "hear": self._hear,
        }

    def __call__(self, jobs: Sequence[Job], step: Step) -> list[list[Any]]:
        """Return each job's answers; an InputError's `row` counts the samples of all jobs."""
        call: Any = jobs[0].key
        found = self._kinds[call.kind](call, jobs, [payload for job in jobs for payload in job.payloads], step)
        ends = [0]
        for job in jobs:
            ends.append(ends[-1] + len(job.payloads))
        return [found[start:end] for start, end in pairwise(ends)]

    def _predict(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        with torch.inference_mode():
            batch = self._packed(payloads)
            return self._model.answers(batch, self._model(batch))

    def _embed(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        """As `Model.embed`, of what was read already."""
        with torch.inference_mode():
            bundle = self._model.fused(self._packed(payloads))
            decoder: Any = self._model.decoder
            vectors = decoder.vectors(bundle) if decoder.paired else {}
            streams = self._model.fusion.outputs
            found = {name: vectors[name] if decoder.paired else summary(bundle[name]) for name in streams}
            return _rows({name: part.float().cpu() for name, part in found.items()})

    def _packed(self, payloads: Sequence[Any]) -> Batch:
        processors = self._model.processors
        items = {name: part.pack_rows([read[name] for _, read in payloads]) for name, part in processors.items()}
        batch = Batch(items=items, size=len(payloads), raw=[dict(sample) for sample, _ in payloads])
        return batch.to(self._model.device)

    def _answer(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        return self._model.predict(payloads, batch_size=self._batch, policy=self._policy)

    def _vectors(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        found = self._model.embed(payloads, batch_size=self._batch, policy=self._policy)
        return _rows(found if isinstance(found, dict) else dict.fromkeys(self._model.fusion.outputs, found))

    def _write(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        owners = [job for job in jobs for _ in job.payloads]

        def told(row: int, number: int, text: str) -> None:
            step()
            owners[row].tell(text)

        how: dict[str, Any] = {"n": call.n, "batch_size": self._together(call), "policy": self._policy}
        return self._model.generate(payloads, call.settings, stream=told, **how)

    def _together(self, call: Call) -> int:
        """Samples at a time, of each of which several texts are kept while it is written."""
        decoder: Any = self._model.decoder
        return max(1, self._batch // max(call.n, (call.settings or decoder.generation).beams))

    def _chat(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        """What a language model without media answers to a conversation, as `Model.chat`; each is a job by itself."""
        from mmhub.generate.conversation import answer

        (job,), (payload,) = jobs, payloads

        def told(text: str) -> None:
            step()
            job.tell(text)

        return [answer(self._model, payload["messages"], call.settings, stream=told, policy=self._policy)]

    def _hear(self, call: Call, jobs: Sequence[Job], payloads: Sequence[Any], step: Step) -> list[Any]:
        from mmhub.speech import transcribe

        how: dict[str, Any] = {"batch_size": min(self._batch, _WINDOWS), "policy": self._policy}
        with _stepping(self._model, step):
            return transcribe(self._model, payloads, settings=call.settings, **how, **dict(call.options))


@contextmanager
def _stepping(model: Model, step: Step) -> Iterator[None]:
    """Call `step` whenever this thread lets an encoder see a batch: long recordings are heard window by window."""
    mine = threading.get_ident()

    def seen(*_: object) -> None:
        if threading.get_ident() == mine:
            step()

    hooks = [encoder.register_forward_pre_hook(seen) for encoder in model.encoders.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(streams: Mapping[str, Tensor]) -> list[dict[str, list[float]]]:
    """Vectors by stream, (B, D), as one table of stream to vector for each row."""
    lists = {name: part.tolist() for name, part in streams.items()}
    size = len(next(iter(lists.values())))
    return [{name: rows[row] for name, rows in lists.items()} for row in range(size)]
