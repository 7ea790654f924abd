"""How well a model's vectors tell whether two rows are of the same speaker, person or thing: verification by cosine.

Each pair of rows is accepted as the same where the cosine of their vectors is at least a threshold. False acceptances
are pairs of different labels, false rejections pairs of the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmhub.batch import Batch
from mmhub.data.lengths import measure_rows
from mmhub.data.loader import Collate, Loaded, load_batches, on_device, worker_count
from mmhub.data.plan import plan_in_order
from mmhub.data.sources import Rows, open_rows, require_columns
from mmhub.errors import InputError, UsageError
from mmhub.evaluation import EvalOptions, input_columns
from mmhub.interfaces.labels import is_missing, label_text, plain
from mmhub.layers import summary
from mmhub.model import Model

MAX_PAIRS = 1_000_000
DEFINITION = (
    "eer: share of wrong decisions at the cosine where as large a share of different pairs is accepted as of same pairs"
    " is rejected, by linear interpolation; min_dcf: least detection cost, prior of a same pair 0.01, costs 1, over"
    " that of deciding without listening"
)
_PRIOR = 0.01  # of a same pair, as in Nagrani et al. 2017, "VoxCeleb" (arXiv:1706.08612)
_CHUNK = 1 << 16  # pairs compared at a time

Numbers = NDArray[np.float64]


def verify(
    model: Model,
    data: Any,
    *,
    inputs: Mapping[str, str] | None = None,
    target: str = "",
    columns: Sequence[str] = (),
    pairs: int = MAX_PAIRS,
    seed: int = 0,
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Measure verification on the rows of `data`, whose column `target` says what is the same.

    The vectors are those of `Model.embed`: what the head reads, or the shared space of a model for retrieval. Columns
    and `data` are as in `mmhub.evaluate`. Returns {"name", "task", "rows", "skipped", "metrics", "subsets",
    "definition"}, the metrics as in `measure_pairs`.

    Raises:
        UsageError: a column is missing, or the model has no vectors or several. InputError: a row cannot be read or
            has no label (unless `options.skip`), or there are no pairs of either kind.
    """
    if model.task.writes or not model.encoders:
        raise UsageError(
            f"{model.name or 'this model'} is for {model.task.name}, and gives no vectors to compare",
            "name a model for classification, embedding or retrieval",
        )
    options = options or EvalOptions()
    rows = data if isinstance(data, Rows) else open_rows(data, columns=list(columns or model.columns.names) or None)
    wanted = input_columns(model, rows, inputs)
    target = target or model.columns.target
    if not target:
        raise UsageError("no column is known that says what is the same", "add --target-column NAME")
    require_columns(rows, [target], "name the column with --target-column")
    labels = [_label(rows, number, raw) for number, raw in enumerate(rows.column(target))]
    index, vectors = _vectors(model, rows, wanted, labels, options)
    return {
        "name": model.name,
        "task": "verification",
        "rows": len(index),
        "skipped": len(rows) - len(index),
        "metrics": measure_pairs(vectors, [labels[i] for i in index], pairs=pairs, seed=seed),
        "subsets": {},
        "definition": DEFINITION,
    }


def _label(rows: Rows, number: int, raw: Any) -> str | None:
    """The label as text, None where the row has none."""
    try:
        return None if is_missing(plain(raw)) else label_text(raw)
    except InputError as error:
        raise InputError(f"{rows.where(number)}: {error.message}", "name another column with --target-column") from None


def measure_pairs(vectors: Tensor, labels: Sequence[Any], *, pairs: int = MAX_PAIRS, seed: int = 0) -> dict[str, Any]:
    """Compare vectors (N, D), each with every other or in `pairs` pairs drawn by `seed` where there are more.

    Returns {"eer", "threshold", "min_dcf", "pairs", "same", "different"}: the equal error rate and the cosine at which
    it is reached, the least normalised detection cost, and how many pairs there were.

    Raises:
        InputError: there are no pairs of the same label, or none of different ones.
    """
    first, second = _pairs(len(labels), pairs, seed)
    _, kinds = np.unique([repr(label) for label in labels], return_inverse=True)
    same = kinds[first] == kinds[second]
    if not same.any() or same.all():
        kind = "different labels" if same.any() else "the same label"
        raise InputError(f"no two of the {len(labels)} rows have {kind}", "name another column, or take more rows")
    unit = torch.nn.functional.normalize(vectors.float(), dim=1)
    starts = range(0, len(first), _CHUNK)
    cosines = [(unit[first[at : at + _CHUNK]] * unit[second[at : at + _CHUNK]]).sum(1) for at in starts]
    eer, threshold, cost = _errors(torch.cat(cosines).numpy().astype(np.float64), same)
    count = int(same.sum())
    return {
        "eer": eer,
        "threshold": threshold,
        "min_dcf": cost,
        "pairs": len(same),
        "same": count,
        "different": len(same) - count,
    }


def _errors(scores: Numbers, same: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Equal error rate, its threshold, and the least detection cost of scores (P,)."""
    order = np.argsort(scores, kind="stable")
    scores, same = scores[order], same[order]
    start = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # from here on everything is accepted
    below = np.r_[0, np.cumsum(same)]  # same pairs that are rejected
    rejected = np.r_[below[start], below[-1]] / below[-1]
    accepted = 1 - np.r_[start - below[start], len(same) - below[-1]] / (len(same) - below[-1])
    thresholds = np.r_[scores[start], np.nextafter(scores[-1], np.inf)]  # the last accepts nothing
    gap = rejected - accepted  # rises from -1 to 1
    k = int(np.argmax(gap >= 0))
    part = gap[k - 1] / (gap[k - 1] - gap[k])
    eer, threshold = (float(v[k - 1] + part * (v[k] - v[k - 1])) for v in (rejected, thresholds))
    cost = (_PRIOR * rejected + (1 - _PRIOR) * accepted).min() / min(_PRIOR, 1 - _PRIOR)
    return eer, threshold, float(cost)


def _pairs(count: int, limit: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs first < second of `count` rows: all, or `limit` different ones drawn by `seed`."""
    if count * (count - 1) // 2 <= limit:
        first, second = np.triu_indices(count, 1)
        return first, second
    rng = np.random.default_rng(seed)
    keys = np.zeros(0, np.int64)
    while len(keys) < limit:
        drawn = rng.integers(count, size=(2, 2 * limit))
        drawn = drawn[:, drawn[0] < drawn[1]]
        keys = np.unique(np.r_[keys, drawn[0] * count + drawn[1]])
    keys = np.sort(rng.permutation(keys)[:limit])
    return keys // count, keys % count


def _vectors(
    model: Model, rows: Rows, inputs: Mapping[str, str], labels: Sequence[Any], options: EvalOptions
) -> tuple[list[int], Tensor]:
    """The vectors (N, D) of the rows that have one, and these rows' numbers, in order."""
    stream = _stream(model, inputs)
    found: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for part in _load(model, rows, inputs, options):
            if part.error is not None:
                raise part.error
            if part.batch is not None:
                found |= zip(part.batch.index or [], _embed(model, part.batch, stream), strict=True)
    finally:
        model.train(was_training)
    good = [i for i in sorted(found) if labels[i] is not None and found[i].any() and found[i].isfinite().all()]
    bad = sorted(found.keys() - set(good))
    if bad and not options.skip:
        reason = "has no label" if labels[bad[0]] is None else "has no vector"
        raise InputError(f"{rows.where(bad[0])} {reason}", "mend the row, or skip it with --on-error skip")
    if not good:
        raise InputError(f"none of the {len(rows)} rows could be compared", "check the data")
    return good, torch.stack([found[i] for i in good])


def _load(model: Model, rows: Rows, inputs: Mapping[str, str], options: EvalOptions) -> Iterator[Loaded]:
    processors = {name: model.processors[name] for name in inputs}
    lengths = measure_rows(rows, processors, model.readers, dict(inputs), options.policy)
    collate = Collate(rows, processors, inputs, policy=options.policy, skip=options.skip, read=lengths.read)
    order = plan_in_order(len(rows), lengths, batch_size=options.batch_size)
    workers = worker_count(options.workers, model.device)
    loaded = load_batches(collate, order, workers, pin_memory=model.device.type == "cuda")
    parts = on_device(loaded, model.device)
    return options.progress(parts, len(order)) if options.progress else parts


def _stream(model: Model, inputs: Mapping[str, str]) -> str:
    """The stream whose vectors are compared."""
    decoder: Any = model.decoder
    names = list(model.fusion.outputs)
    if decoder.paired or len(names) > 1:
        names = [name for name in names if name in inputs]
    if len(names) != 1:
        raise UsageError(f"the model keeps {' and '.join(names)} apart", "name one with --inputs, such as audio=column")
    return names[0]


@torch.inference_mode()
def _embed(model: Model, batch: Batch, stream: str) -> Tensor:
    bundle = model.fused(batch)
    decoder: Any = model.decoder
    found: Tensor = decoder.vectors(bundle)[stream] if decoder.paired else summary(bundle[stream])
    return found.float().cpu()
