"""Projectors: what they make of an item follows from its real tokens alone, and their number is known before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmhub.batch import pad_sequences
from mmhub.errors import UsageError
from mmhub.interfaces import decode_config
from mmhub.layers import Projector, ProjectorConfig
from mmhub.weights import meta_parameters

WIDTH, DIM = 3, 8
GRIDS, LENGTHS = [9, 0, 4, 16, 1], [5, 0, 2, 7, 1]
KINDS: list[Any] = [
    {},
    {"kind": "mlp", "hidden": 5, "norm": True},
    {"kind": "resampler", "queries": 3, "depth": 2, "heads": 2},
    {"stack": 3},
    {"stack": 2, "kind": "mlp", "norm": True},
    {"shuffle": 2},
    {"shuffle": 3, "kind": "mlp"},
    {"shuffle": 2, "kind": "resampler", "queries": 2, "heads": 4},
]


def build(table: dict[str, Any], width: int = WIDTH, dim: int = DIM) -> Projector:
    torch.manual_seed(0)
    return Projector(decode_config(ProjectorConfig, table, "projector"), width, dim)


def items(lengths: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, mask = pad_sequences([torch.randn(n, WIDTH) for n in lengths])
    return tokens, mask


def lengths_for(table: dict[str, Any]) -> list[int]:
    return GRIDS if "shuffle" in table else LENGTHS


@pytest.mark.parametrize("table", KINDS, ids=str)
def test_an_item_becomes_what_it_becomes_alone_and_without_padding(table: dict[str, Any]) -> None:
    projector = build(table)
    tokens, mask = items(lengths_for(table))
    found, kept = projector(tokens.masked_fill(~mask[..., None], torch.nan), mask)
    assert kept.sum(1).tolist() == [projector.token_count(n) for n in lengths_for(table)]
    assert bool((kept.long().diff(dim=1) <= 0).all())
    assert not found[~kept].any()
    for number, length in enumerate(lengths_for(table)):
        alone, own = projector(tokens[number : number + 1, :length], mask[number : number + 1, :length])
        torch.testing.assert_close(found[number][kept[number]], alone[own], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("table", KINDS, ids=str)
def test_gradients_are_finite_and_reach_all_even_where_nothing_is_there(table: dict[str, Any]) -> None:
    projector = build(table)
    tokens, mask = items(lengths_for(table))
    tokens.requires_grad_()
    projector(tokens, mask)[0].pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in projector.parameters())
    assert tokens.grad is not None and bool(tokens.grad[mask].any(1).all()) and not tokens.grad[~mask].any()
    projector.zero_grad()
    projector(tokens[1:2], mask[1:2])[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())


def test_a_linear_projector_is_one_layer_and_an_mlp_the_one_of_llava() -> None:
    tokens, mask = items([4, 4])
    linear, mlp = build({}), build({"kind": "mlp"})
    one: Any = linear.body
    torch.testing.assert_close(linear(tokens, mask)[0], tokens @ one.weight.T + one.bias)
    two: Any = mlp.body
    first, _, second = two
    assert (first.out_features, second.in_features) == (DIM, DIM)
    wanted = torch.nn.functional.gelu(tokens @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(mlp(tokens, mask)[0], wanted)


def test_stacked_tokens_are_neighbours_and_zeros_at_the_end() -> None:
    seen = inputs_of({"stack": 3}, items([5])[0], torch.ones(1, 5, dtype=torch.bool))
    flat = torch.cat([items([5])[0][0].flatten(), torch.zeros(WIDTH)])
    assert torch.equal(seen[0], flat.view(2, 3 * WIDTH))


@pytest.mark.parametrize("side", [4, 5])
def test_shuffled_tokens_are_the_squares_that_pixel_unshuffle_finds(side: int) -> None:
    tokens, mask = items([side * side] * 2)
    seen = inputs_of({"shuffle": 2}, tokens, mask)
    pixels = tokens.view(2, side, side, WIDTH).permute(0, 3, 1, 2)
    pixels = torch.nn.functional.pad(pixels, (0, side % 2, 0, side % 2))
    wanted = torch.nn.functional.pixel_unshuffle(pixels, 2)  # channel, row, column
    wanted = wanted.unflatten(1, (WIDTH, 2, 2)).permute(0, 4, 5, 2, 3, 1).flatten(3).flatten(1, 2)
    assert torch.equal(seen, wanted)


def inputs_of(table: dict[str, Any], tokens: Tensor, mask: Tensor) -> Tensor:
    """What the linear layer of a projector is given."""
    projector, seen = build(table), []
    projector.body.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    projector(tokens, mask)
    found: Tensor = seen[0]
    return found


def test_queries_see_the_order_of_tokens_only_as_far_as_encoders_tell_it() -> None:
    projector = build({"kind": "resampler", "queries": 3, "heads": 2})
    tokens, mask = items([5, 5])
    torch.testing.assert_close(projector(tokens.flip(1), mask)[0], projector(tokens, mask)[0])


def test_tokens_that_are_no_square_grid_are_not_shuffled() -> None:
    projector = build({"shuffle": 2})
    for lengths in ([10, 10], [9, 10]):
        with pytest.raises(UsageError, match="takes items whose tokens are a square grid, and one has 10") as caught:
            projector(*items(lengths))
        assert "stack instead of shuffle" in str(caught.value.hint)
    with pytest.raises(UsageError, match="square grid, and one has 10"):
        projector.token_count(10)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ({"stack": 2, "shuffle": 2}, "one of them has to be 1"),
        ({"hidden": 4}, "hidden is for the kind \"mlp\", and this is 'linear'"),
        ({"kind": "resampler", "heads": 3}, "a resampler of 3 heads does not divide the language model's width, 8"),
        ({"kind": "mpl"}, "mlp"),
        ({"stack": 0}, "stack"),
        ({"shuffle": 65}, "shuffle of a projector is 65, and at most 64"),
        ({"kind": "resampler", "queries": 10**9}, "at most 4096"),
    ],
)
def test_settings_that_cannot_be_are_refused(table: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        build(table)


@pytest.mark.parametrize("table", KINDS, ids=str)
def test_it_is_built_on_the_meta_device_with_the_same_tensors(table: dict[str, Any]) -> None:
    with meta_parameters():
        meta = build(table).state_dict()
    assert all(tensor.is_meta for tensor in meta.values())
    assert {n: t.shape for n, t in meta.items()} == {n: t.shape for n, t in build(table).state_dict().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("table", KINDS, ids=str)
def test_on_a_gpu_it_gives_what_it_gives_on_a_cpu(table: dict[str, Any]) -> None:
    projector, (tokens, mask) = build(table), items(lengths_for(table))
    wanted, kept = projector(tokens, mask)
    found, there = projector.cuda()(tokens.cuda(), mask.cuda())
    assert torch.equal(there.cpu(), kept)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-3, rtol=1e-3)
