"""What an explanation is: one contract for every modality, method and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["integrated-gradients", "gradient-x-input", "occlusion", "attention-rollout"]
METHODS: tuple[Method, ...] = ("integrated-gradients", "gradient-x-input", "occlusion", "attention-rollout")
Kind = Literal["token", "patch", "frame"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of an input, and how much it speaks for the target (above 0) or against it (below).

    A token has its `text` and where it stands in it, in characters; a patch its `box`, (left, top, right, bottom) in
    pixels of the picture as it was given; a frame of sound its `start` and `end` in seconds. A token that the
    tokenizer added has `start` = `end`.
    """

    score: float
    text: str = ""
    start: float = 0.0
    end: float = 0.0
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The pieces of one item of a sample, in reading order; patches row by row, `grid` (rows, columns) of them.

    `item` counts the items of this modality in the sample from 0. `size` is the width and height of a picture, or the
    seconds of a sound.
    """

    modality: str
    kind: Kind
    pieces: tuple[Piece, ...]
    item: int = 0
    grid: tuple[int, int] | None = None
    size: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """What happens to the target when pieces are taken out, or put in, most important first.

    Curves are the target's value at equal steps from nothing to everything removed (or inserted), from 0 to 1. `*_area`
    is the mean of its curve: a faithful explanation has a low `deletion_area` and a high `insertion_area`. `random_*`
    are the means of `orders` random orders; so many of these are beaten. Petsiuk et al., arXiv:1806.07421.
    """

    deletion: tuple[float, ...]
    insertion: tuple[float, ...]
    deletion_area: float
    insertion_area: float
    random_deletion_area: float
    random_insertion_area: float
    orders: int = 0
    deletion_beaten: int = 0
    insertion_beaten: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token that was written: its text, its log-probability in nats, and what of the prompt and of the text before
    it speaks for it. The last attribution of modality "written" is about the tokens written before."""

    text: str
    logprob: float
    attributions: tuple[Attribution, ...]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a model answered one sample as it did.

    `target` is what is explained: a label, "value" of a regression, a written text. `value` is the number that the
    attributions are about (`unit`: "logit", "log-probability in nats", "value", "cosine similarity"), `baseline` the
    same without any input, None where the model gives no number then. `shares` are the modalities' Shapley values: they
    add up to `value` - `baseline`. `steps` are there for texts that were written.

    Integrated gradients begin at an input that says nothing, such as a picture of one colour, whose value is `neutral`.
    Their scores, those of `steps` for tokens written before among them, add up to `value` - `neutral` but for `gap`,
    which sums what is missing to each number of the target; each took `points` gradients. None with other methods.
    """

    task: str
    method: Method
    target: str
    unit: str
    value: float
    baseline: float | None
    answer: Mapping[str, Any]
    attributions: tuple[Attribution, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    gap: float | None = None
    neutral: float | None = None
    points: int | None = None
    faithfulness: Faithfulness | None = None
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()  # what the reader must know, such as that a part has no attention

    def as_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        from dataclasses import asdict

        return asdict(self)
