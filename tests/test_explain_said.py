"""What an explanation says of itself is so, and what it costs is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmhub
from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.explain import rollout
from mmhub.explain.occlusion import faithfulness
from mmhub.explain.page import short_name
from mmhub.explain.pieces import Group, Pieces, cut
from mmhub.explain.places import spots_of, unplaced
from mmhub.explain.probe import Probe
from mmhub.explain.question import LONGEST, ask
from mmhub.explain.records import Piece
from mmhub.interfaces import Generation, Policy
from mmhub.model import Model
from tests.conftest import png

pytest.importorskip("captum", reason="needs captum, mmhub[explain]")

TEXTS = ["a lovely day in town", "an awful night by the sea"]
NOISE = np.random.default_rng(0).normal(0, 0.1, 1600).astype(np.float32)
PICTURE = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
PARTS: dict[str, Any] = {
    "text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 8}},
    "image": {"use": "timm", "config": {"architecture": "test_resnet", "image_size": 32, "crop_pct": 1.0}},
    "audio": {"use": "cnn", "config": {"sample_rate": 8000, "n_mels": 16, "dim": 8}},
}
QUICK: dict[str, Any] = {"method": "gradient-x-input", "faithfulness": False, "shares": False}


def composed(*modalities: str, fusion: Any = None) -> Model:
    torch.manual_seed(0)
    return mmhub.compose(
        encoders={name: PARTS[name] for name in modalities},
        fusion=fusion,
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        tokenizer={"kind": "word"} if "text" in modalities else None,
        texts=TEXTS if "text" in modalities else None,
    ).eval()


def writing(decoder: str = "transformer-lm") -> Model:
    torch.manual_seed(0)
    model: Model = mmhub.compose(
        "language-modelling",
        decoder={"use": decoder, "config": {"dim": 16}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    return model.eval()


@pytest.fixture(scope="module")
def talk_model() -> Model:
    """A model that converses about pictures."""
    torch.manual_seed(0)
    model: Model = mmhub.compose(
        "chat",
        encoders={"image": PARTS["image"]},
        fusion="interleave",
        decoder={"use": "transformer-lm", "config": {"dim": 16, "depth": 1}},
        tokenizer={"kind": "word"},
        texts=TEXTS,
    )
    return model.eval()


def test_integrated_gradients_name_the_input_they_begin_at_and_the_steps_they_took() -> None:
    model = composed("text")
    found = model.explain({"text": TEXTS[0]}, shares=False)
    assert found.neutral is not None and found.gap is not None and found.baseline is not None
    assert found.faithfulness is not None
    assert found.neutral == pytest.approx(found.faithfulness.deletion[-1], abs=1e-5)
    assert abs(found.neutral - found.baseline) > 1e-3, "a text of neutral tokens is not the same as no text"
    total = sum(piece.score for piece in found.attributions[0].pieces)
    assert abs(total - (found.value - found.neutral)) <= found.gap + 1e-5
    assert found.points is not None and found.points >= 32
    assert model.explain({"text": TEXTS[0]}, steps=3, shares=False, faithfulness=False).points in (3, 6, 12, 24)
    assert model.explain({"text": TEXTS[0]}, **QUICK).points is None


def test_of_a_written_text_the_scores_of_tokens_written_before_are_part_of_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmhub.explain.run._PASSES", 20)
    model, options = writing(), {"target": "in town", "shares": False, "faithfulness": False}
    found = model.explain({"text": "a lovely day"}, **options)
    assert found.neutral is not None and found.gap is not None
    assert found.points == 10, "as many as may be made together, for two tokens"
    assert model.explain({"text": "a lovely day"}, steps=12, **options).points == 12
    total = sum(piece.score for step in found.steps for one in step.attributions for piece in one.pieces)
    assert abs(total - (found.value - found.neutral)) <= found.gap + 1e-4
    prompt = sum(piece.score for one in found.attributions for piece in one.pieces)
    assert abs(prompt - total) > 1e-4


def test_where_a_model_says_nothing_without_an_input_there_are_no_shares() -> None:
    model = mmhub.compose(
        "speech-recognition",
        encoders={"audio": PARTS["audio"]},
        decoder={"use": "ctc", "config": {"units": "word", "vocabulary": ["one", "two"]}},
    )
    options: dict[str, Any] = {"target": "one", "method": "gradient-x-input", "faithfulness": False}
    found = model.explain({"audio": (NOISE, 8000)}, **options)
    assert (found.shares, found.baseline) == ({}, None) and np.isfinite(found.value)
    assert any("no shares" in note for note in found.notes)
    assert not model.explain({"audio": (NOISE, 8000)}, shares=False, **options).notes


def test_without_a_token_before_it_the_first_token_has_no_probability() -> None:
    model, policy = writing("lstm-lm"), Policy()
    question = ask(model, {"text": "a lovely day"}, "in town", policy)
    batch = question.batch
    text = batch.items["text"]
    alone = type(text)(text.data[:, -2:], text.mask[:, -2:], text.rows, 1)
    with torch.no_grad():
        values = question.measure(model.fusion(model.encode(batch.items | {"text": alone}, 1)))
    assert values[0, 0].isnan() and values[0, 1].isfinite()


def test_a_modality_is_taken_away_only_where_shares_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.explain import shares

    tried: list[int] = []
    rows = shares._rows

    def counted(probe: Any, pieces: Any, missing: Any) -> Any:
        tried.append(len(missing))
        return rows(probe, pieces, missing)

    monkeypatch.setattr(shares, "_rows", counted)
    model, sample = composed("text", "audio", fusion="concat"), {"text": TEXTS[0], "audio": (NOISE, 8000)}
    whole = model.explain(sample, method="gradient-x-input", faithfulness=False)
    ends = model.explain(sample, **QUICK)
    assert tried == [4, 2] and ends.shares == {}
    assert (ends.value, ends.baseline) == pytest.approx((whole.value, whole.baseline), abs=1e-5)


@pytest.mark.slow
def test_pieces_in_no_order_do_not_beat_random_orders() -> None:
    model = composed("text")
    with torch.no_grad():
        probe = Probe(model, ask(model, {"text": " ".join(TEXTS)}, None, Policy()))
        pieces = cut(probe, spots_of(model, {"text": " ".join(TEXTS)}, Policy()), 64)
        beaten = [0, 0]
        for seed in range(12):
            scores = torch.rand(pieces.total, generator=torch.Generator().manual_seed(seed + 100))
            found = faithfulness(probe, pieces, scores)
            assert found is not None and found == faithfulness(probe, pieces, scores)
            beaten[0] += found.deletion_beaten >= 0.95 * found.orders
            beaten[1] += found.insertion_beaten >= 0.95 * found.orders
            assert (found.deletion[0], found.deletion[-1]) == (found.insertion[-1], found.insertion[0])
    assert max(beaten) <= 3


@pytest.mark.parametrize(
    "text", ["a LOVELY day", "  a   lovely \n day", "a lovely day \N{DOG FACE}", "a lovely zeppelin"]
)
def test_words_of_a_conversation_are_found_whatever_they_are_made_of(talk_model: Model, text: str) -> None:
    talk = [{"role": "user", "content": "in town"}, {"role": "assistant", "content": "by"}]
    found = talk_model.explain({"messages": [*talk, {"role": "user", "content": text}]}, target="in town", **QUICK)
    placed = [piece for piece in found.attributions[0].pieces if piece.end > piece.start]
    given = f"in town\n{text}"
    assert [piece.text for piece in placed] == given.split()
    assert [given[int(piece.start) : int(piece.end)] for piece in placed] == given.split()
    assert not found.notes


def test_texts_whose_tokens_are_nowhere_are_counted_and_told(
    talk_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unplaced([(0, 0), (3, 6)], ["ab", "cd ef", " "]) == 1
    monkeypatch.setattr("mmhub.explain.pieces.spans_of", lambda processor, ids, texts: [None] * len(ids))
    found = talk_model.explain({"text": "a lovely day", "image": PICTURE}, target="in town", **QUICK)
    assert found.notes == ("it was not found where the tokens of a text stand: they are not explained",)


def test_an_address_is_fetched_once(talk_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, policy: Policy) -> bytes:
        asked.append(url)
        return png(1, 16)

    monkeypatch.setattr("mmhub.interfaces.fetch.fetch", fetch)
    found = composed("image").explain({"image": "https://a.example/a.png"}, policy=Policy(urls=True), **QUICK)
    assert found.attributions[0].size == (16, 16) and asked == ["https://a.example/a.png"]
    part = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "a lovely day"}]}]
    talk_model.explain({"messages": talk}, target="in", policy=Policy(urls=True), **QUICK)
    assert asked[1:] == ["https://a.example/b.png"]


def test_a_large_picture_is_placed_by_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = composed("image"), list[int]()
    processor = type(model.processors["image"])
    call = processor.__call__

    def counted(self: Any, raws: Any, policy: Any) -> Any:
        seen.extend(raw.size // 3 for raw in raws)
        return call(self, raws, policy)

    monkeypatch.setattr(processor, "__call__", counted)
    spots = [
        spots_of(model, {"image": np.broadcast_to(np.uint8(0), (size * 2, size * 3, 3))}, Policy())["image"][0]
        for size in (1000, 200)
    ]
    assert max(seen) <= 2**20 + 2000
    assert spots[0].size == (3000, 2000)
    assert spots[0].box(0, 0, 32, 32) == pytest.approx([5 * edge for edge in spots[1].box(0, 0, 32, 32)], abs=15)


def test_seconds_are_right_where_only_short_sounds_may_be_read() -> None:
    model = composed("audio")
    for policy in (Policy(), Policy(max_seconds=0.5)):
        found = model.explain({"audio": (NOISE, 8000)}, policy=policy, **QUICK)
        assert found.attributions[0].size == pytest.approx((0.2,), abs=0.001)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_an_explanation_ends_where_it_is_told_to(at: int) -> None:
    passes: list[int] = []

    def stop() -> None:
        passes.append(1)
        if len(passes) > at:
            raise KeyboardInterrupt

    model = composed("text", "image", fusion="concat").train()
    with pytest.raises(KeyboardInterrupt):
        model.explain({"text": TEXTS[0], "image": PICTURE}, method="occlusion", stop=stop)
    assert len(passes) == at + 1
    assert model.training and all(weight.requires_grad for weight in model.parameters())


def test_an_answer_is_written_by_the_settings_and_its_end_is_told_where_it_is_cut() -> None:
    model = writing()
    own = model.decoder.config
    settings = Generation(max_new_tokens=3, min_new_tokens=3)
    found = model.explain({"text": "a lovely"}, settings=settings, **QUICK)
    assert len(found.steps) == 3 and not found.notes and model.decoder.config is own
    for length, noted in ((LONGEST, False), (LONGEST + 1, True)):
        settings = Generation(max_new_tokens=length, min_new_tokens=length)
        for question in (
            ask(model, {"text": "a lovely"}, None, Policy(), settings),
            ask(model, {"text": "a lovely"}, " ".join(["day"] * length), Policy()),
        ):
            assert (len(question.written), bool(question.notes)) == (LONGEST, noted), length


def test_of_a_folder_the_last_part_is_its_name(tmp_path: Path) -> None:
    (tmp_path / "alice" / "model").mkdir(parents=True)
    assert short_name(str(tmp_path / "alice" / "model")) == "model"
    assert short_name("org/model") == "org/model"


def test_gradients_are_taken_in_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = composed("text"), list[int]()
    whole = model.explain({"text": TEXTS[0]}, **QUICK).attributions
    values = Probe.values

    def counted(self: Probe, xs: Any) -> Any:
        rows.append(len(xs[0]))
        return values(self, xs)

    monkeypatch.setattr(Probe, "values", counted)
    monkeypatch.setattr("mmhub.explain.probe.ROWS", 3)
    parts = model.explain({"text": TEXTS[0]}, **QUICK).attributions
    assert max(rows) == 3
    assert [piece.score for piece in parts[0].pieces] == pytest.approx([p.score for p in whole[0].pieces], abs=1e-5)


@pytest.mark.parametrize(("tokens", "shape", "grid"), [(17, (32, 32), (4, 4)), (16, (24, 40), None), (20, (), None)])
def test_tokens_of_a_picture_have_a_place_where_they_are_a_square(tokens: int, shape: Any, grid: Any) -> None:
    features = Features(torch.zeros(1, tokens, 2), torch.ones(1, tokens, dtype=torch.bool))
    read = rollout._Read("image", 0, features, [torch.zeros(1)], shape)
    found = rollout.Flow(torch.zeros(1), (read,))
    assert rollout.grid_of(found, "image", 0) == grid
    size = grid or (8, 8)
    numbers = tuple(range(size[0] * size[1]))
    group = Group("image", 0, "patch", tuple(Piece(score=0.0) for _ in numbers), numbers, (), size)
    pieces, scores = Pieces((group,), (), len(numbers)), torch.zeros(len(numbers))
    worth = torch.arange(float(tokens))
    if grid is None:
        with pytest.raises(UsageError, match=f"where in the image the encoder's {tokens} tokens stand is not known"):
            rollout._place(pieces, found, read, worth, scores)
    else:
        rollout._place(pieces, found, read, worth, scores)
        assert scores.tolist() == worth[1:].tolist()
