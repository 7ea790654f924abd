"""Where chat templates run: jinja2's sandbox, with limits to the time they take and what they make.

jinja2 keeps templates away from Python; it does not keep them from looping for days or filling all memory in a line.
What is plainly that is refused here, with a word about it; what is not ends with the process (see `typesetting`).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST = 4 * 2**20  # characters of a conversation that a template lays out, and of any text on the way there
SECONDS = 2.0  # of computing
_WIDE = 10_000  # to what a text may be filled up
_SOURCE = 2**20  # characters of a template
_TICK, _JOIN = "_mmhub_tick", "_mmhub_join"

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def limited_time() -> Iterator[None]:
    """Let what a template does inside the block raise SecurityError after `SECONDS`."""
    token = _deadline.set(time.thread_time() + SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def tick() -> bool:
    """Raise SecurityError if the time is over; what a loop, a macro, a filter and a call begin with."""
    if time.thread_time() > _deadline.get():
        raise SecurityError(f"it computes for more than {SECONDS:.0f} seconds")
    return True


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the limits of this module."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _limited(name, one) for name, one in self.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _SOURCE:
            raise SecurityError(f"it has {len(source):,} characters")
        tree = _Ticking().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    def make_globals(self, given: Any) -> Any:
        return super().make_globals({**(given or {}), _TICK: tick, _JOIN: _joined})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        tick()
        if not _SMALL[operator](left, right):
            raise SecurityError(f"it computes a huge {operator}")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        tick()
        own = getattr(obj, "__self__", None)
        if isinstance(own, (str, bytes, list)):
            _check(getattr(obj, "__name__", ""), own, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and getattr(value, "__name__", "") in ("format", "format_map") and _pads(text):
            raise SecurityError("it makes a huge text by format")
        return super().wrap_str_format(value)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return _joined(*parts)


class _Ticking(NodeTransformer):
    """Let loops and macros say that they go on, and texts be joined where their length is looked at."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call(_TICK, node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, node.lineno), lineno=node.lineno))
        return node

    def visit_Include(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError("it reads other templates")

    visit_Import = visit_FromImport = visit_Extends = visit_Include

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call(_JOIN, node.lineno, node.nodes)


def _call(name: str, line: int, arguments: list[nodes.Expr] | None = None) -> nodes.Call:
    function = nodes.Name(name, "load", lineno=line)
    return nodes.Call(function, arguments or [], [], None, None, lineno=line)


def _joined(*parts: Any) -> str:
    found, length = [], 0
    for part in map(str, parts):
        length += len(part)
        if length > LONGEST:
            raise SecurityError(f"it writes more than {LONGEST:,} characters")
        found.append(part)
    return "".join(found)


def _size(value: Any) -> float:
    return abs(value) if isinstance(value, (int, float)) else len(value) if hasattr(value, "__len__") else 1


def _small_sum(left: Any, right: Any) -> bool:
    return all(isinstance(one, (int, float)) for one in (left, right)) or _size(left) + _size(right) <= LONGEST


def _small_product(left: Any, right: Any) -> bool:
    return all(isinstance(one, float) for one in (left, right)) or _size(left) * _size(right) <= LONGEST


def _small_power(left: Any, right: Any) -> bool:
    return all(isinstance(one, (int, float)) and abs(one) <= 1000 for one in (left, right))


def _small_format(left: Any, right: Any) -> bool:
    return not isinstance(left, bytes) and not (isinstance(left, str) and _fills(left))


# Fields that are filled up to a width that is large, or not known before.
_FIELDS = re.compile(r"\{[^{}:]*:[^{}]*(\d{5,}|\{)")
_CONVERSIONS = re.compile(r"%(\([^()]*\))?[-+ #0]*\d*\.?(\d{5,}|\*)")


def _fills(text: str) -> bool:
    return _CONVERSIONS.search(text.replace("%%", "")) is not None


def _pads(text: str) -> bool:
    return _FIELDS.search(text.replace("{{", "").replace("}}", "")) is not None


_SMALL: dict[str, Callable[[Any, Any], bool]] = {
    "+": _small_sum, "*": _small_product, "**": _small_power, "%": _small_format,
}  # fmt: skip


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at the time, and at what it is asked to fill up."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        tick()
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, (str, int, float, list))]
        _check(name, given[0] if given else "", given[1:])
        return function(*args, **kwargs)

    return limited


def _check(name: str, value: Any, given: Iterable[Any]) -> None:
    """Refuse what would make a large text of small ones: filling up, replacing, joining and formatting."""
    given = list(given)
    texts = [one for one in given if isinstance(one, str)]
    wide = name in _WIDTHS and any(isinstance(one, int) and abs(one) > _WIDE for one in given)
    formats = name == "format" and isinstance(value, str) and _fills(value)
    times = len(value) if name in ("join", "indent", "wordwrap") and hasattr(value, "__len__") else 0
    if name == "replace" and isinstance(value, str) and texts:
        times = value.count(texts[0])
    if wide or formats or times * max(map(len, texts), default=0) > LONGEST:
        raise SecurityError(f"it makes a huge text by {name}")


_WIDTHS = frozenset(
    ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice", "tojson")
)
