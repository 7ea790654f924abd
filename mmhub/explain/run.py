"""Explain an answer: find the question, cut the sample into pieces, and say what each is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmhub.errors import UsageError, did_you_mean
from mmhub.explain.gradients import gradient_x_input, integrated_gradients
from mmhub.explain.occlusion import faithfulness as measured
from mmhub.explain.occlusion import occlusion
from mmhub.explain.pieces import Pieces, cut
from mmhub.explain.places import spots_of
from mmhub.explain.probe import Probe, untouched
from mmhub.explain.question import Question, ask
from mmhub.explain.records import METHODS, Attribution, Explanation, Method, Step
from mmhub.explain.rollout import attention_rollout, flow, grid_of
from mmhub.explain.shares import shares as shapley
from mmhub.explain.surfaces import WRITTEN
from mmhub.interfaces import Policy
from mmhub.model import Model

_WIDE = 0.1  # of the difference that attributions should add up to: a gap that a reader must know of


def explain(
    model: Model,
    sample: Mapping[str, Any],
    *,
    method: Method = "integrated-gradients",
    target: str | None = None,
    steps: int = 32,
    faithfulness: bool = True,
    shares: bool = True,
    policy: Policy | None = None,
    max_pieces: int = 64,
) -> Explanation:
    """Say what of a sample speaks for the model's answer, or for another `target`, and how much.

    `target` is a label, a text that might be written, "word=TAG" for tags, or None for what the model answers. `steps`
    are those of integrated gradients. An item is cut into at most `max_pieces` patches or frames, a text into its
    tokens. With `faithfulness` pieces are taken out and put in, which is 88 rows more, and with `shares` each subset
    of the modalities is tried. The model is left as it was; it must not be used by another thread meanwhile.

    Raises:
        UsageError: there is no such method or target, or the model's answers or parts cannot be explained so.
        InputError: the sample cannot be read, or a guard refuses it. PluginError: captum is not installed.
    """
    if method not in METHODS:
        hint = did_you_mean(method, METHODS) or f"methods: {', '.join(METHODS)}"
        raise UsageError(f"there is no method {method!r} of explaining", hint)
    if steps < 1 or max_pieces < 1:
        raise UsageError(f"steps is {steps} and max_pieces {max_pieces}", "give 1 or more of each")
    policy = policy or Policy()
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        question = ask(model, sample, target, policy)
        probe = Probe(model, question)
        rolled = flow(probe) if method == "attention-rollout" else None
        tokens = None if rolled is None else lambda name, item: grid_of(rolled, name, item)
        pieces = cut(probe, spots_of(model, sample, policy), max_pieces, tokens)
        whole = probe.each(probe.inputs)[0]
        gap, notes = None, list(question.notes)
        if not pieces.total:
            raise UsageError("nothing of this sample can be taken out", "give it a text, a picture or a sound")
        if rolled is not None:
            scores = attention_rollout(probe, pieces, rolled)
            notes += [f"the {name} encoder does not attend: nothing is said of it" for name in rolled.lacking()]
        elif method == "integrated-gradients":
            scores, gap = integrated_gradients(probe, pieces, len(whole), steps)
        elif method == "gradient-x-input":
            scores = gradient_x_input(probe, pieces, len(whole))
        else:
            scores = occlusion(probe, pieces)
        if gap is not None and gap > _WIDE * max(abs(float(scores.sum())), 1e-3):
            notes.append(f"the attributions miss the difference by {gap:.3g}: more steps than {steps} come nearer")
        total = scores.sum(0)
        known, value, baseline = _shares(probe, pieces, whole, shares)
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
            faithfulness=measured(probe, pieces, total) if faithfulness else None,
            steps=_steps(question, pieces, scores, whole),
            notes=tuple(notes),
        )


def _shares(probe: Probe, pieces: Pieces, whole: Tensor, wanted: bool) -> tuple[dict[str, float], float, float]:
    found, value, baseline = shapley(probe, pieces)
    return (found if wanted else {}), value, baseline


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
