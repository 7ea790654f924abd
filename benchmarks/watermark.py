"""How often the watermark of written texts is found, and how often it is seen in texts of people, by length.

    python benchmarks/watermark.py MODEL HUMAN [--texts 200] [--keys 5] [--lengths 25,50,100,200,400] [--out FILE]

MODEL is a language model, HUMAN a file of texts that people wrote, such as WikiText-2's valid.txt. The model goes on
from beginnings of human texts, with a mark and without; every text is then read again as text, not as the tokens that
were drawn. "Found" is the share of marked texts with p below 0.01, "false" that of human texts and of the model's own
without a mark, over all keys. Some words of marked texts are then replaced by other words of human texts.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from benchmarks.serve_client import about

BOUND = 0.01
EDITED = 0.3  # share of words that are replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("human", type=Path)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--keys", type=int, default=5, help="human texts are looked at with so many keys")
    parser.add_argument("--lengths", default="25,50,100,200,400")
    parser.add_argument("--temperatures", default="1.0,0.7")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import mmhub

    model = mmhub.load(given.model)
    longest = max(map(int, given.lengths.split(",")))
    if model.decoder.context is not None and model.decoder.context < longest + 16:
        raise SystemExit(f"this model writes no {longest} tokens: its context is {model.decoder.context}")
    human = [word for line in given.human.read_text().splitlines() for word in line.split()]
    lines = ["# Finding the watermark", "", *about(["mmhub", "torch", "transformers"]), ""]
    lines += ["| temperature | tokens | found | 30 % of words replaced | false: people | false: the model, unmarked |"]
    lines += ["|---|---|---|---|---|---|"]
    missed = False
    for temperature in map(float, given.temperatures.split(",")):
        for length in map(int, given.lengths.split(",")):
            row, found = measure(model, human, temperature, length, given.texts, given.keys)
            lines.append(row)
            missed |= length >= 200 and found < 0.95
    lines += ["", *quality(model, human, given.texts)]
    lines.append(f"- at 200 tokens and more at least 95 % found with p < {BOUND}: {'MISSED' if missed else 'kept'}")
    table = "\n".join(lines) + "\n"
    print(table)
    if given.out:
        given.out.write_text(table)
    raise SystemExit(int(missed))


def measure(
    model: Any, human: Sequence[str], temperature: float, length: int, count: int, keys: int
) -> tuple[str, float]:
    """Return a row of the table, and the share of marked texts that were found."""
    from mmhub.interfaces import Watermark

    dice = random.Random(f"{temperature} {length}")
    mark = Watermark(key="benchmark")
    marked = written(model, human, dice, temperature, length, count, mark)
    plain = written(model, human, dice, temperature, length, count, None)
    people = [" ".join(piece(human, dice, length)) for _ in range(count)]
    edited = [replaced(text, human, dice) for text in marked]
    others = [Watermark(key=f"key {number}") for number in range(keys)]
    found = share(model, marked, [mark])
    cells = [found, share(model, edited, [mark]), share(model, people, others), share(model, plain, others)]
    shown = " | ".join(f"{cell:.1%}" for cell in cells)
    return f"| {temperature:g} | {length} | {shown} |", found


def written(
    model: Any, human: Sequence[str], dice: random.Random, temperature: float, length: int, count: int, mark: Any
) -> list[str]:
    from mmhub.interfaces import Generation

    settings = Generation(
        max_new_tokens=length, min_new_tokens=length, temperature=temperature, seed=dice.randrange(2**31)
    )
    settings = replace(settings, watermark=mark) if mark else settings
    samples = [{"text": " ".join(piece(human, dice, 8))} for _ in range(count)]
    return [answer["text"] for answer in model.generate(samples, settings)]


def piece(human: Sequence[str], dice: random.Random, length: int) -> Sequence[str]:
    start = dice.randrange(len(human) - length)
    return human[start : start + length]


def replaced(text: str, human: Sequence[str], dice: random.Random) -> str:
    words = re.split(r"(\s+)", text)
    return "".join(dice.choice(human) if word.strip() and dice.random() < EDITED else word for word in words)


def share(model: Any, texts: Sequence[str], marks: Sequence[Any]) -> float:
    from mmhub.generate import detect

    found = [one.marked for mark in marks for one in detect(model, texts, mark, false_positives=BOUND)]
    return sum(found) / len(found)


def quality(model: Any, human: Sequence[str], count: int) -> list[str]:
    """What the mark changes of how probable the texts are to the model itself, and of the time that writing takes."""
    from mmhub.interfaces import Generation, Watermark

    dice, length = random.Random(0), 100
    samples = [{"text": " ".join(piece(human, dice, 8))} for _ in range(count)]
    plain = Generation(max_new_tokens=length, min_new_tokens=length, temperature=1.0)
    scores, seconds = [], []
    for settings in (plain, replace(plain, watermark=Watermark(key="benchmark"))):
        began = time.perf_counter()
        answers = model.generate(samples, settings)
        seconds.append(time.perf_counter() - began)
        values = [answer["score"] / length for answer in answers]
        mean = sum(values) / count
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
        scores.append((mean, error))
    (before, error), (after, marked_error) = scores
    apart = (after - before) / math.hypot(error, marked_error)
    told = f"{before:.3f} nats without a mark, {after:.3f} with one ({apart:+.1f} standard errors apart)"
    return [
        f"- log-probability of a token to the model itself, {count} texts of {length} tokens: {told}",
        f"- writing them took {seconds[0]:.1f} s without a mark, {seconds[1]:.1f} s with one",
    ]


if __name__ == "__main__":
    main()
