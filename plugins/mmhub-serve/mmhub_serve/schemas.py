"""What the server's routes take and answer, as OpenAPI 3.1 says it, typed for each model by its task and modalities.

A model's own route, /v1/models/NAME/predict, takes exactly the modalities it has and answers what its task answers;
/predict takes what any of the models takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI

from mmhub.interfaces import Generation
from mmhub_serve.served import ModelInfo
from mmhub_serve.settings import Limits

Schema = dict[str, Any]
_REF = "#/components/schemas/"


class _Models(Protocol):
    def infos(self) -> Sequence[ModelInfo]: ...


def ref(name: str) -> Schema:
    return {"$ref": _REF + name}


def _object(needed: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None, **more: Any) -> Schema:
    """An object of these fields and no others."""
    table: Schema = {"type": "object", "properties": {**needed, **(optional or {})}, "additionalProperties": False}
    return table | ({"required": list(needed)} if needed else {}) | more


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _several(one: Schema) -> Schema:
    return {"anyOf": [one, _list(one, minItems=1)]}


TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1, "description": "a probability"}
WHOLE: Schema = {"type": "integer"}
_TIMED = {"start": NUMBER, "end": NUMBER}  # seconds
_TRUTH: Schema = {"type": "boolean"}
_VECTOR = _list(NUMBER)

MEDIUM: Schema = {
    "description": "A file: its bytes in base64, or as a data URL.",
    "anyOf": [
        _object({"base64": {"type": "string", "contentEncoding": "base64"}}),
        {"type": "string", "pattern": "^data:[^,]*;base64,"},
    ],
}
REFUSAL = _object(
    {"refused": TEXT, "guard": TEXT},
    {"scores": {"type": "object", "additionalProperties": SHARE}},  # of a model that is not sure
    description="What a guard does not let through.",
)
ERROR = _object(
    {
        "error": _object(
            {"message": TEXT, "type": TEXT, "code": {"type": ["string", "null"]}, "param": {"type": ["string", "null"]}}
        )
    }
)
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, _list({"type": "object"})]},
    },
    "required": ["role", "content"],
}
WORD = _object({"word": TEXT, **_TIMED})
SEGMENT = _object({"text": TEXT, **_TIMED})
_WRITTEN = {"finish": {"enum": ["end", "stop", "length"]}, "score": {**NUMBER, "description": "log-probability, nats"}}
_NONE_OR_WHOLE: Schema = {"type": ["integer", "null"]}
_ENTITY = _object({"label": TEXT, "start": WHOLE, "end": WHOLE}, {"score": SHARE, "text": TEXT})


def _labels(info: ModelInfo) -> Schema:
    known = getattr(info, "labels", ())
    return {"enum": list(known)} if known else TEXT


def _scores(info: ModelInfo) -> Schema:
    known = getattr(info, "labels", ())
    open_ended: Schema = {"type": "object", "additionalProperties": SHARE}
    return _object(dict.fromkeys(known, SHARE)) if known else open_ended


_ANSWERS: dict[str, Callable[[ModelInfo], Schema]] = {
    "classification": lambda info: _object({"label": _labels(info), "score": SHARE}, {"scores": _scores(info)}),
    "multilabel": lambda info: _object({"labels": _list(_labels(info))}, {"scores": _scores(info)}),
    "regression": lambda info: _object({"value": NUMBER}),
    "tagging": lambda info: _object(
        {"tags": _list(_labels(info)), "words": _list(TEXT)}, {"scores": _list(SHARE), "entities": _list(_ENTITY)}
    ),
    "question-answering": lambda info: _object(
        {"text": TEXT, "start": _NONE_OR_WHOLE, "end": _NONE_OR_WHOLE, "score": SHARE}
    ),
    "retrieval": lambda info: _object({"embeddings": {"type": "object", "additionalProperties": _VECTOR}}),
    "speech-recognition": lambda info: _object(
        {"text": TEXT},
        {"score": NUMBER, "words": _list(WORD), "segments": _list(SEGMENT), "finish": _WRITTEN["finish"]},
    ),
}


def answer_schema(info: ModelInfo) -> Schema:
    """Return the schema of one answer of a model: its task's, or what a guard has refused."""
    if info.task in _ANSWERS:
        found = _ANSWERS[info.task](info)
    else:
        found = _object({"text": TEXT, **_WRITTEN}, {"truncated": WHOLE}) if info.writes else {"type": "object"}
    return {"anyOf": [found, ref("Refusal")]}


def sample_schema(info: ModelInfo) -> Schema:
    """Return the schema of one sample of a model: any of its modalities, at least one."""
    pair = ("question", "context") if info.task == "question-answering" else ("text", "text_pair")
    texts: list[Schema] = [TEXT, _object(dict.fromkeys(pair, TEXT)), _list({})]
    kinds = {"text": TEXT if info.converses or info.writes else {"anyOf": texts}}
    kinds |= dict.fromkeys(("image", "audio"), _several(ref("Medium")))
    fields = {name: kinds.get(name, {}) for name in info.modalities}
    if _talks(info):
        fields["messages"] = _list(ref("Message"), minItems=1)
    return _object({}, {name: {"anyOf": [kind, {"type": "null"}]} for name, kind in fields.items()}, minProperties=1)


def _talks(info: ModelInfo) -> bool:
    """Does it take conversations, if only of texts, where it has a chat template?"""
    return info.converses or (info.writes and info.task == "language-modelling")


def request_schema(info: ModelInfo, samples: Schema, limits: Limits, named: bool) -> Schema:
    """Return the schema of a request to a model; `named`: it has to say which."""
    model = {"model": {"const": info.name}}
    needed = {"samples": _list(samples, minItems=1, maxItems=limits.samples)}
    return _object(needed | (model if named else {}), _options(info) | ({} if named else model))


def _options(info: ModelInfo) -> dict[str, Schema]:
    """What a request may say beside its samples."""
    options: dict[str, Schema] = {"generation": ref("Generation")} if info.writes else {}
    if info.hears:
        options |= {"timestamps": {"enum": ["none", "segment", "word"]}, "language": TEXT, "translate": _TRUTH}
    return options


def _form_schema(info: ModelInfo, options: Mapping[str, Schema]) -> Schema:
    """A multipart form: the modalities as files or values, each as often as there are samples; JSON is sent as text."""
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    fields = {name: _list(TEXT if name == "text" else binary) for name in info.modalities}
    as_json = {"type": "string", "contentMediaType": "application/json"}
    if "text" in info.modalities and not info.writes:
        fields["text_pair"] = _list(TEXT)
    if _talks(info):
        fields["messages"] = _list(as_json)
    more = {name: kind if name in ("timestamps", "language") else as_json for name, kind in options.items()}
    return {"type": "object", "properties": {"model": TEXT, **fields, **more}, "additionalProperties": False}


def document(base: Schema, infos: Sequence[ModelInfo], limits: Limits) -> Schema:
    """Return the whole description: `base`, which FastAPI makes of its own routes, and the routes to models."""
    schemas = dict(base.get("components", {}).get("schemas", {}))
    schemas |= {"Medium": MEDIUM, "Refusal": REFUSAL, "Error": ERROR, "Message": _MESSAGE}
    written = msgspec.json.schema(Generation)
    schemas["Generation"] = written["$defs"]["Generation"]
    del schemas["Generation"]["properties"]["watermark"]  # which no client may choose
    paths, requests, answers = dict(base.get("paths", {})), [], []
    for number, info in enumerate(infos):
        key = f"{re.sub(r'[^A-Za-z0-9._-]', '_', info.name).strip('_')}_{number}"
        schemas[f"Sample_{key}"] = sample_schema(info)
        schemas[f"Answer_{key}"] = answer_schema(info)
        schemas[f"Request_{key}"] = request_schema(info, ref(f"Sample_{key}"), limits, named=False)
        many = request_schema(info, ref(f"Sample_{key}"), limits, named=True) if len(infos) > 1 else None
        requests.append(many or ref(f"Request_{key}"))
        found = ref(f"Answer_{key}")
        answers.append(found)
        paths[f"/v1/models/{info.name}/predict"] = _route(
            f"Answer samples by {info.name} ({info.task}).",
            ref(f"Request_{key}"),
            _object({"predictions": _list(found)}),
            _form_schema(info, _options(info)),
        )
        paths[f"/v1/models/{info.name}/embed"] = _route(
            f"Embed samples by {info.name}.",
            _object({"samples": _list(ref(f"Sample_{key}"), minItems=1, maxItems=limits.samples)}, {"model": TEXT}),
            _EMBEDDED,
            _form_schema(info, {}),
        )
    asked, given = _any_of(requests), _object({"predictions": _list(_any_of(answers))})
    for prefix in ("", "/v1"):
        paths[f"{prefix}/predict"] = _route("Answer samples.", asked, given, {"type": "object"})
        paths[f"{prefix}/embed"] = _route("Embed samples.", _EMBED, _EMBEDDED, {"type": "object"})
    paths |= _OPENAI | {
        "/v1/models": _get("List the models.", _MODELS),
        "/v1/models/{name}": _get("Describe a model.", _MODEL, name=True),
    }
    return base | {"paths": paths, "components": base.get("components", {}) | {"schemas": schemas}}


def _any_of(kinds: list[Schema]) -> Schema:
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {"type": "object"}


def _answers(found: Schema | None, kind: str = "application/json") -> Schema:
    content = {kind: {"schema": found}} if found else {kind: {}}
    failed = {"description": "Refused.", "content": {"application/json": {"schema": ref("Error")}}}
    return {"200": {"description": "The answer.", "content": content}, "4XX": failed, "5XX": failed}


def _route(summary: str, asked: Schema, found: Schema, form: Schema | None = None) -> Schema:
    content = {"application/json": {"schema": asked}}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": _answers(found),
        }
    }


def _get(summary: str, found: Schema, name: bool = False) -> Schema:
    place = [{"name": "name", "in": "path", "required": True, "schema": TEXT}]
    return {"get": {"summary": summary, "responses": _answers(found)} | ({"parameters": place} if name else {})}


_EMBED = _object({"samples": _list({"type": "object"}, minItems=1)}, {"model": TEXT})
_EMBEDDED = {
    "anyOf": [
        _object({"embeddings": _list(_VECTOR), "dim": WHOLE}),
        _object(
            {
                "embeddings": {"type": "object", "additionalProperties": _list(_VECTOR)},
                "dim": {"type": "object", "additionalProperties": WHOLE},
            }
        ),
    ]
}
_MODEL: Schema = {
    "type": "object",
    "properties": {"id": TEXT, "object": {"const": "model"}, "created": WHOLE, "owned_by": TEXT, "task": TEXT}
    | {"modalities": _list(TEXT), "writes": _TRUTH, "converses": _TRUTH, "hears": _TRUTH},
    "required": ["id", "object", "created", "owned_by", "task", "modalities"],
}
_MODELS = _object({"object": {"const": "list"}, "data": _list(_MODEL)})
_PICKED: Schema = {"type": "number", "minimum": 0}
_WRITING: dict[str, Schema] = {
    "model": TEXT,
    "stream": _TRUTH,
    "stream_options": {"type": "object", "properties": {"include_usage": _TRUTH}},
    "max_tokens": WHOLE,
    "temperature": _PICKED,
    "top_p": _PICKED,
    "top_k": WHOLE,
    "min_p": _PICKED,
    "repetition_penalty": _PICKED,
    "seed": WHOLE,
    "stop": _several(TEXT),
    "n": WHOLE,
}
_CHAT: Schema = {
    "type": "object",
    "properties": {"messages": _list(ref("Message"), minItems=1), "max_completion_tokens": WHOLE, **_WRITING},
    "required": ["messages"],
}
_COMPLETION: Schema = {"type": "object", "properties": {"prompt": _several(TEXT), **_WRITING}}
_EMBEDDINGS: Schema = {
    "type": "object",
    "properties": {"input": _several(TEXT), "model": TEXT, "encoding_format": {"enum": ["float", "base64"]}},
    "required": ["input"],
}
_AUDIO: Schema = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "model": TEXT,
        "language": TEXT,
        "response_format": {"enum": ["json", "text", "srt", "vtt", "verbose_json"]},
        "timestamp_granularities[]": _list({"enum": ["segment", "word"]}),
    },
    "required": ["file"],
}
_TABLE: Schema = {"type": "object"}


def _form_route(summary: str) -> Schema:
    body = {"required": True, "content": {"multipart/form-data": {"schema": _AUDIO}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _answers(_TABLE)}}


_OPENAI: dict[str, Schema] = {
    "/v1/chat/completions": _route("Answer a conversation, as OpenAI's API.", _CHAT, _TABLE),
    "/v1/completions": _route("Go on with texts, as OpenAI's API.", _COMPLETION, _TABLE),
    "/v1/embeddings": _route("Embed texts, as OpenAI's API.", _EMBEDDINGS, _TABLE),
    "/v1/audio/transcriptions": _form_route("Write down speech, as OpenAI's API."),
    "/v1/audio/translations": _form_route("Translate speech into English, as OpenAI's API."),
}


def describe(app: FastAPI, pool: _Models, limits: Limits) -> None:
    """Let an application's /openapi.json describe the models of a pool, once they are known."""
    plain = app.openapi

    def openapi() -> Schema:
        return document(plain(), pool.infos(), limits)

    app.openapi = openapi  # type: ignore[method-assign]
