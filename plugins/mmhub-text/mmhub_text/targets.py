"""Target texts of decoders that write: a row has one, or several of which one is trained on."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmhub.errors import InputError
from mmhub.interfaces import describe_raw


def one_text(target: Any) -> str:
    """Return the text to train on, of one or several: the most frequent one, or the first of these.

    Raises:
        InputError: there is none, or one is no text.
    """
    texts = list(target) if isinstance(target, (list, tuple)) else [target]
    if not texts:
        raise InputError("the target is an empty list", "give every row a target text, or leave the row out")
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"the target is {describe_raw(text)}, not a text", "give every row a target text")
    return Counter(texts).most_common(1)[0][0]
