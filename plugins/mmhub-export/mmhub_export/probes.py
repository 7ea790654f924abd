"""What a model computes for a few samples, and how far another one that should compute the same is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhub.errors import MmhubError, TrustError
from mmhub.model import Model

MOST = 16  # samples that are compared

Sample = Mapping[str, Any]
Check = dict[str, Any]


def samples_for(model: Model, given: Sequence[Sample]) -> list[Sample]:
    """Return the first of the samples given, else made-up ones, none where it is not known what the model reads."""
    if given:
        return list(given[:MOST])
    for pairs in (model.decoder.paired and len(model.encoders) == 1, True):
        made = _made_up(model.modalities, pairs)
        try:
            model.collate(made)
        except MmhubError:
            continue
        return made
    return []


def _made_up(modalities: Sequence[str], pairs: bool) -> list[Sample]:
    """A few samples with all modalities at once, of pairs of inputs where they belong to each other."""
    from mmhub.testing.samples import built_in

    raw = {name: list(built_in(name)) for name in modalities}
    raw = {name: values for name, values in raw.items() if values}
    if pairs:
        raw = {name: [(value, values[0]) for value in values] for name, values in raw.items()}
    return [{name: values[row % len(values)] for name, values in raw.items()} for row in range(3 if raw else 0)]


@torch.inference_mode()
def outputs(model: Model, samples: Sequence[Sample]) -> Tensor:
    """Return the logits of samples, flat and fp32: at real positions, or of the first token of an answer."""
    output = model(model.collate(samples).to(model.device))
    logits = output.logits.float()
    return (logits if output.mask is None else logits[output.mask]).flatten()


def compared(what: str, wanted: Tensor, found: Tensor, tolerance: float | None) -> Check:
    """Compare numbers; the largest difference counts, in units of the largest number where that is above 1.

    Without a tolerance they may differ by any amount, but there must be as many, and those that are finite the same.
    """
    if wanted.shape != found.shape or not torch.equal(torch.isfinite(wanted), torch.isfinite(found)):
        return checked(what, float("inf"), tolerance or 0.0)
    sound = torch.isfinite(wanted)  # scores of what must not be written are not
    wanted, found = wanted[sound].double(), found[sound].double()
    if not wanted.numel():
        return checked(what, 0.0, tolerance)
    unit = max(1.0, float(wanted.abs().max()))
    return checked(what, float((wanted - found).abs().max()) / unit, tolerance)


def checked(what: str, error: float, tolerance: float | None) -> Check:
    """Return what `Export.checks` holds."""
    return {"what": what, "max_error": error, "tolerance": tolerance, "ok": tolerance is None or error <= tolerance}


def require(checks: Sequence[Check]) -> None:
    """Raise TrustError where something written differs by more than it may."""
    for check in checks:
        if not check["ok"]:
            raise TrustError(
                f"what was written differs in its {check['what']}: by {check['max_error']:.2g}, and no more than "
                f"{check['tolerance']:.2g} was expected; nothing is kept",
                "tell mmhub's authors which model this is",
            )
