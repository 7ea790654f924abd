"""Building a transformers model whose weights come from elsewhere: only what no checkpoint holds is computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_initial_weights() -> Iterator[None]:
    """Draw nothing for the parameters of this thread's models, if they get no memory (are made on the meta device).

    Going through all modules to initialise nothing takes as long as building them. Tables that are buffers, such as
    rotary angles, are computed as always.
    """
    if not _on_meta():
        yield
        return
    from transformers import PreTrainedModel

    thread = threading.get_ident()
    with _patching:
        initialize = PreTrainedModel.initialize_weights

        def tables_only(model: PreTrainedModel) -> None:
            if threading.get_ident() != thread:
                initialize(model)
                return
            with torch.no_grad():
                for module in model.modules():
                    if module._non_persistent_buffers_set:
                        model._initialize_weights(module)

        PreTrainedModel.initialize_weights = tables_only
        try:
            yield
        finally:
            PreTrainedModel.initialize_weights = initialize


_patching = threading.RLock()


def _on_meta() -> bool:
    probe = torch.nn.Module()
    probe.register_parameter("weight", torch.nn.Parameter(torch.empty(0)))
    return bool(probe.weight.is_meta)
