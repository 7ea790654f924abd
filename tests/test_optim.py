"""Optimizers: who trains which parameter, at what rate, and fp32 copies of what is stored in half precision."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmhub.build import compose
from mmhub.config import Recipe, check_recipe
from mmhub.engine.optimizer import MuonAndAdamW, _keep_masters, hidden_matrices, make_optimizer
from mmhub.errors import MmhubError, UsageError
from mmhub.model import Model
from mmhub.optim import learning_rate_factor, learning_rate_groups, seed_step

CPU = torch.device("cpu")
NAMES = ("adamw", "sgd", "muon")


def small_model() -> Model:
    torch.manual_seed(0)
    config = {"dim": 8, "depth": 2, "heads": 2, "dropout": 0.0, "word_dropout": 0.0}
    return compose(
        encoders={"text": {"use": "transformer", "config": config}},
        decoder={"use": "classification", "config": {"labels": ["no", "yes"]}},
        texts=["a good thing", "a bad thing"],
    )


def recipe(**train: Any) -> Recipe:
    encoders = {"text": {"use": "transformer", "lr_multiplier": 0.5}}
    return check_recipe({"task": "classification", "model": {"encoders": encoders}, "train": train})


def loss_of(model: Model) -> torch.Tensor:
    batch = model.collate([{"text": "a good thing"}, {"text": "a bad"}])
    batch.targets = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=any(p.dtype == torch.bfloat16 for p in model.parameters())):
        loss = model(batch).loss
    assert loss is not None
    return loss


def train(model: Model, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        seed_step(0, step)
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def in_bf16(model: Model) -> Model:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.LayerNorm):
                parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_every_optimizer_learns_at_the_rate_the_schedule_sets(name: str, half: bool) -> None:
    model = small_model()
    model = in_bf16(model) if half else model
    rate = 0.2 if name == "sgd" else 0.02
    optimizer = make_optimizer(model, recipe(optimizer=name, learning_rate=rate), CPU)
    assert {group["base_lr"] for group in optimizer.param_groups} == {rate, rate / 2}
    losses = train(model, optimizer, 8)
    assert losses[-1] < 0.7 * losses[0]
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_trains_every_parameter_once_and_decays_matrices_alone(name: str) -> None:
    model = small_model()
    groups = make_optimizer(model, recipe(optimizer=name, weight_decay=0.1), CPU).param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_adamw_is_that_of_pytorch_in_one_kernel() -> None:
    optimizer = make_optimizer(small_model(), recipe(), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)


def test_nothing_to_train_is_said() -> None:
    model = small_model().requires_grad_(False)
    with pytest.raises(MmhubError, match="every part is frozen"):
        make_optimizer(model, recipe(), CPU)


# -- Muon ------------------------------------------------------------------------------------------------------------


def test_muon_is_for_matrices_between_layers() -> None:
    model = small_model()
    chosen = hidden_matrices(model)
    names = {name for name, p in model.named_parameters() if p in chosen}
    layers = {"attention.qkv", "attention.out", "mlp.0", "mlp.3"}
    prefix = "encoders.text.layers.blocks"
    assert names == {f"{prefix}.{i}.{layer}.weight" for i in range(2) for layer in layers}


def test_the_blocks_of_a_decoder_are_for_muon_and_its_head_is_not() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2))
            self.head = nn.Linear(8, 30)

    model = small_model()
    model.decoder = Decoder()  # type: ignore[assignment]
    chosen = hidden_matrices(model)
    found = {name for name, p in model.decoder.named_parameters() if p in chosen}
    parts = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert found == {f"blocks.{i}.{part}" for i in range(2) for part in parts}


def test_muon_and_adamw_each_train_theirs_as_they_would_alone() -> None:
    torch.manual_seed(0)
    start = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))]
    both, alone = copy.deepcopy(start), copy.deepcopy(start)
    group = {"lr": 0.1, "base_lr": 0.1, "weight_decay": 0.01}
    optimizer = MuonAndAdamW([group | {"params": both}], {both[0]})
    muon = torch.optim.Muon(alone[:1], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(alone[1:], lr=0.1, weight_decay=0.01)
    for _ in range(3):
        for own, other in zip(both, alone, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    assert all(torch.equal(own, other) for own, other in zip(both, alone, strict=True))
    assert set(optimizer.state[both[0]]) == {"momentum_buffer"}
    assert set(optimizer.state[both[1]]) == {"step", "exp_avg", "exp_avg_sq"}


# -- going on from a saved state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["state_dict", "by parameter"])
def test_training_goes_on_bit_for_bit_from_a_saved_state(name: str, half: bool, way: str) -> None:
    settings = recipe(optimizer=name, learning_rate=1e-2)
    model = in_bf16(small_model()) if half else small_model()
    optimizer = make_optimizer(model, settings, CPU)
    train(model, optimizer, 2)
    other = in_bf16(small_model()) if half else small_model()
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer(other, settings, CPU)
    if way == "state_dict":
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:  # as checkpoints do
        for own, theirs in zip(other.parameters(), model.parameters(), strict=True):
            resumed.state[own] = {key: value.clone() for key, value in optimizer.state[theirs].items()}
    assert train(model, optimizer, 3) == train(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- master weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_half_precision_follow_fp32_copies(name: str) -> None:
    model = in_bf16(small_model())
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]  # type: ignore[union-attr]
    optimizer = make_optimizer(model, recipe(optimizer=name, learning_rate=1e-5), CPU)
    first = {p: p.detach().clone() for p in model.parameters()}
    train(model, optimizer, 3)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.grad is None:
            master = optimizer.state[parameter]["master"]
            assert master.dtype == torch.float32
            assert torch.equal(parameter, master.bfloat16())
            moments = [v for key, v in optimizer.state[parameter].items() if key not in ("master", "step")]
            assert all(v.dtype == torch.float32 for v in moments)
        else:
            assert "master" not in optimizer.state[parameter]
    moved = [p for p, old in first.items() if (optimizer.state[p].get("master", p) != old).any()]
    assert len(moved) > 0.9 * len(first)  # steps too small for bf16 add up in fp32
    after = [p.expand_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]  # type: ignore[union-attr]
    assert accumulators == after  # DDP's hooks hang on these


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_many_small_steps_add_up_as_they_do_in_fp32(kind: Any) -> None:
    exact, half = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4).bfloat16())
    optimizers = [kind([parameter], lr=1e-4) for parameter in (exact, half)]
    _keep_masters(optimizers[1])
    for _ in range(40):  # each far below the 1/256 that bf16 can tell from 1
        for parameter, optimizer in zip((exact, half), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(half, exact.bfloat16())
    assert not torch.equal(half, torch.ones(4).bfloat16())


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = in_bf16(small_model())
    optimizer = make_optimizer(model, recipe(), CPU)
    loss_of(model).backward()
    parameter = next(p for p in model.parameters() if p.dtype == torch.bfloat16)
    parameter.grad, before = None, parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, before)
    assert set(optimizer.state[parameter]) == {"master"}


# -- shards ----------------------------------------------------------------------------------------------------------

SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mmhub.engine.blocks import find_blocks
from tests.test_optim import CPU, make_optimizer, recipe, small_model, train

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for name in sys.argv[1:]:
    losses = []
    for sharded in (False, True):
        model = small_model().eval()
        for part in [*(block for _, block in find_blocks(model)), model] if sharded else []:
            fully_shard(part, mesh=mesh)
        losses.append(train(model, make_optimizer(model, recipe(optimizer=name, learning_rate=1e-2), CPU), 4))
    whole, shards = losses
    assert whole[-1] < whole[0], losses
    assert max(abs(a - b) for a, b in zip(whole, shards, strict=True)) < 1e-4, losses
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_every_optimizer_trains_shards_as_it_trains_the_whole(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *NAMES]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# -- groups and schedule ---------------------------------------------------------------------------------------------


def test_an_encoder_has_its_own_multiplier_and_vectors_are_not_decayed() -> None:
    model = small_model()
    groups = learning_rate_groups(model, recipe().model, rate=1.0, decay=0.1)
    factor = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert factor[id(model.encoders["text"].layers.norm.weight)] == (0.5, 0.0)  # type: ignore[union-attr]
    assert {factor[id(p)][0] for p in model.decoder.parameters()} == {1.0}


def test_the_rate_warms_up_and_falls_to_its_minimum() -> None:
    settings = recipe(warmup=4, learning_rate=1.0, min_learning_rate=0.1)
    found = [learning_rate_factor(step, 20, settings) for step in range(21)]
    assert found[:4] == [0.2, 0.4, 0.6, 0.8]
    assert found[4] == 1.0
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[20] == pytest.approx(0.1)
    assert learning_rate_factor(9, 20, recipe(schedule="constant", warmup=0)) == 1.0


def test_the_inverse_square_root_falls_from_the_end_of_the_warm_up_whatever_the_length_of_the_run() -> None:
    settings = recipe(schedule="inverse-sqrt", warmup=4, learning_rate=1.0)
    found = [learning_rate_factor(step, 20, settings) for step in (0, 3, 4, 16, 64)]
    assert found == [0.2, 0.8, 1.0, 0.5, 0.25]
    assert found == [learning_rate_factor(step, 10_000, settings) for step in (0, 3, 4, 16, 64)]
    floored = recipe(schedule="inverse-sqrt", warmup=4, learning_rate=1.0, min_learning_rate=0.4)
    assert learning_rate_factor(64, 20, floored) == 0.4
    with pytest.raises(UsageError, match="falls from the end of the warm-up"):
        learning_rate_factor(0, 20, recipe(schedule="inverse-sqrt", warmup=0))
