"""Explain an answer: find the question, cut the sample into pieces, and say what each is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmhub.batch import Bundle
from mmhub.errors import UsageError, did_you_mean
from mmhub.explain.fetched import fetched
from mmhub.explain.gradients import gradient_x_input, integrated_gradients
from mmhub.explain.occlusion import faithfulness as measured
from mmhub.explain.occlusion import occlusion
from mmhub.explain.pieces import Pieces, cut
from mmhub.explain.places import Spot, spots_of, unplaced
from mmhub.explain.probe import Probe, untouched
from mmhub.explain.question import Question, ask
from mmhub.explain.records import METHODS, Attribution, Explanation, Method, Step
from mmhub.explain.rollout import attention_rollout, flow, grid_of
from mmhub.explain.shares import ends
from mmhub.explain.shares import shares as shapley
from mmhub.explain.surfaces import WRITTEN
from mmhub.interfaces import Generation, Policy
from mmhub.model import Model

_WIDE = 0.1  # of the difference that attributions should add up to: a gap that a reader must know of
_STEPS, _FEWEST = 32, 8  # of integrated gradients where nothing is said: for one number, and for each of many
_PASSES = 256  # of a sample that these make together, if each number gets `_FEWEST`


def explain(
    model: Model,
    sample: Mapping[str, Any],
    *,
    method: Method = "integrated-gradients",
    target: str | None = None,
    steps: int | None = None,
    faithfulness: bool = True,
    shares: bool = True,
    policy: Policy | None = None,
    max_pieces: int = 64,
    settings: Generation | None = None,
    stop: Callable[[], None] | None = None,
) -> Explanation:
    """Say what of a sample speaks for the model's answer, or for another `target`, and how much.

    `target` is a label, a text that might be written, "word=TAG" for tags, or None for what the model answers. `steps`
    are those of integrated gradients, which take up to eight times as many where these miss the difference. An item is
    cut into at most `max_pieces` patches or frames, a text into its tokens. With `faithfulness` pieces are taken out
    and put in, which is up to 191 rows more, and with `shares` each subset of the modalities is tried. `settings` say
    how a model writes, None: as its own do. `stop` is called before each pass; what it raises ends the explanation.
    The model is left as it was. Other threads may predict with it meanwhile, not train it; those who explain it, too,
    wait their turn.

    Raises:
        UsageError: there is no such method or target, or the model's answers or parts cannot be explained so.
        InputError: the sample cannot be read, or a guard refuses it. PluginError: captum is not installed.
    """
    if method not in METHODS:
        hint = did_you_mean(method, METHODS) or f"methods: {', '.join(METHODS)}"
        raise UsageError(f"there is no method {method!r} of explaining", hint)
    if (steps is not None and steps < 1) or max_pieces < 1:
        raise UsageError(f"steps is {steps} and max_pieces {max_pieces}", "give 1 or more of each")
    policy = policy or Policy()
    sample = fetched(model, sample, policy)
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        question = _checked(ask(model, sample, target, policy, settings), stop)
        probe = Probe(model, question)
        rolled = flow(probe) if method == "attention-rollout" else None
        tokens = None if rolled is None else lambda name, item: grid_of(rolled, name, item)
        spots = spots_of(model, question.sample, policy)
        pieces = cut(probe, spots, max_pieces, tokens)
        whole = probe.each(probe.inputs)[0]
        neutral, gap, points = None, None, None
        notes = [*question.notes, *_unplaced(pieces, spots)]
        if not pieces.total:
            raise UsageError("nothing of this sample can be taken out", "give it a text, a picture or a sound")
        if rolled is not None:
            scores = attention_rollout(probe, pieces, rolled)
            notes += [f"the {name} encoder does not attend: nothing is said of it" for name in rolled.lacking()]
        elif method == "integrated-gradients":
            points = steps or max(_FEWEST, min(_STEPS, _PASSES // len(whole)))
            scores, points = integrated_gradients(probe, pieces, len(whole), points)
            nothing = probe.each(pieces.without(probe.surfaces, torch.zeros(1, pieces.total), fading=True))[0]
            neutral = float(nothing.sum())
            gap = float((scores.sum(1) - (whole - nothing)).abs().sum())
            if gap > _WIDE * max(abs(float((whole - nothing).sum())), 1e-3):
                notes.append(f"the scores miss what they should add up to by {gap:.3g}, with {points} steps")
        elif method == "gradient-x-input":
            scores = gradient_x_input(probe, pieces, len(whole))
        else:
            scores = occlusion(probe, pieces)
        total = scores.sum(0)
        known, value, baseline = _shares(probe, pieces, shares, notes)
        return Explanation(
            task=model.task.name,
            method=method,
            target=question.target,
            unit=question.unit,
            value=value,
            baseline=baseline,
            answer=question.answer,
            attributions=_attributions(pieces, total, rolled.lacking() if rolled else ()),
            shares=known,
            gap=gap,
            neutral=neutral,
            points=points,
            faithfulness=measured(probe, pieces, total) if faithfulness else None,
            steps=_steps(question, pieces, scores, whole),
            notes=tuple(notes),
        )


def _checked(question: Question, stop: Callable[[], None] | None) -> Question:
    """The question, in front of each answer to which `stop` is called."""
    if stop is None:
        return question

    def measure(bundle: Bundle) -> Tensor:
        stop()
        return question.measure(bundle)

    return replace(question, measure=measure)


def _unplaced(pieces: Pieces, spots: Mapping[str, Sequence[Spot]]) -> list[str]:
    """A note on texts whose tokens were not found."""
    lacking = 0
    for group in pieces.groups:
        if group.kind == "token" and group.modality != WRITTEN:
            texts = spots[group.modality][group.item].texts
            lacking += unplaced([(piece.start, piece.end) for piece in group.pieces], texts)
    what = "a text" if lacking == 1 else f"{lacking} texts"
    return [f"it was not found where the tokens of {what} stand: they are not explained"] if lacking else []


def _shares(
    probe: Probe, pieces: Pieces, wanted: bool, notes: list[str]
) -> tuple[dict[str, float], float, float | None]:
    if probe.model.decoder.paired:
        notes += ["one side alone is like nothing, so that the inputs have no shares"] * wanted
        return {}, ends(probe, pieces)[0], None
    found, value, baseline = shapley(probe, pieces) if wanted else ({}, *ends(probe, pieces))
    if not all(map(math.isfinite, (*found.values(), value, baseline))):
        notes += ["the model gives no number without some input, so that the inputs have no shares"] * wanted
        found = {}
    return found, value, baseline if math.isfinite(baseline) else None


def _attributions(pieces: Pieces, scores: Tensor, lacking: Sequence[str] = ()) -> tuple[Attribution, ...]:
    groups = (one for one in pieces.groups if one.modality != WRITTEN and one.modality not in lacking)
    return tuple(group.attribution(scores) for group in groups)


def _steps(question: Question, pieces: Pieces, scores: Tensor, values: Tensor) -> tuple[Step, ...]:
    """What of the prompt, and of what was written before it, speaks for each token."""
    written = [group for group in pieces.groups if group.modality == WRITTEN]
    return tuple(
        Step(
            text=text,
            logprob=float(values[number]),
            attributions=(
                *_attributions(pieces, scores[number]),
                *(group.attribution(scores[number], number) for group in written),
            ),
        )
        for number, text in enumerate(question.written)
    )
