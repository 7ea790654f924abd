"""`mmhub generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mmhub.cli.options import device_option, quantize_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.cli.writing import at_prompt, read_lines, read_settings, read_stdin, show, shown, writing_options
from mmhub.errors import InputError, UsageError


@click.command()
@click.argument("name")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("--file", type=click.Path(path_type=Path), help="Read prompts from a file, one a line.")
@writing_options
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Texts for each prompt.")
@click.option("--truncate", is_flag=True, help="Cut prompts that are too long for the model, not refuse them.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@device_option
@quantize_option
@quiet_option
@json_option
def generate(
    name: str,
    prompts: tuple[str, ...],
    file: Path | None,
    writing: dict[str, Any],
    samples: int,
    truncate: bool,
    batch_size: int,
    device: str,
    quantize: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let the model NAME go on from each PROMPT, or translate or answer it, if that is what the model does.

    The prompt '-' is read from stdin, and '' lets a language model begin by itself. On a terminal the text appears as
    it is written.
    """
    if bool(prompts) == bool(file):
        raise UsageError("give prompts, or a file of them with --file", "'' lets the model begin by itself, - is stdin")
    if prompts.count("-") > 1:
        raise UsageError("only one prompt can be read from stdin", "give '-' once")
    texts = [read_stdin() if prompt == "-" else prompt for prompt in prompts] if file is None else read_lines(file)
    from mmhub.hub import load

    model = load(name, device=device, quantize=quantize)
    settings = read_settings(model, writing, samples)
    live = len(texts) == 1 and samples == 1 and not as_json and sys.stdout.isatty()
    try:
        answers = model.generate(
            [{"text": text} for text in texts],
            settings,
            n=samples,
            batch_size=batch_size,
            stream=(lambda row, sample, text: show(text)) if live else None,
            truncate=truncate,
        )
    except InputError as error:
        raise at_prompt(error) if len(texts) > 1 else error from None
    end = "first" if model.decoder.reads_text else "last"
    for number, answer in enumerate(answers, 1):
        if answer.get("truncated"):
            note(f"prompt {number} is too long: its {end} {answer['truncated']} tokens were left out", quiet)
    found = [{"prompt": text} | answer for text, answer in zip(texts, answers, strict=True)]
    plain = "" if live and "text" in answers[0] else "\n".join(line for answer in answers for line in _lines(answer))
    if live and "text" in answers[0]:
        print(flush=True)
    emit({"name": name, "answers": found}, as_json, plain if as_json else shown(plain))


def _lines(answer: dict[str, Any]) -> list[str]:
    """The texts of one answer."""
    if "texts" in answer:
        return [text if text is not None else "(refused)" for text in answer["texts"]]
    return [answer.get("text", f"(refused by {answer.get('guard')}: {answer.get('refused')})")]
