"""timm's own augmentations: the same pixels as in timm, a pure function of picture and seed, and checked settings."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import msgspec
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms_factory import transforms_imagenet_train

from mmhub.batch import Items
from mmhub.data.loader import Collate, load_batches
from mmhub.data.sources import open_rows
from mmhub.errors import UsageError
from mmhub.interfaces import Policy, decode_config
from mmhub_image.backbone import TimmEncoder
from mmhub_image.processor import ImageProcessor

POLICIES = ("rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.8", "augmix-m5-w4-d2", "original-mstd0.5", "v0", "3a")
TABLES: list[Any] = [
    "timm",
    {"policy": "rand-m9-mstd0.5-inc1", "erase": 0.25, "scale": [0.3, 1.0]},
    {"flip": 0.0, "colour": 0.0, "erase": 1.0},
]
KEYS = ("mean", "std", "interpolation")


def picture(seed: int = 0, size: tuple[int, int] = (61, 47)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def processor(augment: Any, **options: Any) -> ImageProcessor:
    state = {"image_size": (32, 24), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "augment": augment} | options
    return ImageProcessor.from_state(state, {})


def seed_of(generator_seed: int) -> int:
    """What the global random numbers are seeded with for a generator of this seed."""
    return int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(generator_seed)))


def read(ours: ImageProcessor, image: Image.Image, seed: int) -> torch.Tensor:
    return ours.read(image, Policy(), torch.Generator().manual_seed(seed))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- the same as in timm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["", *POLICIES])
def test_pixels_are_those_of_timms_training_transform(policy: str) -> None:
    ours = processor({"policy": policy, "scale": [0.3, 1.0], "colour": 0.2, "flip": 0.4})
    theirs: Any = transforms_imagenet_train(
        (32, 24),
        auto_augment=policy or None,
        scale=(0.3, 1.0),
        hflip=0.4,
        color_jitter=0.2,
        force_color_jitter=True,
        **{key: ours.state()[key] for key in KEYS},
    )
    mean, std = ours.scale()
    for seed in range(3):
        pixels = read(ours, picture(seed), seed)
        assert pixels.dtype == torch.uint8
        seed_everything(seed_of(seed))
        torch.testing.assert_close((pixels / 255 - mean) / std, theirs(picture(seed)), rtol=0, atol=1e-5)


def test_what_is_erased_is_what_timm_erases() -> None:
    ours = processor({"erase": 1.0})
    theirs = create_transform((3, 32, 24), is_training=True, re_prob=1.0, **{key: ours.state()[key] for key in KEYS})
    mean, std = ours.scale()
    for seed in range(5):
        pixels = (read(ours, picture(), seed) / 255 - mean) / std
        seed_everything(seed_of(seed))
        expected = theirs(picture())
        assert (expected == 0).any()
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0.5 / 255 / 0.2 + 1e-5)  # the mean, as a whole number


@pytest.mark.parametrize("architecture", ["test_vit", "tf_efficientnet_lite0"])
def test_the_name_timm_is_the_models_own_training_transform(architecture: str) -> None:
    ours = TimmEncoder.make_processor(TimmEncoder.Config(architecture=architecture, augment="timm"))
    own = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    mean, std = ours.scale()
    pixels = read(ours, picture(), 3)
    seed_everything(seed_of(3))
    expected = create_transform(**own, is_training=True)(picture())
    torch.testing.assert_close((pixels / 255 - mean) / std, expected, rtol=0, atol=1e-5)


def test_beside_a_policy_colours_change_only_where_that_is_asked_for() -> None:
    grey = Image.new("RGB", (40, 40), (90, 120, 60))
    still = processor({"policy": "rand-m0-n1", "scale": [1.0, 1.0]})
    asked = processor({"policy": "rand-m0-n1", "scale": [1.0, 1.0], "colour": 0.4})
    assert "ColorJitter" not in repr(still._timm._vary) and "ColorJitter" in repr(asked._timm._vary)  # type: ignore[union-attr]
    plain = processor({"flip": 0.0, "colour": 0.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]})
    assert torch.equal(read(plain, grey, 0), plain.read(grey, Policy()))


# --- a pure function of picture and seed ---------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [*TABLES, *({"policy": policy} for policy in POLICIES)])
def test_augmentation_depends_on_picture_and_seed_alone_and_leaves_no_trace(augment: Any) -> None:
    ours, raws = processor(augment), [picture(), picture(1)]
    seed_everything(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    first = ours(raws, Policy(), [5, 6]).data
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # type: ignore[index]
    seed_everything(2)
    again = pickle.loads(pickle.dumps(ours))([raws[1], raws[0]], Policy(), [6, 5]).data
    assert torch.equal(first, again.flip(0))
    assert not torch.equal(first, ours(raws, Policy(), [7, 8]).data)
    assert torch.equal(ours(raws, Policy()).data, processor("none")(raws, Policy(), [5, 6]).data)


def test_random_numbers_come_back_also_when_reading_fails() -> None:
    ours = processor("timm")
    ours._timm._vary = None  # type: ignore[union-attr]
    seed_everything(1)
    before = random.getstate(), torch.get_rng_state().tolist()
    with pytest.raises(TypeError):
        read(ours, picture(), 0)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_worker_processes_give_what_this_process_gives() -> None:
    rows = [{"image": np.asarray(picture(seed)), "label": "x"} for seed in range(6)]

    def batches(workers: int) -> list[torch.Tensor]:
        collate = Collate(open_rows(rows), {"image": processor(TABLES[1])}, {"image": "image"}, seed=3)
        found = []
        for part in load_batches(collate, [[0, 1], [2, 3], [4, 5]], workers):
            assert part.batch is not None, part.error
            items: Items = part.batch.items["image"]
            found.append(items.data.clone())
        return found

    seed_everything(1)
    here = batches(0)
    seed_everything(2)
    assert all(map(torch.equal, here, batches(2)))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [*TABLES, "none", "crop", "flip", "strong"])
def test_settings_are_kept_with_the_checkpoint(augment: Any) -> None:
    config = decode_config(TimmEncoder.Config, {"architecture": "test_vit", "augment": augment}, "config")
    ours = TimmEncoder.make_processor(config)
    again = TimmEncoder.load_processor(config, json.loads(json.dumps(ours.state())), {})
    assert again.settings == ours.settings
    saved = json.loads(msgspec.json.encode(config))
    assert decode_config(TimmEncoder.Config, saved, "config") == config
    image = picture(size=(90, 70))
    if augment != "none":
        assert torch.equal(read(again, image, 4), read(ours, image, 4))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"policy": "nonsense"}, "no policy 'nonsense'"),
        ({"policy": "rand-x9"}, "no policy 'rand-x9'"),
        ({"policy": "rand-mhigh"}, "no policy 'rand-mhigh'"),
        ({"scale": [0.9, 0.2]}, "the smaller first"),
        ({"scale": [0.5, 1.5]}, "shares of the area"),
        ({"ratio": [0.0, 1.0]}, "above 0"),
        ({"erase": 2.0}, "augment.erase"),
        ({"flipp": 0.5}, "did you mean 'flip'"),
        ("mirror", "invalid enum value 'mirror'"),
    ],
)
def test_settings_that_timm_cannot_follow_are_refused(augment: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_config(TimmEncoder.Config, {"architecture": "test_vit", "augment": augment}, "config")


@pytest.mark.parametrize("interpolation", ["nearest", "box", "lanczos", "hamming"])
def test_every_interpolation_of_a_model_can_be_trained_with(interpolation: str) -> None:
    ours = processor({"policy": "rand-m9-n4"}, interpolation=interpolation)
    for seed in range(4):
        assert read(ours, picture(), seed).shape == (3, 32, 24)
