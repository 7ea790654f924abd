"""Why did a model answer so? Attributions to tokens, patches and frames, and the shares of modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmhub.lazy import lazy

if TYPE_CHECKING:
    from mmhub.explain.records import METHODS, Attribution, Explanation, Faithfulness, Piece, Step
    from mmhub.explain.run import explain

__all__ = ["METHODS", "Attribution", "Explanation", "Faithfulness", "Piece", "Step", "explain"]

_HOMES = {
    "METHODS": "records",
    "Attribution": "records",
    "Explanation": "records",
    "Faithfulness": "records",
    "Piece": "records",
    "Step": "records",
    "explain": "run",
}

__getattr__, __dir__ = lazy(__name__, _HOMES)
