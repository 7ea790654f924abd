"""One model: what it answers equals the library's own answer to that sample, whoever else asks meanwhile."""

from __future__ import annotations

import asyncio
import base64
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

import mmhub
from mmhub.errors import InputError, UsageError
from mmhub.interfaces import Generation
from mmhub.model import Model
from mmhub_serve.errors import Refused
from mmhub_serve.served import ModelInfo, Served
from mmhub_serve.settings import Limits, Settings
from tests.conftest import flac, png, three_modalities

TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 23}" for j in range(1 + 5 * i % 17)) for i in range(12)]
TEXT = {"text": {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2}}}
LABELS = {"labels": ["no", "yes", "maybe"]}
OF_TEXTS: dict[str, dict[str, Any]] = {
    "classification": {"use": "classification", "config": LABELS},
    "multilabel": {"use": "multilabel", "config": LABELS},
    "regression": {"use": "regression", "config": {"mean": 0.0, "std": 1.0}},
    "tagging": {"use": "tagging", "config": LABELS},
}


@asynccontextmanager
async def serving(model: Model, **settings: Any) -> Any:
    served = Served("m", model, Settings(models=("m",), **settings))
    try:
        yield served
    finally:
        await served.close()


def close(got: Any, wanted: Any) -> bool:
    """Are two answers the same, numbers to 1e-5?"""
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(close(got[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(got) == len(wanted) and all(map(close, got, wanted))
    return bool(got == pytest.approx(wanted, abs=1e-5, rel=1e-5)) if isinstance(wanted, float) else bool(got == wanted)


def all_at_once(model: Model, samples: Sequence[dict[str, Any]], **settings: Any) -> tuple[list[Any], list[int]]:
    """Ask for every sample by itself, at the same time; -> the answers, and the sizes of the batches."""
    sizes: list[int] = []

    async def scene() -> list[Any]:
        async with serving(model, **settings) as served:
            compute = served._batcher._compute

            def watched(jobs: Any, step: Any) -> Any:
                sizes.append(len(jobs))
                return compute(jobs, step)

            served._batcher._compute = watched
            return [one[0] for one in await asyncio.gather(*(served.predict([sample]) for sample in samples))]

    return asyncio.run(scene()), sizes


@pytest.mark.parametrize("task", OF_TEXTS)
def test_answers_in_batches_are_those_of_each_text_alone(task: str) -> None:
    model = mmhub.compose(task, encoders=TEXT, decoder=OF_TEXTS[task], texts=TEXTS).eval()
    samples = [{"text": text} for text in TEXTS]
    got, sizes = all_at_once(model, samples)
    assert close(got, [model.predict([sample])[0] for sample in samples])
    assert max(sizes) > 1, "nothing was computed together"


def test_answers_that_point_into_a_text_are_those_of_the_library() -> None:
    config = {"use": "span", "config": {}}
    model = mmhub.compose("question-answering", encoders=TEXT, decoder=config, texts=TEXTS).eval()
    samples = [{"text": {"question": TEXTS[i], "context": TEXTS[i + 1]}} for i in range(0, 6, 2)]
    got, _ = all_at_once(model, samples)
    assert close(got, [model.predict([sample])[0] for sample in samples])


def subsets() -> Iterator[dict[str, Any]]:
    whole = {"image": png(1), "audio": flac(2), "text": TEXTS[3]}
    for size in (1, 2, 3):
        for names in itertools.combinations(whole, size):
            yield {name: whole[name] for name in names}


@pytest.mark.parametrize("invariant", [True, False])
def test_any_subset_of_modalities_is_answered_as_alone(invariant: bool) -> None:
    model = three_modalities(*TEXTS)
    for encoder in model.encoders.values():
        encoder.padding_invariant = encoder.padding_invariant and invariant
    samples = [*subsets(), {"audio": [flac(1), flac(3, 0.4)], "text": TEXTS[5]}]
    got, sizes = all_at_once(model, samples)
    assert close(got, [model.predict([sample])[0] for sample in samples])
    assert max(sizes) > 1


def test_batches_of_one_are_batching_switched_off() -> None:
    model = mmhub.compose(encoders=TEXT, decoder=OF_TEXTS["classification"], texts=TEXTS).eval()
    _, sizes = all_at_once(model, [{"text": text} for text in TEXTS], batch=1)
    assert sizes == [1] * len(TEXTS)


def test_vectors_are_those_of_the_library() -> None:
    sides = {"image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}} | TEXT
    decoder = {"use": "contrastive", "config": {"dim": 8}}
    paired = mmhub.compose("retrieval", encoders=sides, decoder=decoder, texts=TEXTS).eval()
    plain = mmhub.compose(encoders=TEXT, decoder=OF_TEXTS["classification"], texts=TEXTS).eval()

    async def scene(model: Model, samples: list[dict[str, Any]]) -> Any:
        async with serving(model) as served:
            return await served.embed(samples), await asyncio.gather(*(served.embed([one]) for one in samples))

    samples = [{"text": TEXTS[1]}, {"image": png(1)}, {"text": TEXTS[4], "image": png(2)}]
    together, apart = asyncio.run(scene(paired, samples))
    wanted = [paired.embed([sample]) for sample in samples]
    for side in ("text", "image"):
        rows = [one[side][0].tolist() for one in wanted]  # type: ignore[call-overload]
        assert close(together[side], rows)
        assert close([one[side][0] for one in apart], rows)
    together, _ = asyncio.run(scene(plain, [{"text": text} for text in TEXTS]))
    assert close(together, {"": [plain.embed([{"text": text}])[0].tolist() for text in TEXTS]})  # type: ignore[index]


def test_a_bad_sample_fails_its_own_request_alone() -> None:
    model = three_modalities(*TEXTS)
    whole = png(1, 64)
    requests: list[list[dict[str, Any]]] = [
        [{"text": TEXTS[0]}],
        [{"text": TEXTS[1]}, {"image": whole[:200]}],
        [{"image": whole}],
        [{"text": TEXTS[2], "audio": b"no sound"}],
        [{"txt": "a"}],
        [{"text": "w1 \ud800"}],
        [{"image": "/etc/passwd"}],
        [{}],
    ]

    async def scene() -> list[Any]:
        async with serving(model) as served:
            return await asyncio.gather(*map(served.predict, requests), return_exceptions=True)

    found = asyncio.run(scene())
    assert close(found[0], model.predict(requests[0]))
    assert close(found[2], model.predict(requests[2]))
    assert [(one.row, one.modality) for one in found[1:4:2]] == [(1, "image"), (0, "audio")]
    assert isinstance(found[4], UsageError)
    assert "no input 'txt'" in str(found[4])
    assert all(isinstance(one, InputError) for one in found[5:])
    assert "local files may not be read" in str(found[6])


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    zeros = "iVBORw0KGgoAAAANSUhEUgAAw1AAAMNQAQAAAAB"  # a PNG that says it has 50,000 x 50,000 pixels
    bomb = base64.b64decode(zeros + "=" * (-len(zeros) % 4)) + b"\0" * 64
    model = three_modalities(*TEXTS)

    async def scene() -> float:
        async with serving(model) as served:
            began = time.perf_counter()
            with pytest.raises(InputError):
                await served.predict([{"image": bomb}])
            return time.perf_counter() - began

    assert asyncio.run(scene()) < 1


@pytest.mark.parametrize(
    ("text", "what"), [("w1 " * 60, "60 tokens, more than the limit of 50"), ("w1 " * 2000, "6000 characters")]
)
def test_a_text_of_too_many_tokens_is_refused_by_name(text: str, what: str) -> None:
    config = {"dim": 8, "embedding_dim": 8}
    encoder = {"text": {"use": "lstm", "config": config}}
    model = mmhub.compose(encoders=encoder, decoder=OF_TEXTS["classification"], texts=TEXTS).eval()

    async def scene() -> None:
        async with serving(model, limits=Limits(tokens=50)) as served:
            assert await served.predict([{"text": "w1 " * 50}])
            with pytest.raises(InputError, match=what) as caught:
                await served.predict([{"text": "w1"}, {"text": text}])
            assert (caught.value.row, caught.value.modality) == (1, "text")

    asyncio.run(scene())


class Guard:
    name = "no w1"

    def check(self, sample: Any) -> str | None:
        return "w1 is not for here" if "w1" in sample["text"].split() else None

    def review(self, sample: Any, answer: Any) -> Any:
        return {**answer, "seen": True}


def guarded(model: Model) -> Model:
    from mmhub.guard import Guards
    from mmhub.plugins import get_index

    model._guards = Guards(model)
    model._guards._guards = [(get_index().plugins[0], Guard())]  # type: ignore[list-item]
    return model


def test_guards_see_what_is_asked_and_answered() -> None:
    model = guarded(mmhub.compose(encoders=TEXT, decoder=OF_TEXTS["classification"], texts=TEXTS).eval())
    got, _ = all_at_once(model, [{"text": "w1 w2"}, {"text": "w2"}])
    assert got[0]["refused"] == "w1 is not for here"
    assert got[1]["seen"]


# Writing.


@pytest.fixture(scope="module")
def writer() -> Model:
    config = {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0, "max_length": 128}
    torch.manual_seed(0)
    model = mmhub.compose(
        "language-modelling",
        decoder={"use": "transformer-lm", "config": config},
        tokenizer={"kind": "byte"},
        texts=TEXTS,
    )
    return model.eval()


PROMPTS = [{"text": "w1 w2"}, {"text": "w"}, {"text": "w12 w3 w4 w5"}]
GREEDY = Generation(max_new_tokens=12)
DRAWN = Generation(max_new_tokens=12, temperature=1.0, seed=3)


def test_texts_are_those_of_the_library_alone_and_together(writer: Model) -> None:
    async def scene() -> tuple[Any, Any]:
        async with serving(writer) as served:
            apart = await asyncio.gather(*(served.write([prompt], GREEDY) for prompt in PROMPTS * 3))
            return apart, await served.write(PROMPTS, GREEDY)

    apart, together = asyncio.run(scene())
    wanted = [writer.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert close(together, wanted)
    assert close([one[0] for one in apart], wanted * 3)


def test_what_is_drawn_depends_on_the_request_alone(writer: Model) -> None:
    async def scene() -> Any:
        async with serving(writer) as served:
            return await asyncio.gather(*(served.write(PROMPTS, DRAWN, 2) for _ in range(4)))

    for found in asyncio.run(scene()):
        assert close(found, writer.generate(PROMPTS, DRAWN, n=2))


def test_a_stream_gives_the_text_in_pieces_and_then_the_answer(writer: Model) -> None:
    async def collect(served: Served, settings: Generation) -> list[Any]:
        return [piece async for piece in served.stream(PROMPTS[0], settings)]

    async def scene() -> Any:
        async with serving(writer) as served:
            return await asyncio.gather(*(collect(served, one) for one in (GREEDY, DRAWN, GREEDY)))

    for found, settings in zip(asyncio.run(scene()), (GREEDY, DRAWN, GREEDY), strict=True):
        (wanted,) = writer.generate([PROMPTS[0]], settings)
        assert len(found) > 2
        assert "".join(found[:-1]) == wanted["text"]
        assert close(found[-1], wanted)


def test_writing_ends_when_its_reader_is_gone(writer: Model) -> None:
    slow, steps = writer.decoder.step, 0  # type: ignore[operator]

    def step(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.005)
        return slow(*given)

    async def scene() -> None:
        async with serving(writer) as served:
            stream = served.stream(PROMPTS[1], Generation(max_new_tokens=60, temperature=1.0))
            await anext(stream)
            await stream.aclose()
            at_end = steps
            await served.write([PROMPTS[0]], Generation(max_new_tokens=1))
            assert steps - at_end < 10

    writer.decoder.step = step  # type: ignore[assignment]
    try:
        asyncio.run(scene())
    finally:
        writer.decoder.step = slow  # type: ignore[assignment]


def test_long_texts_do_not_keep_a_short_one_waiting(writer: Model) -> None:
    slow, done = writer.decoder.step, []  # type: ignore[operator]

    def step(*given: Any) -> Any:
        time.sleep(0.01)
        return slow(*given)

    async def ask(served: Served, settings: Generation) -> None:
        await served.write([PROMPTS[1]], settings)
        done.append(settings.max_new_tokens)

    async def scene() -> None:
        async with serving(writer) as served:
            drawn = [Generation(max_new_tokens=60, temperature=1.0, seed=seed) for seed in range(5)]
            long = [asyncio.create_task(ask(served, one)) for one in (Generation(max_new_tokens=60), *drawn)]
            await asyncio.sleep(0.05)
            await ask(served, Generation(max_new_tokens=3))
            for one in long[1:]:
                one.cancel()
            await long[0]

    writer.decoder.step = step  # type: ignore[assignment]
    try:
        asyncio.run(scene())
    finally:
        writer.decoder.step = slow  # type: ignore[assignment]
    assert done == [3, 60]


def test_more_tokens_or_texts_than_the_limits_are_refused(writer: Model) -> None:
    async def scene() -> None:
        async with serving(writer, limits=Limits(new_tokens=20, samples=8)) as served:
            with pytest.raises(Refused, match="21 new tokens are more than the limit of 20"):
                await served.write(PROMPTS, Generation(max_new_tokens=21))
            with pytest.raises(Refused, match="9 texts at a time are more than the limit of 8"):
                await served.write(PROMPTS, GREEDY, 3)
            with pytest.raises(UsageError, match="hears no speech"):
                await served.transcribe({"text": "w1"})

    asyncio.run(scene())


# Hearing.


def test_transcripts_are_those_of_the_library() -> None:
    audio = {"audio": {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}}
    model = mmhub.compose(
        "speech-recognition",
        encoders=audio,
        decoder="ctc",
        values={"target": ["one two", "three"]},
    ).eval()
    sounds = [flac(digit, 0.3 + 0.1 * digit) for digit in range(5)]

    async def scene() -> Any:
        async with serving(model) as served:
            assert served.info.hears
            bad = asyncio.create_task(served.transcribe({"audio": sounds[0][:100]}))
            found = await asyncio.gather(*(served.transcribe({"audio": sound}) for sound in sounds))
            with pytest.raises(InputError) as caught:
                await bad
            assert (caught.value.row, caught.value.modality) == (0, "audio")
            assert not any(encoder._forward_pre_hooks for encoder in model.encoders.values())
            return found

    assert close(asyncio.run(scene()), [model.predict([{"audio": sound}])[0] for sound in sounds])


# What is known of a model.


def test_a_model_is_described(writer: Model) -> None:
    classifier = mmhub.compose(encoders=TEXT, decoder=OF_TEXTS["classification"], texts=TEXTS).eval()

    async def scene(model: Model) -> ModelInfo:
        async with serving(model) as served:
            return served.info

    assert asyncio.run(scene(classifier)) == ModelInfo(
        name="m", task="classification", modalities=("text",), labels=("no", "yes", "maybe"), streams=("",)
    )
    assert asyncio.run(scene(writer)) == ModelInfo(
        name="m", task="language-modelling", modalities=("text",), writes=True, streams=("",), context=128
    )


# Bounds of what is read, and for whom.


def listener() -> Model:
    audio = {"audio": {"use": "cnn", "config": {"sample_rate": 8000, "dim": 16, "channels": [4, 8]}}}
    return mmhub.compose(encoders=audio, decoder=OF_TEXTS["classification"]).eval()


def test_the_items_of_a_request_are_bounded_as_its_samples_are() -> None:
    sound = flac(1, 0.1)

    async def scene() -> None:
        async with serving(listener(), limits=Limits(samples=8)) as served:
            assert len(await served.predict([{"audio": [sound] * 4}, {"audio": [sound] * 4}])) == 2
            with pytest.raises(InputError, match="more than 8 pictures or sounds in one request") as caught:
                await served.predict([{"audio": [sound] * 4}, {"audio": [sound] * 5}])
            assert caught.value.row == 1

    asyncio.run(scene())


def test_what_a_request_decodes_to_is_bounded() -> None:
    sound = flac(1, 1.0)  # 32,000 bytes of fp32

    async def scene() -> None:
        async with serving(listener(), limits=Limits(waiting=100_000)) as served:
            assert await served.predict([{"audio": sound}] * 3)
            with pytest.raises(Refused, match="once decoded") as caught:
                await served.predict([{"audio": sound}] * 4)
            assert caught.value.status == 400
            assert await served.predict([{"audio": sound}] * 3)
            assert served._batcher._coming == 0

    asyncio.run(scene())


def test_reading_a_large_request_lets_others_be_read_and_ends_when_its_client_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, read = listener(), []
    own = model.processors["audio"].read_row

    def slow(raw: Any, policy: Any) -> Any:
        read.append(raw)
        time.sleep(0.03)
        return own(raw, policy)

    monkeypatch.setattr(model.processors["audio"], "read_row", slow)
    large, small = flac(1, 0.1), flac(2, 0.1)

    async def scene() -> None:
        async with serving(model) as served:
            many = asyncio.create_task(served.predict([{"audio": large}] * 200))
            await asyncio.sleep(0.05)
            await served.predict([{"audio": small}])
            assert len(read) < 50
            many.cancel()
            await served.predict([{"audio": small}])

    asyncio.run(scene())
    assert len(read) < 60


def test_conversations_with_a_model_of_texts_fail_for_themselves_alone(writer: Model) -> None:
    def talk(*texts: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text} for text in texts]}

    writer.language_model.processor.take_template("plain")
    settings = Generation(max_new_tokens=4)
    good, bad = talk("w1"), talk("w1 " * 100)

    async def scene() -> None:
        async with serving(writer) as served:
            served._batcher._turns.__enter__()  # until all wait
            asked = [asyncio.create_task(served.write([one], settings)) for one in (good, bad, good)]
            await asyncio.sleep(0.05)
            served._batcher._turns.__exit__()
            first, fails, last = await asyncio.gather(*asked, return_exceptions=True)
            assert first == last == [{**first[0], "text": writer.chat(good["messages"], settings)}]
            assert isinstance(fails, InputError) and fails.row == 0
            with pytest.raises(InputError) as caught:
                await served.write([good, bad], settings)
            assert caught.value.row == 1
            with pytest.raises(Refused, match="some samples hold messages"):
                await served.write([good, PROMPTS[0]], settings)
            with pytest.raises(UsageError, match="no input 'image'"):
                await served.write([good | {"image": b""}], settings)
            with pytest.raises(InputError, match="holds messages and 'text'"):
                await served.write([good | {"text": "w1"}], settings)

    asyncio.run(scene())


def test_the_beams_of_a_model_itself_count_for_no_more_texts(writer: Model) -> None:
    beams = mmhub.compose(
        "translation",
        encoders=TEXT,
        decoder={"use": "seq2seq", "config": {"dim": 16, "depth": 1, "heads": 2, "generation": {"beams": 3}}},
        values={"text": TEXTS, "target": TEXTS},
    ).eval()
    samples = [{"text": text} for text in TEXTS[:4]]

    async def scene() -> Any:
        async with serving(beams, limits=Limits(samples=4, new_tokens=3)) as served:
            with pytest.raises(Refused, match="8 texts at a time"):
                await served.write(samples, Generation(beams=2, max_new_tokens=3))
            return await served.write(samples, Generation(beams=3, max_new_tokens=3))

    wanted = [beams.generate([one], Generation(beams=3, max_new_tokens=3))[0] for one in samples]
    assert close(asyncio.run(scene()), wanted)
