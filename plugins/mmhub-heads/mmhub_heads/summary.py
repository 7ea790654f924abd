"""What heads share: which stream they read, and the layers between it and the logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmhub.batch import Bundle
from mmhub.errors import UsageError
from mmhub.interfaces import Stream
from mmhub.layers import summary


def pick_stream(inputs: Mapping[str, Stream]) -> str:
    """Return the name of the stream a head reads: `fused`, or the only one there is.

    Raises:
        UsageError: there are several streams and none is `fused`.
    """
    if "fused" in inputs:
        return "fused"
    if len(inputs) == 1:
        return next(iter(inputs))
    streams = ", ".join(sorted(inputs)) or "none"
    raise UsageError(
        f"a head reads one summary of a sample, and these streams arrive apart: {streams}",
        'combine them: [model.fusion] use = "attention"',
    )


def check_head(dropout: float, hidden: int) -> None:
    """Raise ValueError for settings no `SummaryHead` can be built with."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if hidden < 0:
        raise ValueError(f"hidden must be a width, or 0 for no hidden layer, got {hidden}")


def layers(width: int, outputs: int, *, dropout: float, hidden: int) -> nn.Sequential:
    """Map `width` numbers to `outputs`: dropout, an optional GELU hidden layer, a linear layer."""
    before: list[nn.Module] = [nn.Dropout(dropout)]
    if hidden:
        before += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*before, nn.Linear(hidden or width, outputs))


class SummaryHead(nn.Module):
    """Map the summary of each row to `outputs` numbers by `layers`."""

    def __init__(self, inputs: Mapping[str, Stream], outputs: int, *, dropout: float, hidden: int) -> None:
        super().__init__()
        self.source = pick_stream(inputs)
        width = inputs[self.source].summary
        self.layers = layers(width, outputs, dropout=dropout, hidden=hidden)

    def forward(self, bundle: Bundle) -> Tensor:
        """Read one stream of the bundle, (B, T, D), and return (B, outputs) in fp32."""
        logits: Tensor = self.layers(summary(bundle[self.source]))
        return logits.float()
