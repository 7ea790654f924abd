"""The two encoders: the network of the paper, padding, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmhub.errors import UsageError
from mmhub.interfaces import Encoder, Policy
from mmhub.layers import summary
from mmhub_timeseries.inception import InceptionTime, MaskedBatchNorm
from mmhub_timeseries.patches import PatchTransformer

INCEPTION = InceptionTime.Config(channels=2, standardize="none", depth=3, filters=3, bottleneck=4, kernel_size=8)
PATCHES = PatchTransformer.Config(channels=2, standardize="none", dim=8, depth=1, heads=2, patch=4, dropout=0.0)


def build(config: Any) -> Encoder:
    torch.manual_seed(0)
    cls = InceptionTime if isinstance(config, InceptionTime.Config) else PatchTransformer
    return cls(config, cls.make_processor(config))


def batch(encoder: Encoder, lengths: list[int]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    items = encoder.processor([torch.randn(length, 2, generator=rng) for length in lengths], Policy())
    return items.data, items.mask


@pytest.mark.parametrize("config", [INCEPTION, PATCHES], ids=["inception", "patches"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(config: Any, training: bool) -> None:
    """In training, too: batch statistics are those of real steps. A maximum over negative values finds no zeros."""
    encoder = build(config).train(training)
    data, mask = batch(encoder, [5, 9])
    data = torch.where(mask[..., None], data - 3, 0.0)
    narrow = encoder(data, mask)
    wide = encoder(nn.functional.pad(data, (0, 0, 0, 13)), nn.functional.pad(mask, (0, 13)))
    for row in range(2):
        assert torch.allclose(wide.tokens[row][wide.mask[row]], narrow.tokens[row][narrow.mask[row]], atol=1e-5)
    assert not wide.tokens[~wide.mask].any()


@pytest.mark.parametrize("config", [INCEPTION, PATCHES], ids=["inception", "patches"])
def test_what_lies_under_the_mask_is_never_read(config: Any) -> None:
    encoder = build(config).eval()
    data, mask = batch(encoder, [5, 9])
    dirty = torch.where(mask[..., None], data, torch.tensor(torch.nan))
    assert torch.equal(encoder(dirty, mask).tokens, encoder(data, mask).tokens)


def test_a_missing_value_is_not_the_same_as_the_mean() -> None:
    encoder = build(INCEPTION).eval()
    data, mask = (torch.stack([part[0], part[0]]) for part in batch(encoder, [6]))
    data[:, 2, 0] = 0.0
    data[1, 2, 2] = 1.0
    tokens = encoder(data, mask).tokens
    assert not torch.allclose(tokens[0], tokens[1])


def test_the_norm_of_real_steps_is_that_of_torch_where_nothing_is_padded() -> None:
    ours, theirs = MaskedBatchNorm(3), nn.BatchNorm1d(3)
    x, keep = torch.randn(4, 3, 7) * 2 + 1, torch.ones(4, 1, 7, dtype=torch.bool)
    for _ in range(3):
        assert torch.allclose(ours(x, keep), theirs(x), atol=1e-5)
    assert theirs.running_mean is not None and theirs.running_var is not None
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-5)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    ours.eval(), theirs.eval()
    assert torch.allclose(ours(x, keep), theirs(x), atol=1e-5)


def test_the_default_network_has_the_parameters_of_the_paper() -> None:
    """Of one channel: counted by hand from the authors' code, with two input channels for value and indicator."""
    config = InceptionTime.Config(channels=1, standardize="none")
    blocks = sum(c * 32 + 32 * 32 * (40 + 20 + 10) + c * 32 + 2 * 128 for c in (2, *[128] * 5))
    shortcuts = sum(c * 128 + 2 * 128 for c in (2, 128))
    assert sum(p.numel() for p in build(config).parameters()) == blocks + shortcuts


@pytest.mark.parametrize("config", [INCEPTION, PATCHES], ids=["inception", "patches"])
def test_the_shape_of_a_bump_is_learned_wherever_it_is(config: Any) -> None:
    encoder = build(config)
    head = nn.Linear(encoder.dim, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):
        data, mask, labels = bumps(encoder, 16, rng)
        loss = nn.functional.cross_entropy(head(summary(encoder(data, mask))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data, mask, labels = bumps(encoder.eval(), 100, rng)
    assert (head(summary(encoder(data, mask))).argmax(1) == labels).float().mean() > 0.9


def bumps(encoder: Encoder, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a bump up and then down, or down and then up, at a random place."""
    labels = torch.arange(count) % 2
    series = []
    for label in labels.tolist():
        values = torch.randn(int(torch.randint(12, 24, (), generator=rng)), 2, generator=rng) * 0.2
        at = int(torch.randint(0, len(values) - 8, (), generator=rng))
        values[at : at + 4, 0] += 2.0 - 4.0 * label
        values[at + 4 : at + 8, 0] -= 2.0 - 4.0 * label
        series.append(values)
    items = encoder.processor(series, Policy())
    return items.data, items.mask, labels


def test_an_encoder_that_knows_no_number_of_channels_says_what_to_do() -> None:
    config = InceptionTime.Config()
    with pytest.raises(UsageError, match="channels is not known"):
        InceptionTime(config, InceptionTime.make_processor(config))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="not a multiple of heads"):
        PatchTransformer.Config(dim=6, heads=4)
