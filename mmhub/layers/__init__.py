"""Small building blocks that fusions, heads and model plugins share.

Every block keeps the mask rule of `mmhub.batch`: padding never changes a real position, and padded outputs are zero.
"""

from __future__ import annotations

from mmhub.layers.language import chunked_token_losses
from mmhub.layers.lineup import line_up
from mmhub.layers.loss import chunked_cross_entropy
from mmhub.layers.packing import Packing, packed_attention
from mmhub.layers.pooling import keep_modalities, masked_mean, summary
from mmhub.layers.projectors import Projector, ProjectorConfig
from mmhub.layers.transformer import (
    Attention,
    TransformerBlock,
    TransformerEncoder,
    attention_mask,
    sinusoidal_positions,
)

__all__ = [
    "Attention",
    "Packing",
    "Projector",
    "ProjectorConfig",
    "TransformerBlock",
    "TransformerEncoder",
    "attention_mask",
    "chunked_cross_entropy",
    "chunked_token_losses",
    "keep_modalities",
    "line_up",
    "masked_mean",
    "packed_attention",
    "sinusoidal_positions",
    "summary",
]
