"""Measure an interpolated Kneser-Ney trigram (nltk's) as the yardstick of the word-level language models.

    python benchmarks/kneser_ney.py TRAIN.txt VALID.txt [--discounts 0.5,0.6,0.7,0.8,0.9] [--out TABLE.md]

It sees what mmhub's word-level models see: words between whitespace, every line break a word of its own, words that the
training text lacks as "<unk>", and the end of each document. All of these are predicted, and none else. "row" takes
every line that is not blank as a document, "article" WikiText's articles, "file" the whole file.

The discount, one for all orders as nltk has it, is the best of `--discounts` on the validation text itself, which
flatters the yardstick. nltk counts continuations anew for every n-gram, by going through all of them; here they are
counted once, and some are compared with nltk's own.

Needs nltk: pip install nltk
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nltk
from nltk.lm import KneserNeyInterpolated
from nltk.lm.smoothing import KneserNey
from nltk.util import everygrams, pad_sequence

ORDER, BEGIN, END = 3, "<s>", "</s>"
ARTICLE = re.compile("^ = [^=]")
Context = tuple[str, ...]


class Counted(KneserNey):  # type: ignore[misc]
    """nltk's smoothing, with continuations counted once."""

    known: dict[Context, tuple[Counter[str], int]]

    def count(self) -> None:
        found: dict[Context, Counter[str]] = defaultdict(Counter)
        for order in range(2, ORDER + 1):
            for prefix, counts in self.counts[order].items():
                found[prefix[1:]].update(word for word, count in counts.items() if count > 0)
        self.known = {context: (counts, counts.total()) for context, counts in found.items()}

    def _continuation_counts(self, word: str, context: Context = ()) -> tuple[int, int]:
        counts, total = self.known.get(context, (Counter(), 0))
        return counts[word], total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--discounts", default="0.5,0.6,0.7,0.75,0.8,0.85,0.9,0.95")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    discounts = [float(text) for text in args.discounts.split(",")]
    lines = [
        "# Interpolated Kneser-Ney trigram\n",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- command: `python benchmarks/kneser_ney.py {args.train.name} {args.valid.name}`",
        f"- versions: nltk {nltk.__version__}, Python {platform.python_version()}\n",
        "| documents | vocabulary | predicted tokens | unknown | discount | perplexity |\n|---|---|---|---|---|---|",
    ]
    for document in ("row", "article", "file"):
        train, valid = (list(documents(path, document)) for path in (args.train, args.valid))
        model = fit(train)
        words = set(model.vocab)
        valid = [[word if word in words else "<unk>" for word in text] for text in valid]
        best, discount = min((perplexity(model, valid, discount), discount) for discount in discounts)
        count = sum(len(text) + 1 for text in valid)
        unknown = sum(text.count("<unk>") for text in valid) / count
        lines.append(f"| {document} | {len(words):,} | {count:,} | {unknown:.1%} | {discount} | {best:.1f} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(table, encoding="utf-8")
    else:
        print(table)


def documents(path: Path, document: str) -> Iterator[list[str]]:
    """The words of each document of a file, "\\n" for a line break between two of its lines."""
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if document == "row":
        yield from (line.split() for line in lines if line.strip())
        return
    text: list[str] = []
    for line in lines:
        if text and document == "article" and ARTICLE.match(line):
            if set(text) != {"\n"}:  # what stands before the first article is blank
                yield text[:-1]
            text = []
        text += [*line.split(), "\n"]
    yield text[:-1]


def fit(train: list[list[str]]) -> Any:
    model = KneserNeyInterpolated(ORDER)
    padded = [list(pad_sequence(text, ORDER, True, True, BEGIN, END)) for text in train]
    whole = (everygrams(text[: len(text) - ORDER + 2], max_len=ORDER) for text in padded)
    grams = [[gram for gram in text if gram[-1] != BEGIN] for text in whole]  # nobody predicts the beginning
    model.fit(grams, ["<unk>", BEGIN, END, *(word for text in train for word in text)])
    plain = model.estimator
    model.estimator = Counted(model.vocab, model.counts, order=ORDER)
    model.estimator.count()
    compare(plain, model, train)
    return model


def compare(plain: KneserNey, model: Any, train: list[list[str]]) -> None:
    """Stop if the counts are not nltk's own, or the probabilities of all words do not add up to 1."""
    draw = random.Random(0)
    words = [word for text in train for word in text]
    for _ in range(10):
        at = draw.randrange(1, len(words))
        for context in ((), (words[at - 1],)):
            own, theirs = (one._continuation_counts(words[at], context) for one in (model.estimator, plain))
            assert own == theirs, (context, words[at], own, theirs)
    for context in ((BEGIN, BEGIN), (words[7], words[8]), ("nobody", "ever"), (words[7], END)):
        total = math.fsum(model.unmasked_score(word, context) for word in model.vocab)
        assert abs(total - 1) < 1e-9, (context, total)


def perplexity(model: Any, texts: list[list[str]], discount: float) -> float:
    model.estimator.discount = discount
    known: dict[Context, float] = {}
    nats, count = 0.0, 0
    for text in texts:
        words = [BEGIN] * (ORDER - 1) + [*text, END]
        for at in range(ORDER - 1, len(words)):
            gram = tuple(words[at - ORDER + 1 : at + 1])
            if gram not in known:
                known[gram] = math.log(model.unmasked_score(gram[-1], gram[:-1]))
            nats, count = nats - known[gram], count + 1
    return math.exp(nats / count)


if __name__ == "__main__":
    main()
