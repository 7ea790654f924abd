"""Devices and precision: the rules on any machine, and one run on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmhub.device import find_device, find_precision
from mmhub.engine import train
from mmhub.errors import UsageError
from tests.conftest import recipe


def test_auto_precision_is_float32_on_a_cpu_whatever_it_can_do() -> None:
    assert find_precision("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("capable", [True, False])
def test_auto_precision_on_a_gpu_is_bfloat16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, capable: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable)
    expected = torch.bfloat16 if capable else torch.float32
    assert find_precision("auto", torch.device("cuda")) is expected
    assert find_precision("fp32", torch.device("cuda")) is torch.float32


def test_auto_takes_a_gpu_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "tpu0"])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        find_device(name)


@pytest.mark.slow
def test_training_in_bfloat16_learns(tables: Path, tmp_path: Path) -> None:
    table = recipe(tables, epochs=1, precision="bf16", max_steps=2)
    assert train(table, tmp_path / "run").steps == 2


@pytest.mark.gpu
def test_training_on_a_gpu_learns_and_its_model_answers_on_a_cpu(tables: Path, tmp_path: Path) -> None:
    result = train(recipe(tables, epochs=4, device="cuda"), tmp_path / "run")
    assert result.metrics["accuracy"] > 0.9
    from mmhub.evaluation import evaluate

    assert evaluate(result.load(), tables / "valid.parquet")["metrics"]["accuracy"] > 0.9


@pytest.mark.gpu
def test_resuming_on_a_gpu_goes_on(tables: Path, tmp_path: Path) -> None:
    table = recipe(tables, epochs=2, device="cuda", checkpoint_every=2, max_steps=5)
    train(table, tmp_path / "run")
    assert train(table, tmp_path / "run", resume=True).steps == 5
