"""Packing changes speed and nothing else; a chunked loss is the loss, without its logits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmhub.layers import Packing, TransformerEncoder, chunked_cross_entropy, packed_attention, packing, transformer

LENGTHS = (3, 0, 7, 1, 3, 3)


def ragged(lengths: tuple[int, ...] = LENGTHS, dim: int = 16, width: int = 9) -> tuple[Tensor, Tensor]:
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), width, dim), mask


def padded(encoder: TransformerEncoder, x: Tensor, mask: Tensor) -> Tensor:
    """What the encoder gives when padding is computed as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "_may_pack", lambda x: False)
        return encoder(x, mask)


@pytest.fixture
def shapes_seen() -> Iterator[list[torch.Size]]:
    """The shape of what every Linear layer computed on."""
    seen: list[torch.Size] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(args[0].shape) if isinstance(module, nn.Linear) else None
    )
    yield seen
    handle.remove()


def gradients(module: nn.Module, x: Tensor, run: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    (run(x) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return [grad.clone() for grad in found if grad is not None]


# -- unpadding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holes", [False, True], ids=["right-padded", "with holes"])
def test_packed_values_and_gradients_are_those_of_the_padded_computation(holes: bool) -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, 2, 4)
    x, mask = ragged()
    if holes:  # as the attention fusion joins modalities
        mask = torch.rand(mask.shape) < 0.5
        mask[1] = False
    want, found = padded(encoder, x, mask), encoder(x, mask)
    assert torch.allclose(found, want, atol=1e-6)
    assert not found[~mask].any()
    want_grads = gradients(encoder, x, lambda x: padded(encoder, x, mask))
    found_grads = gradients(encoder, x, lambda x: encoder(x, mask))
    assert len(want_grads) == len(found_grads) == 1 + len(list(encoder.parameters()))
    for want, found in zip(want_grads, found_grads, strict=True):
        assert torch.allclose(found, want, atol=2e-6)


def test_only_real_tokens_are_computed(shapes_seen: list[torch.Size]) -> None:
    encoder = TransformerEncoder(16, 1, 4)
    encoder(*ragged())
    assert {shape[:-1] for shape in shapes_seen} == {(sum(LENGTHS),)}


def test_a_batch_without_padding_is_neither_packed_nor_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TransformerEncoder(16, 1, 4)
    x, mask = ragged((9, 9))
    want = padded(encoder, x, mask)
    monkeypatch.setattr(transformer, "attention_mask", None)
    monkeypatch.setattr(transformer, "packed_attention", None)
    assert torch.allclose(encoder(x, mask), want, atol=1e-6)


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, 2, 4).eval()
    x, mask = ragged()
    found = encoder(x, mask)
    for row, length in enumerate(LENGTHS):
        alone = encoder(x[row : row + 1, : max(length, 1)], mask[row : row + 1, : max(length, 1)])
        assert torch.allclose(found[row, :length], alone[0, :length], atol=1e-6)


def test_rows_without_a_token_give_zeros_and_gradients_of_zero() -> None:
    encoder = TransformerEncoder(16, 1, 4)
    x, mask = ragged((0, 0))
    assert not encoder(x, mask).any()
    assert all(not grad.any() for grad in gradients(encoder, x, lambda x: encoder(x, mask)))


def test_dropout_works_on_packed_tokens_and_follows_the_seed() -> None:
    encoder = TransformerEncoder(16, 1, 4, dropout=0.5)
    x, mask = ragged()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(encoder(x, mask))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not runs[0][~mask].any()
    assert torch.equal(encoder.eval()(x, mask), encoder(x, mask))


def test_the_names_of_the_weights_are_those_of_older_checkpoints() -> None:
    names = {name.split(".", 2)[2] for name in TransformerEncoder(16, 1, 4).blocks.state_dict(prefix="blocks.")}
    parts = {"norm1", "norm2", "attention.qkv", "attention.out", "mlp.0", "mlp.3"}
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_the_meta_device_and_export_take_the_padded_path() -> None:
    x, mask = ragged()
    assert TransformerEncoder(16, 1, 4).to("meta")(x.to("meta"), mask.to("meta")).shape == x.shape
    encoder = TransformerEncoder(16, 1, 4).eval()
    program = torch.export.export(encoder, (x, mask)).module()
    other, other_mask = ragged((9, 2, 2, 2, 2, 2))
    assert torch.allclose(program(other, other_mask), encoder(other, other_mask), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_compiled_blocks_compute_packed_tokens_without_compiling_for_each_batch() -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(16, 2, 4)
    for block in encoder.blocks:
        block.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    batches = [ragged(lengths) for lengths in (LENGTHS, (2, 9, 1, 1), (4, 4, 8, 1, 1, 5, 2), (3, 1, 1, 1, 1))]
    for x, mask in batches[:2]:
        assert torch.allclose(encoder(x, mask), padded(encoder, x, mask), atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for x, mask in batches[2:]:
            encoder(x, mask).sum().backward()


# -- attention over packed sequences ---------------------------------------------------------------------------------


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    """The reference: each sequence by itself."""
    parts = []
    for triple in zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True):
        q1, k1, v1 = (part.transpose(0, 1)[None] for part in triple)
        y = F.scaled_dot_product_attention(q1, k1, v1, is_causal=causal, enable_gqa=True)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("path", ["by length", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_attention_is_attention_within_each_sequence(
    path: str, causal: bool, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lengths = (5, 1, 1, 0, 8, 5)
    inputs = [torch.randn(20, heads, 8, dtype=torch.float64) for heads in (4, key_heads, key_heads)]
    if path == "padded":
        monkeypatch.setattr(packing, "_by_length", packing._padded)
    found, want = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    (q, k, v), (q1, k1, v1) = found, want
    y, reference = packed_attention(q, k, v, lengths, causal=causal), one_by_one(q1, k1, v1, lengths, causal)
    assert torch.allclose(y, reference, atol=1e-12)
    for result in (y, reference):
        result.square().sum().backward()
    for got, expected in zip(found, want, strict=True):
        assert torch.allclose(got.grad, expected.grad, atol=1e-12)  # type: ignore[arg-type]


def test_lengths_that_do_not_add_up_are_an_error() -> None:
    q = torch.randn(5, 2, 8)
    with pytest.raises(ValueError, match="add up to 4 tokens, the query has 5"):
        packed_attention(q, q, q, [2, 2])


def test_a_packing_knows_where_every_token_stands() -> None:
    found = Packing.of([2, 0, 3])
    assert (found.lengths, found.longest) == ((2, 0, 3), 3)
    assert found.starts.tolist() == [0, 2, 2, 5]
    assert found.starts.dtype == torch.int32  # what the CUDA kernel takes
    assert found.rows.tolist() == [0, 0, 2, 2, 2]
    assert found.places.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_for_half_precision_is_given_what_it_asks_for(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    calls: list[Any] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append((*rest, options))
        return v

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(packing, "_has_kernel", lambda query, dropout: not dropout)
    q = torch.randn(5, 2, 8)
    packed_attention(q, q, q, [2, 3], causal=causal)
    (starts, same, longest, _, options) = calls[0]
    assert (starts.tolist(), longest, starts is same) == ([0, 2, 5], 3, True)
    assert options == {"window_size": (-1, 0 if causal else -1)}
    packed_attention(q, q, q, [2, 3], causal=causal, scale=0.5)
    assert calls[1][-1]["scale"] == 0.5


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_an_older_gpu_has_no_kernel_for_packed_attention(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(shape=(5, 2, 8), dtype=torch.float16, is_cuda=True, device="cuda:0")
    assert packing._has_kernel(query, 0.0) is has


def test_the_example_in_the_documentation_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "compute.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["y"].shape == names["q"].shape
    assert names["loss"].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_on_a_gpu_is_that_of_a_cpu(dtype: torch.dtype, causal: bool) -> None:
    lengths = (50, 1, 200, 0, 63)
    q, k, v = (torch.randn(sum(lengths), 4, 64, dtype=dtype) for _ in range(3))
    found = packed_attention(q.cuda(), k.cuda(), v.cuda(), lengths, causal=causal).cpu()
    want = one_by_one(q.float(), k.float(), v.float(), lengths, causal)
    assert torch.allclose(found.float(), want, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


# -- cross-entropy in chunks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("biased", [False, True])
def test_the_chunked_loss_and_its_gradients_are_those_of_pytorch(smoothing: float, biased: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((2, 7, 5), (11, 5), (11,)))
    targets = torch.randint(0, 11, (2, 7))
    targets[0, 3:5] = -1
    sides = []
    for chunked in (True, False):
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        given = b if biased else None
        if chunked:
            loss = chunked_cross_entropy(h, w, targets, given, ignore_index=-1, label_smoothing=smoothing, chunk=3 * 11)
        else:
            logits = F.linear(h, w, given).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, label_smoothing=smoothing)
        (3 * loss).backward()
        sides.append([loss.detach(), h.grad, w.grad, *([b.grad] if biased else [])])
    for found, want in zip(*sides, strict=True):
        assert torch.allclose(found, want, atol=1e-12)  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned, in elements."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return found


def test_all_logits_are_never_held_at_once() -> None:
    n, v, d = 64, 300, 4
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets = torch.randint(0, v, (n,))
    with Largest() as chunked:
        chunked_cross_entropy(hidden, weight, targets, chunk=8 * v).backward()
    with Largest() as whole:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    assert whole.size >= n * v
    assert chunked.size <= 8 * v


def test_a_batch_without_a_real_target_has_no_loss_and_teaches_nothing() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((3,), -100))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and weight.grad is not None
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_gradients_only_the_loss_is_computed() -> None:
    weight = torch.randn(300, 4, requires_grad=True)
    with torch.no_grad(), Largest() as seen:
        loss = chunked_cross_entropy(torch.randn(8, 4), weight, torch.zeros(8, dtype=torch.long), chunk=300)
    assert not loss.requires_grad
    assert seen.size <= 300 * 4
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmhub.layers.loss._collect", None)
        chunked_cross_entropy(torch.randn(8, 4), weight, torch.zeros(8, dtype=torch.long))


def test_under_autocast_products_are_bfloat16_and_gradients_have_their_tensors_type() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    targets = torch.randint(0, 9, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward()
    exact = F.cross_entropy(hidden @ weight.T, targets)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert torch.allclose(loss, exact, rtol=2e-2)
    (want,) = torch.autograd.grad(exact, weight)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert torch.allclose(weight.grad, want, atol=2e-2 * float(want.abs().max()))


def test_under_autocast_a_weight_counts_the_same_in_the_gradient_as_in_the_loss() -> None:
    torch.manual_seed(0)
    size = torch.rand(512, 1) + 0.5
    hidden, weight, bias = size.expand(-1, 2).clone(), torch.eye(2), torch.zeros(2)  # both classes are as probable
    given = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    weights = torch.full((512,), 0.3)  # 0.3008 in bfloat16
    weights[0] = 1.0  # else the mean takes it out
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(
            hidden, weight, torch.zeros(512, dtype=torch.long), bias, weights=weights, chunk=2 * 4
        )
    (loss * weights.sum()).backward()
    right = torch.tensor([-0.5, 0.5])
    wanted = [weights[:, None] * right, (weights[:, None] * size).sum() * right[:, None].expand(2, 2)]
    for tensor, want in zip(given, [*wanted, weights.sum() * right], strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, want, rtol=5e-4, atol=0)


def test_the_gradient_of_a_confident_answer_survives_half_precision() -> None:
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[8.0, 0.0], [0.0, 0.0]])  # p = 0.9997 of the right class
    with torch.autocast("cpu", torch.bfloat16):
        chunked_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    assert hidden.grad is not None
    assert float(hidden.grad[0, 0]) == pytest.approx(-8 * torch.sigmoid(torch.tensor(-8.0)).item(), rel=1e-2)


def test_hidden_states_and_targets_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="3 hidden states, 2 targets"):
        chunked_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long))
