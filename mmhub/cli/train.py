"""`mmhub train`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmhub.cli.output import emit, json_option, quiet_option
from mmhub.errors import Interrupted, MmhubError, NotFoundError, UsageError
from mmhub.registry import find_component

if TYPE_CHECKING:
    from mmhub.config import Recipe


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/<recipe's name>]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, e.g. train.epochs=3.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run folder.")
@quiet_option
@json_option
def train(recipe: Path, out: Path | None, overrides: tuple[str, ...], resume: bool, quiet: bool, as_json: bool) -> None:
    """Train a model from a RECIPE (a TOML file).

    The run folder gets metrics.jsonl, resumable checkpoints/, and model/, a checkpoint folder ready for
    `mmhub eval`, `predict` and `push`. Ctrl-C saves, and --resume goes on from there. Of a recipe with stages each is
    a run of its own, in stages/, that starts from the model of the one before.

    On several GPUs: torchrun --nproc-per-node N -m mmhub train RECIPE
    """
    from mmhub.config import read_recipe

    with _one_voice():
        _check_parts(read_recipe(recipe, overrides))  # a wrong recipe is reported before torch loads
        from mmhub.engine import train as run
        from mmhub.metrics import flat

        result = run(recipe, out, resume=resume, quiet=quiet, overrides=overrides)
    if os.environ.get("RANK", "0") != "0":
        return
    shown = "  ".join(f"{key} {value:.4f}" for key, value in flat(result.metrics).items())
    model = _as_name(result.model)
    data = {
        "out": str(result.out),
        "model": model,
        "metrics": result.metrics,
        "steps": result.steps,
        "seconds": result.seconds,
    }
    emit(data, as_json, f"{model}  {shown}")


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of the processes that `torchrun` started on this machine, let the first say what is the same for all."""
    try:
        yield
    except MmhubError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        if isinstance(error, (UsageError, NotFoundError, Interrupted)) or getattr(error, "shared", False):
            raise click.exceptions.Exit(error.exit_code) from None
        error.message = f"process {os.environ.get('RANK', '?')}: {error.message}"
        raise


def _check_parts(recipe: Recipe) -> None:
    """Look every part up that the recipe names."""
    parts = {f"{modality}_encoder": part for modality, part in recipe.model.encoders.items()}
    for kind, part in (*parts.items(), ("fusion", recipe.model.fusion), ("decoder", recipe.model.decoder)):
        if part and part.use:
            find_component(kind, part.use)


def _as_name(folder: Path) -> str:
    """The folder as other commands take it: `a/b` alone could also be a repository on the Hub."""
    return f"./{folder}" if len(folder.parts) < 3 and not folder.is_absolute() else str(folder)
