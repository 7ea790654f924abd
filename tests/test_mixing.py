"""Mixup and CutMix: pictures and labels are mixed in the same shares, in training alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmhub.batch import Batch, Bundle, Output
from mmhub.build import compose
from mmhub.config import check_recipe
from mmhub.data.loader import row_seed
from mmhub.engine import train
from mmhub.engine.mixing import Mixer
from mmhub.engine.step import Stepper
from mmhub.errors import Interrupted, UsageError
from mmhub.model import Model
from mmhub.optim import seed_step
from tests.conftest import png, recipe
from tests.test_engine import image_only
from tests.test_resume import stop_at, weights


def picture_model(decoder: str = "classification", **config: Any) -> Model:
    torch.manual_seed(0)
    settings = {"labels": ["a", "b", "c"], "dropout": 0.0} | config
    encoder = {"use": "timm", "config": {"architecture": "test_vit", "image_size": 32}}
    task = decoder if decoder in ("multilabel", "regression") else "classification"
    return compose(task, encoders={"image": encoder}, decoder={"use": decoder, "config": settings})


def batch_of(model: Model, count: int = 4) -> Batch:
    batch = model.collate([{"image": png(i)} for i in range(count)])
    targets = model.decoder.encode_targets([["a", "b", "c"][i % 3] for i in range(count)])
    return replace(batch, targets=targets, weights=model.decoder.weigh(targets))


def mixed(model: Model, batch: Batch, step: int = 0, **alphas: float) -> Batch:
    seed_step(0, step)
    return Mixer(model, **({"mixup": 0.0, "cutmix": 0.0} | alphas)).mix(batch)


def plain_pixels(model: Model, batch: Batch) -> Tensor:
    encoder: Any = model.encoders["image"]
    return (batch.items["image"].data.float() / 255 - encoder.mean) / encoder.std


def shares(model: Model, batch: Batch, found: Batch) -> tuple[Tensor, Tensor]:
    """The share (B,) each row kept and the number (B,) of the row it was mixed with, as its pixels tell."""
    pixels, result = plain_pixels(model, batch), found.items["image"].data
    kept, partners = [], []
    for row in range(batch.size):
        best = []
        for other in range(batch.size):
            delta = pixels[row] - pixels[other]
            square = float((delta * delta).sum())
            share = float(((result[row] - pixels[other]) * delta).sum()) / square if square else 1.0
            error = float((result[row] - torch.lerp(pixels[other], pixels[row], share)).abs().max())
            best.append((error, share, other))
        error, share, other = min(best)
        assert error < 1e-5
        kept.append(share)
        partners.append(other)
    return torch.tensor(kept), torch.tensor(partners)


def test_mixup_is_the_formula_for_pixels_and_for_labels() -> None:
    model = picture_model()
    batch = batch_of(model)
    found = mixed(model, batch, step=1, mixup=1.0)
    kept, partners = shares(model, batch, found)
    moved = partners != torch.arange(4)
    assert moved.any() and len(set(partners.tolist())) == 4, "each row is the second of one other"
    share = kept[moved][0]
    assert 0.05 < share < 0.95 and torch.allclose(kept[moved], share.expand(int(moved.sum())), atol=1e-5)
    one_hot = F.one_hot(batch.targets, 3).float()
    assert torch.allclose(found.targets, share * one_hot + (1 - share) * one_hot[partners], atol=1e-6)
    expected = share * plain_pixels(model, batch) + (1 - share) * plain_pixels(model, batch)[partners]
    assert torch.allclose(found.items["image"].data, expected, atol=1e-5)
    assert batch.items["image"].data.dtype == torch.uint8, "the batch itself is left as it is"


def test_cutmix_puts_one_box_of_another_picture_in_and_counts_its_pixels() -> None:
    model = picture_model()
    batch = batch_of(model)
    pixels = plain_pixels(model, batch)
    one_hot = F.one_hot(batch.targets, 3).float()
    sizes = set()
    for step in range(6):
        found = mixed(model, batch, step, cutmix=1.0)
        changed = (found.items["image"].data != pixels).any(1).any(0)
        if not changed.any():
            continue
        rows, columns = changed.any(1).nonzero()[[0, -1], 0], changed.any(0).nonzero()[[0, -1], 0]
        inside = (slice(rows[0], rows[1] + 1), slice(columns[0], columns[1] + 1))
        partners = [
            next(o for o in range(4) if torch.equal(found.items["image"].data[r][:, *inside], pixels[o][:, *inside]))
            for r in range(4)
        ]
        area = int((rows[1] - rows[0] + 1) * (columns[1] - columns[0] + 1))
        sizes.add(area)
        share = 1 - area / (32 * 32)
        assert torch.allclose(found.targets, share * one_hot + (1 - share) * one_hot[partners], atol=1e-6)
    assert len(sizes) > 2, "boxes of many sizes"


def test_with_both_about_half_of_the_batches_are_cut() -> None:
    model = picture_model()
    batch = batch_of(model)
    pixels = plain_pixels(model, batch)
    kinds = []
    for step in range(40):
        found = mixed(model, batch, step, mixup=1.0, cutmix=1.0).items["image"].data
        values = (found[:, None] - pixels[None]).abs().amin(1)  # a cut pixel is that of some picture
        kinds.append(float(values.max()) < 1e-6)
    assert 10 <= sum(kinds) <= 30


def test_what_is_drawn_depends_on_seed_step_and_rank_alone() -> None:
    model = picture_model()
    batch = batch_of(model)

    def drawn(seed: int, step: int, rank: int) -> Tensor:
        seed_step(row_seed(seed, rank), step)  # as a run does
        return Mixer(model, 0.4, 0.0).mix(batch).targets

    first = drawn(0, 3, 0)
    assert torch.equal(first, drawn(0, 3, 0))
    assert not any(torch.equal(first, drawn(*other)) for other in ((1, 3, 0), (0, 4, 0), (0, 3, 1)))


def test_floating_point_pixels_are_mixed_as_they_are() -> None:
    model = picture_model()
    batch = batch_of(model)
    pixels = plain_pixels(model, batch)
    floats = replace(batch, items={"image": replace(batch.items["image"], data=pixels)})
    assert torch.equal(
        mixed(model, floats, mixup=1.0).items["image"].data, mixed(model, batch, mixup=1.0).items["image"].data
    )


@pytest.mark.parametrize("weights", [None, {"a": 4.0, "b": 0.5}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_of_the_losses_with_either_label(weights: Any, smoothing: float) -> None:
    model = picture_model(class_weights=weights, label_smoothing=smoothing)
    decoder: Any = model.decoder
    targets, order, share = torch.tensor([0, 1, 2, 1]), torch.tensor([2, 0, 1, 3]), 0.3
    logits = torch.randn(4, 3)
    soft = decoder.soft_targets(targets)
    soft = share * soft + (1 - share) * soft[order]
    # both are sums over rows divided by the weight of the rows, which a permutation leaves as it is
    expected = share * decoder._loss(logits, targets) + (1 - share) * decoder._loss(logits, targets[order])
    assert float(decoder._loss(logits, soft)) == pytest.approx(float(expected), abs=1e-6)
    assert float(decoder._loss(logits, decoder.soft_targets(targets))) == pytest.approx(
        float(decoder._loss(logits, targets)), abs=1e-6
    )


def test_autocast_does_not_round_what_rows_weigh() -> None:
    decoder: Any = picture_model(class_weights={"a": 1.003, "b": 0.501}).decoder
    soft = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.1, 0.9]])
    expected, logits = decoder.weigh(soft), torch.randn(2, 3)
    loss = decoder._loss(logits, soft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoder.weigh(soft), expected)
        assert torch.equal(decoder._loss(logits, soft), loss)


def test_several_labels_a_picture_are_mixed_one_by_one() -> None:
    model = picture_model("multilabel")
    batch = model.collate([{"image": png(i)} for i in range(3)])
    batch.targets = model.decoder.encode_targets([["a", "b"], [], ["c"]])
    found = mixed(model, batch, step=2, mixup=1.0)
    kept, partners = shares(model, batch, found)
    share = kept[partners != torch.arange(3)][0]
    assert torch.allclose(found.targets, share * batch.targets + (1 - share) * batch.targets[partners], atol=1e-5)
    assert math.isfinite(float(model(found).loss.detach()))


def test_a_batch_of_one_stays_and_a_row_of_two_pictures_is_named() -> None:
    model = picture_model()
    alone = batch_of(model, 1)
    assert mixed(model, alone, mixup=1.0) is alone
    two = model.collate([{"image": [png(0), png(1)]}, {"image": png(2)}])
    two.targets = torch.tensor([0, 1])
    with pytest.raises(UsageError, match="one picture a row, and 2 rows have 3"):
        mixed(model, two, mixup=1.0)


def test_what_cannot_be_mixed_is_one_line(tables: Path, tmp_path: Path) -> None:
    fused = recipe(tables, mixup=0.2)
    with pytest.raises(UsageError, match=r"train\.mixup mixes pictures, and this model takes image, audio"):
        train(fused, tmp_path / "fused")
    frozen = image_only(tables, cutmix=1.0)
    frozen["model"]["encoders"]["image"]["freeze"] = True
    with pytest.raises(UsageError, match=r"train\.cutmix changes pictures, and the features .* are kept"):
        train(frozen, tmp_path / "frozen")
    with pytest.raises(UsageError, match=r"train\.mixup is -1.*not negative"):
        check_recipe({"task": "classification", "train": {"mixup": -1}})
    assert not any(tmp_path.iterdir())


def test_numbers_are_no_labels_that_can_be_mixed() -> None:
    from mmhub.engine.mixing import make_mixer

    encoder = {"use": "timm", "config": {"architecture": "test_vit", "image_size": 32}}
    model = compose(
        "regression", encoders={"image": encoder}, decoder={"use": "regression", "config": {"mean": 0.0, "std": 1.0}}
    )
    options = check_recipe({"task": "regression", "train": {"mixup": 0.2}}).train
    with pytest.raises(UsageError, match=r"train\.mixup mixes labels, and those of mmhub-heads/regression cannot be"):
        make_mixer(model, options)


def mixing_run(tables: Path, **options: Any) -> dict[str, Any]:
    table = image_only(tables, epochs=3, mixup=0.4, cutmix=1.0, **options)
    table["model"]["encoders"]["image"]["config"] |= {"architecture": "test_vit", "drop_path": 0.2}
    table["model"]["decoder"]["config"] |= {"label_smoothing": 0.1}
    del table["model"]["fusion"]
    return table


def test_a_run_that_mixes_goes_on_bit_for_bit_and_evaluates_what_is_whole(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = mixing_run(tables)
    seen: set[tuple[bool, bool]] = set()
    real = Model.decode

    def decode(self: Model, bundle: Bundle, targets: Any = None, plan: Any = None) -> Output:
        if targets is not None:
            seen.add((self.training, targets.is_floating_point()))
        return real(self, bundle, targets, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "decode", decode)
        train(table, tmp_path / "whole")
    assert seen == {(True, True), (False, False)}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert "mixup = 0.4" in text and "cutmix = 1.0" in text


def test_accumulated_batches_are_mixed_each_in_its_own_way(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    real = Stepper._plain

    def plain(self: Stepper, batch: Batch, *args: Any) -> Tensor:
        found.append(batch.targets)
        return real(self, batch, *args)

    monkeypatch.setattr(Stepper, "_plain", plain)
    table = mixing_run(tables, accumulate=2, max_steps=1)
    table["data"].pop("valid")
    train(table, tmp_path / "run")
    odd = [set(target[(target > 0) & (target < 1)].flatten().tolist()) for target in found]
    assert len(odd) == 2 and all(odd) and odd[0] != odd[1]


@pytest.mark.gpu
@pytest.mark.parametrize("alphas", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_a_gpu_mixes_as_a_cpu_does(alphas: dict[str, float]) -> None:
    model = picture_model()
    expected = mixed(model, batch_of(model), step=1, **alphas)
    found = mixed(model.cuda(), batch_of(model).to("cuda"), step=1, **alphas)
    assert found.targets.is_cuda and torch.allclose(found.targets.cpu(), expected.targets)
    assert torch.allclose(found.items["image"].data.cpu(), expected.items["image"].data, atol=1e-6)
