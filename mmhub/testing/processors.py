"""Checks of an encoder's processor: its state, what it refuses, and how it packs."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from mmhub.errors import InputError
from mmhub.interfaces import Policy
from mmhub.testing.catalogue import Check
from mmhub.testing.contract import ContractError, expect
from mmhub.testing.samples import MAYBE, refused
from mmhub.testing.subject import EncoderSubject, subject_of

_RULE = "Processor"


def processor_state(check: Check) -> None:
    """Its state is JSON, its files are bytes, and a processor rebuilt from them reads the same tensors."""
    subject: EncoderSubject = subject_of(check)
    encoder = subject.part()
    processor = encoder.processor
    try:
        state = json.loads(json.dumps(processor.state(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ContractError(f"its state makes no JSON: {error}; expected names and numbers [{_RULE}]") from error
    files = processor.files()
    strange = [name for name, content in files.items() if not isinstance(content, bytes)]
    expect(not strange, f"the files {strange} are no bytes", "bytes by name", _RULE)
    again = subject.cls.load_processor(encoder.config, state, files)
    for row, (one, other) in enumerate(zip(subject.items(processor), subject.items(again), strict=True)):
        expect(torch.equal(one, other), f"rebuilt, it reads input {row} differently", "equal tensors", _RULE)


def processor_refuses(check: Check) -> None:
    """What is no input of its modality is refused with an InputError: objects, foreign structs, numbers; for pictures
    and sound also bytes and files that are none. Nothing raises anything else."""
    subject: EncoderSubject = subject_of(check)
    processor = subject.part().processor
    for raw in refused(subject.modality):
        taken = _is_taken(processor, raw)
        expect(not taken, f"read takes {_shown(raw)}", "an InputError", _RULE)
    for raw in MAYBE:
        _is_taken(processor, raw)


def processor_packs(check: Check) -> None:
    """`read` gives the same tensor each time; `pack` joins one or many into data (N, ...) and a bool mask (N, S) that
    is right-padded, with the data zero where it is False."""
    subject: EncoderSubject = subject_of(check)
    processor = subject.part().processor
    items, again = subject.items(processor), subject.items(processor)
    same = all(torch.equal(one, other) for one, other in zip(items, again, strict=True))
    expect(same, "read twice, an input gives other tensors", "equal ones without a generator", _RULE)
    for some in (items[:1], items):
        data, mask = processor.pack(some)
        n = len(some)
        expect(len(data) == n, f"{n} items make data {tuple(data.shape)}", f"({n}, ...)", _RULE)
        good = mask.dtype == torch.bool and mask.ndim == 2 and len(mask) == n
        expect(good, f"{n} items make a mask {tuple(mask.shape)} of {mask.dtype}", f"({n}, S) bool", _RULE)
        expect(bool((mask.long().diff(dim=1) <= 0).all()), "the mask is padded on the left", "right padding", _RULE)
        expect(bool(mask.any(1).all()), "an item has no real position", "at least one", _RULE)
        if data.shape[1:2] == mask.shape[1:2]:
            expect(not data[~mask].any(), "data are not zero where the mask is False", "zeros", _RULE)


def _is_taken(processor: Any, raw: Any) -> bool:
    try:
        read = processor.read(raw, Policy())
    except InputError:
        return False
    except Exception as error:
        name = type(error).__name__
        raise ContractError(
            f"read raises {name} for {_shown(raw)}: {error}; expected an InputError [{_RULE}]"
        ) from error
    expect(isinstance(read, Tensor), f"read gives a {type(read).__name__}", "a tensor", _RULE)
    return True


def _shown(raw: Any) -> str:
    return "an object" if type(raw) is object else repr(raw)
