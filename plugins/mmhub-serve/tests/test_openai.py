"""OpenAI's own client, unchanged, against a real socket: what it is told equals what the library says."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

import mmhub
from mmhub.model import Model
from mmhub.speech import transcribe
from mmhub.speech.subtitles import as_text
from mmhub_serve.tokens import talk_tokens, written_tokens
from tests.conftest import _one_thread, _own_caches, flac, png  # noqa: F401
from tests.serving import serving
from tests.talk_tables import AUDIO, IMAGE, WORDS
from tests.test_speech import save_whisper

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LM = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}
TEXTS = ["a fine film", "one long string of old words"]
TEXT = {"text": {"use": "transformer", "config": LM}}


def talker() -> Model:
    """A language model of texts alone with a chat template."""
    decoder = {"use": "transformer-lm", "config": LM | {"generation": {"max_new_tokens": 6}}}
    model = mmhub.compose("language-modelling", decoder=decoder, tokenizer={"kind": "byte"}).eval()
    model.language_model.processor.take_template("plain")
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Untrained models: one that sees, hears and answers, one that writes on, one that embeds, and two for speech."""
    spoken = " ".join([*WORDS, "say which picture and sound User: Assistant:"])
    both = {"image": IMAGE, "audio": AUDIO}
    writes = {"use": "transformer-lm", "config": LM | {"max_length": 64}}
    paired = {"use": "contrastive", "config": {"dim": 8}}
    return {
        "org/chat": mmhub.compose(
            "chat",
            encoders=both,
            decoder={"use": "transformer-lm", "config": LM},
            tokenizer={"kind": "word"},
            texts=[spoken],
        ).eval(),
        "lm": mmhub.compose("language-modelling", decoder=writes, tokenizer={"kind": "byte"}).eval(),
        "talker": talker(),
        "labels": mmhub.compose(encoders=TEXT, decoder={"config": {"labels": ["no", "yes"]}}, texts=TEXTS).eval(),
        "pairs": mmhub.compose("retrieval", encoders=TEXT | {"image": IMAGE}, decoder=paired, texts=TEXTS).eval(),
        "whisper": mmhub.load(str(save_whisper(tmp_path_factory.mktemp("whisper")))).eval(),
        "ctc": mmhub.compose("speech-recognition", encoders={"audio": AUDIO}, values={"target": ["zero one"]}).eval(),
    }


@pytest.fixture(scope="module")
def url(models: dict[str, Model]) -> Iterator[str]:
    with serving(models, samples=8, new_tokens=100_000) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


ASKED: list[dict[str, Any]] = [
    {"role": "developer", "content": "say"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "which picture"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{in_base64(png(1))}", "detail": "low"}},
            {"type": "input_audio", "input_audio": {"data": in_base64(flac(2)), "format": "flac"}},
        ],
    },
]
OURS: list[dict[str, Any]] = [
    {"role": "system", "content": "say"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "which picture"},
            {"type": "image", "image": png(1)},
            {"type": "audio", "audio": flac(2)},
        ],
    },
]
DRAWN: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 7}


def test_an_answer_is_what_the_library_says(client: Any, models: dict[str, Model]) -> None:
    model = models["org/chat"]
    found = client.chat.completions.create(model="org/chat", messages=ASKED, max_tokens=6)
    (choice,) = found.choices
    assert choice.message.content == model.chat(OURS, max_new_tokens=6)
    assert (choice.finish_reason, choice.message.role, choice.message.refusal) == ("length", "assistant", None)
    used = found.usage
    assert used.completion_tokens == 6 and used.total_tokens == used.prompt_tokens + 6


def test_usage_counts_what_the_model_reads(client: Any, models: dict[str, Model]) -> None:
    model = models["org/chat"]
    batch = model.collate([{"messages": OURS}])
    read = model.fusion(model.encode(batch.items, 1), plan=batch.plan)["fused"].mask.sum()
    used = client.chat.completions.create(model="org/chat", messages=ASKED, max_tokens=1).usage
    assert used.prompt_tokens == int(read) == talk_tokens(model, OURS, _policy())
    assert written_tokens(models["lm"], "abc") == 3 and written_tokens(models["lm"], "") == 0


def _policy() -> Any:
    from mmhub.interfaces import Policy

    return Policy()


def test_a_stream_is_the_same_text_piece_by_piece(client: Any) -> None:
    asked = {"model": "org/chat", "messages": ASKED, "max_completion_tokens": 6} | DRAWN
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant" and len(middle) > 1
    text = "".join(chunk.choices[0].delta.content for chunk in middle)
    assert text.strip() == whole.choices[0].message.content
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, whole.choices[0].finish_reason)
    assert usage.choices == [] and usage.usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1 and first.object == "chat.completion.chunk"


def test_many_ask_at_once_and_each_gets_its_own_answer(url: str, models: dict[str, Model]) -> None:
    async def ask(client: Any, number: int) -> str:
        talk = [{"role": "user", "content": f"say {WORDS[number % 4]}"}]
        asked = {"model": "org/chat", "messages": talk, "max_tokens": 5, "temperature": 1.0, "seed": number}
        if number % 2:
            return str((await client.chat.completions.create(**asked)).choices[0].message.content)
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()

    async def scene() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(8)))

    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 1.0}
    wanted = [
        models["org/chat"].chat([{"role": "user", "content": f"say {WORDS[number % 4]}"}], **settings, seed=number)
        for number in range(8)
    ]
    assert asyncio.run(scene()) == wanted


def test_several_answers_are_drawn_as_the_library_draws_them(client: Any, models: dict[str, Model]) -> None:
    found = client.chat.completions.create(model="org/chat", messages=ASKED, max_tokens=6, n=3, **DRAWN)
    (own,) = models["org/chat"].generate([{"messages": OURS}], n=3, max_new_tokens=6, **DRAWN)
    assert [choice.message.content for choice in found.choices] == own["texts"]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len(set(own["texts"])) > 1


def test_without_a_seed_texts_differ_from_time_to_time(client: Any) -> None:
    asked = {"model": "lm", "prompt": "ab", "max_tokens": 20, "temperature": 2.0}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(3)}) > 1


def test_stop_texts_end_an_answer(client: Any, models: dict[str, Model]) -> None:
    whole = models["lm"].generate([{"text": "ab"}], max_new_tokens=9, **DRAWN)[0]["text"]
    asked = {"model": "lm", "prompt": "ab", "max_tokens": 9} | DRAWN
    for stop in (whole[4], [whole[4], "never"]):
        (choice,) = client.completions.create(**asked, stop=stop).choices
        assert choice.text == whole[: whole.index(whole[4])] and choice.finish_reason == "stop"


def test_harmless_parameters_pass(client: Any) -> None:
    harmless: dict[str, Any] = {"tools": [], "tool_choice": "none", "logprobs": False, "frequency_penalty": 0, "n": 1}
    harmless |= {
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "user": "me",
        "stop": None,
        "store": False,
    }
    harmless |= {"top_logprobs": None, "logit_bias": {}, "modalities": ["text"], "metadata": {"a": "b"}, "top_p": 1}
    found = client.chat.completions.create(model="org/chat", messages=ASKED, max_tokens=2, **harmless)
    assert found.choices[0].finish_reason == "length"


REFUSED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "logprobs": True,
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"5": 1},
    "audio": {"voice": "x", "format": "wav"},
    "modalities": ["text", "audio"],
    "max_tokens": 10**6,
    "max_completion_tokens": 0,
    "temperature": -0.5,
    "top_p": 0,
    "n": 99,
    "seed": 2**70,
    "stop": [""],
    "stream_options": {"include_usage": True},
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}],
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_a_model_cannot_do_is_refused_by_name(param: str, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "org/chat", "messages": ASKED, param: REFUSED[param]})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_errors_are_those_the_client_knows(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has org/chat, lm") as missing:
        client.chat.completions.create(model="gpt-9", messages=ASKED)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="holds no conversations") as wrong:
        client.chat.completions.create(model="labels", messages=ASKED)
    assert wrong.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        client.chat.completions.create(model="org/chat", messages=ASKED, extra_body={"temprature": 1})
    torn = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
    for stream in (False, True):  # also a stream says so before it begins
        with pytest.raises(openai.BadRequestError, match="3 bytes is not an image") as bad:
            client.chat.completions.create(model="org/chat", messages=torn, stream=stream)
        assert bad.value.param == "messages"
    long = {"model": "lm", "prompt": "a" * 100}
    with pytest.raises(openai.BadRequestError, match="the model's context of 64") as beyond:
        client.completions.create(**long)
    assert (beyond.value.code, beyond.value.param) == ("context_length_exceeded", "prompt")


def test_a_language_model_with_a_chat_template_answers_texts(client: Any, models: dict[str, Model]) -> None:
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "ha"},
    ]
    wanted = models["talker"].chat(talk, max_new_tokens=6, **DRAWN)
    asked = {"model": "talker", "messages": talk, "max_tokens": 6} | DRAWN
    assert client.chat.completions.create(**asked).choices[0].message.content == wanted
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == wanted
    with pytest.raises(openai.BadRequestError, match="this model takes text"):
        client.chat.completions.create(**asked | {"messages": ASKED})
    with pytest.raises(openai.BadRequestError, match="chat template") as plain:
        client.chat.completions.create(**asked | {"model": "lm"})
    assert plain.value.param == "messages"


def test_a_stream_ends_as_the_protocol_says(url: str) -> None:
    asked = {"model": "org/chat", "messages": [{"role": "user", "content": "say one"}], "max_tokens": 2, "stream": True}
    found = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=30)
    assert found.headers["content-type"].startswith("text/event-stream")
    assert found.text.endswith("\n\ndata: [DONE]\n\n")


def test_texts_are_continued_whole_and_as_a_stream(client: Any, models: dict[str, Model]) -> None:
    found = client.completions.create(model="lm", prompt=["ab", "c"], max_tokens=5)
    wanted = models["lm"].generate([{"text": "ab"}, {"text": "c"}], max_new_tokens=5)
    assert [choice.text for choice in found.choices] == [one["text"] for one in wanted]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 10)  # each begins with a token
    chunks = list(client.completions.create(model="lm", prompt="ab", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted[0]["text"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    with pytest.raises(openai.BadRequestError, match="ask /v1/chat/completions"):
        client.completions.create(model="org/chat", prompt="ab")
    with pytest.raises(openai.BadRequestError, match="stream one"):
        client.completions.create(model="lm", prompt=["a", "b"], stream=True)


@pytest.mark.parametrize("name", ["labels", "pairs"])
def test_vectors_are_those_of_the_library_in_both_encodings(name: str, client: Any, models: dict[str, Model]) -> None:
    own: Any = models[name].embed([{"text": text} for text in TEXTS])
    wanted = (own["text"] if isinstance(own, dict) else own).tolist()
    for how in ({}, {"encoding_format": "float"}, {"dimensions": len(wanted[0])}):  # base64 where nothing is said
        found = client.embeddings.create(model=name, input=TEXTS, **how)
        assert [one.embedding for one in found.data] == [pytest.approx(vector, abs=1e-5) for vector in wanted]
        counted = [models[name].processors["text"].count(text) for text in TEXTS]
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(counted)
    one = client.embeddings.create(model=name, input=TEXTS[1])
    assert one.data[0].embedding == pytest.approx(wanted[1], abs=1e-5)
    for wrong in ({"dimensions": 3}, {"input": []}, {"input": [1, 2]}, {"input": ["a"] * 9}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**{"model": name, "input": TEXTS, **wrong})
        assert caught.value.param in wrong


def recording(seconds: float = 1.5) -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal(int(16000 * seconds))
    soundfile.write(file, noise, 16000, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize("name", ["whisper", "ctc"])
def test_transcripts_are_those_of_the_library_in_every_format(name: str, client: Any, models: dict[str, Model]) -> None:
    content = recording()
    (own,) = transcribe(models[name], [{"audio": content}], timestamps="segment")
    asked = {"model": name, "file": ("a.wav", content)}
    for kind in ("srt", "vtt"):
        assert client.audio.transcriptions.create(**asked, response_format=kind) == as_text(own, f".{kind}")
    found = client.audio.transcriptions.create(**asked, response_format="verbose_json")
    spans = [(one.text, one.start, one.end) for one in found.segments]
    assert spans == [(one["text"], one["start"], one["end"]) for one in own["segments"]]
    assert (found.text, found.duration, found.words) == (own["text"].strip(), 1.5, None)
    if name == "ctc":  # knows times whether or not they are asked for
        assert client.audio.transcriptions.create(**asked).text == own["text"]
        assert client.audio.transcriptions.create(**asked, response_format="text", temperature=0) == own["text"] + "\n"
        by_word = {"response_format": "verbose_json", "timestamp_granularities": ["word"]}
        heard = client.audio.transcriptions.create(**asked, **by_word)
        assert [one.word for one in heard.words] == [one["word"] for one in own["words"]] and heard.segments is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"response_format": "verbose_json", "timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"language": "de"}, "language"),
        ({"prompt": "names"}, "prompt"),
        ({"temperature": 0.4}, "temperature"),
        ({"stream": True}, "stream"),
        ({"response_format": "diarized_json"}, "response_format"),
        ({"model": "labels"}, "model"),
        ({"file": ("a.wav", b"no sound")}, "file"),
    ],
)
def test_what_no_transcript_can_be_is_refused_by_name(wrong: dict[str, Any], param: str, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(**{"model": "whisper", "file": ("a.wav", recording(0.5)), **wrong})
    assert caught.value.param == param


def test_english_is_the_language_of_a_whisper_of_one_language(client: Any) -> None:
    asked = {"model": "whisper", "file": ("a.wav", recording(0.5)), "response_format": "srt"}
    assert client.audio.transcriptions.create(**asked, language="en") == client.audio.transcriptions.create(**asked)
    with pytest.raises(openai.BadRequestError, match="knows one language alone"):
        client.audio.translations.create(**asked)


def test_a_client_that_goes_away_stops_the_writing(
    url: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = models["org/chat"].decoder
    steps, step = [0], decoder.step

    def counted(*args: Any) -> Any:
        steps[0] += 1
        time.sleep(0.05)  # else it would end by itself soon
        return step(*args)

    monkeypatch.setattr(decoder, "step", counted)
    asked = {"model": "org/chat", "messages": [{"role": "user", "content": "say one"}], "max_tokens": 100_000}
    for stream in (True, False):
        steps[0] = 0
        body = httpx.Request("POST", f"{url}/v1/chat/completions", json=asked | {"stream": stream})
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as sock:
            head = f"POST {body.url.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(body.content)}\r\n\r\n".encode() + body.content)
            _until(lambda: steps[0] > 3)
        _until(lambda: _rests(steps), seconds=5)


def _rests(steps: list[int]) -> bool:
    before = steps[0]
    time.sleep(0.3)
    return steps[0] == before


def _until(said: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_what_a_guard_refuses_is_filtered_content(
    client: Any, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strict:
        def __bool__(self) -> bool:
            return True

        def answer(self, samples: Any, *_: Any) -> list[dict[str, Any]]:
            return [{"refused": "not that", "guard": "mmhub-x/strict"} for _ in samples]

    monkeypatch.setattr(models["org/chat"], "_guards", Strict())
    (choice,) = client.chat.completions.create(model="org/chat", messages=ASKED).choices
    assert (choice.finish_reason, choice.message.content, choice.message.refusal) == (
        "content_filter",
        None,
        "not that",
    )
    chunks = list(client.chat.completions.create(model="org/chat", messages=ASKED, stream=True))
    assert [chunk.choices[0].delta.refusal for chunk in chunks] == [None, "not that", None]
    assert chunks[-1].choices[0].finish_reason == "content_filter"


def test_an_empty_prompt_is_gone_on_with(client: Any, models: dict[str, Model]) -> None:
    (choice,) = client.completions.create(model="lm", prompt="", max_tokens=4).choices
    assert choice.text == models["lm"].generate([{"text": ""}], max_new_tokens=4)[0]["text"]


def test_extreme_settings_are_answered_or_refused(client: Any, models: dict[str, Model]) -> None:
    cold = {"model": "lm", "prompt": "ab", "max_tokens": 5, "seed": 1}
    (choice,) = client.completions.create(**cold, temperature=1e-300).choices
    assert choice.text == models["lm"].generate([{"text": "ab"}], max_new_tokens=5)[0]["text"]
    for penalty in (1e-308, 1e308):
        with pytest.raises(openai.BadRequestError, match="repetition_penalty is out of bounds"):
            client.completions.create(**cold, temperature=1.0, extra_body={"repetition_penalty": penalty})
    with pytest.raises(openai.BadRequestError, match="n is 0") as none:
        client.completions.create(**cold, n=0)
    assert none.value.param == "n"


@pytest.mark.parametrize("model", ["org/chat", "talker"])
def test_an_answer_is_not_gone_on_with(model: str, client: Any) -> None:
    talk = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "one"}]
    with pytest.raises(openai.BadRequestError, match="the last message is the assistant's") as caught:
        client.chat.completions.create(model=model, messages=talk)
    assert caught.value.param == "messages"
