"""Run training cases in this process as one rank of several: `python -m tests.ranks_worker CASES.json`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mmhub.engine import train
from mmhub.engine.report import Reporter
from mmhub.errors import MmhubError


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Train; `stop_at` sends SIGTERM to the rank `stop_rank` in that optimizer step."""
    rank, count = int(os.environ["RANK"]), 0
    real = Reporter.step

    def on_step(self: Reporter, loss: float) -> None:
        nonlocal count
        count += 1
        real(self, loss)
        if count == case["stop_at"] and rank == case.get("stop_rank", 0):
            os.kill(os.getpid(), signal.SIGTERM)

    if case.get("stop_at"):
        Reporter.step = on_step  # type: ignore[method-assign]
    try:
        result = train(case["recipe"], case["out"], resume=case.get("resume", False))
        return {"steps": result.steps, "metrics": result.metrics}
    except MmhubError as error:
        return {"error": error.message, "exit_code": error.exit_code}
    finally:
        Reporter.step = real  # type: ignore[method-assign]


def main() -> None:
    path = Path(sys.argv[1])
    results = [run_case(case) for case in json.loads(path.read_text())]
    path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
