"""Checks of commands and hooks: that they run with what mmhub will give them, and leave alone what is not theirs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmhub.errors import MmhubError, NotFoundError
from mmhub.plugins import load_target
from mmhub.records import cause
from mmhub.spec import CommandSpec, DataRequest, DataSource
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import ContractError, expect
from mmhub.testing.isolation import work_folder

_SAMPLE = {"text": "The weather is fine today."}
_ANSWER = {"label": "fine", "score": 0.75}


def help(check: Check) -> None:
    """The command's `--help` runs, and says something."""
    from click.testing import CliRunner

    command = check.target
    assert isinstance(command, CommandSpec)
    loaded = load_target(
        command.factory, f"the command {command.name!r}", check.plugin.distribution, check.plugin.version
    )
    done = CliRunner().invoke(loaded, ["--help"], prog_name=f"mmhub {command.name}")
    why = f": {cause(done.exception)}" if done.exception else ""
    expect(done.exit_code == 0, f"`--help` ends with {done.exit_code}{why}", "0", "commands")
    expect("Usage:" in done.output, f"`--help` prints {done.output[:60]!r}", "a usage line", "commands")


def watches_a_run(check: Check) -> None:
    """Given a run, it returns callbacks, and each takes on_start, on_log (twice) and on_end without an error."""
    run = SimpleNamespace(folder=work_folder() / "run", config={"task": "classification", "seed": 0}, total_steps=2)
    run.folder.mkdir()
    for callback in _call(check, run=run):
        missing = [name for name in ("on_start", "on_log", "on_end") if not callable(getattr(callback, name, None))]
        what = type(callback).__name__
        expect(not missing, f"{what} lacks {missing}", "on_start, on_log and on_end", "hook mmhub_train_callbacks")
        callback.on_start(run)
        callback.on_log(1, {"loss": 1.5, "learning_rate": 1e-3})
        callback.on_log(2, {"loss": 1.25, "valid/accuracy": 0.5})
        callback.on_end(run)


def ignores_strangers(check: Check) -> None:
    """For a folder of no library it knows, it offers no reader."""
    folder = work_folder() / "unknown"
    folder.mkdir()
    for config in ({}, {"library": "of a stranger"}, {"model_type": None, "architecture": 3}):
        offers = _call(check, folder=folder, config=config)
        expect(not offers, f"it offers to read a folder with config {config}", "nothing", "hook mmhub_load_foreign")


def ignores_other_layouts(check: Check) -> None:
    """For a layout it does not know, it offers no writer."""
    encoder = SimpleNamespace(modality="of no plugin", config=None)
    offers = _call(check, encoder=encoder, decoder=None, layout="of no library")
    expect(not offers, "it offers to write a layout that does not exist", "nothing", "hook mmhub_write_foreign")


def opens_or_refuses(check: Check) -> None:
    """It returns `DataSource` records of a valid scheme, and a file that does not exist is refused with an error of
    mmhub.errors."""
    from mmhub.data.parts import scheme_of

    for source in _call(check):
        what = type(source).__name__
        expect(isinstance(source, DataSource), f"it returns a {what}", "DataSource", "hook mmhub_datasets")
        valid = scheme_of(f"{source.scheme}:") == source.scheme
        expect(valid, f"the scheme is {source.scheme!r}", "two or more of a-z, 0-9, +, - and .", "hook mmhub_datasets")
        request = DataRequest(address="no/such/file", split="train", find=_find_nothing)
        try:
            rows = list(source.open(request))
        except MmhubError:
            continue
        except Exception as error:
            raise ContractError(
                f"a missing file raises {cause(error)}; expected an error of mmhub.errors [hook mmhub_datasets]"
            ) from error
        expect(False, f"a missing file has {len(rows)} rows", "an error of mmhub.errors", "hook mmhub_datasets")


def lets_pass(check: Check) -> None:
    """Its guards have a name, let a harmless sample pass, and leave a harmless answer as it is."""
    rule = "hook mmhub_generation_guards"
    model = SimpleNamespace(name="a model", modalities=("text",), task=SimpleNamespace(name="classification"))
    for guard in _call(check, model=model):
        what = type(guard).__name__
        missing = [name for name in ("name", "check", "review") if not hasattr(guard, name)]
        expect(not missing, f"{what} lacks {missing}", "name, check and review", rule)
        expect(isinstance(guard.name, str) and bool(guard.name), f"its name is {guard.name!r}", "a text", rule)
        reason = guard.check(dict(_SAMPLE))
        expect(reason == "", f"for {_SAMPLE}, check says {reason!r}", "'', to let it pass", rule)
        answer = guard.review(dict(_SAMPLE), dict(_ANSWER))
        expect(dict(answer) == _ANSWER, f"it turns {_ANSWER} into {answer}", "the answer unchanged", rule)


def _find_nothing(path: str) -> Path:
    raise NotFoundError(f"no file or folder '{path}'", "check the path")


def _call(check: Check, **arguments: Any) -> list[Any]:
    """Call the plugin's implementation of the hook, and return what it gives as a list."""
    import pluggy

    from mmhub import hookspecs

    assert isinstance(check.target, str)
    manager = pluggy.PluginManager("mmhub")
    manager.add_hookspecs(hookspecs)
    manager.register(import_module(check.plugin.module))
    found: list[Any] = []
    for result in getattr(manager.hook, check.target)(**arguments):
        try:
            found += list(result)
        except TypeError:
            what = type(result).__name__
            raise ContractError(f"it returns a {what}; expected a list or generator [hook {check.target}]") from None
    return found
