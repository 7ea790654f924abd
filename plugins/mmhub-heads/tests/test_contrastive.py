"""The contrastive head: its losses against their definitions, its sides, its temperature, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Features
from mmhub.errors import UsageError
from mmhub.interfaces import Stream, decode_config
from mmhub.interfaces.pairs import NO_PAIR
from mmhub_heads.contrastive import Contrastive

STREAMS = {"image": Stream(6), "text": Stream(4, pooled=5)}


def features(rows: int, stream: Stream, absent: tuple[int, ...] = ()) -> Features:
    mask = torch.ones(rows, 3, dtype=torch.bool)
    mask[list(absent)] = False
    tokens = torch.randn(rows, 3, stream.dim) * mask[..., None]
    pooled = torch.randn(rows, stream.pooled) * mask[:, :1] if stream.pooled else None
    return Features(tokens, mask, pooled=pooled)


def build(streams: dict[str, Stream] = STREAMS, **config: Any) -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(decode_config(Contrastive.Config, {"dim": 8} | config, "config"), streams)


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_clip_loss_is_cross_entropy_both_ways() -> None:
    head, text, image = build(), unit(5, 1), unit(5, 2)
    logits, right = text @ image.T / 0.07, torch.arange(5)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    loss = head.pair_loss({"text": text, "image": image}, torch.tensor([7, 3, 9, 1, 2]))
    assert torch.allclose(loss, expected, atol=1e-6)


def test_the_siglip_loss_asks_about_every_pair_and_is_a_mean_over_rows() -> None:
    head, text, image = build(loss="siglip"), unit(4, 1), unit(4, 2)
    targets = [5, 6, 5, 8]
    logits = 10 * text @ image.T - 10
    signs = [[1 if a == b else -1 for b in targets] for a in targets]
    expected = sum(math.log1p(math.exp(-signs[i][j] * float(logits[i, j]))) for i in range(4) for j in range(4))
    loss = head.pair_loss({"text": text, "image": image}, torch.tensor(targets))
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


def test_rows_that_belong_together_share_the_softmax() -> None:
    head, text, image = build(), unit(4, 1), unit(4, 2)
    targets = torch.tensor([5, 6, 5, 8])
    shares = F.normalize((targets[:, None] == targets).float(), p=1, dim=1)
    logits = text @ image.T / 0.07
    expected = (F.cross_entropy(logits, shares) + F.cross_entropy(logits.T, shares)) / 2
    assert torch.allclose(head.pair_loss({"text": text, "image": image}, targets), expected, atol=1e-6)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_row_without_a_pair_is_no_part_of_the_loss(loss: str) -> None:
    head, text, image = build(loss=loss), unit(5, 1), unit(5, 2)
    alone = torch.tensor([0, NO_PAIR, 2, 3, NO_PAIR])
    kept = [0, 2, 3]
    whole = head.pair_loss({"text": text, "image": image}, alone)
    part = head.pair_loss({"text": text[kept], "image": image[kept]}, alone[kept])
    assert torch.allclose(whole, part, atol=1e-6)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_without_any_pair_the_loss_is_zero_and_every_parameter_has_a_gradient(loss: str) -> None:
    head = build(loss=loss)
    bundle = {name: features(3, stream) for name, stream in STREAMS.items()}
    found = head(bundle, torch.full((3,), NO_PAIR)).loss
    assert found is not None
    found.backward()
    assert found.item() == 0
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in head.parameters())


def test_vectors_have_length_one_and_an_absent_side_is_zero() -> None:
    head = build()
    bundle = {"image": features(3, STREAMS["image"], absent=(1,)), "text": features(3, STREAMS["text"])}
    vectors = head.vectors(bundle)
    assert list(vectors) == ["text", "image"]
    assert torch.allclose(vectors["text"].norm(dim=1), torch.ones(3))
    assert torch.allclose(vectors["image"].norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    answers = head.predict(head(bundle))
    assert [list(answer["embeddings"]) for answer in answers] == [["text", "image"], ["text"], ["text", "image"]]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_single_stream_is_compared_with_itself_by_one_projection(loss: str) -> None:
    head = build({"text": Stream(4)}, loss=loss)
    one, other = features(6, Stream(4)), features(6, Stream(4))
    vectors = head.vectors({"text": one, "text_pair": one})
    assert head.sides == ("text", "text_pair")
    assert torch.equal(vectors["text"], vectors["text_pair"])
    assert not torch.equal(head.vectors({"text": one, "text_pair": other})["text_pair"], vectors["text"])


def test_the_scores_are_scaled_cosines_and_learned_up_to_a_hundred() -> None:
    head = build(scale=100.0)
    assert head.log_scale.shape == build(loss="siglip").bias.shape == (1,), "FSDP shards no scalars"
    one, other = unit(3, 1), unit(4, 2)
    assert torch.allclose(head.scores(one, other), 100 * one @ other.T, atol=1e-4)
    with torch.no_grad():
        head.log_scale.fill_(6.0)
    head.train().pair_loss({"text": one, "image": -one}, torch.arange(3)).backward()  # a smaller scale is better
    assert head.log_scale.item() == pytest.approx(math.log(100))
    assert head.log_scale.grad is not None and float(head.log_scale.grad) > 0


@pytest.mark.slow
def test_a_sharded_scale_is_learned_up_to_a_hundred(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    head, bundle = build(loss="siglip"), {name: features(3, stream) for name, stream in STREAMS.items()}
    whole = build(loss="siglip").eval()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
        with torch.no_grad():
            head.log_scale.fill_(6.0)
            whole.log_scale.fill_(math.log(100))
        losses = [head.train()(bundle, torch.arange(3)).loss, head.eval()(bundle, torch.arange(3)).loss]
        losses[0].backward()
        assert head.log_scale.grad is not None and float(head.log_scale.grad.to_local()) != 0
    finally:
        dist.destroy_process_group()
    expected = whole(bundle, torch.arange(3)).loss.detach()
    assert [float(loss.detach()) for loss in losses] == pytest.approx([float(expected)] * 2, rel=1e-5)


def test_a_fixed_temperature_is_saved_and_not_trained() -> None:
    head = build(loss="siglip", learn_temperature=False)
    assert not {"log_scale", "bias"} & {name for name, _ in head.named_parameters()}
    assert {"log_scale", "bias"} <= set(head.state_dict())


@pytest.mark.parametrize(
    ("streams", "config", "message"),
    [
        ({"fused": Stream(4)}, {}, "arrive mixed"),
        ({"text": Stream(4), "image": Stream(4), "audio": Stream(4)}, {}, "there are 3: text, image, audio"),
        (STREAMS, {"sides": ["image", "txet"]}, "'txet', which is no stream; did you mean 'text'"),
        (STREAMS, {"sides": ["image", "image"]}, "two different streams"),
        (STREAMS, {"scale": 101.0}, "at most 100"),
        (STREAMS, {"dim": 0}, "dim must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(streams: dict[str, Stream], config: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(streams, **config)
    assert message in str(caught.value)


def test_the_sides_can_be_given_in_another_order() -> None:
    assert build(sides=["image", "text"]).sides == ("image", "text")
    pair = build({"text": Stream(4)}, sides=["text_pair", "text"])
    assert pair.sides == ("text_pair", "text")
    assert set(pair.vectors({name: features(2, Stream(4)) for name in pair.sides})) == {"text", "text_pair"}
