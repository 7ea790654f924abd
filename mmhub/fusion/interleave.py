"""What a language model reads: one stream of tokens, texts and media in the order in which they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmhub.batch import Bundle, Features, Plan
from mmhub.errors import UsageError, did_you_mean
from mmhub.interfaces import ComponentConfig, Fusion, Stream
from mmhub.layers import Projector, ProjectorConfig, line_up


class Interleave(Fusion):
    """Put the tokens of media, brought to the language model's width, between its own embeddings of text.

    All real tokens of an item are read, whatever summary it has; where they stand in it is known by the encoder alone.
    Where items stand is said by a plan; without one, media come before the text of their row. With text alone, that is
    passed on unchanged.
    """

    by_item: ClassVar[bool] = True

    class Config(ComponentConfig, frozen=True):
        """Settings of what joins media to a language model.

        `projectors` says by modality how an encoder's tokens become the language model's; one linear layer where
        nothing is said. `separators` puts a learned vector before and one behind each item. `pack` puts rows behind
        each other in training where fewer rows come of it; the loss stays what it is.
        """

        projectors: dict[str, ProjectorConfig] = {}  # noqa: RUF012 - msgspec copies it
        separators: bool = False
        pack: bool = True

    config: Config

    def __init__(self, config: Config, inputs: Mapping[str, Stream]) -> None:
        super().__init__(config, inputs)
        if "text" not in inputs:
            raise UsageError(
                'the fusion "interleave" joins media to the text of a language model, and there is none',
                "take a language model as decoder, or another fusion, such as concat",
            )
        media = {name: stream for name, stream in inputs.items() if name != "text"}
        for name in config.projectors:
            if name not in media:
                known = f"there are encoders of {', '.join(media)}" if media else "there is no encoder"
                raise UsageError(
                    f"there is a projector for {name!r}, and no encoder", did_you_mean(name, media) or known
                )
        dim, plain = inputs["text"].dim, ProjectorConfig()
        self.projectors = nn.ModuleDict(
            {name: Projector(config.projectors.get(name, plain), stream.dim, dim) for name, stream in media.items()}
        )
        ends = media if config.separators else ()
        self.separators = nn.ParameterDict({name: nn.Parameter(torch.empty(2, dim)) for name in ends})
        for vectors in self.separators.values():
            nn.init.normal_(vectors, std=0.02)
        self.reads = "tokens" if self.projectors else "nothing"
        self.outputs = {"fused": Stream(dim)}

    def forward(self, bundle: Bundle, plan: Plan | None = None, embed: Any = None) -> Bundle:
        media = {name: self.projected(name, bundle[name]) for name in self.projectors}
        pack = self.config.pack and self.training and torch.is_grad_enabled()
        return {"fused": line_up(bundle["text"], media, plan, pack=pack)}

    def token_count(self, name: str, tokens: int) -> int:
        """Raises: UsageError, where its projector shuffles and so many tokens are no square grid."""
        if name not in self.projectors:
            return tokens
        projector: Any = self.projectors[name]
        count: int = projector.token_count(tokens)
        return count + 2 * bool(count) if name in self.separators else count

    def projected(self, name: str, features: Features) -> Features:
        """Return the items of a modality, (N, T, width), as the language model reads them, (N, t, D)."""
        tokens, mask = self.projectors[name](features.tokens, features.mask)
        if name in self.separators:
            tokens, mask = _separated(tokens, mask, self.separators[name])
        return Features(tokens, mask, rows=features.rows)


def _separated(tokens: Tensor, mask: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Put the first of two vectors (2, D) before each item and the other behind it: (N, T, D) -> (N, T + 2, D)."""
    begin, end = vectors.to(tokens.dtype)
    tokens = nn.functional.pad(tokens, (0, 0, 1, 1))
    place, lengths = torch.arange(tokens.shape[1], device=mask.device), mask.sum(1, keepdim=True)
    tokens = torch.where((place == 0)[:, None], begin, tokens)
    tokens = torch.where((place == lengths + 1)[..., None], end, tokens)
    mask = (place < lengths + 2) & (lengths > 0)
    return tokens.masked_fill(~mask[..., None], 0), mask
