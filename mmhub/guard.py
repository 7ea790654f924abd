"""Guards of plugins around a model's answers: which apply, and what they do to samples and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmhub.errors import InputError, PluginError
from mmhub.plugins import Plugin, get_index, hook_items
from mmhub.records import cause

if TYPE_CHECKING:
    from mmhub.spec import Guard

Sample = Mapping[str, Any]
Answer = dict[str, Any]


HOOK = "mmhub_generation_guards"


class Guards:
    """The guards of one model, in the order of their plugins' names.

    Raises:
        PluginError: a plugin with guards fails, cannot be used, or gives something else than guards.
    """

    def __init__(self, model: Any) -> None:
        for plugin in get_index().plugins:
            if HOOK in plugin.hooks and plugin.status in ("broken", "incompatible"):
                raise PluginError(
                    f"the guard in plugin {plugin} cannot be used: {plugin.problem}", _switch_off(plugin.distribution)
                )
        self._guards: list[tuple[Plugin, Guard]] = hook_items(HOOK, required=True, model=model)
        for plugin, guard in self._guards:
            lacking = [name for name in ("name", "check", "review") if not hasattr(guard, name)]
            if lacking:
                raise PluginError(
                    f"plugin {plugin} gives a guard without {lacking[0]!r}: a {type(guard).__name__}",
                    _switch_off(plugin.distribution),
                )

    def __bool__(self) -> bool:
        return bool(self._guards)

    def answer(self, samples: Sequence[Sample], predict: Callable[[list[Sample]], list[Answer]]) -> list[Answer]:
        """Answer the samples that no guard refuses by one call of `predict`, and review what it answers.

        Raises:
            InputError: `predict` cannot read a sample; `row` is its position in `samples`.
        """
        answers = {row: refusal for row, sample in enumerate(samples) if (refusal := self._refusal(sample))}
        passed = [row for row in range(len(samples)) if row not in answers]
        try:
            given = predict([samples[row] for row in passed])
        except InputError as error:
            error.row = passed[error.row or 0]
            error.__notes__ = [f"in sample {error.row}"]  # the old one counts only the samples that passed
            raise
        answers |= {row: self._review(samples[row], answer) for row, answer in zip(passed, given, strict=True)}
        return [answers[row] for row in range(len(samples))]

    def _refusal(self, sample: Sample) -> Answer | None:
        for plugin, guard in self._guards:
            try:
                reason = guard.check(sample)
            except Exception as error:
                reason = f"the guard failed: {cause(error)}"
            if reason:
                return _refused(str(reason), plugin, guard)
        return None

    def _review(self, sample: Sample, answer: Answer) -> Answer:
        for plugin, guard in self._guards:
            try:
                answer = dict(guard.review(sample, answer))
            except Exception as error:
                return _refused(f"the guard failed: {cause(error)}", plugin, guard)
        return answer


def _switch_off(distribution: str) -> str:
    return f"repair it, or switch it off: MMHUB_DISABLE_PLUGINS={distribution}"


def _refused(reason: str, plugin: Plugin, guard: Guard) -> Answer:
    return {"refused": reason, "guard": f"{plugin.distribution}/{guard.name}"}
