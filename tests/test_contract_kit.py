"""The contract kit: it finds every planted fault by the check meant for it, and nothing in the clean twins."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from mmhub import plugins
from mmhub.errors import NotFoundError, UsageError
from mmhub.hookspecs import hook_names
from mmhub.interfaces import Decoder, Encoder, Fusion
from mmhub.plugins import Component, Index, Plugin, get_index
from mmhub.spec import ComponentSpec
from mmhub.testing import Check, ContractError, NotApplicableError, checks_of, find_checks, parametrize_checks
from mmhub.testing.catalogue import CHECKS, documentation
from tests.fake_plugins import ROOT
from tests.faulty_parts import (
    CLEAN,
    FAULTS,
    Fading,
    HiddenState,
    LooksAtWeights,
    Mean,
    Migrating,
    Needless,
    NothingMissing,
    ReadsTheFirst,
    Sign,
    WrongMigration,
)

RAISING = (HiddenState, LooksAtWeights, NothingMissing, ReadsTheFirst)  # found by what somebody else raises
ROLES: dict[str, type[Any]] = {"numbers_encoder": Encoder, "fusion": Fusion, "decoder": Decoder}
FAULT_OF = {names[0]: cls for cls, names in FAULTS.items()}
# clean parts, and the checks that are not for their kind
NOT_FOR: dict[type[Any], set[str]] = {
    Mean: {"by-plan", "no-items"},
    Sign: {"token-losses", "step-by-step", "select", "texts-apart", "media", "goes-on", "embed", "text-processor"},
    Fading: {"streams", "loss-mean", "predict-schema", "targets-refused", "references"},
}
SCHEMA_2 = (Migrating, WrongMigration)


def plugin_of(*classes: type[Any]) -> Plugin:
    """A plugin of faulty parts, as if it were installed; a component has the name of its class."""
    specs = [
        ComponentSpec(
            kind=next(kind for kind, role in ROLES.items() if issubclass(cls, role)),
            name=cls.__name__,
            factory=f"tests.faulty_parts:{cls.__name__}",
            config=f"tests.faulty_parts:{cls.__name__}.Config",
            schema=2 if cls in SCHEMA_2 else 1,
        )
        for cls in classes
    ]
    return Plugin(
        distribution="mmhub-faulty", version="0.1.0", summary="", status="ok", problem="", manifest="", module="",
        hooks=(), components=tuple(Component(spec, "mmhub-faulty", "0.1.0") for spec in specs), commands=(), models={},
    )  # fmt: skip


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """All clean and faulty parts as one installed plugin."""
    plugin = plugin_of(*CLEAN, *FAULTS)
    monkeypatch.setattr(plugins, "_index", Index((*get_index().plugins, plugin)))
    return plugin


def checks_for(plugin: Plugin, cls: type[Any]) -> dict[str, Check]:
    """The checks of one class by name."""
    found = [check for check in checks_of(plugin) if f":{cls.__name__}/" in check.id]
    return {check.id.rpartition("/")[2]: check for check in found}


@pytest.mark.parametrize("cls", [pytest.param(cls, id=cls.__name__) for cls in CLEAN])
def test_a_clean_component_passes_every_check(faulty: Plugin, cls: type[Any]) -> None:
    results = {name: _result(check) for name, check in checks_for(faulty, cls).items()}
    found = {name for name, text in results.items() if text.startswith("NotApplicableError")}
    assert {name: text for name, text in results.items() if text != "passed" and name not in found} == {}
    assert found == NOT_FOR.get(cls, set())


@pytest.mark.parametrize("cls", [pytest.param(cls, id=cls.__name__) for cls in FAULTS])
def test_each_planted_fault_is_found_by_its_check(faulty: Plugin, cls: type[Any]) -> None:
    checks = checks_for(faulty, cls)
    for name in FAULTS[cls]:
        with pytest.raises(ContractError, match=r"expected .*\[") as caught:
            checks[name].run()
        assert "\n" not in str(caught.value) and ("it raised" not in str(caught.value) or cls in RAISING)


def test_every_check_of_a_component_has_a_planted_fault() -> None:
    names = {
        name for role in ("component", "encoder", "fusion", "decoder") for _, names in CHECKS[role] for name in names
    }
    assert names == {name for found in FAULTS.values() for name in found[:1]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factory": "tests.faulty_parts:Sign"}, "is the class Sign; expected a subclass of Encoder"),
        ({"factory": "tests.faulty_parts:Nobody"}, "has no attribute 'Nobody'; expected it to load"),
        ({"config": "tests.faulty_parts:Mean.Config"}, "is not tests.faulty_parts:Clean.Config; expected the same"),
        ({"config": "tests.faulty_parts:Words"}, "is the class Words; expected a ComponentConfig"),
        ({"kind": "smell_encoder"}, "modality is 'numbers'; expected 'smell'"),
        ({"modalities": ("text",)}, r"lists the modalities \('text',\); expected 'numbers' alone"),
        ({"kind": "encoder_of_numbers"}, "the kind is 'encoder_of_numbers'; expected fusion, decoder or"),
        ({"kind": "decoder", "factory": "tests.faulty_parts:NoTask", "config": ""}, r"serves \['juggling'\]"),
    ],
)
def test_a_manifest_that_disagrees_with_the_code_is_found(wrong: dict[str, Any], message: str) -> None:
    plugin = plugin_of(CLEAN[0])
    (component,) = plugin.components
    component = replace(component, spec=msgspec.structs.replace(component.spec, **wrong))
    checks = {check.id: check for check in checks_of(replace(plugin, components=(component,)))}
    with pytest.raises(ContractError, match=message):
        checks["plugin/targets"].run()


def test_every_hook_has_a_check() -> None:
    assert set(hook_names()) <= set(CHECKS)


def test_an_error_of_the_plugin_is_told_with_its_line(faulty: Plugin) -> None:
    with pytest.raises(ContractError, match=r"it raised RuntimeError: .* at faulty_parts\.py:\d+; expected no error"):
        checks_for(faulty, LooksAtWeights)["builds-on-meta"].run()


def test_what_cannot_be_built_fails_one_check_and_skips_the_others(faulty: Plugin) -> None:
    results = {name: _result(check) for name, check in checks_for(faulty, Needless).items()}
    assert results.pop("builds").startswith("ContractError: the example of mmhub-faulty/Needless: the key 'dim'")
    assert results.pop("schema") == "passed"  # which asks only the manifest
    assert all(
        text.startswith("NotApplicableError: it cannot be built, see the check builds") for text in results.values()
    )
    assert len(results) > 20


def _result(check: Check) -> str:
    try:
        check.run()
    except (ContractError, NotApplicableError) as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def test_a_check_leaves_the_process_as_it_was(faulty: Plugin) -> None:
    before = (os.environ.copy(), Path.cwd(), tempfile.gettempdir(), random.getstate(), torch.get_rng_state().tolist())
    for check in checks_for(faulty, FAULT_OF["writes"]).values():
        if not check.id.endswith("compile"):
            with suppress(ContractError):
                check.run()
    after = (os.environ.copy(), Path.cwd(), tempfile.gettempdir(), random.getstate(), torch.get_rng_state().tolist())
    assert after == before
    assert plugins._index is not None and faulty in plugins._index.plugins


def test_raw_inputs_of_the_author_replace_those_of_the_encoder(faulty: Plugin) -> None:
    check = next(c for c in checks_of(faulty, {"numbers": ["1"]}) if c.id == "numbers_encoder:Clean/builds")
    with pytest.raises(ContractError, match="has 1 raw inputs of the modality 'numbers'; expected at least two"):
        check.run()
    check = next(c for c in checks_of(faulty, {"numbers": ["1", "x"]}) if c.id == "numbers_encoder:Clean/shapes")
    with pytest.raises(ContractError, match="'x' is no list of numbers"):
        check.run()


# -- collecting


def test_checks_are_collected_from_the_manifest_alone() -> None:
    code = (
        "import sys, mmhub.testing; mark = mmhub.testing.find_checks('mmhub-text');"
        "print(len(mark), *{'torch', 'pytest', 'transformers', 'mmhub_text'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, *heavy = done.stdout.split()
    assert int(number) > 100 and not heavy


def test_the_pytest_plugin_imports_nothing_but_pytest() -> None:
    code = (
        "import sys, pytest; before = {*sys.modules}; import mmhub.testing.pytest_plugin;"
        "print(*{name.split('.')[0] for name in {*sys.modules} - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["mmhub"]


def test_the_public_names_of_the_kit_are_these() -> None:
    import mmhub.testing as kit

    public = ["Check", "ContractError", "NotApplicableError", "checks_of", "find_checks", "parametrize_checks"]
    assert kit.__all__ == public and all(getattr(kit, name) for name in public)
    with pytest.raises(AttributeError, match="no attribute 'parametrise_check'"):
        _ = kit.parametrise_check  # type: ignore[attr-defined]


def test_an_expected_failure_is_a_strict_xfail_with_its_reason() -> None:
    mark = parametrize_checks("mmhub-heads", expected_failures={"decoder:regression/compile": "it cannot"})
    parameters = {parameter.id: parameter for parameter in mark.args[1]}
    (xfail,) = parameters["decoder:regression/compile"].marks
    assert xfail.name == "xfail" and xfail.kwargs == {"reason": "it cannot", "strict": True}
    assert [id for id, parameter in parameters.items() if parameter.marks] == ["decoder:regression/compile"]
    assert [check.id for check in find_checks("mmhub-heads")] == list(parameters)


def test_marks_go_to_the_checks_their_pattern_names() -> None:
    mark = parametrize_checks("mmhub-heads", marks={"*/compile": pytest.mark.slow})
    marked = [parameter.id for parameter in mark.args[1] if parameter.marks]
    assert {"decoder:classification/compile", "decoder:regression/compile"} <= set(marked)
    assert marked == [check.id for check in find_checks("mmhub-heads") if check.id.endswith("/compile")]


def test_a_wrong_id_among_the_expected_failures_is_an_error_with_near_matches() -> None:
    with pytest.raises(UsageError, match="'decoder:regresion/compile', which is no check of mmhub-heads; did you mean"):
        parametrize_checks("mmhub-heads", expected_failures={"decoder:regresion/compile": "typo"})


def test_a_plugin_that_is_not_installed_is_an_error_with_near_matches() -> None:
    with pytest.raises(NotFoundError, match=r"'mmhub-haeds' is not installed; .*did you mean 'mmhub-heads'"):
        parametrize_checks("mmhub-haeds")


def test_a_broken_plugin_gets_the_check_of_its_manifest_alone() -> None:
    (check,) = checks_of(replace(plugin_of(), status="broken", problem="api is missing"))
    with pytest.raises(ContractError, match="the status is 'broken': api is missing; expected 'ok'"):
        check.run()


# -- documentation


def test_the_documentation_lists_every_check_with_its_docstring() -> None:
    text = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith("| `")]
    assert listed == [f"| `{name}` | {words} |" for _, name, words in documentation()]
