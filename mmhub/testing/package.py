"""Checks of a plugin as a package: its manifest, what it names, its metadata, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from mmhub.errors import MmhubError
from mmhub.plugins import Component, Plugin, load_target
from mmhub.records import canonical
from mmhub.testing.catalogue import Check, role_of
from mmhub.testing.contract import ContractError, NotApplicableError, expect
from mmhub.testing.watch import watched

HEAVY = ("torch", "torchvision", "torchaudio", "transformers", "timm", "tensorflow", "jax")
SECONDS = 0.15  # of CPU time, beyond what mmhub.spec and pluggy take
_RULE = "manifest"
_PROBE = """
import sys, time
import mmhub.spec, pluggy
start = time.process_time()
for name in {modules!r}:
    __import__(name)
print()
print(time.process_time() - start, *(name for name in {heavy!r} if name in sys.modules))
"""


def manifest(check: Check) -> None:
    """The manifest is valid, and this mmhub can use the plugin: its status is "ok"."""
    plugin = check.plugin
    expect(plugin.status == "ok", f"the status is {plugin.status!r}: {plugin.problem}", "'ok'", _RULE)


def targets(check: Check) -> None:
    """Every factory, configuration and command the manifest names exists and is of the right type; modality and tasks
    of a class agree with the manifest; importing them opens no connection."""
    plugin = check.plugin
    with watched(None) as seen:
        for component in plugin.components:
            _check_component(component)
        for command in plugin.commands:
            _check_command(plugin, command.name, command.factory)
    expect(not seen.connections, f"importing opens {seen.connections[:1]}", "no connection", "imports")


def hooks(check: Check) -> None:
    """Every hook the manifest declares is implemented and marked `hookimpl`, takes arguments that the hook has, and no
    other hook is implemented."""
    plugin = check.plugin
    if not plugin.module:
        return
    import pluggy

    from mmhub import hookspecs

    module = import_module(plugin.module)
    found = {name for name in dir(module) if _is_marked(getattr(module, name))}
    missing, extra = sorted(set(plugin.hooks) - found), sorted(found - set(plugin.hooks))
    expect(not missing, f"{plugin.module} implements no {missing}", "a function marked hookimpl", _RULE)
    expect(not extra, f"{plugin.module} implements {extra}", "only hooks that the manifest lists", _RULE)
    manager = pluggy.PluginManager("mmhub")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ContractError(f"{error}; expected the arguments of the hook [{_RULE}]") from None


def metadata(check: Check) -> None:
    """The package's metadata require mmhub, and hold both entry points: `mmhub.manifest`, and `mmhub` if there are
    hooks."""
    found = _distribution(check.plugin)
    groups = {point.group for point in found.entry_points}
    expect("mmhub.manifest" in groups, f"the entry points are of {sorted(groups)}", "one of mmhub.manifest", _RULE)
    expect("mmhub" in groups or not check.plugin.hooks, "no entry point of group mmhub", "one, for the hooks", _RULE)
    required = [_required_name(line) for line in found.requires or ()]
    expect("mmhub" in required, f"Requires-Dist names {required}", "mmhub among them", "version numbers")


def import_light(check: Check) -> None:
    """Importing the top-level package and the hook module imports no torch, transformers, timm, torchaudio or
    tensorflow, and takes less than 150 ms of CPU time more than mmhub.spec and pluggy do."""
    plugin = check.plugin
    modules = list(dict.fromkeys([*_packages(plugin), *([plugin.module] if plugin.module else [])]))
    if not modules:
        raise NotApplicableError("it names no module")
    best = 60.0
    for _ in range(5):  # other processes disturb even CPU time
        seconds, heavy = _import_once(modules)
        expect(not heavy, f"importing {' and '.join(modules)} imports {heavy}", "nothing heavy", "import light")
        best = min(best, seconds)
        if not SECONDS <= best < 3 * SECONDS:
            break  # clear enough
    what = " and ".join(modules)
    expect(best < SECONDS, f"importing {what} takes {best:.2f} s", f"under {SECONDS} s", "import light")


def install_time(check: Check) -> None:
    """Installing runs no code: the package brings no .pth file that imports something (editable installs apart)."""
    for file in _distribution(check.plugin).files or ():
        path = Path(str(file.locate()))
        if path.suffix != ".pth" or "editable" in path.name or not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        code = [line for line in lines if line.startswith(("import ", "import\t"))]
        expect(not code, f"{path.name} runs {code[:1]} in every process", "no code in .pth files", "trust")


def _check_component(component: Component) -> None:
    from mmhub.interfaces import TASKS, ComponentConfig, Decoder, Encoder, Fusion

    kinds: dict[str, Any] = {"encoder": Encoder, "fusion": Fusion, "decoder": Decoder}
    spec, role = component.spec, role_of(component)
    what = f"{spec.kind} {spec.name!r}"
    known = "fusion, decoder or MODALITY_encoder, or guard"
    expect(role in (*kinds, "guard"), f"the kind is {spec.kind!r}", known, _RULE)
    cls = _load(spec.factory, what, component)
    base = kinds.get(role, object)  # what guards have to be `mmhub.testing.guards` says
    good = isinstance(cls, type) and issubclass(cls, base)
    expect(good, f"{spec.factory} is {_described(cls)}", f"a subclass of {base.__name__}", _RULE)
    abstract = sorted(getattr(cls, "__abstractmethods__", ()))
    expect(not abstract, f"{spec.factory} leaves {abstract} abstract", "a class that can be built", "roles")
    config = _load(spec.config, what, component) if spec.config else getattr(cls, "Config", None)
    good = isinstance(config, type) and issubclass(config, ComponentConfig)
    expect(good, f"the configuration of {what} is {_described(config)}", "a ComponentConfig", "Config")
    expect(
        config is getattr(cls, "Config", None), f"{spec.config} is not {spec.factory}.Config", "the same class", _RULE
    )
    if role == "encoder":
        modality = spec.kind.removesuffix("_encoder")
        expect(cls.modality == modality, f"{spec.factory}.modality is {cls.modality!r}", f"{modality!r}", _RULE)
        listed = not spec.modalities or spec.modalities == (modality,)
        expect(listed, f"the manifest lists the modalities {spec.modalities}", f"{modality!r} alone", _RULE)
    if role == "decoder":
        expect(bool(cls.tasks), f"{spec.factory}.tasks is empty", "the tasks it serves", "Decoder")
        unknown = [task for task in cls.tasks if task not in TASKS]
        expect(not unknown, f"{spec.factory} serves {unknown}", f"tasks among {', '.join(TASKS)}", "tasks")
        strange = [name for name in cls.needs if spec.modalities and name not in (*spec.modalities, "fused")]
        expect(not strange, f"{spec.factory} needs {strange}", f"streams among {spec.modalities}", _RULE)


def _check_command(plugin: Plugin, name: str, factory: str) -> None:
    import click

    try:
        command = load_target(factory, f"the command '{name}'", plugin.distribution, plugin.version)
    except MmhubError as error:
        raise ContractError(f"{error.message}; expected it to load [{_RULE}]") from error
    expect(isinstance(command, click.Command), f"{factory} is {_described(command)}", "a click command", _RULE)


def _load(target: str, what: str, component: Component) -> Any:
    try:
        return load_target(target, what, component.distribution, component.version)
    except MmhubError as error:
        raise ContractError(f"{error.message}; expected it to load [{_RULE}]") from error


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _is_marked(value: Any) -> bool:
    try:
        return isinstance(getattr(value, "mmhub_impl", None), dict)  # what HookimplMarker("mmhub") leaves
    except Exception:  # modules hold objects that answer anything
        return False


def _distribution(plugin: Plugin) -> Distribution:
    try:
        return distribution(plugin.distribution)
    except PackageNotFoundError:
        raise ContractError(f"there are no metadata of {plugin.distribution}; expected a dist-info [{_RULE}]") from None


def _required_name(line: str) -> str:
    from packaging.requirements import Requirement

    return canonical(Requirement(line).name)


def _packages(plugin: Plugin) -> Iterator[str]:
    targets_ = [component.spec.factory for component in plugin.components]
    targets_ += [command.factory for command in plugin.commands] + ([plugin.module] if plugin.module else [])
    yield from (target.partition(":")[0].partition(".")[0] for target in targets_)


def _import_once(modules: list[str]) -> tuple[float, list[str]]:
    """Import modules in a process of their own; return CPU seconds and the heavy ones among what came along."""
    code = _PROBE.format(modules=modules, heavy=HEAVY)
    path = [repr(entry) for entry in sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:] = [{', '.join(path)}]\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ContractError(f"importing {' and '.join(modules)} fails: {last}; expected no error [imports]")
    seconds, *heavy = done.stdout.splitlines()[-1].split()  # what they print themselves comes first
    return float(seconds), heavy
