"""The model: batches that change nothing, missing inputs, frozen encoders, and errors that name the sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmhub.batch import Features
from mmhub.errors import InputError, UsageError
from mmhub.fusion.streams import Streams
from mmhub.model import Model
from tests.conftest import flac, png, three_modalities
from tests.fake_parts import Numbers, Sensitive, fake_model


@pytest.fixture(scope="module")
def three() -> Model:
    """Image, audio and text, joined by attention."""
    return three_modalities("a good thing", "a bad thing", "so long a text about a thing")


SAMPLES: list[dict[str, Any]] = [
    {"image": png(0), "audio": flac(0), "text": "a good thing"},
    {"image": png(1)},
    {"audio": flac(2, seconds=0.5), "text": None},
    {"text": "so long a text about a good good bad thing", "image": None, "audio": []},
    {"image": [png(1), png(2)], "audio": flac(3, seconds=0.11)},
    {"text": ["a", "a good thing"], "image": png(3)},
]


def test_a_sample_gives_the_same_alone_as_in_a_batch_whatever_it_lacks(three: Model) -> None:
    together = three.predict(SAMPLES)
    alone = [three.predict(sample)[0] for sample in SAMPLES]
    for one, other in zip(together, alone, strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    vectors = three.embed(SAMPLES)
    assert isinstance(vectors, Tensor)
    assert torch.allclose(vectors, torch.cat([three.embed(s) for s in SAMPLES]), atol=1e-5)  # type: ignore[misc]
    assert vectors.unique(dim=0).shape == vectors.shape == (6, 16)


def test_answers_keep_their_order_across_batches(three: Model) -> None:
    whole, parts = three.predict(SAMPLES, batch_size=6), three.predict(SAMPLES, batch_size=2)
    assert [answer["scores"] for answer in whole] == [pytest.approx(answer["scores"], abs=1e-5) for answer in parts]
    assert torch.allclose(three.embed(SAMPLES), three.embed(SAMPLES, batch_size=4), atol=1e-5)  # type: ignore[arg-type]


def test_details_are_for_people(three: Model) -> None:
    assert set(three.predict(SAMPLES[0], details=False)[0]) == {"label", "score"}


def test_no_samples_give_no_answers(three: Model) -> None:
    assert three.predict([]) == []
    assert three.embed([]).shape == (0, 16)  # type: ignore[union-attr]


def test_a_model_that_keeps_streams_apart_embeds_each(three: Model) -> None:
    encoders: dict[str, Any] = dict(three.encoders.items())
    streams = Streams(Streams.Config(), {name: encoder.stream for name, encoder in encoders.items()})
    apart = Model(three.task, encoders, streams, three.decoder, three.sources).eval()
    found = apart.embed(SAMPLES)
    assert isinstance(found, dict)
    assert {name: vectors.shape[0] for name, vectors in found.items()} == {"image": 6, "audio": 6, "text": 6}
    assert not found["audio"][1].any()
    assert found["audio"][2].any()


def test_embeddings_can_be_trained_upon(three: Model) -> None:
    vectors = three.embed(SAMPLES[:2])
    probe = torch.nn.Linear(16, 1)
    probe(vectors).sum().backward()
    assert probe.weight.grad is not None


def test_answering_leaves_the_training_mode_as_it_was(three: Model) -> None:
    three.train()
    three.predict(SAMPLES[0])
    with pytest.raises(InputError):
        three.predict({"image": b"junk"})
    assert three.training
    assert three.encoders["image"].training
    three.eval()


def test_an_unknown_modality_is_an_error_with_a_suggestion(three: Model) -> None:
    with pytest.raises(UsageError, match="this model has no input 'imgae'; did you mean 'image'"):
        three.predict({"imgae": png(0)})
    with pytest.raises(UsageError, match="it takes image, audio, text"):
        three.predict({"smell": png(0)})


def test_a_sample_must_be_a_dict(three: Model) -> None:
    with pytest.raises(UsageError, match=r"sample 1 is a bytes"):
        three.predict([SAMPLES[1], png(0)], batch_size=1)  # type: ignore[list-item]


@pytest.mark.parametrize("empty", [{}, {"text": None}, {"image": [], "audio": None}])
def test_an_empty_sample_is_an_error_with_its_row(three: Model, empty: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="sample is empty; give at least one of image, audio, text") as caught:
        three.predict([*SAMPLES[:3], empty], batch_size=2)
    assert caught.value.row == 3


def test_an_empty_text_is_no_missing_text(three: Model) -> None:
    assert three.predict({"text": ""})[0]["label"] in ("no", "yes")


def test_an_input_that_cannot_be_read_names_its_row_and_modality(three: Model) -> None:
    with pytest.raises(InputError) as caught:
        three.predict([*SAMPLES, {"text": "a"}, {"audio": b"junk"}], batch_size=3)
    assert (caught.value.row, caught.value.modality) == (7, "audio")
    assert caught.value.__notes__ == ["in sample 7, audio"]


def test_items_of_equal_length_run_together_where_padding_would_matter() -> None:
    model = fake_model()
    samples = [{"numbers": text} for text in ("1 2", "3 1 4", "5 5", "9", "2 7 1")]
    samples[2]["numbers"] = ["5 5", "8 1 1"]  # type: ignore[assignment]
    encoder: Any = model.encoders["numbers"]
    alone = [model.predict(sample)[0]["value"] for sample in samples]
    encoder.seen.clear()
    together = [answer["value"] for answer in model.predict(samples)]
    assert sorted(encoder.seen) == [(1, 1), (2, 2), (3, 3)]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-6)
    bundle = model.encode(model.collate(samples).items, 5)
    assert bundle["numbers"].lengths.tolist() == [2, 3, 5, 1, 3]


def test_running_by_length_keeps_tokens_and_gradients() -> None:
    model = fake_model()
    batch = model.collate([{"numbers": text} for text in ("1 2", "3", "4 6")])
    found = model.encode(batch.items, 3)["numbers"]
    encoder: Any = model.encoders["numbers"]
    want = encoder(torch.tensor([[4.0, 6.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert torch.allclose(found.tokens[2], want.tokens[0])
    found.tokens.sum().backward()
    assert encoder.layer.bias.grad.tolist() == [5.0] * 4


def test_pictures_are_not_cut_where_padding_would_matter() -> None:
    class Pixels(Sensitive):
        def forward(self, data: Tensor, mask: Tensor) -> Features:
            self.seen.append(tuple(data.shape))
            return Features(torch.zeros(len(data), 2, self.dim), torch.ones(len(data), 2, dtype=torch.bool))

    class Picture(Numbers):
        def pack(self, items: Any) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(items), 3, 4, 4), torch.ones(len(items), 1, dtype=torch.bool)

    encoder = Pixels(Pixels.Config(), Picture())
    encoder.pooled_dim = None
    fake_model(encoder).predict([{"numbers": "1"}, {"numbers": "2"}])
    assert encoder.seen == [(2, 3, 4, 4)]


def test_a_frozen_encoder_stays_in_evaluation_mode_and_gets_no_gradients() -> None:
    model = fake_model()
    model.freeze("numbers")
    model.train()
    assert model.training
    assert model.decoder.training
    assert not any(module.training for module in model.encoders["numbers"].modules())
    batch = model.collate([{"numbers": "1 2"}])
    batch.targets = torch.zeros(1)
    loss = model(batch).loss
    assert loss is not None
    loss.backward()
    assert all(p.grad is None for p in model.encoders["numbers"].parameters())
    assert model.decoder.scale.grad is not None
    assert not model.encode(batch.items, 1)["numbers"].tokens.requires_grad


def test_parts_are_named_by_role_and_cover_every_tensor(three: Model) -> None:
    assert list(three.parts()) == ["image_encoder", "audio_encoder", "text_encoder", "fusion", "decoder"]
    inside = [p for part in three.parts().values() for p in part.parameters()]
    assert {id(p) for p in inside} == {id(p) for p in three.parameters()}
