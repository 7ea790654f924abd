"""Write the numbers of a training run as TensorBoard curves, through the hook `mmhub_train_callbacks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmhub.spec import hookimpl


class TensorBoardTracker:
    """Write scalars to `RUN/tensorboard`; training names without a slash appear under `train/`."""

    def on_start(self, run: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run.folder / "tensorboard")

    def on_log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def on_end(self, run: Any) -> None:
        self.writer.close()


@hookimpl
def mmhub_train_callbacks(run: Any) -> list[TensorBoardTracker]:
    """Track every run."""
    return [TensorBoardTracker()]
