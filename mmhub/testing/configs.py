"""Checks of every component: that it is built from its example, and what its configuration is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mmhub.errors import MmhubError
from mmhub.interfaces import Processor, Stream, decode_config, encode_config
from mmhub.testing.catalogue import Check, role_of
from mmhub.testing.contract import ContractError, expect
from mmhub.testing.subject import Subject, subject_of
from mmhub.weights import meta_parameters

_RULE = "Config"
_UNKNOWN = "no_such_key_of_any_component"


def builds(check: Check) -> None:
    """It is built on the CPU from the manifest's `example` (or its defaults), all numbers finite, with the attributes
    its role promises: config, and dim, pooled_dim, padding_invariant and processor, or inputs and outputs."""
    subject: Subject = subject_of(check)
    torch.manual_seed(0)
    try:
        subject.complete()
        module = subject.build()
    except (MmhubError, ContractError) as error:
        raise ContractError(f"{error}; expected its example to build it [{_RULE}]") from error
    expect(isinstance(module, nn.Module), f"it is a {type(module).__name__}", "a torch module", "roles")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        expect(not tensor.is_meta, f"{name} is on the meta device", "real numbers", "roles")
        expect(bool(torch.isfinite(tensor).all()), f"{name} is not finite", "finite weights", "roles")
    found = type(getattr(module, "config", None)).__name__
    expect(isinstance(module.config, subject.cls.Config), f"config is a {found}", "its own Config", _RULE)
    _check_attributes(role_of(subject.component), module)


def builds_on_meta(check: Check) -> None:
    """It is built while parameters are on the meta device, as loading a checkpoint does, with the same tensors."""
    subject: Subject = subject_of(check)
    wanted = {name: tensor.shape for name, tensor in subject.part().state_dict().items()}
    with meta_parameters():
        module = subject.build()
    expect(all(p.is_meta for p in module.parameters()), "a parameter has data", "all on the meta device", "load")
    found = {name: tensor.shape for name, tensor in module.state_dict().items()}
    gap = sorted(set(found.items()) ^ set(wanted.items()))
    expect(not gap, f"on meta, it has other tensors: {gap[:2]}", "the same as on the CPU", "load")


def config_round_trip(check: Check) -> None:
    """Its configuration becomes JSON and the same configuration again, and holds no import path."""
    subject: Subject = subject_of(check)
    for config in (subject.part().config, subject.config()):
        try:
            table = encode_config(config)
            again = decode_config(subject.cls.Config, json.loads(json.dumps(table, allow_nan=False)), "config")
        except (TypeError, ValueError, MmhubError) as error:
            raise ContractError(f"its config makes no JSON: {error}; expected names and numbers [{_RULE}]") from error
        expect(again == config, f"its config comes back as {again}", f"{config}", _RULE)
        for text in _texts(table):
            expect(not _is_import_path(text), f"its config holds {text!r}", "names, never import paths", _RULE)


def unknown_key(check: Check) -> None:
    """An unknown key in its configuration is refused."""
    subject: Subject = subject_of(check)
    subject.part()
    table = {**subject.component.spec.example, _UNKNOWN: 1}
    try:
        subject.build(decode_config(subject.cls.Config, table, "config"))
    except MmhubError:
        return
    expect(False, f"the key {_UNKNOWN!r} is accepted in silence", "a UsageError that names it", _RULE)


def defaults(check: Check) -> None:
    """Its configuration is frozen, building leaves it as it was, and two instances share nothing that can change."""
    subject: Subject = subject_of(check)
    subject.part()
    config, other = subject.complete(), subject.complete()
    before = encode_config(config)
    one, two = subject.build(config), subject.build(other)
    expect(encode_config(config) == before, "building changes the config it is given", "a copy", _RULE)
    for name in config.__struct_fields__:
        a, b = getattr(config, name), getattr(other, name)
        shared = a is b and isinstance(a, (list, dict, set))
        expect(not shared or not a, f"two configs share the {type(a).__name__} in {name!r}", "one each", _RULE)
    expect(bool(config.__struct_config__.frozen), "a config can be changed", "a frozen one", _RULE)
    places = {t.data_ptr() for t in one.state_dict().values() if t.numel()}
    shared_tensors = [name for name, t in two.state_dict().items() if t.numel() and t.data_ptr() in places]
    expect(not shared_tensors, f"two instances share {shared_tensors[:2]}", "tensors of their own", "roles")


def schema(check: Check) -> None:
    """`schema` is at least 1; above 1, a class method `migrate(config, from_schema)` turns every older configuration,
    keys missing or already new, into one that is accepted now."""
    subject: Subject = subject_of(check)
    newest, rule = subject.component.spec.schema, "schema"
    expect(newest >= 1, f"schema is {newest}", "1 or more", rule)
    if newest == 1:
        return
    migrate = getattr(subject.cls, "migrate", None)
    bound = getattr(migrate, "__self__", None) is subject.cls
    expect(callable(migrate) and bound, f"schema is {newest}, and it has no class method migrate", "one", rule)
    assert migrate is not None
    for older in range(1, newest):
        for table in ({}, dict(subject.component.spec.example)):
            given = json.dumps(table, sort_keys=True)
            try:
                migrated = migrate(json.loads(given), older)
            except Exception as error:
                raise ContractError(f"migrate({given}, {older}) raises {error!r}; expected a table [{rule}]") from error
            what = type(migrated).__name__
            expect(isinstance(migrated, Mapping), f"migrate({given}, {older}) gives a {what}", "a table", rule)
            if table or _is_valid(subject, table):
                expect(_is_valid(subject, migrated), f"migrate({given}, {older}) gives {migrated}", "a valid one", rule)


def _check_attributes(role: str, module: Any) -> None:
    rule = f"{role.capitalize()}"
    if role == "encoder":
        good = isinstance(module.dim, int) and module.dim > 0
        expect(good, f"dim is {module.dim!r}", "the width of its tokens", rule)
        pooled = module.pooled_dim
        expect(pooled is None or (isinstance(pooled, int) and pooled > 0), f"pooled_dim is {pooled!r}", "a width", rule)
        invariant = getattr(module, "padding_invariant", None)
        expect(isinstance(invariant, bool), f"padding_invariant is {invariant!r}", "True or False", rule)
        what = type(module.processor).__name__
        expect(isinstance(module.processor, Processor), f"processor is a {what}", "a Processor", rule)
    if role == "fusion":
        good = bool(module.outputs) and all(isinstance(stream, Stream) for stream in module.outputs.values())
        expect(good, f"outputs is {module.outputs!r}", "name -> Stream", rule)


def _is_valid(subject: Subject, table: Mapping[str, Any]) -> bool:
    try:
        decode_config(subject.cls.Config, table, "config")
    except MmhubError:
        return False
    return True


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _is_import_path(text: str) -> bool:
    """Does a text lead to an object of an imported module, as `package.module.Class` or `package.module:Class`?"""
    if not re.fullmatch(r"[A-Za-z_]\w*([.:][A-Za-z_]\w*)+", text):
        return False
    steps = re.split(r"[.:]", text)
    for end in range(len(steps), 0, -1):
        module: Any = sys.modules.get(".".join(steps[:end]))
        if module is not None:
            for step in steps[end:]:
                module = getattr(module, step, None)
            return module is not None
    return False
