"""Staged training: a run for each `[[train.stages]]` of a recipe, each from the best model of the one before.

    OUT/recipe.toml      the whole recipe
    OUT/stages/1-NAME/   the run of a stage, with a model/ but for the last, whose model is OUT/model
      done.json          written last: the stage is not run again; its checkpoints are removed then
    OUT/metrics.jsonl, sessions.jsonl, report.html     of all stages, whose steps count on

What a stage trains is said here, and which comes next; how a run goes is left to `mmhub.engine.loop`.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmhub.config import Recipe, StageRecipe, check_parts, dump_recipe, stage_name, stage_recipe
from mmhub.engine.data import TrainingData, resolved, with_base_columns
from mmhub.engine.data import replace as with_values
from mmhub.engine.mixing import make_mixer
from mmhub.engine.page import METRICS, SESSIONS, write_page
from mmhub.engine.ranks import Ranks
from mmhub.errors import UsageError
from mmhub.files import disk_errors, write_file
from mmhub.interfaces import Task
from mmhub.model import Model

DONE = "done.json"
_Result = TypeVar("_Result")


class Finished(msgspec.Struct):
    """done.json: what a stage came to. `parents` are what the model's weights started from, before any stage."""

    name: str
    parts: list[str]
    steps: int
    best_step: int
    seconds: float
    data: dict[str, Any] = {}
    parents: list[dict[str, str]] = []

    def facts(self) -> dict[str, Any]:
        """What provenance.json says of the stage."""
        return {key: value for key, value in msgspec.to_builtins(self).items() if key != "parents"}


@dataclass(frozen=True)
class Stage:
    """One stage, as its own run sees it.

    Attributes:
        number: from 1. whole, recipes: the recipe of the whole run, and those of its stages. out: the run's folder.
        done: what the stages before came to.
    """

    number: int
    whole: Recipe
    recipes: Sequence[Recipe]
    out: Path
    done: Sequence[Finished] = ()

    @property
    def recipe(self) -> Recipe:
        return self.recipes[self.number - 1]

    @property
    def name(self) -> str:
        return stage_name(self.recipe.train.stages[0])

    @property
    def parts(self) -> Sequence[str]:
        """What it trains."""
        return self.recipe.train.stages[0].parts

    @property
    def last(self) -> bool:
        return self.number == len(self.recipes)

    @property
    def title(self) -> str:
        return f"stage {self.number}/{len(self.recipes)} {self.name}"

    @property
    def folder(self) -> Path:
        """Where its run is."""
        return self.out / "stages" / f"{self.number}-{self.name}"

    @property
    def home(self) -> Path:
        """Where its model goes."""
        return self.out if self.last else self.folder

    @property
    def start(self) -> Path | None:
        """The model it starts from, None where it is built."""
        return replace(self, number=self.number - 1).home / "model" if self.number > 1 else None

    @property
    def parents(self) -> list[dict[str, str]]:
        """What the weights started from before the first stage."""
        return self.done[0].parents if self.done else []

    def other_data(self, task: Task, folder: Path | None) -> list[TrainingData]:
        """What the other stages train and validate on, where it is not what this one does.

        Raises:
            UsageError, InputError, NotFoundError: it cannot be read, which is better known before the first stage.
        """
        known, found = [self.recipe.data], []
        for recipe in self.recipes:
            if recipe.data not in known:
                known.append(recipe.data)
                found.append(TrainingData(recipe, task, folder))
        return found

    def hold(self, model: Model) -> None:
        """Freeze what this stage does not train."""
        _hold(model, self.recipe)

    def check(self, model: Model) -> None:
        """Try all stages on the model they start from, before the first step of the first.

        Raises:
            UsageError: one names a part that the model lacks, trains nothing, or cannot mix pictures.
        """
        for number, recipe in enumerate(self.recipes, 1):
            (stage,) = recipe.train.stages
            where = f"train.stages {number}"
            check_parts(stage, [*model.encoders, "fusion", "decoder"], where)
            with _held(model, recipe):
                if not any(parameter.requires_grad for parameter in model.parameters()):
                    hint = "name a part that has weights, and is not frozen by its recipe"
                    raise UsageError(f"{where} trains nothing: {', '.join(stage.parts)} has nothing to learn", hint)
                make_mixer(model, recipe.train)

    def finish(self, came_to: Finished) -> None:
        """Write down, for good, that this stage is done; its checkpoints are of no more use."""
        with disk_errors("the stage", self.folder):
            write_file(self.folder / DONE, msgspec.json.format(msgspec.json.encode(came_to), indent=2))
        self.tidy()

    def tidy(self) -> None:
        """Remove the checkpoints of a stage that is done."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def finished(self) -> Finished | None:
        """What the stage came to, None if it is not done."""
        try:
            return msgspec.json.decode((self.folder / DONE).read_bytes(), type=Finished)
        except FileNotFoundError:
            return None


def _hold(model: Model, recipe: Recipe) -> None:
    (stage,) = recipe.train.stages
    for name in (*model.encoders, "fusion", "decoder"):
        if name not in stage.parts:
            model.freeze(name)


@contextmanager
def _held(model: Model, recipe: Recipe) -> Iterator[None]:
    """Hold what a stage holds, for a while."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen, training = set(model.frozen), model.training
    _hold(model, recipe)
    try:
        yield
    finally:
        model.frozen = frozen
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)


# -- one after the other ----------------------------------------------------------------------------------------


def train_stages(
    recipe: Recipe,
    out: Path,
    folder: Path | None,
    ranks: Ranks,
    *,
    resume: bool,
    begin: Callable[[Path, Recipe], None],
    run: Callable[[Stage], _Result],
) -> _Result:
    """Run every stage that is not done; return the last one's result, with the steps and seconds of all.

    `begin` checks the run folder against the recipe, `run` trains one stage and may be asked for the last one again.
    """
    recipe = whole_recipe(recipe, out, folder, resume=resume)
    if ranks.first:
        begin(out, recipe)
    fresh = not (out.is_dir() and any(out.iterdir()))
    ranks.barrier()
    recipes = [stage_recipe(recipe, number) for number in range(1, len(recipe.train.stages) + 1)]
    done: list[Finished] = []
    stages = [Stage(number, recipe, recipes, out) for number in range(1, len(recipes) + 1)]
    if ranks.first:
        with disk_errors("the run", out):
            out.mkdir(parents=True, exist_ok=True)
            write_file(out / "recipe.toml", dump_recipe(recipe))
    ranks.barrier()
    try:
        for stage in stages[:-1]:
            known = _finished(stage, ranks)
            if known is None:
                run(replace(stage, done=tuple(done)))
                gc.collect()  # what trained it may be held by cycles, and the next needs its memory
                known = _finished(stage, ranks)
            elif ranks.first:
                stage.tidy()  # it may have been killed in between
            assert known is not None, "a stage that ran to its end has said so"
            done.append(known)
        result: Any = run(replace(stages[-1], done=tuple(done)))
    finally:
        if ranks.first:
            _leave(out, stages, fresh)
    steps, seconds = result.steps + sum(one.steps for one in done), result.seconds + sum(one.seconds for one in done)
    return replace(result, out=out, steps=steps, seconds=round(seconds, 3))


def whole_recipe(recipe: Recipe, out: Path, folder: Path | None, *, resume: bool) -> Recipe:
    """The recipe with absolute paths, also in its stages, and with the columns of `model.base`."""
    recipe = with_base_columns(recipe, out, folder, resume=resume)
    stages = []
    for number, stage in enumerate(recipe.train.stages, 1):
        if stage.data is not None:
            data = resolved(stage_recipe(recipe, number), folder).data
            own = {key: getattr(data, key) for key in ("train", "mix", "valid") if getattr(stage.data, key)}
            stage = with_values(stage, {"data": with_values(stage.data, own)})
        stages.append(stage)
    return resolved(with_values(recipe, {"train": with_values(recipe.train, {"stages": stages})}), folder)


def same_begun(old: Sequence[StageRecipe], new: Sequence[StageRecipe], out: Path) -> bool:
    """Say whether the stages that have begun in a run folder are the same; others may be changed, added and left out.

    The last stage stays the last once it has begun, and no other becomes it, for its model has another place.
    """
    folders = [out / "stages" / f"{number}-{stage_name(stage)}" for number, stage in enumerate(old, 1)]
    begun = sum(folder.exists() for folder in folders)
    last = begun in (len(old), len(new))
    return 0 < begun <= len(new) and old[:begun] == new[:begun] and (not last or len(old) == len(new))


def _finished(stage: Stage, ranks: Ranks) -> Finished | None:
    """What the first process finds of a stage, for all."""
    found = ranks.tell(msgspec.to_builtins(stage.finished()) if ranks.first else None)
    return None if found is None else msgspec.convert(found, Finished)


# -- what the whole run tells -----------------------------------------------------------------------------------


def _leave(out: Path, stages: Sequence[Stage], fresh: bool) -> None:
    """Join what the stages say; a run that failed before its first step leaves nothing."""
    if fresh and not stages[0].folder.exists():
        shutil.rmtree(out, ignore_errors=True)
        return
    try:
        for name in (METRICS, SESSIONS):
            lines = "".join(f"{json.dumps(line)}\n" for line in _lines(stages, name))
            write_file(out / name, lines)
        write_page(out)
    except OSError as problem:
        print(f"warning: {METRICS} of all stages is not written: {problem}", file=sys.stderr)


def _lines(stages: Sequence[Stage], name: str) -> Iterator[dict[str, Any]]:
    """The lines of all stages, with the number of the stage; steps count on."""
    before = 0
    for stage in stages:
        path, found = stage.folder / name, stage.finished()
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut off where a process was killed
            counts = {key: before + line[key] for key in ("step", "total_steps") if key in line}
            yield {"step": 0, "stage": stage.number} | line | counts
        before += found.steps if found else 0
