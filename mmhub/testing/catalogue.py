"""The list of checks by name, and which of them a plugin gets, read from its static manifest.

The checks themselves are functions in the modules named here; they import torch, so they are imported when one runs.
A check's documentation is its function's docstring (docs/contract.md holds them all, and a test compares).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from mmhub.errors import NotFoundError, PluginError, did_you_mean
from mmhub.plugins import Component, Plugin, get_index
from mmhub.records import CORE, canonical, cause
from mmhub.spec import CommandSpec

# what is checked: (module in mmhub.testing, checks). A check's function has its name with underscores.
CHECKS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "plugin": (("package", ("manifest", "targets", "hooks", "metadata", "import-light", "install-time")),),
    "component": (
        ("configs", ("builds", "builds-on-meta", "config-round-trip", "unknown-key", "defaults", "schema")),
        ("storage", ("save-load", "state-dict", "offline", "writes")),
        (
            "tensors",
            ("determinism", "inputs-unchanged", "gradients", "training", "autocast", "compile", "moves"),
        ),
    ),
    "encoder": (
        (
            "encoders",
            (
                "shapes",
                "mask",
                "token-count",
                "padding-invariance",
                "padding-garbage",
                "batch-invariance",
                "missing-rows",
            ),
        ),
        ("processors", ("processor-state", "processor-refuses", "processor-packs")),
    ),
    "fusion": (
        (
            "fusions",
            (
                "shapes",
                "missing",
                "missing-leak",
                "batch-invariance",
                "padding-invariance",
                "by-plan",
                "no-items",
            ),
        ),
    ),
    "decoder": (
        (
            "decoders",
            (
                "streams",
                "batch-invariance",
                "loss-decreases",
                "loss-mean",
                "predict-schema",
                "targets-refused",
                "references",
            ),
        ),
        (
            "writing",
            (
                "token-losses",
                "step-by-step",
                "select",
                "texts-apart",
                "media",
                "goes-on",
                "embed",
                "text-processor",
            ),
        ),
    ),
    "guard": (("guards", ("builds", "config-round-trip", "judges")),),
    "command": (("hooks", ("help",)),),
    "mmhub_train_callbacks": (("hooks", ("watches-a-run",)),),
    "mmhub_load_foreign": (("hooks", ("ignores-strangers",)),),
    "mmhub_write_foreign": (("hooks", ("ignores-other-layouts",)),),
    "mmhub_datasets": (("hooks", ("opens-or-refuses",)),),
    "mmhub_generation_guards": (("hooks", ("lets-pass",)),),
}


@dataclass(frozen=True)
class Check:
    """One check of one plugin: `plugin/NAME`, `KIND:NAME/CHECK`, `command:NAME/CHECK` or `hook:NAME/CHECK`.

    Attributes:
        plugin: the plugin that is checked. target: its component, command or hook, None for the package as a whole.
        function: `module:attribute` of the check. samples: raw inputs by modality that the author gave.
    """

    id: str
    plugin: Plugin
    function: str
    target: Component | CommandSpec | str | None = None
    samples: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def with_example(self, example: Mapping[str, Any]) -> Check:
        """Return the same check of the component built from another configuration than the manifest's."""
        assert isinstance(self.target, Component), f"{self.id} is no check of a component"
        spec = msgspec.structs.replace(self.target.spec, example=dict(example))
        return replace(self, target=replace(self.target, spec=spec))

    def run(self) -> None:
        """Run the check, in a temporary home and working folder, leaving the process's random state as it was.

        Raises:
            ContractError: the contract is broken. NotApplicableError: the check does not apply.
        """
        from mmhub.testing.contract import ContractError, NotApplicableError, one_line
        from mmhub.testing.isolation import isolated

        module, _, name = self.function.partition(":")
        try:
            with isolated():
                getattr(import_module(module), name)(self)
        except (ContractError, NotApplicableError, KeyboardInterrupt):
            raise
        except BaseException as error:  # a plugin may even call sys.exit
            raise ContractError(
                one_line(f"it raised {cause(error)}{_place(error, self.plugin)}; expected no error [{self.id}]")
            ) from error


def checks_of(plugin: Plugin, samples: Mapping[str, Sequence[Any]] | None = None) -> list[Check]:
    """Return the checks that apply to `plugin`; nothing of it is imported.

    A plugin whose status is not "ok" gets the check of its manifest alone.
    """
    samples = samples or {}
    wanted = dict(_functions("plugin"))
    if plugin.status != "ok":
        wanted = {"manifest": wanted["manifest"]}
    elif plugin.distribution == CORE:  # the core is no package of its own kind
        wanted = {name: wanted[name] for name in ("manifest", "targets")}
    checks = [Check(f"plugin/{name}", plugin, function) for name, function in wanted.items()]
    if plugin.status != "ok":
        return checks
    for component in plugin.components:
        subject = f"{component.spec.kind}:{component.spec.name}"
        role = role_of(component)
        for name, function in (*(_functions("component") if role != "guard" else ()), *_functions(role)):
            checks.append(Check(f"{subject}/{name}", plugin, function, component, samples))
    for command in plugin.commands:
        checks += [Check(f"command:{command.name}/{n}", plugin, f, command) for n, f in _functions("command")]
    for hook in plugin.hooks:
        checks += [Check(f"hook:{hook}/{n}", plugin, f, hook) for n, f in _functions(hook)]
    return checks


def find_checks(distribution: str, samples: Mapping[str, Sequence[Any]] | None = None) -> list[Check]:
    """Return the checks of an installed plugin.

    Raises:
        NotFoundError: it is not installed. PluginError: it is switched off.
    """
    index = get_index()
    plugin = index.plugin(distribution)
    if plugin is None:
        names = [one.distribution for one in index.plugins]
        near = did_you_mean(canonical(distribution), names)
        hint = "install it first, from its source: mmhub plugins install -e ." + (f" ({near})" if near else "")
        raise NotFoundError(f"the plugin '{distribution}' is not installed", hint)
    if plugin.status == "disabled":
        raise PluginError(f"the plugin {plugin} is disabled: {plugin.problem}")
    return checks_of(plugin, samples)


def role_of(component: Component) -> str:
    """Return "encoder", "fusion", "decoder" or "guard"."""
    return "encoder" if component.spec.kind.endswith("_encoder") else component.spec.kind


def documentation() -> Iterator[tuple[str, str, str]]:
    """Yield (what is checked, check, docstring) of every check; imports them all."""
    for subject in CHECKS:
        for name, function in _functions(subject):
            module, _, attribute = function.partition(":")
            yield subject, name, " ".join(str(getattr(import_module(module), attribute).__doc__).split())


def _functions(subject: str) -> Iterator[tuple[str, str]]:
    for module, names in CHECKS.get(subject, ()):
        yield from ((name, f"mmhub.testing.{module}:{name.replace('-', '_')}") for name in names)


def _place(error: BaseException, plugin: Plugin) -> str:
    """Where an error was raised: the innermost line of the plugin if there is one, else the innermost of all."""
    from traceback import extract_tb

    named = [component.spec.factory for component in plugin.components] + [
        command.factory for command in plugin.commands
    ]
    packages = {target.partition(":")[0].partition(".")[0] for target in (*named, plugin.module) if target}
    frames = list(extract_tb(error.__traceback__))
    theirs = [frame for frame in frames if packages & set(Path(frame.filename).parts)]
    frame = (theirs or frames)[-1] if frames else None
    return f" at {Path(frame.filename).name}:{frame.lineno}" if frame else ""
