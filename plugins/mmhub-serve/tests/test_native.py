"""The routes of our own: answers are the library's, fit the schema that is published, and mistakes are named."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.openapi.models import OpenAPI

import mmhub
from mmhub.model import Model
from mmhub_serve.schemas import document
from mmhub_serve.settings import Limits
from tests.conftest import _one_thread, _own_caches, flac, png, three_modalities  # noqa: F401
from tests.serving import serving
from tests.talk_tables import AUDIO, IMAGE

TEXTS = ["a fine film", "one long string of old words", "was it good or was it bad"]
TEXT = {"text": {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}}}
LABELS = ["no", "yes"]
LM = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "max_length": 128}}
SHORT = {"generation": {"max_new_tokens": 4}}


def of_text(task: str, use: str, **config: Any) -> Model:
    decoder = {"use": use, "config": config}
    values = {"text": TEXTS, "target": TEXTS}
    return mmhub.compose(task, encoders=TEXT, decoder=decoder, tokenizer={"kind": "word"}, values=values).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """An untrained model of each task."""
    heard = {"target": ["zero one", "two"]}
    return {
        "classification": of_text("classification", "classification", labels=LABELS),
        "org/multilabel": of_text("multilabel", "multilabel", labels=LABELS),
        "regression": of_text("regression", "regression", mean=1.0, std=2.0),
        "tagging": of_text("tagging", "tagging", labels=["O", "B-X", "I-X"]),
        "question-answering": of_text("question-answering", "span"),
        "translation": of_text("translation", "seq2seq", dim=16, depth=1, heads=2, generation={"max_new_tokens": 5}),
        "language-modelling": mmhub.compose("language-modelling", decoder=LM, tokenizer={"kind": "byte"}).eval(),
        "chat": mmhub.compose(
            "chat", encoders={"image": IMAGE, "audio": AUDIO}, decoder=LM, tokenizer={"kind": "word"}, texts=TEXTS
        ).eval(),
        "speech": mmhub.compose("speech-recognition", encoders={"audio": AUDIO}, values=heard).eval(),
        "retrieval": mmhub.compose(
            "retrieval", encoders=TEXT | {"image": IMAGE}, decoder={"config": {"dim": 8}}, texts=TEXTS
        ).eval(),
        "any": three_modalities(*TEXTS),
    }


SAMPLES: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": TEXTS[0]}, {"text": TEXTS[2]}],
    "org/multilabel": [{"text": TEXTS[1]}],
    "regression": [{"text": TEXTS[1]}],
    "tagging": [{"text": TEXTS[1]}, {"text": ["one", "film"]}],
    "question-answering": [{"text": {"question": "was it good", "context": TEXTS[2]}}],
    "translation": [{"text": TEXTS[0]}],
    "language-modelling": [{"text": "was"}],
    "chat": [{"text": "was it good", "image": png(1)}, {"image": [png(1), png(2)], "audio": flac(3), "text": "fine"}],
    "speech": [{"audio": flac(1)}],
    "retrieval": [{"text": TEXTS[0]}, {"image": png(2)}, {"text": TEXTS[1], "image": png(1)}],
    "any": [{"image": png(1)}, {"audio": flac(1), "text": TEXTS[0]}, {"image": png(3), "audio": flac(2)}],
}


@pytest.fixture(scope="module")
def client(models: dict[str, Model]) -> Iterator[httpx.Client]:
    with serving(models, samples=8) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def described(client: httpx.Client) -> dict[str, Any]:
    """What /openapi.json says once all models are known."""
    until = time.monotonic() + 10
    while len(found := client.get("/openapi.json").json()["paths"]) < 20 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(found) >= 20
    return dict(client.get("/openapi.json").json())


def sent(value: Any) -> Any:
    """A sample as JSON has it."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {key: sent(one) for key, one in value.items()}
    return [sent(one) for one in value] if isinstance(value, list) else value


def same(got: Any, wanted: Any) -> bool:
    """Are two answers the same, numbers to 1e-5?"""
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    return bool(got == pytest.approx(wanted, abs=1e-5, rel=1e-5)) if isinstance(wanted, float) else bool(got == wanted)


def fits(value: Any, schema: Any, schemas: dict[str, Any]) -> bool:
    """Is a value of a schema, as far as ours go?"""
    if "$ref" in schema:
        return fits(value, schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return any(fits(value, one, schemas) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    named = schema.get("type", [])
    names = [named] if isinstance(named, str) else named
    if names and not any(value is None if name == "null" else isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, dict):
        return _fits_object(value, schema, schemas)
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) and all(fits(one, schema["items"], schemas) for one in value)
    return not isinstance(value, str) or re.search(schema.get("pattern", ""), value) is not None


def _fits_object(value: dict[str, Any], schema: Any, schemas: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if len(value) < schema.get("minProperties", 0) or not set(schema.get("required", [])) <= value.keys():
        return False
    rest = [
        fits(one, others, schemas) if isinstance(others, dict) else others
        for key, one in value.items()
        if key not in known
    ]
    return all(rest) and all(fits(one, known[key], schemas) for key, one in value.items() if key in known)


@pytest.mark.parametrize("name", SAMPLES)
def test_answers_are_those_of_the_library_and_fit_the_schema_of_the_model(
    name: str, client: httpx.Client, models: dict[str, Model], described: dict[str, Any]
) -> None:
    options = SHORT if name in ("chat", "language-modelling") else {}
    body = {"samples": [sent(sample) for sample in SAMPLES[name]]} | options
    answer = client.post(f"/v1/models/{name}/predict", json=body)
    assert answer.status_code == 200, answer.text
    own: dict[str, Any] = options.get("generation", {})
    alone = [models[name].generate([one], **own) if own else models[name].predict([one]) for one in SAMPLES[name]]
    assert same(answer.json()["predictions"], [one for (one,) in alone])
    route = described["paths"][f"/v1/models/{name}/predict"]["post"]
    schemas = described["components"]["schemas"]
    assert fits(answer.json(), route["responses"]["200"]["content"]["application/json"]["schema"], schemas)
    asked = route["requestBody"]["content"]["application/json"]["schema"]
    assert fits(body, asked, schemas)
    assert not fits(body | {"smaples": []}, asked, schemas)
    assert not fits({"samples": [{"smell": "of roses"}]}, asked, schemas)
    generic = client.post("/predict", json=body | {"model": name})
    assert same(generic.json(), answer.json())


def test_the_description_is_openapi_and_names_the_labels(described: dict[str, Any]) -> None:
    OpenAPI.model_validate(described)
    schemas = described["components"]["schemas"]
    names = re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', httpx.Response(200, json=described).text)
    assert set(names) <= schemas.keys()
    (key,) = [key for key in schemas if key.startswith("Answer_classification")]
    answer = {"label": "yes", "score": 0.5}
    assert fits(answer, schemas[key], schemas) and not fits(answer | {"label": "perhaps"}, schemas[key], schemas)


def test_one_model_needs_no_name_in_the_description(models: dict[str, Model]) -> None:
    from mmhub_serve.served import info_of

    found = document({}, [info_of("a/b", models["any"])], Limits())
    schema = found["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    sample = {"image": {"base64": "AAAA"}, "audio": "data:audio/flac;base64,AAAA", "text": None}
    assert fits({"samples": [sample]}, schema, found["components"]["schemas"])
    assert not fits({"samples": [sample | {"audio": "/etc/passwd"}]}, schema, found["components"]["schemas"])


def test_forms_are_samples_as_the_command_line_takes_them(client: httpx.Client, models: dict[str, Model]) -> None:
    files = [("image", ("a.png", png(1))), ("image", ("b.png", png(2)))]
    answer = client.post("/predict", data={"model": "any", "text": TEXTS[:2]}, files=files)
    paired = [{"text": TEXTS[0], "image": png(1)}, {"text": TEXTS[1], "image": png(2)}]
    assert same(answer.json()["predictions"], models["any"].predict(paired))
    about = {"model": "chat", "text": "was it good", "generation": '{"max_new_tokens": 3}'}
    one = client.post("/predict", data=about, files=files).json()["predictions"]
    question = {"text": "was it good", "image": [png(1), png(2)]}
    assert same(one, models["chat"].generate([question], max_new_tokens=3))
    pair = {"model": "classification", "text": TEXTS[0], "text_pair": TEXTS[1]}
    found = client.post("/predict", data=pair, files={"none": ("", b"")}).json()
    assert "none" in found["error"]["message"]


def test_vectors_are_those_of_the_library(client: httpx.Client, models: dict[str, Model]) -> None:
    sample = {"text": TEXTS[0], "image": png(1)}
    one = client.post("/embed", json={"model": "classification", "samples": [{"text": TEXTS[0]}]}).json()
    assert same(one["embeddings"], models["classification"].embed([{"text": TEXTS[0]}]).tolist()) and one["dim"] == 16  # type: ignore[union-attr]
    two = client.post("/v1/embed", json={"model": "retrieval", "samples": [sent(sample)]}).json()
    wanted = models["retrieval"].embed([sample])
    assert same(two["embeddings"], {name: part.tolist() for name, part in wanted.items()})  # type: ignore[union-attr]
    assert two["dim"] == {"text": 8, "image": 8}


def test_models_are_listed_with_what_they_are_for(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == list(SAMPLES)
    one = client.get("/v1/models/org/multilabel").json()
    assert one in listed["data"] and (one["task"], one["modalities"]) == ("multilabel", ["text"])
    assert client.get("/v1/models/org/other").json()["error"]["code"] == "model_not_found"


def test_sampled_texts_depend_on_the_seed_and_the_row_alone(client: httpx.Client, models: dict[str, Model]) -> None:
    samples = [{"text": "was"}, {"text": "was"}]
    drawn: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "seed": 5}
    body = {"model": "language-modelling", "samples": samples, "generation": drawn}
    found = client.post("/predict", json=body).json()["predictions"]
    assert same(found, models["language-modelling"].generate(samples, **drawn))
    assert found[0]["text"] != found[1]["text"]


PICTURE = {"base64": base64.b64encode(png(1)).decode()}
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a misspelt key": ({"smaples": []}, "did you mean 'samples'?", "smaples"),
    "no samples at all": ({}, "the key 'samples' is missing", "samples"),
    "an empty list": ({"samples": []}, "give between 1 and 8", "samples"),
    "too many samples": ({"samples": [{"text": "a"}] * 9}, "samples holds 9", "samples"),
    "samples of a wrong kind": ({"samples": "a"}, "expected 'array'", "samples"),
    "a misspelt modality": ({"samples": [{"imgae": PICTURE}]}, "did you mean 'image'?", "samples"),
    "a file by name": ({"samples": [{"image": "/etc/passwd"}]}, "opens no files by name", "samples[0]"),
    "a struct with a path": ({"samples": [{"image": {"path": "/etc/passwd"}}]}, "send the file itself", "samples[0]"),
    "an address": ({"samples": [{"text": "a"}, {"image": "http://a/b.png"}]}, "fetches no addresses", "samples[1]"),
    "no base64": ({"samples": [{"image": {"base64": "???"}}]}, "is no base64", "samples[0]"),
    "no picture": (
        {"samples": [{"text": "a"}, {"image": {"base64": "AAAA"}}]},
        "samples[1]: 3 bytes",
        "samples[1].image",
    ),
    "no text": ({"samples": [{"text": 7}]}, "a text is expected", "samples[0].text"),
    "options for others": ({"samples": [{"text": "a"}], **SHORT}, "writes no text", "generation"),
    "times of no speech": ({"samples": [{"text": "a"}], "timestamps": "word"}, "takes no 'timestamps'", "timestamps"),
    "another model": ({"model": "nobody", "samples": [{"text": "a"}]}, "the body names the model 'nobody'", "model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_and_named(mistake: str, client: httpx.Client) -> None:
    body, message, param = MISTAKES[mistake]
    answer = client.post("/v1/models/any/predict", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("asked", "message", "param"),
    [
        ({"max_new_tokns": 3}, "did you mean", "max_new_tokns"),
        ({"max_new_tokens": 10**6}, "this server allows", "max_new_tokens"),
        ({"max_new_tokens": "3"}, "expected 'int'", "max_new_tokens"),
        ({"beams": 1000}, "this server allows 16", "beams"),
        ({"temperature": -1}, "temperature must be", "temperature"),
        ({"stop": ["a"] * 99}, "at most 16 stop texts", "stop"),
    ],
)
def test_settings_of_writing_are_bounded(asked: dict[str, Any], message: str, param: str, client: httpx.Client) -> None:
    body = {"model": "chat", "samples": [{"text": "was it good"}], "generation": asked}
    error = client.post("/predict", json=body).json()["error"]
    assert message in error["message"] and error["param"] == param


def test_media_come_as_data_urls_and_in_wrapped_base64_too(client: httpx.Client, models: dict[str, Model]) -> None:
    wanted = models["any"].predict([{"image": png(1)}])
    url = "data:image/png;base64," + PICTURE["base64"]
    wrapped = {"base64": re.sub("(.{76})", r"\1\n", PICTURE["base64"])}
    for image in (url, wrapped, [PICTURE]):
        found = client.post("/predict", json={"model": "any", "samples": [{"image": image}]})
        assert same(found.json()["predictions"], wanted)


def test_conversations_are_samples_of_models_that_converse(client: httpx.Client, models: dict[str, Model]) -> None:
    def talk(image: Any) -> dict[str, Any]:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "was it good"}]
        return {"messages": [{"role": "user", "content": parts}]}

    body = {"model": "chat", "samples": [talk(PICTURE)]} | SHORT
    wanted = models["chat"].generate([talk(png(1))], max_new_tokens=4)
    assert same(client.post("/predict", json=body).json()["predictions"], wanted)


def test_forms_whose_pairs_are_not_whole_are_refused(client: httpx.Client) -> None:
    fields = {"model": "classification", "text": ["a", "b", "c"], "text_pair": ["d", "e"]}
    answer = client.post("/predict", data=fields, files={"none": ("", b"")})
    assert answer.status_code == 400
    assert "3 text, 2 text_pair" in answer.json()["error"]["message"]


def test_everything_that_is_taken_is_described(described: dict[str, Any]) -> None:
    paths, schemas = described["paths"], described["components"]["schemas"]

    def of(name: str, route: str, kind: str) -> Any:
        return paths[f"/v1/models/{name}/{route}"]["post"]["requestBody"]["content"][kind]["schema"]

    sample = {"samples": [{"text": "a"}]}
    assert fits(sample, of("classification", "embed", "application/json"), schemas)
    assert not fits({"samples": [{"image": "a"}]}, of("classification", "embed", "application/json"), schemas)
    talk = {"samples": [{"messages": [{"role": "user", "content": "a"}]}]}
    assert fits(talk, of("language-modelling", "predict", "application/json"), schemas)
    assert not fits(talk, of("translation", "predict", "application/json"), schemas)
    forms = {name: of(name, "predict", "multipart/form-data")["properties"] for name in SAMPLES}
    assert {"text", "text_pair"} <= forms["classification"].keys()
    assert {"messages", "generation", "image"} <= forms["chat"].keys()
    assert {"timestamps", "language", "translate", "audio"} <= forms["speech"].keys()
    assert not {"generation", "messages", "timestamps"} & forms["classification"].keys()


def test_what_is_not_drawn_has_no_seed(models: dict[str, Model]) -> None:
    from mmhub_serve.writing import settings_of

    model = models["chat"]
    assert settings_of(model, {"seed": 5}, Limits()) == settings_of(model, {"seed": 6}, Limits())
    assert settings_of(model, {"seed": 5, "temperature": 1.0}, Limits()).seed == 5
