"""The GPU benchmarks run: at toy size on a CPU, so that they are ready when a GPU is at hand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("gpu_*.py") if path.name != "gpu_table.py")


@pytest.fixture
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.mark.usefixtures("_as_a_script")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_toy_run_prints_its_table_and_keeps_none(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set((FOLDER / "results").iterdir())
    monkeypatch.setattr(sys, "argv", [str(FOLDER / name), "--toy"])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert f"- command: `python benchmarks/{name} --toy`" in lines
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) >= 3
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert set((FOLDER / "results").iterdir()) == before


@pytest.mark.usefixtures("_as_a_script")
def test_without_a_gpu_only_toys_are_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(FOLDER / SCRIPTS[0])])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / SCRIPTS[0]), run_name="__main__")
    assert "--toy runs on any CPU" in capsys.readouterr().err


@pytest.mark.usefixtures("_as_a_script")
def test_gpt2_costs_what_the_formula_says() -> None:
    import torch

    script = runpy.run_path(str(FOLDER / "gpu_gpt2.py"))
    with torch.device("meta"):
        model = script["GPT"](12, 768, 12, script["VOCABULARY"], 1024)
    weights = 12 * 12 * 768**2 + script["VOCABULARY"] * 768
    assert model.flops_a_token(1024) == 6 * weights + 12 * 12 * 768 * 1024
    assert model.flops_a_token(1024) == pytest.approx(855e6, rel=2e-3)
