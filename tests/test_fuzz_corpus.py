"""Every file of the fuzzers' corpus, and rules that hold for all texts: without a fuzzer, in a moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from mmhub.errors import MmhubError, TrustError
from tests.fuzz import targets

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SERVED = ("predict", "completions")  # these start a server's application
# The same examples each time, and no judgement by the clock of a machine that does other work.
quickly = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def _closed() -> Iterator[None]:
    yield
    targets.close()


@pytest.mark.usefixtures("_closed")
@pytest.mark.parametrize(
    "name",  # the process that lays templates out dies of many, and another must start
    [pytest.param(name, marks=pytest.mark.slow if name == "template" else ()) for name in targets.TARGETS],
)
def test_what_was_sound_or_crashed_once_is_read_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmhub_text.sandbox.SECONDS", 0.1)
    files = sorted((CORPUS / name).iterdir())
    assert files
    read = targets.TARGETS[name]()
    for file in files:
        targets.allowed(read, file.read_bytes())


@pytest.mark.parametrize("name", [name for name in targets.TARGETS if name not in (*SERVED, "lock")])
def test_the_first_seed_of_a_target_is_read_to_its_end(name: str) -> None:
    """A target that refused everything would find nothing."""
    sound = {"names": "requirement", "picture": "png", "sound": "wav"}
    targets.TARGETS[name]()((CORPUS / name / sound.get(name, "sound")).read_bytes())


def test_the_corpus_stays_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) < 300 and sum(path.stat().st_size for path in files) < 500_000
    assert {path.parent.name for path in files} == set(targets.TARGETS)


def test_another_error_than_ours_is_not_let_pass() -> None:
    def fail(content: bytes) -> Any:
        raise TrustError("refused") if content else ValueError("a bug")

    targets.allowed(fail, b"x")
    with pytest.raises(ValueError, match="a bug"):
        targets.allowed(fail, b"")


def test_a_crash_says_what_was_raised_and_where() -> None:
    """The exception is on standard output, what libFuzzer makes of it on the other."""
    fuzzer = pytest.importorskip("tests.fuzz.run", exc_type=ImportError)  # no `resource` on Windows
    printed = " === Uncaught Python exception: ===\nKeyError: 'a'\nTraceback (most recent call last):\n"
    printed += '  File "/x/mmhub/hub/card.py", line 7, in read_card\n    raise\n'
    complaint = "==1== ERROR: libFuzzer: fuzz target exited\nSUMMARY: libFuzzer: fuzz target exited\n"
    said = fuzzer.reason(printed + complaint)
    assert said.startswith("KeyError: 'a' | ==1== ERROR: libFuzzer") and said.endswith("line 7, in read_card")


# -- rules ------------------------------------------------------------------------------------------------------

_text = some.text(some.characters(codec="utf-8"), max_size=8)
_number = some.integers(-(2**63), 2**63) | some.floats(allow_nan=False, allow_infinity=False)
_json = (
    some.none() | some.booleans() | _number | _text | some.lists(_number) | some.dictionaries(_text, _text | _number)
)


@quickly
@given(_json)
@pytest.mark.slow
def test_json_says_what_was_written(value: Any) -> None:
    from mmhub.reading import parse_json

    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@quickly
@given(some.from_regex(r"\A[A-Za-z0-9_]{1,8}/[A-Za-z0-9_]{1,8}\Z"), some.from_regex(r"\A[a-z0-9]{1,8}\Z"))
def test_a_name_of_the_hub_means_its_parts(repo: str, revision: str) -> None:
    from mmhub.names import resolve

    found = resolve(f"hub:{repo}@{revision}#image")
    assert (found.repo_id, found.revision, found.component) == (repo, revision, "image")


@quickly
@given(some.text(max_size=40))
def test_any_text_is_a_name_or_refused(text: str) -> None:
    from mmhub.names import resolve

    with suppress(MmhubError):
        resolve(text)


@quickly
@given(some.text(max_size=20), some.text(max_size=20))
def test_a_requirement_is_met_or_not_or_refused_and_never_a_command(distribution: str, specifier: str) -> None:
    from mmhub.plugins import get_index
    from mmhub.requirements import unmet_requirements

    with suppress(TrustError):
        unmet = unmet_requirements([{"distribution": distribution, "specifier": specifier}], get_index())
        assert not [one for one in unmet if set(one.requirement) & set(";|&$`\n'\"@")]


@quickly
@given(some.dictionaries(some.sampled_from(["epochs", "keep", "log_every", "batch_size"]), some.integers(1, 10**6)))
def test_a_recipe_is_what_it_was_when_it_was_written_and_read(train: dict[str, int]) -> None:
    import tomllib

    from mmhub.config import check_recipe, dump_recipe

    recipe = check_recipe({"task": "classification", "train": train})
    assert check_recipe(tomllib.loads(dump_recipe(recipe))) == recipe
