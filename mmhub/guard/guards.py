"""The guards of one model around its answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError, UsageError
from mmhub.guard.decisions import UNKNOWN, Action, Decisions, Stage, logger
from mmhub.guard.sources import guards_of_process
from mmhub.guard.texts import with_media
from mmhub.interfaces import Policy, raw_bytes
from mmhub.plugins import Component, Plugin, get_index, hook_items
from mmhub.records import cause
from mmhub.spec import Change, Refusal

if TYPE_CHECKING:
    from mmhub.spec import Guard

Sample = Mapping[str, Any]
Answer = dict[str, Any]
Predict = Callable[[list[Sample], list[int]], list[Answer]]

HOOK = "mmhub_generation_guards"
_policy: ContextVar[Policy | None] = ContextVar("policy", default=None)


def current_policy() -> Policy:
    """Return what may be read of the samples that are being guarded, for guards that read their media."""
    return _policy.get() or Policy()


class Guards:
    """The guards of one model: its own, those of MMHUB_GUARDS, and those of plugins' hooks, by the plugins' names.

    Raises:
        PluginError: a plugin with guards fails, cannot be used, or gives something else than guards.
        MmhubError: what MMHUB_GUARDS or MMHUB_GUARD_LOG names is not there, or wrong.
    """

    def __init__(self, model: Any) -> None:
        for plugin in get_index().plugins:
            if HOOK in plugin.hooks and plugin.status in ("broken", "incompatible"):
                raise PluginError(
                    f"the guard in plugin {plugin} cannot be used: {plugin.problem}", _switch_off(plugin.distribution)
                )
        self._told: set[str] = set()  # failures that a warning was given of
        self._decisions = Decisions(getattr(model, "name", ""))
        sources = [*getattr(model, "guards", ()), *guards_of_process()]
        self._guards: list[tuple[Plugin | Component, Guard]] = [(s.component, s.build(model)) for s in sources]
        self._guards += hook_items(HOOK, required=True, model=model)
        for owner, guard in self._guards:
            lacking = [name for name in ("name", "check", "review") if not hasattr(guard, name)]
            if lacking:
                raise PluginError(
                    f"plugin {owner.distribution} {owner.version} gives a guard without {lacking[0]!r}: "
                    f"a {type(guard).__name__}",
                    _switch_off(owner.distribution),
                )

    @classmethod
    def none(cls) -> Guards:
        """Return those of a model that nobody guards."""
        guards = cls.__new__(cls)
        guards._guards = []
        return guards

    def __bool__(self) -> bool:
        return bool(self._guards)

    @property
    def review_answers(self) -> bool:
        """Does one of them look at answers, so that nothing may be shown before it has?"""
        return any(_watches(guard, "output") for _, guard in self._guards)

    def answer(
        self,
        samples: Sequence[Sample],
        predict: Predict,
        seen: Callable[[Sample], Sample] = lambda sample: sample,
        policy: Policy | None = None,
        said: Callable[[Sample], Sample] | None = None,
    ) -> list[Answer]:
        """Answer the samples that no guard refuses by one call of `predict(samples, rows)`, and review what it answers.

        `rows` are the positions in `samples` of those that passed, which guards may have rewritten. `seen` says what
        `check` and `review` are shown of a sample, `said` what `check` is of guards that watch inputs alone, `policy`
        what may be read of its media. Where a guard reads media, it and `predict` get the same bytes of them.

        Raises:
            InputError: `predict`, or a guard that reads media, cannot read a sample; `row` is its position in
            `samples`.
        """
        token = _policy.set(policy)
        try:
            return self._answer(samples, predict, seen, said or seen)
        finally:
            _policy.reset(token)

    def _answer(
        self,
        samples: Sequence[Sample],
        predict: Predict,
        seen: Callable[[Sample], Sample],
        said: Callable[[Sample], Sample],
    ) -> list[Answer]:
        media = {one for _, guard in self._guards if _watches(guard, "input") for one in getattr(guard, "media", ())}
        passed = {row: _held(sample, row, media) for row, sample in enumerate(samples)}
        answers = dict[int, Answer]()
        for owner, guard in self._guards:
            shown = seen if _watches(guard, "output") else said
            refused = self._screen(owner, guard, passed, shown) if _watches(guard, "input") else {}
            answers |= refused
            passed = {row: sample for row, sample in passed.items() if row not in refused}
        rows = list(passed)
        try:
            given = predict(list(passed.values()), rows)
        except InputError as error:
            raise _at(error, rows[error.row or 0]) from None
        answers |= {row: self._review(seen(passed[row]), answer) for row, answer in zip(rows, given, strict=True)}
        return [answers[row] for row in range(len(samples))]

    def _screen(
        self, owner: Plugin | Component, guard: Guard, samples: dict[int, Sample], seen: Callable[[Sample], Sample]
    ) -> dict[int, Answer]:
        """Let one guard rewrite samples, in place, and check them; return the refusals."""
        refused: dict[int, Answer] = {}
        rewrite = getattr(guard, "rewrite", None)
        for row, sample in list(samples.items()):
            if rewrite is None:
                break
            try:
                made = rewrite(sample)
                change = made if isinstance(made, Change) else Change(made)
                if change.value is not sample:
                    samples[row] = dict(change.value)
                    self._note(owner, guard, "input", "changed", change.rule, change.reason)
            except Exception as error:
                refused[row] = self._failed(error, owner, guard, "input")
        rows = [row for row in samples if row not in refused]
        for row, found in zip(rows, _checked(guard, [seen(samples[row]) for row in rows]), strict=True):
            if isinstance(found, InputError) and found.modality in getattr(guard, "media", ()):
                raise _at(found, row)  # which the model could not read either
            if isinstance(found, Exception):
                refused[row] = self._failed(found, owner, guard, "input")
            elif found:
                refused[row] = self._refused(found, owner, guard, "input")
        return refused

    def _review(self, sample: Sample, answer: Answer) -> Answer:
        for owner, guard in self._guards:
            if not _watches(guard, "output"):
                continue
            try:
                found: Any = guard.review(sample, answer)
                if isinstance(found, Refusal):
                    return self._refused(found, owner, guard, "output")
                change = found if isinstance(found, Change) else Change(found)
                new = dict(change.value)
                changed = new != answer
            except Exception as error:
                return self._failed(error, owner, guard, "output")
            if "refused" in new and "refused" not in answer:
                given = self._refused(str(new["refused"]), owner, guard, "output")
                return given | new
            if changed:
                self._note(owner, guard, "output", "changed", change.rule, change.reason)
            answer = new
        return answer

    def _refused(self, found: Refusal | str, owner: Plugin | Component, guard: Guard, stage: Stage) -> Answer:
        """The answer that says so, noted; the reason of a `Refusal` repeats nothing, any other may."""
        refusal = found if isinstance(found, Refusal) else Refusal(str(found))
        reason = refusal.reason if refusal is found else UNKNOWN
        self._note(owner, guard, stage, refusal.action, refusal.rule, reason)
        return {"refused": refusal.reason, "guard": _name(owner, guard), **refusal.beside}

    def _failed(self, error: Exception, owner: Plugin | Component, guard: Guard, stage: Stage) -> Answer:
        """The answer that says no more than that; whoever runs the model is told why, once."""
        name, kind = _name(owner, guard), type(error).__name__
        self._note(owner, guard, stage, "refused", "failure", f"the guard failed: {kind}")
        ours = isinstance(error, MmhubError) and not isinstance(error, InputError)
        why = cause(error) if ours else kind  # the text of another may repeat what was said
        if why not in self._told:
            self._told.add(why)
            logger.warning("the guard %s failed: %s", name, why)
        return {"refused": "the guard failed", "guard": name}

    def _note(
        self, owner: Plugin | Component, guard: Guard, stage: Stage, action: Action, rule: str, reason: str
    ) -> None:
        self._decisions.note(_name(owner, guard), stage, action, rule=rule, reason=reason)


def _checked(guard: Guard, samples: list[Sample]) -> list[Any]:
    """What a guard says of samples, together if it can: '' or why each is refused, or the error that it raised."""
    together = getattr(guard, "check_all", None)
    if together is not None and len(samples) > 1:
        try:
            found = list(together(samples))
            if len(found) == len(samples):
                return found
        except (NotFoundError, PluginError, UsageError) as error:  # it fails for all
            return [error] * len(samples)
        except Exception:  # for one of them, perhaps: the others need not suffer
            pass
    return [_checked_one(guard, sample) for sample in samples]


def _checked_one(guard: Guard, sample: Sample) -> Any:
    try:
        return guard.check(sample)
    except Exception as error:
        return error


def _held(sample: Sample, row: int, media: set[str]) -> Sample:
    """A sample with what files and addresses of some media hold, read once: what a guard sees is what a model sees."""
    policy = current_policy()

    def read(raw: Any) -> Any:
        path: Any = raw.get("path") if isinstance(raw, Mapping) and raw.get("bytes") is None else raw
        content = raw_bytes(path, policy) if isinstance(path, (str, os.PathLike)) else None
        return raw if content is None else {"bytes": content, "path": os.fspath(path)}

    for modality in media:
        try:
            sample = with_media(sample, modality, read)
        except InputError as error:
            error.modality = modality
            raise _at(error, row) from None
    return sample


def _at(error: InputError, row: int) -> InputError:
    error.row = row
    error.__notes__ = [f"in sample {row}"]  # an old one counts only some of the samples
    return error


def _watches(guard: Guard, stage: Stage) -> bool:
    return stage in getattr(guard, "on", ("input", "output"))


def _name(owner: Plugin | Component, guard: Guard) -> str:
    return f"{owner.distribution}/{guard.name}"


def _switch_off(distribution: str) -> str:
    return f"repair it, or switch it off: MMHUB_DISABLE_PLUGINS={distribution}"
