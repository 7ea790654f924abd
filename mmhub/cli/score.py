"""`mmhub score`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from mmhub.cli.options import device_option
from mmhub.cli.output import emit, json_option, note, quiet_option, table
from mmhub.cli.text import short
from mmhub.cli.writing import at_prompt, read_lines
from mmhub.errors import InputError, UsageError


@click.command()
@click.argument("name")
@click.option("--text", "texts", multiple=True, help="A text (repeatable).")
@click.option("--file", type=click.Path(path_type=Path), help="Read texts from a file, one a line.")
@click.option("--end/--no-end", default=None, help="Is the end of the text part of it? By default as in training.")
@device_option
@quiet_option
@json_option
def score(
    name: str, texts: tuple[str, ...], file: Path | None, end: bool | None, device: str, quiet: bool, as_json: bool
) -> None:
    """Say how probable texts are to the language model NAME.

    The log-probability is log P(w1) + log P(w2 | w1) + ... by the chain rule, to base e, over the model's tokens.
    """
    if bool(texts) == bool(file):
        raise UsageError("give texts with --text, or a file of them with --file", "not both, not neither")
    given = list(texts) if file is None else read_lines(file)
    from mmhub.hub import load
    from mmhub.perplexity import score_texts

    model = load(name, device=device)
    try:
        found = score_texts(model, given, end=end)
    except InputError as error:
        raise at_prompt(error, "text") if len(given) > 1 else error from None
    ends = model.language_model.processor.ends if end is None else end
    note(_definition(ends), quiet)
    scores = [
        {
            "text": text,
            "logprob": one.logprob,
            "tokens": one.tokens,
            "perplexity": math.exp(min(-one.logprob / one.tokens, 700)) if one.tokens else None,
            "words": one.words,
            "bytes": one.bytes,
            "unknown": one.unknown,
        }
        for text, one in zip(given, found, strict=True)
    ]
    rows = [
        (f"{s['logprob']:.4f}", s["tokens"], "-" if s["perplexity"] is None else f"{s['perplexity']:.4g}", s["unknown"],
         short(s["text"], 60))
        for s in scores
    ]  # fmt: skip
    human = table(("logprob", "tokens", "perplexity", "unknown", "text"), rows)
    emit({"name": name, "end": ends, "scores": scores}, as_json, human)


def _definition(ends: bool) -> str:
    last = "with the end token" if ends else "without an end token"
    return (
        f"logprob: sum of log P(token | all before it) in nats, {last}; "
        "perplexity: exp(-logprob / tokens), tokens being those that were predicted"
    )
