"""Make conversations about pictures and spoken digits: `python questions.py PICTURES DIGITS OUT`.

PICTURES holds train.parquet and valid.parquet with the columns image {bytes, path} and label, DIGITS the same with
audio {bytes, path} and digit. OUT gets train.jsonl and valid.jsonl with the column messages, and the media they name.

A conversation has a picture, a recording, both in either order, or neither, and one to three questions about them in
any order. What is shown and said in those of valid.jsonl is in none of train.jsonl. digits.jsonl and pictures.jsonl ask
one question each of the same held-out media, "Which digit is spoken?" and "What is in the picture?".
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROWS = {"train": 8000, "valid": 800}
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SHARES = {("image", "audio"): 0.4, ("image",): 0.25, ("audio",): 0.25, (): 0.1}

Question = tuple[str, str]  # and its answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("digits", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for seed, (split, rows) in enumerate(ROWS.items()):
        rng = random.Random(seed)
        (args.out / "media").mkdir(parents=True, exist_ok=True)
        pictures = save(args.pictures / f"{split}.parquet", "image", "label", args.out, split, "png")
        digits = save(args.digits / f"{split}.parquet", "audio", "digit", args.out, split, "flac")
        with (args.out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(rows):
                file.write(json.dumps({"messages": conversation(pictures, digits, rng)}) + "\n")
        print(f"{args.out / split}.jsonl: {rows} conversations, {len(pictures)} pictures, {len(digits)} recordings")
    for kind, name in (("image", "pictures"), ("audio", "digits")):
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(ROWS["valid"]):
                file.write(json.dumps({"messages": one_question(kind, pictures, digits, rng)}) + "\n")


def save(table: Path, kind: str, label: str, out: Path, split: str, ending: str) -> list[tuple[str, str]]:
    """Write the media of a table as files; return the path and the label of each."""
    found = []
    for number, row in enumerate(pq.read_table(table).to_pylist()):
        path = Path("media") / f"{split}-{number}.{ending}"
        (out / path).write_bytes(row[kind]["bytes"])
        found.append((str(path), str(row[label])))
    return found


def conversation(pictures: list[Any], digits: list[Any], rng: random.Random) -> list[dict[str, Any]]:
    """A conversation of one to three questions; the media come with the first."""
    (kinds,) = rng.choices(list(SHARES), list(SHARES.values()))
    media, questions = [], []
    for kind in rng.sample(kinds, len(kinds)):
        path, label = rng.choice(pictures if kind == "image" else digits)
        media.append({"type": kind, kind: path})
        questions += about_picture(label) if kind == "image" else about_digit(int(label))
    questions = questions or about_nothing(rng)
    asked = rng.sample(questions, min(rng.randint(1, 3), len(questions)))
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(asked):
        text = {"type": "text", "text": question}
        parts = rng.choice([[*media, text], [text, *media]]) if number == 0 else [text]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages


def one_question(kind: str, pictures: list[Any], digits: list[Any], rng: random.Random) -> list[dict[str, Any]]:
    """The first question about a picture or a recording, with or without the other, in any order."""
    kinds = rng.choice([("image", "audio"), ("audio", "image"), (kind,)])
    media = []
    for one in kinds:
        path, label = rng.choice(pictures if one == "image" else digits)
        media.append({"type": one, one: path})
        if one == kind:
            question, answer = (about_picture(label) if kind == "image" else about_digit(int(label)))[0]
    text = {"type": "text", "text": question}
    parts = rng.choice([[*media, text], [text, *media]])
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def about_picture(label: str) -> list[Question]:
    animal = "yes" if label in ANIMALS else "no"
    return [("What is in the picture?", label), ("Is there an animal in the picture?", animal)]


def about_digit(digit: int) -> list[Question]:
    return [
        ("Which digit is spoken?", WORDS[digit]),
        ("Is the digit larger than five?", "yes" if digit > 5 else "no"),
        ("Is the digit even?", "no" if digit % 2 else "yes"),
    ]


def about_nothing(rng: random.Random) -> list[Question]:
    """Questions that the text alone answers."""
    a, b = rng.sample(range(10), 2)
    return [(f"Is {WORDS[a]} larger than {WORDS[b]}?", "yes" if a > b else "no"), (f"Say {WORDS[a]}.", WORDS[a])]


if __name__ == "__main__":
    main()
