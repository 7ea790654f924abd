"""The routes of our own: models, predictions and vectors, all also below /v1.

They are plain Starlette routes, for what FastAPI does around a call costs more than the rest of one; what they take and
answer is described in `schemas`, for each model by itself.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mmhub.errors import InputError
from mmhub_serve.bodies import (
    Body,
    answer,
    as_text,
    aside,
    content_type,
    lent,
    only_value,
    read_form,
    read_json,
    shaped,
    size_of,
)
from mmhub_serve.errors import Refused
from mmhub_serve.inputs import Fetch, read_inputs, read_sample
from mmhub_serve.pool import Pool
from mmhub_serve.refusals import blaming, check_count
from mmhub_serve.schemas import describe
from mmhub_serve.served import ModelInfo, Served
from mmhub_serve.settings import Limits, Settings
from mmhub_serve.writing import settings_of


class EmbedBody(Body, kw_only=True):
    samples: list[dict[str, Any]]
    model: str | None = None


class PredictBody(EmbedBody, kw_only=True):
    generation: dict[str, Any] | None = None
    timestamps: Literal["none", "segment", "word"] | None = None
    language: str | None = None
    translate: bool | None = None

    @property
    def hearing(self) -> dict[str, Any]:
        """The options for models that hear, as far as they are given."""
        given = {"timestamps": self.timestamps, "language": self.language, "translate": self.translate}
        return {name: value for name, value in given.items() if value is not None}


def native_routes(pool: Pool, settings: Settings) -> APIRouter:
    """Return the routes for the models of a pool."""
    limits, created = settings.limits, int(time.time())

    @asynccontextmanager
    async def described(app: FastAPI) -> AsyncIterator[None]:
        describe(app, pool, limits)
        yield

    router = APIRouter(lifespan=described)

    async def predict(request: Request) -> Response:
        body, form = await _read(request, PredictBody, limits, pool)
        async with lent(request, pool, body.model) as served:
            samples = await _samples(request, body, form, served.info, limits)
            with blaming("samples", several=True):
                return answer({"predictions": await _answers(served, samples, body, limits)})

    async def embed(request: Request) -> Response:
        body, form = await _read(request, EmbedBody, limits, pool)
        async with lent(request, pool, body.model) as served:
            samples = await _samples(request, body, form, served.info, limits)
            with blaming("samples", several=True):
                found = await served.embed(samples)
        widths = {name: len(vectors[0]) for name, vectors in found.items()}
        if set(found) == {""}:
            return answer({"embeddings": found[""], "dim": widths[""]})
        return answer({"embeddings": found, "dim": widths})

    async def models(request: Request) -> Response:
        found = [await pool.info(name) for name in pool.names]
        return answer({"object": "list", "data": [_entry(info, created, pool) for info in found]})

    async def model(request: Request) -> Response:
        return answer(_entry(await pool.info(request.path_params["name"]), created, pool))

    for prefix in ("", "/v1"):
        router.add_route(f"{prefix}/predict", predict, methods=["POST"])
        router.add_route(f"{prefix}/embed", embed, methods=["POST"])
    router.add_route("/v1/models", models, methods=["GET"])
    router.add_route("/v1/models/{name:path}/predict", predict, methods=["POST"])
    router.add_route("/v1/models/{name:path}/embed", embed, methods=["POST"])
    router.add_route("/v1/models/{name:path}", model, methods=["GET"])
    return router


def _entry(info: ModelInfo, created: int, pool: Pool) -> dict[str, Any]:
    """A model as OpenAI lists it, and what it is for."""
    about = {"task": info.task, "modalities": list(info.modalities), "writes": info.writes}
    about |= {"converses": info.converses, "hears": info.hears, "loaded": info.name in pool.loaded}
    return {"id": info.name, "object": "model", "created": created, "owned_by": "mmhub"} | about


async def _read(
    request: Request, kind: Any, limits: Limits, pool: Pool
) -> tuple[Any, dict[str, list[str | bytes]] | None]:
    """A body in its shape, and the form that it was, whose samples are still to be put together."""
    form = await read_form(request, limits) if content_type(request) == "multipart/form-data" else None
    table = await read_json(request) if form is None else _options(form)
    body = await aside(size_of(request), shaped, kind, table)
    name = request.path_params.get("name")
    if name and body.model is not None and pool.called(body.model) != pool.called(name):
        raise Refused(400, f"the body names the model {body.model!r}, the address {name!r}", param="model")
    return (msgspec.structs.replace(body, model=name) if name else body), form


def _options(form: dict[str, list[str | bytes]]) -> dict[str, Any]:
    """Take what is no sample out of a form."""
    table: dict[str, Any] = {"samples": []}
    for name in ("model", "generation", "timestamps", "language", "translate"):
        value = only_value(form, name)
        form.pop(name, None)
        if value is not None:
            table[name] = _json(name, value) if name in ("generation", "translate") else value
    return table


def _json(name: str, value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(400, f"{name} is no JSON: {error}", param=name) from None


async def _samples(request: Request, body: Any, form: Any, info: ModelInfo, limits: Limits) -> list[dict[str, Any]]:
    given = body.samples if form is None else _of_form(form, info)
    check_count(len(given), limits.samples, "samples")
    return await read_inputs(request, limits, _read_all, given)


def _read_all(given: list[dict[str, Any]], fetch: Fetch) -> list[dict[str, Any]]:
    found = []
    for row, sample in enumerate(given):
        with blaming(f"samples[{row}]"):
            found.append(read_sample(sample, fetch))
    return found


def _of_form(form: Mapping[str, list[str | bytes]], info: ModelInfo) -> list[dict[str, Any]]:
    """The samples of a form, as `mmhub predict` takes its options: fields given once each are one sample, several times
    several, paired in order; one text with several files is one question to a model that converses."""
    fields: dict[str, list[Any]] = {
        name: [as_text(name, value) for value in values] if name in ("text", "text_pair", "messages") else list(values)
        for name, values in form.items()
    }
    if "text_pair" in fields:
        texts, seconds = fields.get("text", []), fields.pop("text_pair")
        if len(texts) != len(seconds):
            what = f"the fields do not pair up: {len(texts)} text, {len(seconds)} text_pair"
            raise Refused(400, what, "give each as often", param="samples")
        fields["text"] = [{"text": text, "text_pair": second} for text, second in zip(texts, seconds, strict=True)]
    if "messages" in fields:
        fields["messages"] = [_json("messages", value) for value in fields["messages"]]
    counts = {len(values) for values in fields.values()}
    if info.converses and len(fields.get("text", ())) == 1 and len(counts) > 1:
        return [{name: values if len(values) > 1 else values[0] for name, values in fields.items()}]
    if len(counts) > 1:
        shown = ", ".join(f"{len(values)} {name}" for name, values in fields.items())
        raise Refused(400, f"the fields do not pair up: {shown}", "give each as often", param="samples")
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


async def _answers(
    served: Served, samples: list[dict[str, Any]], body: PredictBody, limits: Limits
) -> list[dict[str, Any]]:
    """Predictions as `mmhub predict --json` has them."""
    info, hearing = served.info, body.hearing
    if hearing and not info.hears:
        name = next(iter(hearing))
        raise Refused(400, f"{info.name} is for {info.task} and takes no {name!r}", "leave it out", param=name)
    if not info.writes:
        if body.generation is not None:
            what = f"{info.name} is for {info.task} and writes no text"
            raise Refused(400, what, "leave generation out", param="generation")
        if not hearing:
            return await served.predict(samples)
        return [await _heard(served, sample, row, hearing) for row, sample in enumerate(samples)]
    given = body.generation or {}
    decoder: Any = served.model.decoder
    if not given and not hearing and decoder.generation.max_new_tokens <= limits.new_tokens:
        return await served.predict(samples)
    written = settings_of(served.model, given, limits)
    if not info.hears:
        return await served.write(samples, written)
    options = hearing | ({"settings": written} if given else {})
    drawn = bool(given) and written.temperature > 0  # random choices are those of a sample's row
    return [
        await _heard(served, sample, row, options | ({"first": row} if drawn else {}))
        for row, sample in enumerate(samples)
    ]


async def _heard(served: Served, sample: dict[str, Any], row: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The transcript of a sample; an error names its row."""
    try:
        return await served.transcribe(sample, **options)
    except InputError as error:
        error.row = row
        raise
