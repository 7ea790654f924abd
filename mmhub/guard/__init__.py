"""Guards around a model's answers: which apply, what they do to samples and answers, and what is noted of it.

Guards are components of plugins that a recipe, a checkpoint or MMHUB_GUARDS names, and whatever plugins give by the
hook `mmhub_generation_guards`.
"""

from __future__ import annotations

from mmhub.guard.decisions import Decisions
from mmhub.guard.guards import Guards, current_policy
from mmhub.guard.sources import GuardRecord, GuardSource, read_guards
from mmhub.guard.texts import media_in, texts_of, with_media, with_texts

__all__ = [
    "Decisions",
    "GuardRecord",
    "GuardSource",
    "Guards",
    "current_policy",
    "media_in",
    "read_guards",
    "texts_of",
    "with_media",
    "with_texts",
]
