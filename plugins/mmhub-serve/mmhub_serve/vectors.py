"""POST /v1/embeddings: a vector a text."""

from __future__ import annotations

import base64
from array import array
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from mmhub_serve.bodies import Body, answer, aside, lent, read_json, shaped, size_of
from mmhub_serve.completions import texts_of
from mmhub_serve.errors import Refused
from mmhub_serve.openai_parameters import EMBEDDINGS, without_defaults
from mmhub_serve.pool import Pool
from mmhub_serve.refusals import blaming
from mmhub_serve.settings import Limits
from mmhub_serve.tokens import prompt_tokens, usage


class EmbeddingBody(Body, kw_only=True):
    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


async def embed_texts(request: Request, pool: Pool, limits: Limits) -> Response:
    """Embed one or several texts; of a model that keeps several streams apart, the one of texts."""
    table = without_defaults(await read_json(request), EMBEDDINGS)
    body = await aside(size_of(request), shaped, EmbeddingBody, table)
    texts = texts_of(body.input, "input", limits)
    async with lent(request, pool, body.model) as served:
        if "text" not in served.info.modalities:
            what = f"{served.name} takes {', '.join(served.info.modalities)} and no texts"
            raise Refused(400, what, "ask /v1/embed", param="model")
        with blaming("input", several=len(texts) > 1):
            streams = await served.embed([{"text": text} for text in texts])
        model = served.model
        found = streams.get("text") or next(iter(streams.values()))
        if body.dimensions not in (None, len(found[0])):
            what = f"dimensions is {body.dimensions}, and the vectors have {len(found[0])}"
            raise Refused(400, what, "leave it out", param="dimensions")

        def count() -> int:
            return sum(prompt_tokens(model, text, limits.policy) for text in texts)

        used = usage(await aside(2**30, count))
    data = [
        {"object": "embedding", "index": number, "embedding": _encoded(vector, body.encoding_format)}
        for number, vector in enumerate(found)
    ]
    return answer({"object": "list", "data": data, "model": served.name, "usage": used})


def _encoded(vector: list[float], kind: str) -> Any:
    """A vector as numbers, or as base64 of little-endian fp32."""
    if kind == "float":
        return vector
    numbers = array("f", vector)
    if numbers.itemsize == 4 and array("H", [1]).tobytes()[0] == 0:
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
