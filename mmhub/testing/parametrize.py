"""The checks of a plugin as parameters of a pytest function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mmhub.errors import UsageError, did_you_mean
from mmhub.testing.catalogue import Check, find_checks

if TYPE_CHECKING:
    import pytest


def parametrize_checks(
    distribution: str,
    *,
    expected_failures: Mapping[str, str] | None = None,
    samples: Mapping[str, Sequence[Any]] | None = None,
    marks: Mapping[str, pytest.MarkDecorator] | None = None,
) -> pytest.MarkDecorator:
    """Decorate a test function that takes `check`, to run once for each check of an installed plugin.

    Only the static manifest is read; the plugin is imported when a check runs.

    Args:
        distribution: the plugin's name, such as "mmhub-x".
        expected_failures: check id -> reason. Such a check must fail: one that passes fails the test (strict xfail).
        marks: pattern of check ids (as in fnmatch) -> mark, such as {"*/compile": pytest.mark.slow}.
        samples: modality -> at least two raw inputs of different lengths, instead of `Encoder.examples()`.

    Raises:
        NotFoundError: the plugin is not installed. UsageError: an expected failure names no check of it.
    """
    import pytest

    checks = find_checks(distribution, samples)
    reasons = dict(expected_failures or {})
    _refuse_unknown(reasons, [check.id for check in checks], distribution)
    found = [_parameter(check, reasons.get(check.id), marks or {}) for check in checks]
    return pytest.mark.parametrize("check", found)


def _parameter(check: Check, reason: str | None, marks: Mapping[str, pytest.MarkDecorator]) -> Any:
    import pytest

    found = [mark for pattern, mark in marks.items() if fnmatchcase(check.id, pattern)]
    found += [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
    return pytest.param(check, id=check.id, marks=found)


def _refuse_unknown(ids: Iterable[str], known: Sequence[str], distribution: str) -> None:
    for wrong in (given for given in ids if given not in known):
        hint = did_you_mean(wrong, known) or f"`mmhub plugins check {distribution}` shows all ids"
        raise UsageError(f"expected_failures names {wrong!r}, which is no check of {distribution}", hint)
