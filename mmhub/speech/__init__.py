"""From recordings to texts: any length, cut into windows that a model hears one by one, in bounded memory.

How a model turns a window into text is `mmhub.speech.ctc`'s business (frame by frame) or `mmhub.speech.writing`'s
(token by token, as Whisper). Subtitles are written by `mmhub.speech.subtitles`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from mmhub.errors import UsageError
from mmhub.interfaces import Generation, Policy, TextDecoder

if TYPE_CHECKING:
    from mmhub.model import Model

Timestamps = Literal["none", "segment", "word"]
LONGEST = 6 * 3600.0  # seconds of a recording; it is never held as a whole, so the policy's own limit is not meant


def transcribe(
    model: Model,
    samples: Sequence[Mapping[str, Any]],
    *,
    window: float = 0.0,
    overlap: float = -1.0,
    batch_size: int = 32,
    policy: Policy | None = None,
    timestamps: Timestamps = "none",
    language: str = "",
    translate: bool = False,
    settings: Generation | None = None,
    search: Any = None,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Write down what is said in each sample's recording, {"audio": raw input}, in order.

    An answer is {"text"}. Decoders that write add "segments", a list of {"text", "start", "end"} in seconds, where
    `timestamps` asks for them. Those that hear frame by frame (CTC) know times anyway: whatever `timestamps` says,
    their answers have a "score" and, if the encoder says what a token lasts, "segments" and "words", a list of {"word",
    "start", "end"}. Recordings, of up to 6 hours if no `policy` is given, are cut into windows of `window` seconds, 0
    for the model's own, each sharing `overlap` seconds with the next, -1 for the model's own; `batch_size` windows are
    heard at once. `language` (a code or English name) and `translate`, into English, are for models that know several
    languages. `settings` say how decoders that write choose their tokens, without stop texts for Whisper, and `search`
    how those that do not find theirs. Samples are numbered from `first`; what is drawn depends on the seed and the
    numbers of sample and window alone.

    Raises:
        UsageError: the model cannot do what is asked. InputError: a recording cannot be read; `row` is its position.
    """
    if timestamps not in get_args(Timestamps):
        raise UsageError(f"timestamps is {timestamps!r}", f"choose one of {', '.join(get_args(Timestamps))}")
    _check_windows(window, overlap, batch_size)
    policy = policy or Policy(max_seconds=LONGEST)
    samples = [dict(sample) if isinstance(sample, Mapping) else sample for sample in samples]
    options: dict[str, Any] = {"window": window, "overlap": overlap, "batch_size": batch_size, "policy": policy}
    if isinstance(model.decoder, TextDecoder):
        from mmhub.speech.writing import transcribe_written

        options |= {"timestamps": timestamps, "language": language, "translate": translate, "settings": settings}
        if search is not None:
            raise UsageError("a search is for models that hear frame by frame", "leave it out, or set beams")
        if len(model.modalities) > 1:
            if timestamps != "none" or language or translate or window:
                raise UsageError("a model that takes more than speech has no windows and times", "leave those out")
            return model.generate(samples, settings, batch_size=batch_size, policy=policy, first=first)

        def written(part: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[dict[str, Any]]:
            return transcribe_written(model, part, **options, numbers=[first + place for place in places])

        return model.guarded(samples, written, policy=policy)
    if language or translate or settings is not None:
        what = f"{model.name or 'this model'} hears frame by frame: it knows no languages and no settings of writing"
        raise UsageError(what, "leave language, translate and the settings out")
    from mmhub.speech.ctc import transcribe_ctc

    return model.guarded(samples, lambda part, _: transcribe_ctc(model, part, **options, search=search), policy=policy)


def _check_windows(window: float, overlap: float, batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}", "expected how many windows are heard at once, 1 or more")
    if not 0 <= window < math.inf:
        raise UsageError(f"window is {window}", "expected seconds, or 0 for the model's own")
    if overlap != -1 and not 0 <= overlap < math.inf:
        raise UsageError(f"overlap is {overlap}", "expected seconds, or -1 for the model's own")
