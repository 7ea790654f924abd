"""Answers about pictures and recordings: by themselves and in batches, with and without what was read before."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mmhub
from mmhub.errors import InputError
from mmhub.generate import Conversation, write
from mmhub.generate.media import Media
from mmhub.generate.talks import Layout
from mmhub.index.vectors import vectors_of
from mmhub.interfaces import Generation, Policy, own_stream
from mmhub.model import Model
from mmhub.verification import _embed

TINY_IMAGES = {"use": "timm", "config": {"architecture": "resnet10t", "image_size": 32}}
TINY_SOUNDS = {"use": "cnn", "config": {"sample_rate": 8000, "channels": [8, 8], "dim": 32, "dropout": 0.0}}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "transformer-lm": {"dim": 32, "depth": 2, "heads": 4, "kv_heads": 2},
    "lstm-lm": {"dim": 24, "embedding_dim": 16, "depth": 2},
    "transformers-lm": LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
SETTINGS = Generation(max_new_tokens=8, stop=())
POLICY = Policy()


def chatty(use: str, **config: Any) -> Model:
    """A model of random weights that sees, hears, and writes bytes, as different as those of a trained one."""
    model = mmhub.compose(
        "chat",
        encoders={"image": TINY_IMAGES, "audio": TINY_SOUNDS},
        decoder={"use": use, "config": DECODERS[use] | config},
        tokenizer={"kind": "byte"},
    )
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_({"lstm-lm": 2, "transformers-lm": 4, "transformer-lm": 8}[use])
    return model.eval()


@pytest.fixture(scope="module", params=list(DECODERS))
def model(request: Any) -> Model:
    return chatty(request.param)


@pytest.fixture(scope="module")
def transformer() -> Model:
    return chatty("transformer-lm", max_length=160)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def sound(seed: int, seconds: float = 0.3) -> dict[str, Any]:
    values = np.random.default_rng(seed).normal(size=int(8000 * seconds)).astype(np.float32)
    return {"array": values / 4, "sampling_rate": 8000}


def tone(pitch: float) -> dict[str, Any]:
    return {"array": np.sin(np.arange(2400) * 2 * np.pi * pitch / 8000).astype(np.float32), "sampling_rate": 8000}


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message of texts, pictures and sounds."""
    kinds = {str: "text", dict: "audio", Image.Image: "image"}
    return {"role": role, "content": [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]}


MIXED = [
    [said("hello")],
    [said(picture(1), "what is it?")],
    [said("first ", picture(1), " then ", sound(2), picture(3), " last"), said("yes.", role="assistant"), said("why?")],
    [said(sound(4, 0.5), sound(5), picture(6), sound(7))],
    [said("a ", picture(8), picture(9), picture(10), picture(11), " b"), said("c", role="assistant"), said(sound(12))],
]


def asked(model: Model, talks: Sequence[Any]) -> Any:
    """What the decoder begins with."""
    found = [model.messages_of({"messages": talk}) for talk in talks]
    with torch.inference_mode():
        return Media(model, POLICY).bundle(found, [Layout(model, POLICY)(talk) for talk in found])


def begin(model: Model, talks: Sequence[Any]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.language_model.begin(asked(model, talks))[0]
    return found


def test_a_batch_of_any_media_in_any_order_answers_as_each_conversation_alone(model: Model) -> None:
    together = begin(model, MIXED)
    for row, talk in enumerate(MIXED):
        torch.testing.assert_close(begin(model, [talk])[0], together[row], rtol=0, atol=1e-4)
    answers = model.generate([{"messages": talk} for talk in MIXED], SETTINGS)
    assert [answer["text"] for answer in answers] == [model.chat(talk, SETTINGS) for talk in MIXED]
    assert len({answer["text"] for answer in answers}) > 1


def test_what_is_encoded_once_is_what_collate_packs(model: Model) -> None:
    batch = model.collate([{"messages": talk} for talk in MIXED], POLICY)
    with torch.inference_mode():
        fused = model.fusion(model.encode(batch.items, batch.size), plan=batch.plan)["fused"]
    stream = own_stream(asked(model, MIXED))
    assert stream.ids is not None
    assert fused.ids is not None
    assert torch.equal(stream.ids, fused.ids)
    torch.testing.assert_close(stream.tokens, fused.tokens, rtol=0, atol=1e-5)


def test_a_batch_is_fused_with_its_media_where_they_stand_for_embeddings_too(transformer: Model) -> None:
    before: list[Any] = [said(picture(1), "what is it?")]
    after: list[Any] = [said("what is it?", picture(1))]
    batch = transformer.collate([{"messages": before}, {"messages": after}], POLICY)
    seen: list[Tensor] = []
    hook = transformer.fusion.register_forward_hook(lambda *args: seen.append(own_stream(args[-1]).ids))  # type: ignore
    with torch.inference_mode():
        first, second = own_stream(transformer.fused(batch)).tokens
        transformer.embed([{"messages": before}, {"messages": after}])
        vectors_of(transformer, batch, "text")
        _embed(transformer, batch, "fused")
    hook.remove()
    assert not torch.allclose(first, second, atol=1e-3)
    assert len(seen) == 4
    assert not torch.equal(seen[0][0], seen[0][1])
    assert all(torch.equal(seen[0], ids) for ids in seen)


def test_writing_with_a_cache_is_writing_without(model: Model) -> None:
    bundle = asked(model, MIXED)
    cached, anew = (write(model.language_model, bundle, SETTINGS, cache=cache) for cache in (True, False))
    for (one,), (other,) in zip(cached, anew, strict=True):
        assert one.ids == other.ids
        assert one.score == pytest.approx(other.score, abs=1e-3)


def test_greedy_answers_are_those_of_transformers_given_the_same_embeddings() -> None:
    model = chatty("transformers-lm")
    llama: Any = model.decoder.model
    for talk in MIXED:
        bundle = asked(model, [talk])
        tokens = own_stream(bundle).tokens
        with torch.inference_mode():
            ids = llama.generate(
                inputs_embeds=tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        (found,) = write(model.language_model, bundle, SETTINGS)[0]
        assert list(found.ids) == ids[0][: len(found.ids)].tolist()


@contextmanager
def watched(model: Model) -> Iterator[dict[str, list[int]]]:
    """Note how many tokens the decoder reads at once, and how many items each encoder sees."""
    seen: dict[str, list[int]] = {"begin": [], "extend": [], "image": [], "audio": []}
    decoder: Any = model.decoder
    begin, extend, encode = decoder.begin, decoder.extend, model.encode_items

    def begun(bundle: Any) -> Any:
        seen["begin"].append(int(own_stream(bundle).lengths[0]))
        return begin(bundle)

    def extended(bundle: Any, state: Any) -> Any:
        seen["extend"].append(int(own_stream(bundle).lengths[0]))
        return extend(bundle, state)

    def encoded(name: str, items: Any) -> Any:
        seen[name].append(len(items))
        return encode(name, items)

    decoder.begin, decoder.extend, model.encode_items = begun, extended, encoded  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for part, name in ((decoder, "begin"), (decoder, "extend"), (model, "encode_items")):
            vars(part).pop(name, None)


def test_reading_on_is_reading_everything(model: Model) -> None:
    decoder, stream = model.language_model, own_stream(asked(model, [MIXED[2]]))
    width = stream.mask.shape[1]

    def part(start: int, end: int) -> Any:
        assert stream.ids is not None
        cut = {"tokens": stream.tokens, "mask": stream.mask, "ids": stream.ids}
        return {"fused": replace(stream, **{name: tensor[:, start:end] for name, tensor in cut.items()}, loss=None)}

    with torch.inference_mode():
        wanted, after = decoder.begin(part(0, width))
        _, state = decoder.begin(part(0, 20))
        _, state = decoder.extend(part(20, width - 1), state)  # more than the memory has room for
        found, state = decoder.extend(part(width - 1, width), state)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        chosen = wanted.argmax(1)
        torch.testing.assert_close(decoder.step(chosen, state)[0], decoder.step(chosen, after)[0], rtol=0, atol=1e-4)


def test_each_turn_reads_what_is_new_and_answers_as_if_it_had_read_everything(model: Model) -> None:
    talk = Conversation(model, "be kind", SETTINGS)
    first = [*said(picture(1), "what is it?")["content"]]
    with watched(model) as seen:
        talk.ask(first)
        talk.ask("and now?")
        talk.ask([*said(sound(2), "louder?", first[0]["image"])["content"]])
    assert seen["image"] == [1]  # the same picture, shown twice
    assert seen["audio"] == [1]
    assert len(seen["begin"]) == 1
    assert len(seen["extend"]) == 2
    for number in (2, 4, 6):
        assert model.chat(talk.messages[:number], SETTINGS) == talk.messages[number]["content"]
    whole = int(own_stream(asked(model, [talk.messages[:6]])).lengths[0])
    assert seen["begin"][0] + sum(seen["extend"]) < whole + 20  # an answer may be read once more, the rest may not


def test_an_answer_that_was_written_is_not_read_again() -> None:
    model = chatty("transformer-lm")
    talk = Conversation(model, settings=Generation(max_new_tokens=6))
    answer = model.processors["text"].prompt(" fine.", POLICY).tolist()[-6:]
    with watched(model) as seen, dictated(model, [*answer, answer[0]]):
        assert talk.ask("hi")["text"] == "fine."
        talk.ask("ok")
    ended = model.processors["text"].end_id is not None
    assert seen["extend"] == [len(".\nUser: ok\nAssistant:") + ended]


@contextmanager
def dictated(model: Model, ids: Sequence[int]) -> Iterator[None]:
    """Let the decoder find these tokens most probable, one after the other, and then the last again and again."""
    decoder: Any = model.decoder
    left = list(ids)

    def told(found: Any) -> Any:
        logits, state = found
        token = left.pop(0) if len(left) > 1 else left[0]
        return torch.zeros_like(logits).index_fill(1, torch.tensor(token), 1.0), state

    parts = {name: getattr(decoder, name) for name in ("begin", "extend", "step")}
    decoder.begin = lambda bundle: told(parts["begin"](bundle))
    decoder.extend = lambda bundle, state: told(parts["extend"](bundle, state))
    decoder.step = lambda ids, state: told(parts["step"](ids, state))
    try:
        yield
    finally:
        vars(decoder).update(parts)


def test_what_is_taken_back_or_changed_is_read_anew(transformer: Model) -> None:
    talk = Conversation(transformer, settings=SETTINGS)

    def right() -> bool:
        return talk.messages[-1]["content"] == transformer.chat(talk.messages[:-1], SETTINGS)

    talk.ask([*said(picture(1), "a")["content"]])
    talk.ask("b")
    talk.undo()
    talk.ask("c")
    assert right()
    talk.system = "s"
    talk.ask("d")
    assert right()
    talk.reset()
    talk.ask([*said(picture(2), "a")["content"]])
    assert right()


def test_an_interrupted_answer_is_gone_on_from_as_far_as_it_came(transformer: Model) -> None:
    talk = Conversation(transformer, settings=Generation(max_new_tokens=12))

    def impatient(piece: str) -> None:
        raise KeyboardInterrupt

    with watched(transformer) as seen:
        found = talk.ask([*said(picture(1), "count")["content"]], impatient)
        talk.ask("go on")
    assert found["finish"] == "interrupted"
    assert len(seen["extend"]) == bool(found["text"])
    assert talk.messages[-1]["content"] == transformer.chat(talk.messages[:-1], Generation(max_new_tokens=12))


def test_the_oldest_turns_and_their_media_are_left_out_when_the_context_is_full(transformer: Model) -> None:
    talk = Conversation(transformer, settings=SETTINGS)
    truncated = []
    for number in range(4):
        truncated.append(talk.ask([*said(picture(number), sound(number), "x" * 20)["content"]]).get("truncated"))
    assert truncated[0] is None
    assert truncated[-1] and truncated[-1] >= 1
    with pytest.raises(InputError, match=r"the conversation has \d+ tokens, and the model's context of 160"):
        transformer.chat(talk.messages[:-1], SETTINGS)
    assert transformer.chat(talk.messages[:-1], SETTINGS, truncate=True) == talk.messages[-1]["content"]
    (found,) = transformer.generate({"messages": talk.messages}, SETTINGS, truncate=True)
    assert found["text"] == talk.messages[-1]["content"]
    assert found["truncated"] == truncated[-1]
    with pytest.raises(InputError, match="its last turn has"):
        talk.ask("y" * 200)
    assert len(talk.messages) == 8


def test_a_file_that_has_changed_is_seen_anew(transformer: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    media = Media(transformer, POLICY)
    with watched(transformer) as seen:
        for seed in (1, 2):
            picture(seed).save(path)
            media.read([transformer.messages_of({"image": str(path)})] * 2)
    assert seen["image"] == [1, 1]


def test_what_was_changed_in_place_is_seen_anew(transformer: Model) -> None:
    drawn, buffer, clip = picture(1), np.array(picture(1)), sound(1)
    tensor, pair = torch.tensor(buffer).permute(2, 0, 1), (clip["array"].copy(), 8000)
    changes: list[tuple[Any, Any]] = [
        (drawn, lambda: drawn.paste(picture(2))),
        (buffer, lambda: buffer.fill(0)),
        (tensor, tensor.zero_),
        (clip, lambda: clip["array"].fill(0)),
        (pair, lambda: pair[0].fill(0)),
    ]
    for raw, change in changes:
        kind = "audio" if isinstance(raw, (dict, tuple)) else "image"
        question = [{"type": kind, kind: raw}]
        talk = Conversation(transformer, settings=Generation(max_new_tokens=3))
        with watched(transformer) as seen:
            talk.ask(question)
            talk.ask("same?")
            assert seen[kind] == [1]
            change()
            talk.ask(question)
        assert seen[kind] == [1, 1]
    wanted = transformer.chat(talk.messages[:-1], Generation(max_new_tokens=3), truncate=True)
    assert talk.messages[-1]["content"] == wanted


def test_a_new_object_at_the_place_of_a_forgotten_one_has_its_own_number_of_tokens(transformer: Model) -> None:
    talk = Conversation(transformer, settings=SETTINGS)
    media = talk._memory.media
    clip = sound(1, 0.3)
    talk.ask([*said(clip)["content"]])
    talk.reset()
    clip["array"] = sound(1, 0.9)["array"]  # as if the memory were used again
    asked = transformer.messages_of({"audio": clip})
    assert media.size(asked) == Media(transformer, POLICY).size(asked)


def test_equal_content_is_encoded_once_and_another_rate_is_other_content(transformer: Model) -> None:
    media, clip = Media(transformer, POLICY), sound(1)
    same = clip | {"array": clip["array"].copy()}
    with watched(transformer) as seen:
        media.read([transformer.messages_of({"messages": [said(clip, same, picture(1), picture(1))]})])
        media.read([transformer.messages_of({"audio": clip | {"sampling_rate": 4000}})])
    assert (seen["image"], seen["audio"]) == ([1], [1, 1])


def test_features_of_turns_that_were_left_out_are_not_kept(transformer: Model) -> None:
    talk = Conversation(transformer, settings=SETTINGS)
    for number in range(5):
        found = talk.ask([*said(picture(number), "x" * 30)["content"]])
    media = talk._memory.media
    assert len(media._items) == 5 - found["truncated"] < 5
    assert len(media._sizes) == 5  # else all of them were encoded in each turn
    with watched(transformer) as seen:
        talk.ask("y")
    assert not seen["image"]


def test_only_what_stands_in_a_conversation_is_kept(transformer: Model) -> None:
    talk = Conversation(transformer, settings=SETTINGS)
    talk.ask([*said(picture(1), "a")["content"]])
    talk.undo()
    talk.ask([*said(sound(2), "b")["content"]])
    kept = talk._memory.media._items
    assert [key[0] for key in kept] == ["audio"]
    talk.reset()
    assert not talk._memory.media._items
    assert not talk._memory.media._sizes
    assert not talk._memory.media._looked
    assert talk._memory._asked is None


def test_samples_become_questions_and_answers_at_the_end_of_a_conversation_are_left_out(transformer: Model) -> None:
    content = io.BytesIO()
    picture(3).save(content, "png")
    one = [{"text": "hi", "image": content.getvalue()}, {"messages": [said(picture(3), "hi")]}]
    answers = transformer.generate([*one, {"audio": sound(1)}], SETTINGS)
    assert answers[0]["text"] == answers[1]["text"]
    answered = {"messages": [*MIXED[1], said("a bird", role="assistant")]}
    assert transformer.predict(answered)[0]["text"] == transformer.predict({"messages": MIXED[1]})[0]["text"]
    with pytest.raises(InputError, match="holds messages and 'image'; give messages or image/audio/text") as caught:
        transformer.predict([one[1], {"messages": MIXED[1], "image": picture(1), "audio": None}])
    assert caught.value.row == 1
    with pytest.raises(InputError, match="holds no message of the user") as caught:
        transformer.generate([one[0], {"messages": [said("a", role="assistant")]}], SETTINGS)
    assert caught.value.row == 1
    with pytest.raises(InputError, match=r"no file 'b\.png'") as caught:
        transformer.generate([one[0], {"text": "a", "image": ["b.png"]}], SETTINGS)
    assert (caught.value.row, caught.value.modality) == (1, "image")
    with pytest.raises(InputError, match=r"no file '~nosuch/b\.png'"):
        transformer.chat([{"role": "user", "content": [{"type": "image", "image": "~nosuch/b.png"}]}])


def test_several_texts_and_beams_are_written_about_media_too(transformer: Model) -> None:
    sample = {"messages": MIXED[2]}
    (drawn,) = transformer.generate(sample, max_new_tokens=6, temperature=1.0, n=3)
    assert len(set(drawn["texts"])) > 1
    (best,) = transformer.generate(sample, max_new_tokens=6, beams=3, n=2)
    assert best["score"][0] >= best["score"][1]
    talk = Conversation(transformer, settings=Generation(max_new_tokens=6, beams=3))
    talk.ask("a")
    talk.ask("b")
    wanted = transformer.chat(talk.messages[:-1], Generation(max_new_tokens=6, beams=3))
    assert talk.messages[-1]["content"] == wanted


class Guard:
    name = "test"

    def __init__(self) -> None:
        self.samples: list[Any] = []

    def check(self, sample: Any) -> str | None:
        self.samples.append(sample)
        return "no bombs" if "bomb" in sample["text"] else None

    def review(self, sample: Any, answer: Any) -> Any:
        return answer


def test_guards_see_what_is_said_and_shown() -> None:
    from mmhub.guard import Guards
    from mmhub.plugins import get_index

    model, guard = chatty("transformer-lm"), Guard()
    model._guards = Guards(model)
    model._guards._guards = [(get_index().plugins[0], guard)]  # type: ignore[list-item]
    seen = picture(1)
    bomb = {"messages": [said("a "), said(seen, "bomb")]}
    answers = model.generate([bomb, {"text": "hi", "image": seen}], SETTINGS)
    assert answers[0]["refused"] == "no bombs"
    assert "text" in answers[1]
    assert guard.samples == [{"text": "a \n\nbomb", "image": seen}, {"text": "hi", "image": seen}]
    with pytest.raises(InputError, match="refused: no bombs"):
        model.chat(bomb["messages"])


def test_a_model_says_what_it_cannot_take() -> None:
    blind = mmhub.compose(
        "chat",
        encoders={"audio": TINY_SOUNDS},
        decoder={"use": "lstm-lm", "config": DECODERS["lstm-lm"]},
        tokenizer={"kind": "byte"},
    )
    with pytest.raises(InputError, match="message 1 has a part of the type 'image'") as caught:
        blind.chat([said(picture(1))])
    assert caught.value.hint == "this model takes audio, text"
    with pytest.raises(InputError, match="holds more than text"):
        blind.chat([said("a"), said(sound(1), role="assistant"), said("b")])


@pytest.mark.slow
def test_what_was_heard_is_transcribed_and_then_asked_about() -> None:
    """Two recordings are learned by heart, each with a transcript and an answer in the turn after it."""
    torch.manual_seed(0)
    model = mmhub.compose(
        "chat",
        encoders={"audio": TINY_SOUNDS},
        decoder={
            "use": "transformer-lm",
            "config": {"dim": 32, "depth": 1, "heads": 2, "dropout": 0.0, "word_dropout": 0.0},
        },
        tokenizer={"kind": "word"},
        texts=["Transcribe this . one two Is it more than one ? yes no"],
    )
    clips = {"one": tone(300), "two": tone(2000)}
    lesson = [
        [
            said(clip, "Transcribe this ."),
            said(word, role="assistant"),
            said("Is it more than one ?"),
            said(more, role="assistant"),
        ]
        for (word, clip), more in zip(clips.items(), ("no", "yes"), strict=True)
    ]
    batch = model.collate([{"messages": talk} for talk in lesson], POLICY)
    batch.targets = model.decoder.count_targets(batch.items["text"])  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        loss = model(batch).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for word, more in (("one", "no"), ("two", "yes")):
        talk = Conversation(model)
        assert talk.ask([*said(clips[word], "Transcribe this .")["content"]])["text"] == word
        assert talk.ask("Is it more than one ?")["text"] == more
        assert model.chat([said(clips[word], "Transcribe this .")]) == word


@pytest.mark.gpu
@pytest.mark.parametrize("use", list(DECODERS))
def test_conversations_on_a_gpu_answer_as_on_the_cpu(use: str) -> None:
    model = chatty(use)
    wanted = begin(model, MIXED)
    model.cuda()
    torch.testing.assert_close(begin(model, MIXED).cpu(), wanted, rtol=0, atol=2e-3)
    talk = Conversation(model, settings=SETTINGS)
    with watched(model) as seen:
        talk.ask([*said(picture(1), sound(2), "a")["content"]])
        talk.ask("b")
    assert (len(seen["begin"]), len(seen["extend"])) == (1, 1)
    assert talk.messages[-1]["content"] == model.chat(talk.messages[:-1], SETTINGS)
