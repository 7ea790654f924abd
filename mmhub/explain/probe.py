"""Ask a model the same question about varied inputs, many rows at once, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmhub.batch import Items, Plan
from mmhub.errors import UsageError
from mmhub.explain.question import Question
from mmhub.explain.surfaces import WRITTEN, Lookup, Surface, embedded, surface_of
from mmhub.model import Model

ROWS = 32  # rows of a forward pass, at most
_LOGITS = 2**26  # that are held at once, where every token of a text has as many as there are words


class Probe:
    """A question, and the surfaces of the sample it is about."""

    def __init__(self, model: Model, question: Question) -> None:
        self.model, self.question = model, question
        self.surfaces = self._find()

    @property
    def rows(self) -> int:
        """How many rows a forward pass may have."""
        text = self.question.batch.items.get("text")
        words = getattr(getattr(self.model.decoder, "processor", None), "vocab_size", 0)
        length = text.data.shape[1] if text is not None and self.model.decoder.reads_text else len(self.question.ids)
        return max(1, min(ROWS, _LOGITS // max(words * length, 1)))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The surfaces' numbers, (1, N, ...) each."""
        return tuple(surface.x[None] for surface in self.surfaces)

    @property
    def origins(self) -> tuple[Tensor, ...]:
        return tuple(surface.origin[None] for surface in self.surfaces)

    def values(self, xs: Sequence[Tensor]) -> Tensor:
        """Return the question's numbers for R rows of surfaces, (R, N, ...) each -> (R, K) fp32."""
        rows, items, given = len(xs[0]), dict[str, Items](), []
        for surface, x in zip(self.surfaces, xs, strict=True):
            flat = x.flatten(0, 1)
            if surface.ids is not None:
                ids, mask = (_repeated(part, rows) for part in (surface.ids, surface.mask))
                given.append((ids, mask, flat))
            if surface.name != WRITTEN:
                known = repeat(self.question.batch.items[surface.name], rows)
                items[surface.name] = known if surface.ids is not None else replace(known, data=flat.to(surface.dtype))
        with Lookup(given):
            return self.measure(items, rows, _repeated_plan(self.question.batch.plan, rows))

    def each(self, xs: Sequence[Tensor]) -> Tensor:
        """As `values`, without gradients and in passes of bounded size."""
        with torch.no_grad():
            return torch.cat([self.values(part) for part in zip(*(x.split(self.rows) for x in xs), strict=True)])

    def measure(self, items: dict[str, Items], rows: int, plan: Plan | None) -> Tensor:
        """Return the question's numbers of packed items."""
        bundle = self.model.encode(items, rows)
        fused = self.model.fusion(bundle) if plan is None else self.model.fusion(bundle, plan=plan)
        return self.question.measure(fused)

    def _find(self) -> list[Surface]:
        """Find the surfaces, by one forward pass where there are token ids."""
        batch, labels = self.question.batch, self.question.labels
        known = {name: items for name, items in batch.items.items() if len(items)}
        ids = {
            name: items for name, items in known.items() if not items.data.is_floating_point() and items.data.ndim == 2
        }
        wanted: list[tuple[Tensor, Tensor, Tensor | None]] = [(one.data, one.mask, None) for one in ids.values()]
        if labels is not None:
            before = torch.cat([torch.full_like(labels[:, :1], -1), labels[:, :-1]], 1)
            wanted.append((before.clamp(min=0), before >= 0, None))
        look = Lookup(wanted)
        with torch.no_grad(), look:
            self.measure(dict(batch.items), 1, batch.plan)
        found = [
            embedded(name, one.data, one.mask, look.seen.get(list(ids).index(name)), self.model.processors[name])
            if name in ids
            else surface_of(self.model, name, one)
            for name, one in known.items()
        ]
        if labels is not None and len(ids) in look.seen:
            processor: Any = self.model.decoder.processor
            found.append(embedded(WRITTEN, *wanted[-1][:2], look.seen[len(ids)], processor))
        return found


def repeat(items: Items, rows: int) -> Items:
    """Return the items of one row for so many rows."""
    owners = torch.arange(rows, device=items.mask.device).repeat_interleave(len(items))
    marks = None if items.marks is None else _repeated(items.marks, rows)
    return Items(_repeated(items.data, rows), _repeated(items.mask, rows), owners, rows, marks)


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    return tensor.repeat(rows, *[1] * (tensor.ndim - 1))


def _repeated_plan(plan: Plan | None, rows: int) -> Plan | None:
    return None if plan is None else Plan({name: _repeated(places, rows) for name, places in plan.places.items()})


def one_item(items: Items, number: int) -> Items:
    """Return one item as the only one of a row, without padding."""
    length = int(items.mask[number].sum())
    padded = items.data.ndim > 1 and items.data.shape[1] == items.mask.shape[1]
    data = items.data[number : number + 1, :length] if padded else items.data[number : number + 1]
    marks = None if items.marks is None else items.marks[number : number + 1, :length]
    mask = items.mask[number : number + 1]
    return Items(data, mask[:, :length] if padded else mask, torch.zeros_like(items.rows[:1]), 1, marks)


_ENTRY, _CUDNN = Lock(), RLock()  # to the table of turns, and to a setting of the whole process
_turns: WeakKeyDictionary[Model, Any] = WeakKeyDictionary()


def _turn(model: Model) -> Any:
    with _ENTRY:
        return _turns.setdefault(model, RLock())


@contextmanager
def _own_recurrence(model: Model) -> Iterator[None]:
    """Without cuDNN where there are recurrent layers, through which it passes a gradient in training mode alone."""
    if model.device.type == "cuda" and any(isinstance(module, torch.nn.RNNBase) for module in model.modules()):
        with _CUDNN, torch.backends.cudnn.flags(enabled=False):
            yield
    else:
        yield


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """Freeze the weights and evaluate meanwhile; afterwards all is as before, whatever happened.

    A model is explained by one thread at a time, others wait: each would take what the other changed for how it was.
    Those who predict do not: weights and gradients are nothing to them, and modes of torch functions are a thread's
    own.

    Raises:
        UsageError: gradients cannot pass through a part.
    """
    with _turn(model), _frozen(model), _own_recurrence(model):
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if "derivative" in str(error) or "does not require grad" in str(error) or "autograd" in str(error):
                what = f"no gradient passes through this model: {str(error).splitlines()[0]}"
                raise UsageError(what, "use --method occlusion") from None
            raise


@contextmanager
def _frozen(model: Model) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    frozen, share = model.frozen, model.unimodal_loss
    try:
        model.frozen = set()  # or no gradient passes through a frozen encoder
        model.eval()
        for parameter, _ in wanted:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        yield
    finally:
        model.frozen, model.unimodal_loss = frozen, share
        for parameter, grad in wanted:
            parameter.requires_grad_(grad)
        for module, mode in modes:
            module.training = mode
