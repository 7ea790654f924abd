"""What each modality adds to a number: Shapley values over the modalities that a sample has.

A modality is taken away as the model itself knows it: its items are not there. Of what a language model reads the
user's words and the items are left out, and the rest moves together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmhub.batch import Batch, Items, Plan, pad_sequences
from mmhub.explain.pieces import FIXED, Pieces
from mmhub.explain.probe import Probe, repeat

EXACT = 6  # modalities up to which every subset is tried
_ORDERS = 32  # that are drawn above
Subset = frozenset[str]


def ends(probe: Probe, pieces: Pieces) -> tuple[float, float]:
    """Return the value of the whole sample, and that of nothing."""
    names = _names(probe, pieces)
    value, baseline = _values(probe, pieces, names, [frozenset(names), frozenset()]).values()
    return value, baseline


def shares(probe: Probe, pieces: Pieces, seed: int = 0) -> tuple[dict[str, float], float, float]:
    """Return each modality's Shapley value (Shapley 1953; Lundberg and Lee, arXiv:1705.07874), the value of the whole
    sample, and that of nothing. The values add up to the difference of these two; they are no numbers where the model
    gives none without some modality."""
    names = _names(probe, pieces)
    orders = _orders(names, seed)
    wanted = {frozenset(order[:end]) for order in orders for end in range(len(order) + 1)}
    if len(names) <= EXACT:
        wanted = {frozenset(some) for size in range(len(names) + 1) for some in itertools.combinations(names, size)}
    known = _values(probe, pieces, names, sorted(wanted, key=sorted))
    worth = known.__getitem__
    found = _exact(names, worth) if len(names) <= EXACT else _sampled(names, orders, worth)
    return found, known[frozenset(names)], known[frozenset()]


def _names(probe: Probe, pieces: Pieces) -> list[str]:
    """The modalities of the sample that can be taken away."""
    return [name for name, items in probe.question.batch.items.items() if len(items) and _has_own(pieces, name)]


def _has_own(pieces: Pieces, name: str) -> bool:
    return any(number != FIXED for group in pieces.groups if group.modality == name for number in group.numbers)


def _orders(names: Sequence[str], seed: int) -> list[list[str]]:
    if len(names) <= EXACT:
        return []
    draw = torch.Generator().manual_seed(seed)
    return [[names[at] for at in torch.randperm(len(names), generator=draw)] for _ in range(_ORDERS)]


def _exact(names: Sequence[str], worth: Callable[[Subset], float]) -> dict[str, float]:
    found = {}
    for name in names:
        others = [other for other in names if other != name]
        total = 0.0
        for size in range(len(others) + 1):
            weight = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(names))
            for some in itertools.combinations(others, size):
                total += weight * (worth(frozenset({*some, name})) - worth(frozenset(some)))
        found[name] = total
    return found


def _sampled(
    names: Sequence[str], orders: Sequence[Sequence[str]], worth: Callable[[Subset], float]
) -> dict[str, float]:
    """The mean over drawn orders of what each modality adds to those before it."""
    found = dict.fromkeys(names, 0.0)
    for order in orders:
        for place, name in enumerate(order):
            added = worth(frozenset(order[: place + 1])) - worth(frozenset(order[:place]))
            found[name] += added / len(orders)
    return found


def _values(probe: Probe, pieces: Pieces, names: Sequence[str], subsets: Sequence[Subset]) -> dict[Subset, float]:
    """The value of each subset, the K numbers together."""
    found: list[float] = []
    for start in range(0, len(subsets), probe.rows):
        part = subsets[start : start + probe.rows]
        batch = _rows(probe, pieces, [frozenset(names) - some for some in part])
        with torch.no_grad():
            found += probe.measure(batch.items, len(part), batch.plan).sum(1).double().tolist()
    return dict(zip(subsets, found, strict=True))


def _rows(probe: Probe, pieces: Pieces, missing: Sequence[Subset]) -> Batch:
    """The sample once for each set of missing modalities."""
    batch, reads = probe.question.batch, probe.model.decoder.reads_text
    items = {
        name: _only(one, [row for row, gone in enumerate(missing) if name not in gone], len(missing))
        for name, one in batch.items.items()
        if len(one)
    }
    if not reads:
        return replace(batch, items=items, size=len(missing), plan=None)
    number = list(items).index("text")
    stays = (pieces.numbers[number] == FIXED)[0, :, 0] | _was_written(probe, batch.items["text"])
    text, plan = _left(batch, stays, missing)
    return replace(batch, items=items | {"text": text}, size=len(missing), plan=plan)


def _only(items: Items, rows: Sequence[int], batch: int) -> Items:
    """The items in these rows alone."""
    if not rows:
        return Items(items.data[:0], items.mask[:0], items.rows[:0], batch)
    owners = torch.tensor(rows, device=items.rows.device).repeat_interleave(len(items))
    return replace(repeat(items, len(rows)), rows=owners, batch=batch)


def _was_written(probe: Probe, text: Items) -> Tensor:
    places = torch.arange(text.data.shape[1], device=text.data.device)
    return places >= text.data.shape[1] - len(probe.question.ids)


def _left(batch: Batch, stays: Tensor, missing: Sequence[Subset]) -> tuple[Items, Plan | None]:
    """A language model's text, and where items stand in it, without what is missing."""
    ids, places = batch.items["text"].data[0], _places(batch.plan)
    free = [at for at in range(len(ids) + len(places)) if at not in places]
    texts, rows = [], []
    for gone in missing:
        kept = stays.tolist() if "text" in gone else [True] * len(ids)
        texts.append(ids[torch.tensor(kept, device=ids.device)])
        left = {at for at, keep in zip(free, kept, strict=True) if keep}
        left |= {at for at, name in places.items() if name not in gone}
        order = {at: new for new, at in enumerate(sorted(left))}
        rows.append([(name, order[at]) for at, name in places.items() if at in order])
    data, mask = pad_sequences(texts)
    device = ids.device
    text = Items(data, mask.to(device), torch.arange(len(missing), device=device), len(missing))
    return text, None if batch.plan is None else Plan.of(rows, list(batch.plan.places)).to(device)


def _places(plan: Plan | None) -> Mapping[int, str]:
    """Which modality stands at a place."""
    known = {} if plan is None else plan.places
    return {at: name for name, row in known.items() for at in row[0].tolist() if at >= 0}
