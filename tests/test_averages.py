"""The average of the weights: what is evaluated and saved, and what a resumed run goes on averaging."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmhub.checkpoint import load
from mmhub.config import check_recipe
from mmhub.engine import train
from mmhub.engine.averages import Averages
from mmhub.engine.loop import TrainResult
from mmhub.engine.optimizer import make_optimizer
from mmhub.engine.step import Stepper
from mmhub.errors import Interrupted, TrustError, UsageError
from mmhub.evaluation import evaluate
from mmhub.model import Model
from tests.conftest import three_modalities
from tests.test_distributed import on_ranks, texts, valid_loss
from tests.test_engine import image_only
from tests.test_optim import CPU, in_bf16, small_model
from tests.test_optim import recipe as optim_recipe
from tests.test_optim import train as steps
from tests.test_resume import stop_at, weights

DECAY = 0.8


def averaged(tables: Path, **options: Any) -> dict[str, Any]:
    return image_only(tables, epochs=3, ema=DECAY, eval_every=2, **options)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights of the model before training and after every step."""
    found: list[dict[str, Tensor]] = []
    real = Stepper.take

    def take(self: Stepper, *args: Any) -> Any:
        if not found:
            found.append(state_of(self.model))
        result = real(self, *args)
        found.append(state_of(self.model))
        return result

    monkeypatch.setattr(Stepper, "take", take)
    return found


def state_of(model: Model) -> dict[str, Tensor]:
    parts = model.parts().items()
    return {f"{role}.{name}": t.detach().clone() for role, part in parts for name, t in part.state_dict().items()}


def test_the_saved_model_is_the_average_of_what_training_passed_through(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = averaged(tables)
    del table["data"]["valid"]
    with monkeypatch.context() as patch:
        passed = watched(patch)
        result = train(table, tmp_path / "run")
    assert len(passed) == result.steps + 1 == 7
    expected = {name: tensor.double() for name, tensor in passed[0].items()}
    for step, state in enumerate(passed[1:]):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * state[name].double() for name in expected}
    saved = load_file(result.model / "model.safetensors")
    assert saved.keys() == expected.keys()
    counters = {name for name, tensor in saved.items() if not tensor.is_floating_point()}
    assert counters and any("running_var" in name for name in saved)
    for name, tensor in saved.items():
        if name in counters:
            assert torch.equal(tensor, passed[-1][name]), "a counter is that of the model"
        else:
            assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name
    assert not torch.allclose(saved["decoder.head.layers.1.weight"], passed[-1]["decoder.head.layers.1.weight"])
    stored = load_file(tmp_path / "run" / "checkpoints" / "last" / "model" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in passed[-1].items()), "training goes on from these"


@pytest.fixture(scope="module")
def whole(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that was never stopped."""
    return train(averaged(tables), tmp_path_factory.mktemp("whole") / "run")


def test_the_metrics_of_a_run_are_those_of_the_saved_average(tables: Path, whole: TrainResult) -> None:
    report = evaluate(load(whole.model), tables / "valid.parquet")
    assert report["metrics"]["loss"] == pytest.approx(whole.metrics["loss"], abs=1e-6)
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    measured = [line["valid"]["loss"] for line in lines if "valid" in line]
    assert min(abs(loss - whole.metrics["loss"]) for loss in measured) < 1e-5


def test_averaging_and_evaluating_leave_training_as_it_is(tables: Path, whole: TrainResult, tmp_path: Path) -> None:
    table = averaged(tables)
    table["train"] |= {"ema": 0.0, "eval_every": 0}
    place = Path("checkpoints", "last", "model", "model.safetensors")
    plain, average = (load_file(out / place) for out in (train(table, tmp_path / "run").out, whole.out))
    assert all(torch.equal(plain[name], average[name]) for name in plain)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_with_an_average_goes_on_bit_for_bit(
    tables: Path, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    table = averaged(tables)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    train(table, tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(whole.out)
    ends = [load_file(out / "checkpoints" / "last" / "state.safetensors") for out in (whole.out, tmp_path / "run")]
    assert any(name.startswith("average/") for name in ends[0])
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_frozen_parts_have_no_copy_shared_ones_a_single_one_and_tables_none() -> None:
    model = three_modalities("a good thing", "bad")
    model.freeze("image")
    text: Any = model.encoders["text"]
    text.twin = nn.Linear(1, 1)
    text.twin.weight = next(text.parameters())
    names = Averages(model, 0.9).tensors
    assert not any(name.startswith("image_encoder.") for name in names)
    assert {name.partition(".")[0] for name in names} == {"audio_encoder", "text_encoder", "fusion", "decoder"}
    assert "text_encoder.twin.weight" not in names and "text_encoder.twin.bias" in names
    model.encoders["image"].requires_grad_(True)
    names = Averages(model, 0.9).tensors
    assert "image_encoder.mean" not in names, "what is not saved is not averaged"
    assert any(name.startswith("image_encoder.") and name.endswith("running_mean") for name in names)
    assert not any(name.endswith("num_batches_tracked") for name in names)


def test_of_weights_in_half_precision_the_fp32_copies_are_averaged() -> None:
    model = in_bf16(small_model())
    optimizer = make_optimizer(model, optim_recipe(learning_rate=1e-5), CPU)
    averages = Averages(model, 0.999)
    assert all(tensor.dtype == torch.float32 for tensor in averages.tensors.values())
    before = {name: tensor.clone() for name, tensor in averages.tensors.items()}
    steps(model, optimizer, 3)
    averages.update(0, optimizer)
    parameter = next(p for p in model.decoder.parameters() if p.dtype == torch.bfloat16)
    name = next(f"decoder.{n}" for n, p in model.decoder.named_parameters() if p is parameter)
    expected = torch.lerp(before[name], optimizer.state[parameter]["master"], 0.9)
    assert torch.equal(averages.tensors[name], expected)
    assert (expected != expected.bfloat16()).any(), "steps that bf16 cannot tell count"
    held = parameter.detach().clone()
    with averages.applied():
        assert torch.equal(parameter, expected.bfloat16())
    assert torch.equal(parameter, held)


@pytest.mark.gpu
def test_a_gpu_averages_as_a_cpu_does() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = small_model().to(device)
        optimizer = make_optimizer(model, optim_recipe(), torch.device(device))
        averages = Averages(model, 0.5)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.add_(0.01 * number)
        averages.update(9, optimizer)
        before = state_of(model)
        with averages.applied():
            found.append({name: tensor.cpu() for name, tensor in state_of(model).items()})
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
    assert all(torch.allclose(tensor, found[1][name], atol=1e-6) for name, tensor in found[0].items())


def test_a_checkpoint_of_other_averages_is_refused() -> None:
    from mmhub.engine.tensors import fill_averages

    with pytest.raises(TrustError, match=r"averages do not fit the model \(decoder\.x is not in both\)"):
        fill_averages({"decoder.x": torch.zeros(1)}, {})


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_decay_that_can_be_none_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match=r"train\.ema is .*in \[0, 1\)"):
        check_recipe({"task": "classification", "train": {"ema": value}})


@pytest.mark.slow
def test_the_average_of_an_adapter_is_kept_and_goes_on(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    table = texts(tmp_path, 16)
    config = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 8}  # fmt: skip
    lora = {"rank": 2, "targets": ["query"]}
    table["model"]["encoders"]["text"] = {"use": "transformers", "config": {"config": config}, "lora": lora}
    table["train"] |= {"ema": DECAY, "epochs": 1, "max_steps": 2}
    whole = train(table, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Interrupted):
            train(table, tmp_path / "run")
    last = load_file(tmp_path / "run" / "checkpoints" / "last" / "state.safetensors")
    names = {name for name in last if name.startswith("average/text_encoder")}
    assert names and all("lora_" in name for name in names)
    train(table, tmp_path / "run", resume=True)
    for file in whole.model.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(whole.out)).read_bytes()


@pytest.mark.slow
def test_two_processes_average_as_one(tmp_path: Path) -> None:
    plain = texts(tmp_path)
    plain["train"] |= {"ema": DECAY, "eval_every": 3}
    sharded = plain | {"train": plain["train"] | {"parallel": "fsdp"}}
    cases: list[dict[str, Any]] = [
        {"recipe": plain, "out": str(tmp_path / "ddp")},
        {"recipe": sharded, "out": str(tmp_path / "fsdp")},
        {"recipe": plain, "out": str(tmp_path / "ddp-stopped"), "stop_at": 4, "stop_rank": 1},
        {"recipe": sharded, "out": str(tmp_path / "fsdp-stopped"), "stop_at": 4},
        {"recipe": sharded, "out": str(tmp_path / "fsdp-stopped"), "resume": True},
    ]
    on_ranks(2, cases, tmp_path)
    alone = train(plain, tmp_path / "alone")
    train(plain, tmp_path / "ddp-stopped", resume=True)  # one process goes on with what two began
    expected = load_file(alone.model / "model.safetensors")
    for name in ("ddp", "fsdp", "ddp-stopped", "fsdp-stopped"):
        assert valid_loss(tmp_path / name) == pytest.approx(valid_loss(alone.out), rel=1e-4), name
        found = load_file(tmp_path / name / "model" / "model.safetensors")
        keys = [key for key in expected if not key.endswith("qkv.bias")]  # keys' biases have no gradient but rounding
        off = {key: float((found[key] - expected[key]).abs().max()) for key in keys}
        assert max(off.values()) < 1e-5, (name, off)
    whole, stopped = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("fsdp", "fsdp-stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


@pytest.mark.slow
def test_image_training_works_on_the_command_line(tables: Path, tmp_path: Path) -> None:
    """Several labels a picture, with all that this release adds for training on images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(tables / "valid.parquet").to_pylist()
    rows = [{"image": row["image"], "tags": ["square", row["label"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tagged.parquet")
    (tmp_path / "r.toml").write_text(
        'task = "multilabel"\n[model.encoders.image]\nuse = "timm"\nlayer_decay = 0.8\n'
        'config = { architecture = "test_convnext", image_size = 32, drop_path = 0.1 }\n'
        '[data]\ntrain = "tagged.parquet"\nvalid = "tagged.parquet"\ninputs = { image = "image" }\ntarget = "tags"\n'
        "[train]\nepochs = 2\nbatch_size = 8\nmixup = 0.2\ncutmix = 1.0\nema = 0.9\n"
    )

    def mmhub(*args: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "mmhub", *args, "--json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    trained = mmhub("train", "r.toml", "--out", "run")
    assert trained["steps"] == 4
    measured = mmhub("eval", "./run/model", "--data", "tagged.parquet")
    assert measured["metrics"]["f1"] == pytest.approx(trained["metrics"]["f1"])
