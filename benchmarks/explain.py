"""Find evidence that was planted, by each method of explaining, in texts, pictures and sounds.

    python benchmarks/explain.py [--cases 120] [--out benchmarks/results/explain.md]

Small models are trained for seconds on data in which one piece decides the label: one of eight words among eleven that
mean nothing; a red or a blue square among up to two green ones in a noisy picture; a low or a high burst of sound among
up to two of a middle pitch, in noise; or there is none of these. Were there no squares and bursts that mean nothing,
"is there any?" would be evidence, too, and that is not where the square or burst is: the front end of sound brings each
clip to the same mean and variance, so that a burst changes all frames. And noise alone has to be among what is learned,
because all methods compare with it: what a model answers that never met it is chance. "accuracy" is that of all labels:
where one is not learned there is nothing to find.

Of unseen samples with evidence that are answered right, "hit" is the share in which the piece with the highest
attribution is the planted one: that word, a patch whose middle is in the square, a span of time of which more than a
quarter is in the burst. "chance" is the share of all pieces that would count. "deletion" is the mean logit while the
best pieces are taken out, "insertion" while they are put in, each beside random orders.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmhub
from mmhub.batch import Batch
from mmhub.errors import UsageError
from mmhub.explain import METHODS, Explanation, Piece
from mmhub.explain.records import Method
from mmhub.model import Model

RATE = 8000  # Hz
WORDS = [f"{first}{rest}" for first in "bdfgklmnprst" for rest in ("alo", "eni", "omu")]
KEYS = {"good": ("lovely", "superb", "great", "fine"), "bad": ("awful", "dull", "poor", "weak")}
NONE = "none"  # the label where there is no evidence: else one label would be what the other is not
COLOURS = {"red": (250, 40, 40), "blue": (40, 40, 250), NONE: (40, 200, 40)}
PITCHES = {"low": 500.0, "high": 2000.0, NONE: 1000.0}  # Hz
AMONG = 3  # squares or bursts at most, of which one decides


@dataclass(frozen=True)
class Case:
    """A sample, its label, and whether a piece of its explanation is the evidence."""

    sample: dict[str, Any]
    label: str
    holds: Callable[[Piece], bool]


def text_case(draw: np.random.Generator, label: str) -> Case:
    key = str(draw.choice(KEYS.get(label, WORDS)))
    words = [str(word) for word in draw.choice(WORDS, 11)]
    words.insert(int(draw.integers(12)), key)
    return Case({"text": " ".join(words)}, label, lambda piece: piece.text == key)


def _kinds(draw: np.random.Generator, label: str) -> list[str]:
    """What the squares or bursts are: the one that decides first, and others that mean nothing; maybe none at all."""
    return [label] * (label != NONE) + [NONE] * int(draw.integers(AMONG))


def image_case(draw: np.random.Generator, label: str) -> Case:
    pixels = draw.integers(60, 130, (32, 32, 3)).astype(np.uint8)
    squares = [(int(place) // 4 * 8, int(place) % 4 * 8) for place in draw.choice(16, AMONG, replace=False)]
    for (top, left), colour in zip(squares, _kinds(draw, label), strict=False):
        pixels[top : top + 8, left : left + 8] = COLOURS[colour]
    top, left = squares[0]

    def holds(piece: Piece) -> bool:
        assert piece.box is not None
        x, y = (piece.box[0] + piece.box[2]) / 2, (piece.box[1] + piece.box[3]) / 2
        return left <= x <= left + 8 and top <= y <= top + 8

    return Case({"image": pixels}, label, holds)


def audio_case(draw: np.random.Generator, label: str) -> Case:
    length, total, places = 480, RATE * 2 // 5, 6
    samples = draw.normal(0, 0.02, total)
    starts = draw.choice(places, AMONG, replace=False) * length + draw.integers(total - places * length)
    for start, pitch in zip(starts, _kinds(draw, label), strict=False):
        tone = np.sin(2 * np.pi * PITCHES[pitch] * np.arange(length) / RATE)
        samples[start : start + length] += 0.4 * np.hanning(length) * tone
    begin, end = starts[0] / RATE, (starts[0] + length) / RATE
    return Case(
        {"audio": (samples.astype(np.float32), RATE)},
        label,
        lambda piece: min(end, piece.end) - max(begin, piece.start) > 0.25 * (piece.end - piece.start),
    )


STEPS = {"lstm": 160, "cnn": 320}  # until all labels are learned; 192 for others
BATCHES = 64
QUIET = {"n_mels": 16, "mask_bands": 0, "mask_time": 0.0}
SUBJECTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("text", "lstm"): {"dim": 32, "embedding_dim": 32},
    ("text", "transformer"): {"dim": 32, "depth": 2, "heads": 2},
    ("image", "test_resnet"): {"architecture": "test_resnet", "image_size": 64, "crop_pct": 1.0},
    ("image", "test_vit"): {"architecture": "test_vit", "image_size": 64, "crop_pct": 1.0},
    ("audio", "cnn"): {"sample_rate": RATE, **QUIET, "dim": 32},
    ("audio", "transformer"): {"sample_rate": RATE, **QUIET, "dim": 32, "depth": 2, "heads": 2},
}
CASES = {"text": text_case, "image": image_case, "audio": audio_case}
LABELS = {"text": ("good", "bad"), "image": ("red", "blue"), "audio": ("low", "high")}


def trained(modality: str, encoder: str, steps: int | None = None, seed: int = 0) -> Model:
    """Train a small classifier on planted evidence."""
    steps = steps or STEPS.get(encoder, 192)
    draw = np.random.default_rng(seed)
    use = "timm" if modality == "image" else encoder
    every = [word for words in KEYS.values() for word in words]
    model = mmhub.compose(
        encoders={modality: {"use": use, "config": dict(SUBJECTS[modality, encoder])}},
        decoder={"use": "classification", "config": {"labels": [*LABELS[modality], NONE]}},
        tokenizer={"kind": "word"} if modality == "text" else None,
        texts=[" ".join([*WORDS, *every])] if modality == "text" else None,
        seed=seed,
    )
    batches = [_batch(model, _cases(modality, draw, 32, NONE)) for _ in range(min(BATCHES, steps))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 - 2 * step / steps))
    model.train()
    for step in range(steps):
        loss = model(batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _cases(modality: str, draw: np.random.Generator, count: int, *more: str) -> list[Case]:
    labels = draw.choice([*LABELS[modality], *more], count)
    return [CASES[modality](draw, str(label)) for label in labels]


def _batch(model: Model, cases: Sequence[Case]) -> Batch:
    batch = model.collate([case.sample for case in cases])
    return replace(batch, targets=model.decoder.encode_targets([case.label for case in cases]))  # type: ignore[operator]


@dataclass(frozen=True)
class Found:
    """What one method found with one model; means over its cases."""

    hit: float
    chance: float
    deletion: tuple[float, float]
    insertion: tuple[float, float]
    seconds: float
    cases: int
    accuracy: float


def found(model: Model, modality: str, method: Method, count: int, seed: int = 1, curves: int = 20) -> Found:
    """Explain `count` unseen samples that the model answers right, the first `curves` with their curves.

    Raises:
        UsageError: the method does not fit the model.
    """
    cases = _cases(modality, np.random.default_rng(seed), 2 * count, NONE)
    answers = model.predict([case.sample for case in cases])
    right = [case for case, answer in zip(cases, answers, strict=True) if answer["label"] == case.label]
    evident = [case for case in right if case.label != NONE]
    hits, chances, measured, spent = [], [], [], 0.0
    for number, case in enumerate(evident[:count]):
        start = time.perf_counter()
        explanation = model.explain(case.sample, method=method, faithfulness=False, shares=False)
        spent += time.perf_counter() - start
        pieces = explanation.attributions[0].pieces
        hits.append(case.holds(max(pieces, key=lambda piece: piece.score)))
        chances.append(sum(map(case.holds, pieces)) / len(pieces))
        if number < curves:
            measured.append(model.explain(case.sample, method=method, shares=False))
    return Found(
        hit=float(np.mean(hits)),
        chance=float(np.mean(chances)),
        deletion=(_mean(measured, "deletion_area"), _mean(measured, "random_deletion_area")),
        insertion=(_mean(measured, "insertion_area"), _mean(measured, "random_insertion_area")),
        seconds=spent / max(len(hits), 1),
        cases=len(hits),
        accuracy=len(right) / len(cases),
    )


def _mean(explanations: Sequence[Explanation], name: str) -> float:
    return float(np.mean([getattr(one.faithfulness, name) for one in explanations])) if explanations else float("nan")


def table(count: int, curves: int) -> list[str]:
    """Measure every method with every model that it fits."""
    lines = [
        "| modality | encoder | accuracy | method | hit | chance | deletion (random) | insertion (random) | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for modality, encoder in SUBJECTS:
        model = trained(modality, encoder)
        for method in METHODS:
            try:
                one = found(model, modality, method, count, curves=curves)
            except UsageError as error:
                lines.append(f"| {modality} | {encoder} | | {method} | - | | {error.message} | | |")
                continue
            lines.append(
                f"| {modality} | {encoder} | {one.accuracy:.3f} | {method} | {one.hit:.3f} of {one.cases} | "
                f"{one.chance:.3f} | {one.deletion[0]:.2f} ({one.deletion[1]:.2f}) | "
                f"{one.insertion[0]:.2f} ({one.insertion[1]:.2f}) | {one.seconds:.3f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", type=int, default=120, help="samples with such evidence that are answered right, of each row"
    )
    parser.add_argument("--curves", type=int, default=20, help="of them with deletion and insertion curves")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    from benchmarks.train_text import _facts

    options.rounds = options.epochs = 1
    report = _facts(options)
    report[0] = "# Finding planted evidence"
    text = "\n".join([*report, "", *table(options.cases, options.curves)]) + "\n"
    text = text.replace("benchmarks/train_text.py", "benchmarks/explain.py").replace(" (rounds: 1, epochs: 1)", "")
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
