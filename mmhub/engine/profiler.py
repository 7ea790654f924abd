"""A trace of a few optimizer steps, for `chrome://tracing` or Perfetto, and a table of what took longest."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from mmhub.files import write_file
from mmhub.records import cause

WARM_UP = 3  # steps before the trace, in which memory is allocated and kernels are chosen


class Profiler:
    """Trace `steps` optimizer steps of this process into `folder`/profile; does nothing if `steps` is 0.

    Several processes write a trace each, named by `rank`.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device, rank: int = 0) -> None:
        self._folder, self._steps, self._device, self._rank = folder / "profile", steps, device, rank
        self._seen = 0
        self._trace: Any = None

    def step(self) -> None:
        """An optimizer step is done."""
        if not self._steps:
            return
        self._seen += 1
        if self._seen == WARM_UP:
            self._trace = _start(self._device)
        elif self._seen == WARM_UP + self._steps:
            self.close()

    def close(self) -> None:
        """Write what was traced so far, if anything; where that fails a line says so, and training goes on."""
        if self._trace is None:
            return
        trace, self._trace, self._steps = self._trace, None, 0
        try:
            self._write(trace)
        except (OSError, RuntimeError) as error:
            print(f"warning: the trace is not written: {cause(error)}", file=sys.stderr)

    def _write(self, trace: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was launched belongs to the steps
        trace.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"-{self._rank}" if self._rank else ""
        trace.export_chrome_trace(str(self._folder / f"trace{name}.json"))
        by = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60)
        write_file(self._folder / f"operations{name}.txt", f"{self._seen - WARM_UP} optimizer steps\n{table}\n")


def _start(device: torch.device) -> Any:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines on stderr say nothing to anyone
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    trace = profile(activities=kinds)
    trace.__enter__()
    return trace
