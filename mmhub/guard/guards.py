"""The guards of one model around its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from mmhub.errors import InputError, PluginError
from mmhub.guard.decisions import Action, Decisions, Stage, without_content
from mmhub.guard.sources import guards_of_process
from mmhub.interfaces import Policy
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
    ) -> list[Answer]:
        """Answer the samples that no guard refuses by one call of `predict(samples, rows)`, and review what it answers.

        `rows` are the positions in `samples` of those that passed, which guards may have rewritten. `seen` says what
        `check` and `review` are shown of a sample, `policy` what may be read of its media.

        Raises:
            InputError: `predict` cannot read a sample; `row` is its position in `samples`.
        """
        token = _policy.set(policy)
        try:
            return self._answer(samples, predict, seen)
        finally:
            _policy.reset(token)

    def _answer(self, samples: Sequence[Sample], predict: Predict, seen: Callable[[Sample], Sample]) -> list[Answer]:
        passed, answers = dict(enumerate(samples)), dict[int, Answer]()
        for owner, guard in self._guards:
            refused = self._screen(owner, guard, passed, seen) if _watches(guard, "input") else {}
            answers |= refused
            passed = {row: sample for row, sample in passed.items() if row not in refused}
        rows = list(passed)
        try:
            given = predict(list(passed.values()), rows)
        except InputError as error:
            error.row = rows[error.row or 0]
            error.__notes__ = [f"in sample {error.row}"]  # the old one counts only the samples that passed
            raise
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
            if isinstance(found, Exception):
                refused[row] = self._failed(found, owner, guard, "input")
            elif found:
                refused[row] = self._refused(found, owner, guard, "input", seen(samples[row]))
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
                given = self._refused(str(new["refused"]), owner, guard, "output", sample, answer)
                return given | new
            if changed:
                self._note(owner, guard, "output", "changed", change.rule, change.reason)
            answer = new
        return answer

    def _refused(
        self, found: Refusal | str, owner: Plugin | Component, guard: Guard, stage: Stage, *given: Sample
    ) -> Answer:
        """The answer that says so, noted; the reason of a `Refusal` repeats nothing, any other may."""
        refusal = found if isinstance(found, Refusal) else Refusal(str(found))
        reason = refusal.reason if refusal is found else without_content(refusal.reason, *given)
        self._note(owner, guard, stage, refusal.action, refusal.rule, reason)
        return {"refused": refusal.reason, "guard": _name(owner, guard), **refusal.beside}

    def _failed(self, error: Exception, owner: Plugin | Component, guard: Guard, stage: Stage) -> Answer:
        self._note(owner, guard, stage, "refused", "failure", f"the guard failed: {type(error).__name__}")
        return {"refused": f"the guard failed: {cause(error)}", "guard": _name(owner, guard)}

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
        except Exception:  # for one of them, perhaps: the others need not suffer
            pass
    return [_checked_one(guard, sample) for sample in samples]


def _checked_one(guard: Guard, sample: Sample) -> Any:
    try:
        return guard.check(sample)
    except Exception as error:
        return error


def _watches(guard: Guard, stage: Stage) -> bool:
    return stage in getattr(guard, "on", ("input", "output"))


def _name(owner: Plugin | Component, guard: Guard) -> str:
    return f"{owner.distribution}/{guard.name}"


def _switch_off(distribution: str) -> str:
    return f"repair it, or switch it off: MMHUB_DISABLE_PLUGINS={distribution}"
