"""What `explain` says, on models in memory: evidence that was planted is found, shares add up, nothing is changed."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import mmhub
from benchmarks import explain as planted
from mmhub.build import add_guards
from mmhub.config import GuardRecipe
from mmhub.errors import InputError, UsageError
from mmhub.explain import METHODS
from mmhub.explain.places import spans_of, spots_of
from mmhub.explain.probe import untouched
from mmhub.interfaces import Policy, decode_config
from mmhub.model import Model

TEXTS = ["a lovely day in town", "an awful night by the sea"]
NOISE = np.random.default_rng(0).normal(0, 0.1, 1600).astype(np.float32)
PICTURE = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
SOUND = (NOISE, 8000)
PARTS: dict[str, Any] = {
    "text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}},
    "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32, "crop_pct": 1.0}},
    "audio": {"use": "cnn", "config": {"sample_rate": 8000, "n_mels": 16, "dim": 8}},
}
ATTENDING: dict[str, Any] = {"use": "transformer", "config": {"dim": 16, "depth": 1, "heads": 2}}
SAMPLE: dict[str, Any] = {"text": TEXTS[0], "image": PICTURE, "audio": SOUND}
QUICK: dict[str, Any] = {"faithfulness": False, "shares": False, "steps": 4}


def composed(*modalities: str, fusion: Any = None, **parts: Any) -> Model:
    return mmhub.compose(
        encoders={name: parts.get(name, PARTS[name]) for name in modalities},
        fusion=fusion,
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    ).eval()


@pytest.fixture(scope="module")
def transformer() -> Model:
    """A text classifier that has learned which word decides."""
    torch.manual_seed(0)
    return planted.trained("text", "transformer", steps=64)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_word_that_decides(transformer: Model, method: Any) -> None:
    found = planted.found(transformer, "text", method, 12, curves=1)
    assert found.accuracy > 0.9
    assert found.hit >= 0.95
    assert found.chance < 0.1
    assert found.deletion[0] < found.deletion[1]
    assert found.insertion[0] > found.insertion[1]


@pytest.mark.slow
@pytest.mark.parametrize(("modality", "encoder"), list(planted.SUBJECTS))
def test_planted_evidence_is_found_in_every_modality(modality: str, encoder: str) -> None:
    model = planted.trained(modality, encoder)
    for method in METHODS:
        try:
            found = planted.found(model, modality, method, 100, curves=0)
        except UsageError:
            assert method == "attention-rollout" and encoder in ("lstm", "test_resnet", "cnn")
            continue
        assert found.cases >= 100
        assert found.accuracy > 0.95
        assert found.hit >= 0.95, (method, found)


@pytest.mark.parametrize("fusion", ["concat", "gated", "attention"])
def test_shares_of_modalities_add_up_to_the_difference(fusion: str) -> None:
    model = composed("text", "image", "audio", fusion=fusion)
    found = model.explain(SAMPLE, method="gradient-x-input", faithfulness=False)
    with torch.no_grad():
        number = ["no", "yes"].index(found.target)
        whole = float(model(model.collate([SAMPLE])).logits[0, number])
        batch = model.collate([SAMPLE])
        nothing = {name: type(one)(one.data[:0], one.mask[:0], one.rows[:0], 1) for name, one in batch.items.items()}
        empty = float(model.decode(model.encode(nothing, 1)).logits[0, number])
    assert set(found.shares) == {"text", "image", "audio"}
    assert found.value == pytest.approx(whole, abs=1e-4)
    assert found.baseline == pytest.approx(empty, abs=1e-4)
    assert sum(found.shares.values()) == pytest.approx(whole - empty, abs=1e-3)
    assert sum(map(abs, found.shares.values())) > 1e-4


def test_a_modality_that_the_answer_does_not_depend_on_has_no_share() -> None:
    model = composed("text", "image", fusion="concat")
    with torch.no_grad():
        for name, weight in model.fusion.named_parameters():
            if "image" in name:
                weight.zero_()
    found = model.explain({"text": TEXTS[0], "image": PICTURE}, method="gradient-x-input", faithfulness=False)
    image, text = found.shares["image"], found.shares["text"]
    assert abs(image) < 1e-5 < abs(text)


def test_integrated_gradients_add_up_to_what_the_sample_changes() -> None:
    model = composed("text", text=ATTENDING)
    found = model.explain({"text": TEXTS[0]}, steps=32)
    assert found.gap is not None
    total = sum(piece.score for piece in found.attributions[0].pieces)
    curve = found.faithfulness.deletion  # type: ignore[union-attr]
    assert total == pytest.approx(curve[0] - curve[-1], abs=1e-3)
    assert found.gap < 1e-3


def test_pieces_stand_where_they_are_in_the_sample() -> None:
    model = composed("text", "image", "audio", fusion="concat")
    found = model.explain(SAMPLE, method="occlusion", **QUICK)
    text, image, audio = found.attributions
    assert [TEXTS[0][int(p.start) : int(p.end)] for p in text.pieces] == TEXTS[0].split()
    assert (image.grid, image.size) == ((8, 8), (30.0, 20.0))
    left, top, right, bottom = image.pieces[0].box or ()
    # the short side is shown as a whole, and the middle of the long one
    assert (left, top) == (pytest.approx(5, abs=0.5), pytest.approx(0, abs=0.5))
    assert (right - left, bottom - top) == (pytest.approx(2.5, abs=0.2), pytest.approx(2.5, abs=0.3))
    assert audio.size == (pytest.approx(0.2, abs=0.001),)
    assert audio.pieces[0].start == 0
    assert audio.pieces[-1].end == pytest.approx(0.2, abs=0.001)
    assert [p.end for p in audio.pieces[:-1]] == [p.start for p in audio.pieces[1:]]


def test_several_items_of_a_sample_are_told_apart() -> None:
    model = composed("text", "image", fusion="attention")
    found = model.explain({"image": [PICTURE, PICTURE[:, ::-1].copy()]}, **QUICK)
    assert [(one.modality, one.item) for one in found.attributions] == [("image", 0), ("image", 1)]


def test_a_label_that_is_asked_for_is_explained_instead_of_the_answer() -> None:
    model = composed("text")
    both = {label: model.explain({"text": TEXTS[0]}, target=label, **QUICK) for label in ("no", "yes")}
    with torch.no_grad():
        logits = model(model.collate([{"text": TEXTS[0]}])).logits[0].tolist()
    assert [both[label].value for label in ("no", "yes")] == pytest.approx(logits, abs=1e-5)
    with pytest.raises(UsageError, match=r"no label 'yess'.*did you mean"):
        model.explain({"text": TEXTS[0]}, target="yess")


def test_what_cannot_be_explained_is_said_in_one_line() -> None:
    model = composed("text")
    with pytest.raises(UsageError, match="the text encoder does not attend"):
        model.explain({"text": TEXTS[0]}, method="attention-rollout")
    with pytest.raises(UsageError, match=r"no method 'occlusoin'.*did you mean"):
        model.explain({"text": TEXTS[0]}, method="occlusoin")
    with pytest.raises(InputError, match="the sample is empty"):
        model.explain({"text": None})


@pytest.mark.parametrize("method", [*METHODS, "fails"])
def test_the_model_is_left_as_it_was(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed("text", text=ATTENDING)
    model.freeze("text")
    model.train()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    wanted = [weight.requires_grad for weight in model.parameters()]
    if method == "fails":
        monkeypatch.setattr("mmhub.explain.run.occlusion", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.explain({"text": TEXTS[0]}, method="occlusion")
    else:
        model.explain({"text": TEXTS[0]}, method=method, steps=2)
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(weight.grad is None for weight in model.parameters())
    assert model.frozen == {"text"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_others_predict_and_explain_while_a_model_is_explained() -> None:
    model = composed("text", "audio", fusion="attention", text=ATTENDING)
    samples = [{"text": text, "audio": SOUND} for text in TEXTS]
    wanted = model.predict(samples)
    scores = [model.explain(sample, **QUICK).attributions for sample in samples]
    wrong, rounds, done = list[Any](), 0, threading.Event()

    def predict() -> None:
        nonlocal rounds
        while not done.is_set():
            rounds += 1
            for one, other in zip(model.predict(samples), wanted, strict=True):
                if one["scores"] != pytest.approx(other["scores"], abs=1e-5):
                    wrong.append(one)

    def explain(number: int) -> None:
        for method in ("attention-rollout", "integrated-gradients"):
            found = model.explain(samples[number], method=method, **QUICK)
        for one, other in zip(found.attributions, scores[number], strict=True):
            assert [p.score for p in one.pieces] == pytest.approx([p.score for p in other.pieces], abs=1e-4)

    with ThreadPoolExecutor(3) as pool:
        predicting = pool.submit(predict)
        try:
            for job in [pool.submit(explain, number) for number in range(2)]:
                job.result()
        finally:
            done.set()
        predicting.result()
    assert rounds > 1
    assert not wrong
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_explanation_waits_for_that_of_another_thread() -> None:
    model = composed("text")
    with ThreadPoolExecutor(1) as pool:
        with untouched(model):
            waiting = pool.submit(model.explain, {"text": TEXTS[0]}, **QUICK)
            with pytest.raises(TimeoutError):
                waiting.result(0.05)
        assert waiting.result(30).attributions
    assert all(weight.requires_grad for weight in model.parameters())


def test_integrated_gradients_take_more_steps_where_few_miss_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed("text")
    plain = model.explain({"text": TEXTS[0]}, **QUICK)
    worth = sum(piece.score for piece in plain.attributions[0].pieces)
    middle = plain.value - worth / 2

    def tip_over(_: Any, __: Any, output: Any) -> None:
        output.logits = torch.sigmoid(40 / abs(worth) * (output.logits - middle))

    model.decoder.register_forward_hook(tip_over)
    options: dict[str, Any] = {"target": plain.target, "steps": 8, "faithfulness": False, "shares": False}
    near = model.explain({"text": TEXTS[0]}, **options)
    monkeypatch.setattr("mmhub.explain.gradients._FINER", (1,))
    far = model.explain({"text": TEXTS[0]}, **options)
    assert near.gap is not None
    assert far.gap is not None
    assert near.gap < 0.05 < far.gap


def test_half_precision_weights_are_explained() -> None:
    model = composed("text", "audio", fusion="concat").to(torch.bfloat16)
    found = model.explain({"text": TEXTS[0], "audio": SOUND}, steps=4)
    assert all(np.isfinite(piece.score) for one in found.attributions for piece in one.pieces)


def test_of_tags_the_word_that_is_named_is_explained() -> None:
    model = mmhub.compose(
        "tagging",
        encoders={"text": PARTS["text"]},
        decoder={"use": "tagging", "config": {"labels": ["O", "B-X"]}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    found = model.explain({"text": TEXTS[0]}, target="day=B-X", **QUICK)
    assert (found.target, found.unit) == ("day=B-X", "logit")
    assert len(found.attributions[0].pieces) == 5
    with pytest.raises(UsageError, match="no word 'dya'"):
        model.explain({"text": TEXTS[0]}, target="dya")


def test_a_regression_explains_its_value() -> None:
    model = mmhub.compose(
        "regression",
        encoders={"audio": PARTS["audio"]},
        decoder={"use": "regression", "config": {"mean": 3.0, "std": 2.0}},
    )
    found = model.explain({"audio": SOUND}, **QUICK)
    assert found.unit == "value"
    assert found.value == pytest.approx(model.predict({"audio": SOUND})[0]["value"], abs=1e-4)


def test_two_inputs_that_belong_together_are_explained_by_their_similarity() -> None:
    model = mmhub.compose(
        "retrieval",
        encoders={"text": PARTS["text"], "image": PARTS["image"]},
        decoder="contrastive",
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    sample = {"text": TEXTS[0], "image": PICTURE}
    found = model.explain(sample, method="gradient-x-input", faithfulness=False)
    assert (found.shares, found.baseline) == ({}, None), "one side alone is like none: there is nothing to share"
    assert any("no shares" in note for note in found.notes)
    sides = list(model.predict(sample)[0]["embeddings"].values())
    assert found.value == pytest.approx(float(np.dot(*sides)), abs=1e-4)
    with pytest.raises(UsageError, match="there is one"):
        model.explain({"text": TEXTS[0]})


@pytest.mark.parametrize("decoder", ["lstm-lm", "transformer-lm"])
def test_each_token_that_a_language_model_writes_is_explained(decoder: str) -> None:
    model = mmhub.compose(
        "language-modelling",
        decoder={"use": decoder, "config": {"dim": 16}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    found = model.explain({"text": "a lovely day"}, target="in town", steps=4)
    assert [step.text.strip() for step in found.steps] == ["in", "town"]
    score = model.score("a lovely day in town", end=False)[0] - model.score("a lovely day", end=False)[0]
    assert found.value == pytest.approx(score, abs=1e-3)
    assert sum(step.logprob for step in found.steps) == pytest.approx(score, abs=1e-3)
    assert [len(step.attributions[-1].pieces) for step in found.steps] == [0, 1]
    assert found.steps[0].attributions[-1].modality == "written"
    prompt = found.attributions[0].pieces
    summed = [sum(step.attributions[0].pieces[at].score for step in found.steps) for at in range(len(prompt))]
    assert summed == pytest.approx([piece.score for piece in prompt], abs=1e-5)
    assert sum(found.shares.values()) == pytest.approx(found.value - found.baseline, abs=1e-3)


def test_a_translation_is_explained_by_its_source_and_by_what_was_written() -> None:
    model = mmhub.compose(
        "translation",
        encoders={"text": PARTS["text"]},
        decoder={"use": "seq2seq", "config": {"dim": 16, "depth": 1, "heads": 2}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
        values={"text": TEXTS, "target": TEXTS},
    )
    found = model.explain({"text": TEXTS[0]}, target="a day", steps=4)
    assert [step.text.strip() for step in found.steps] == ["a", "day", "<end>"]
    assert [one.modality for one in found.steps[2].attributions] == ["text", "written"]
    assert [piece.text.strip() for piece in found.steps[2].attributions[1].pieces] == ["a", "day"]
    assert sum(found.shares.values()) == pytest.approx(found.value - found.baseline, abs=1e-3)


@pytest.mark.slow
def test_of_a_conversation_the_picture_and_the_users_words_have_their_shares() -> None:
    model = mmhub.compose(
        "chat",
        encoders={"image": PARTS["image"]},
        fusion="interleave",
        decoder={"use": "transformer-lm", "config": {"dim": 16, "depth": 1}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    sample = {"text": "a lovely day", "image": PICTURE}
    for method in METHODS:
        found = model.explain(sample, method=method, target="in town", steps=2, faithfulness=False)
        assert set(found.shares) == {"text", "image"}
        assert sum(found.shares.values()) == pytest.approx(found.value - found.baseline, abs=1e-3)
        text = next(one for one in found.attributions if one.modality == "text")
        assert [piece.text for piece in text.pieces if piece.end > piece.start] == ["a", "lovely", "day"]


def test_a_picture_that_is_squashed_is_mapped_back() -> None:
    part = {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32}}
    model = composed("image", image=part)
    (spot,) = spots_of(model, {"image": PICTURE}, Policy())["image"]
    _, step, _, other = spot.lines
    shown = 20 * model.processors["image"].settings.crop_pct
    assert (step * 32, other * 32) == (pytest.approx(shown, abs=1), pytest.approx(shown, abs=1))


def test_tokens_are_found_in_a_text_by_what_they_are_decoded_to() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    spans = spans_of(Letters(), [ord(char) for char in "<ab c>"], ["ab c"])
    assert spans == [None, (0, 1, "a"), (1, 2, "b"), None, (3, 4, "c"), None]


def writer(*guards: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    decoder = {"dim": 16, "depth": 1, "heads": 2, "max_length": 64, "generation": {"max_new_tokens": 4}}
    return mmhub.compose(
        "language-modelling",
        decoder={"use": "transformer-lm", "config": decoder},
        tokenizer={"kind": "byte"},
        texts=["a"],
        guards=list(guards),
    ).eval()


def test_of_an_answer_that_a_guard_changes_no_token_is_shown() -> None:
    pytest.importorskip("mmhub_guards")
    masked = {"use": "pattern", "config": {"patterns": {"all": "(?s)."}, "action": "replace", "on": ["output"]}}
    with pytest.raises(InputError, match="a guard changes this answer, so that it is not explained"):
        writer(masked).explain({"text": "ab"}, **QUICK)
    assert writer(masked).explain({"text": "ab"}, target="c", **QUICK).steps[0].text == "c"


def test_what_a_guard_refuses_is_not_explained() -> None:
    pytest.importorskip("mmhub_guards")
    listed = {"use": "wordlist", "config": {"words": ["lovely"]}}
    parts, decoder = {"text": PARTS["text"]}, {"use": "classification", "config": {"labels": ["no", "yes"]}}
    labels = mmhub.compose(encoders=parts, decoder=decoder, texts=TEXTS, guards=[listed]).eval()
    for model in (labels, writer(listed)):
        with pytest.raises(InputError, match="wordlist refuses this sample"):
            model.explain({"text": "a lovely day"}, **QUICK)


def test_what_is_explained_is_what_guards_let_through() -> None:
    pytest.importorskip("mmhub_guards")
    hidden = {"use": "wordlist", "config": {"words": ["secret"], "action": "replace", "on": ["input"]}}
    given, passed = {"text": "the secret"}, {"text": "the ***"}
    found, wanted = writer(hidden).explain(given, **QUICK), writer().explain(passed, **QUICK)
    assert found.target == wanted.target and found.steps == wanted.steps
    assert "".join(piece.text for piece in found.attributions[0].pieces).endswith("***")
    parts = {"text": PARTS["text"]}
    torch.manual_seed(0)
    model = mmhub.compose(
        encoders=parts, decoder={"use": "classification", "config": {"labels": ["no", "yes"]}}, texts=TEXTS
    ).eval()
    plain = model.explain({"text": "a *** day"}, **QUICK)
    lovely = {"use": "wordlist", "config": {"words": ["lovely"], "action": "replace"}}
    add_guards(model, [decode_config(GuardRecipe, lovely, "")])
    model._guards = None
    found = model.explain({"text": "a lovely day"}, **QUICK)
    assert (found.attributions, found.answer) == (plain.attributions, plain.answer)
    assert found.notes[-1] == "guards have changed the sample: what they let through is explained"
