"""What people hand over to the app: bounded, never fetched, and decoded in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmhub.errors import InputError
from mmhub.interfaces import apart
from mmhub_ui.context import Context, policy_of
from tests.conftest import png


@pytest.mark.parametrize("decoders", [0, 1])
def test_uploads_are_decoded_in_processes_of_their_own(
    decoders: int, tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, real = [], apart._pool
    monkeypatch.setattr(apart, "_pool", lambda bounds: used.append(bounds) or real(bounds))  # type: ignore[func-returns-value]
    context, model = Context(policy=policy_of(decoders)), tiny("talker")
    for name, content in (("good.png", png(1)), ("bad.png", png(1)[:-50])):
        (tmp_path / name).write_bytes(content)
        talk = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / name)}]}]
        if name == "good.png":
            assert model.chat(talk, policy=context.bounds(model), max_new_tokens=1)
            continue
        with pytest.raises(InputError, match="damaged PNG"):
            model.chat(talk, policy=context.bounds(model), max_new_tokens=1)
    assert bool(used) == bool(decoders)


def test_nothing_is_fetched_for_those_who_use_the_app() -> None:
    policy = Context().policy
    assert policy.urls is False and policy.worker is not None and policy.worker.workers == 2
