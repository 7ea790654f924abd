"""Checks of guards: that they are built from their example, judge samples of every shape alike, and change none."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from mmhub.errors import MmhubError
from mmhub.guard.decisions import WITHHELD, without_content
from mmhub.interfaces import ComponentConfig, decode_config, encode_config
from mmhub.plugins import Component
from mmhub.spec import Change, Refusal
from mmhub.testing.catalogue import Check
from mmhub.testing.configs import _UNKNOWN, _is_import_path, _texts
from mmhub.testing.contract import ContractError, expect

_RULE = "Guard"
_SAMPLES: tuple[Mapping[str, Any], ...] = (
    {"text": "The weather is fine today."},
    {"text": ""},
    {"text": ["Is it raining?", "It is not."]},
    {"text": {"premise": "It rains.", "hypothesis": "It is wet."}},
    {"image": b"no picture", "text": "What is it?"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}]},
)
_ANSWERS: tuple[Mapping[str, Any], ...] = (
    {"label": "fine", "score": 0.9, "scores": {"fine": 0.9, "bad": 0.1}},
    {"labels": ["fine"], "scores": {"fine": 0.9, "bad": 0.1}},
    {"value": 0.5},
    {"text": "It is fine, thank you.", "finish": "end", "score": -1.5},
    {"text": "fine day", "words": [{"word": "fine", "start": 0.0, "end": 0.5}], "segments": [{"text": " fine day"}]},
    {"tags": ["O", "O"], "scores": [0.9, 0.8], "words": ["fine", "day"], "entities": [{"label": "X", "text": "day"}]},
    {"texts": ["fine", None], "finish": ["end", None], "score": [-1.5, None], "refused": [None, "no"]},
)


def builds(check: Check) -> None:
    """It is built from the manifest's `example` (or its defaults) for a model, with a name, `check` and `review`; `on`,
    if it has it, is made of "input" and "output"."""
    guard = _guard(check)
    missing = [name for name in ("name", "check", "review") if not hasattr(guard, name)]
    expect(not missing, f"it lacks {missing}", "name, check and review", _RULE)
    expect(isinstance(guard.name, str) and bool(guard.name), f"its name is {guard.name!r}", "a text", _RULE)
    on = tuple(getattr(guard, "on", ("input", "output")))
    expect(bool(on) and set(on) <= {"input", "output"}, f"on is {on}", "'input', 'output' or both", _RULE)


def config_round_trip(check: Check) -> None:
    """Its configuration becomes JSON and the same configuration again, holds no import path, and an unknown key in it
    is refused."""
    component = _component(check)
    cls, config = component.load(), _config(component)
    table = json.loads(json.dumps(encode_config(config), allow_nan=False))
    again = decode_config(cls.Config, table, "config")
    expect(again == config, f"its config comes back as {again}", f"{config}", "Config")
    for text in _texts(table):
        expect(not _is_import_path(text), f"its config holds {text!r}", "names, never import paths", "Config")
    try:
        decode_config(cls.Config, {**component.spec.example, _UNKNOWN: 1}, "config")
    except MmhubError:
        return
    expect(False, f"the key {_UNKNOWN!r} is accepted in silence", "a UsageError that names it", "Config")


def judges(check: Check) -> None:
    """Whatever shape a sample or an answer has, it says the same of it twice, in the right types, changes neither, and
    repeats in a refusal nothing of what was said; `check_all` says what `check` does. It may raise errors of
    mmhub.errors, such as for a model that is not there."""
    guard = _guard(check)
    for sample in _SAMPLES:
        kept = copy.deepcopy(sample)
        for call, kinds in _calls(guard, sample):
            first, second = _tried(call), _tried(call)
            expect(isinstance(first, kinds), f"it says {first!r}", f"one of {[k.__name__ for k in kinds]}", _RULE)
            expect(first == second, f"it says {first!r}, and then {second!r}", "the same", _RULE)
            if isinstance(first, Refusal):
                noted = without_content(first.reason, sample)
                expect(noted != WITHHELD, f"for {sample} it says {first.reason!r}", "nothing of what was said", _RULE)
        expect(sample == kept, f"it changes the sample to {sample}", "a copy", _RULE)
    for answer in _ANSWERS:
        given = copy.deepcopy(answer)
        found = _tried(lambda given=given: guard.review({"text": "How is it?"}, given))
        good = isinstance(found, (Mapping, Change, Refusal, MmhubError))
        expect(good, f"review gives a {type(found).__name__}", "an answer, a Change or a Refusal", _RULE)
        expect(given == answer, f"it changes the answer to {given}", "a copy", _RULE)
    if hasattr(guard, "check_all"):
        together = _tried(lambda: list(guard.check_all(list(_SAMPLES))))
        apart = [_tried(lambda sample=sample: guard.check(sample)) for sample in _SAMPLES]
        same = isinstance(together, MmhubError) or together == apart
        expect(same, f"check_all says {together}", f"what check says, {apart}", _RULE)


def _calls(guard: Any, sample: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[type, ...]]]:
    yield (lambda: guard.check(sample)), (str, Refusal, _Failed)
    if hasattr(guard, "rewrite"):
        yield (lambda: guard.rewrite(sample)), (Mapping, Change, _Failed)


class _Failed(MmhubError):
    """An error of mmhub.errors, which equals another of the same text."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Failed) and str(other) == str(self)

    __hash__ = MmhubError.__hash__


def _tried(call: Any) -> Any:
    """What a call returns, or the error of ours that it raises."""
    try:
        return call()
    except MmhubError as error:
        return _Failed(error.message, error.hint)


def _component(check: Check) -> Component:
    assert isinstance(check.target, Component)
    return check.target


def _config(component: Component) -> Any:
    cls = component.load()
    config = getattr(cls, "Config", None)
    good = isinstance(config, type) and issubclass(config, ComponentConfig)
    expect(good, f"the configuration of {cls.__name__} is {config!r}", "a ComponentConfig", "Config")
    try:
        return decode_config(cls.Config, component.spec.example, "the example")
    except MmhubError as error:
        raise ContractError(f"{error}; expected its example to build it [Config]") from error


def _guard(check: Check) -> Any:
    component = _component(check)
    model = SimpleNamespace(
        name="a model", modalities=("text", "image"), task=SimpleNamespace(name="classification"), device="cpu"
    )
    return component.load()(_config(component), model=model, folder=None)
