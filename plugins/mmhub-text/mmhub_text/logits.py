"""From the last states of a transformers model to its logits and losses, by its own head, whatever that does.

Most heads are one matrix; some scale or cap the logits (Gemma 2, Cohere, Granite), some have layers of their own
(BERT). None of their code is written again: the model runs with a stand-in that gives its head the states. All logits
are never held at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from mmhub.layers import chunked_cross_entropy

_CHUNK = 2**24  # logits at once: 64 MiB in fp32


class Head:
    """The head of a model that writes text: states (..., D) to logits (..., V).

    It is no module and owns nothing; what happens to the model's layers later, such as adapters, holds for it too.
    """

    def __init__(self) -> None:
        self._plain: bool | None = None  # is it one matrix, and perhaps a bias? Known when it has weights

    def matrix(self, model: Any) -> nn.Linear | None:
        """Return the layer that is the whole head, None if there is more to it."""
        layer = getattr(model, "lm_head", None)
        layer = model.get_output_embeddings() if layer is None else layer
        if type(layer) is not nn.Linear:  # an adapter's layer is not
            return None
        if self._plain is None and not layer.weight.is_meta:
            self._plain = _is_whole(model, layer)
        return layer if self._plain else None

    def __call__(self, model: Any, states: Tensor) -> Tensor:
        layer = self.matrix(model)
        return _own_logits(model, states) if layer is None else F.linear(states, layer.weight, layer.bias)

    def mean_loss(
        self, model: Any, states: Tensor, targets: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Mean -log P of targets (...) that are not -100, given states (..., D); weighted by `weights` (...), if any.

        Where none counts, it is zero.
        """
        layer = self.matrix(model)
        if layer is not None:
            return chunked_cross_entropy(
                states, layer.weight, targets, layer.bias, label_smoothing=smoothing, weights=weights
            )
        share = (targets != -100).float() if weights is None else weights.float() * (targets != -100)
        real = share > 0
        total = states.new_zeros((), dtype=torch.float32)
        for h, y, w in _chunks(_vocabulary(model), states[real], targets[real], share[real]):
            total = total + checkpoint(self._summed, model, h, y, w, smoothing, use_reentrant=False)
        count = share.sum()
        return total / torch.where(count > 0, count, 1)

    def losses(self, model: Any, states: Tensor, targets: Tensor) -> Tensor:
        """-log P of each target (...), fp32; 0 where it is -100."""
        real = targets != -100
        found = [
            F.cross_entropy(self(model, h).float(), y, reduction="none")
            for h, y in _chunks(_vocabulary(model), states[real], targets[real])
        ]
        losses = states.new_zeros(targets.shape, dtype=torch.float32)
        return losses.masked_scatter(real, torch.cat(found)) if found else losses

    def _summed(self, model: Any, states: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
        logits = self(model, states).float()
        return (F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none") * weights).sum()


def _chunks(vocabulary: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _CHUNK // vocabulary)
    return zip(*(part.split(rows) for part in parts), strict=True) if len(parts[0]) else iter(())


def _vocabulary(model: Any) -> int:
    return int(model.config.vocab_size)


def _is_whole(model: Any, layer: nn.Linear) -> bool:
    """Does the head give no more than the product with its matrix? Numbers this large show any cap or scale."""
    with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
        width = torch.arange(layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
        states = torch.stack((1000 * torch.sin(width + 1), 0 * width))  # zeros show what is added
        expected = layer(states)
        try:
            found = _own_logits(model, states)
        except RuntimeError:  # the head changes the width first
            return False
        wrong, scale = (found - expected).abs().amax(1), expected.abs().amax(1)
        return bool((wrong <= 1e-3 * scale).all())


def _own_logits(model: Any, states: Tensor) -> Tensor:
    """Run the whole model, of which all but the head is replaced by the given states."""
    shape = states.shape
    states = states.reshape(1, -1, shape[-1])
    shell = copy.copy(model)
    place = "decoder" if "decoder" in model._modules else model.base_model_prefix  # T5's head stands beside it
    shell._modules = dict(model._modules) | {place: _Given(states)}
    both = model.config.is_encoder_decoder
    given = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)} if both else {}  # type: ignore[arg-type]
    given["decoder_inputs_embeds" if both else "inputs_embeds"] = states
    logits: Tensor = shell(**given, use_cache=False).logits
    return logits.reshape(*shape[:-1], logits.shape[-1])


class _Given(nn.Module):
    """Stands where a model without its head was; some call its `decoder`."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else super().__getattr__(name)

    def forward(self, *_: Any, **__: Any) -> _States:
        return _States(self.states)


class _States:
    """The output of such a model: its states, and None for all else it may be asked for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
