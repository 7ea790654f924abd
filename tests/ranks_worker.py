"""Run training cases in this process as one rank of several: `python -m tests.ranks_worker CASES.json`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mmhub.engine import loop, train
from mmhub.engine.report import Reporter
from mmhub.engine.step import Stepper
from mmhub.errors import MmhubError


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train; tell the result or the error, and the rows that this rank has trained on.

    `stop_at` sends SIGTERM to the rank `stop_rank` in that optimizer step, `stop_in` as that evaluation begins.
    """
    with pytest.MonkeyPatch.context() as patch:
        seen = _watch(patch, case)
        try:
            result = train(case["recipe"], case["out"], resume=case.get("resume", False))
            told: dict[str, Any] = {"steps": result.steps, "metrics": result.metrics}
        except MmhubError as error:
            told = {"error": error.message, "exit_code": error.exit_code}
    return told | {"rows": seen}


def _watch(patch: pytest.MonkeyPatch, case: dict[str, Any]) -> list[int]:
    seen: list[int] = []
    steps = evaluations = 0
    step, gradients, evaluate = Reporter.step, Stepper._gradients, loop.evaluate

    def stop(wanted: bool) -> None:
        if wanted and int(os.environ["RANK"]) == case.get("stop_rank", 0):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step(self: Reporter, loss: float) -> None:
        nonlocal steps
        steps += 1
        step(self, loss)
        stop(steps == case.get("stop_at"))

    def on_gradients(self: Stepper, pieces: Any, rows: float) -> Any:
        seen.extend(row for batch, weight in pieces if weight for row in batch.index)
        return gradients(self, pieces, rows)

    def on_evaluate(*args: Any, **options: Any) -> Any:
        nonlocal evaluations
        evaluations += 1
        stop(evaluations == case.get("stop_in"))
        return evaluate(*args, **options)

    patch.setattr(Reporter, "step", on_step)
    patch.setattr(Stepper, "_gradients", on_gradients)
    patch.setattr(loop, "evaluate", on_evaluate)
    return seen


def main() -> None:
    path = Path(sys.argv[1])
    results = [run_case(case) for case in json.loads(path.read_text())]
    path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
