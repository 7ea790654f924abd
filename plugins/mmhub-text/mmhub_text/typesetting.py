"""How a chat template is laid out: in jinja2's sandbox, and, if it is a stranger's, in another process.

The sandbox bounds what Python sees. What one call of a library takes, such as comparing nested lists, only a process
that can be killed bounds. It gets a template, messages and names as JSON, and gives back a text, or says why not.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from mmhub.errors import InputError, MmhubError, TrustError
from mmhub.interfaces.apart import Busy, Decoded, decode_apart
from mmhub.interfaces.raw import Bounds, Policy
from mmhub_text import sandbox
from mmhub_text.sandbox import LONGEST, Sandbox, limited_time

# Of a process; its clock runs on while the machine does other work, and its own time ends it before.
BOUNDS = Bounds(memory=512 * 2**20, seconds=10.0)
_NAME = "the chat template"
_POLICY = Policy(paths=False, max_pixels=2 * LONGEST)  # three bytes each, and a character has four at most
_ERROR = 2000  # characters of a message
_UTF8 = ("utf-8", "surrogatepass")  # half a character is for the tokenizer to refuse


def lay_out(template: str, values: Mapping[str, Any] | None) -> str:
    """Return what a template writes about `values`, or '' without any: then it is only read.

    Raises:
        TrustError: it is damaged, or does or takes what none may. InputError: it refuses the conversation.
    """
    compiled = _compile(template)
    try:
        with limited_time():
            return "" if values is None else Sandbox.concat(compiled.generate(**values))
    except (RecursionError, MemoryError):
        raise _too_much() from None
    except SecurityError as error:
        raise _forbidden(error) from None
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{_NAME} refuses the conversation: {error}", "check roles and their order") from None


def lay_out_apart(template: str, values: Mapping[str, Any] | None) -> str:
    """Return what `lay_out` does, in a process that is killed if it takes too much; `values` are JSON data."""
    content = json.dumps([template, values], ensure_ascii=False).encode(*_UTF8)
    now = datetime.now().isoformat()  # the process knows no time zone
    try:
        facts, *parts = decode_apart(_laid_out, content, _NAME, _POLICY, BOUNDS, seconds=sandbox.SECONDS, now=now)
    except Busy:
        raise InputError(f"{_NAME} could not be used: others take too long", "try again") from None
    except InputError:
        raise _too_much() from None
    if not isinstance(facts, Mapping):
        raise _too_much()
    error = {"InputError": InputError, "TrustError": TrustError}.get(str(facts.get("error")))
    if error is not None:
        raise error(str(facts.get("message"))[:_ERROR], str(facts.get("hint"))[:_ERROR])
    return _read(parts)


def _read(parts: list[Any]) -> str:
    try:
        text = b"".join(np.asarray(part).tobytes() for part in parts).decode(*_UTF8)
    except (TypeError, ValueError):
        raise _too_much() from None
    if len(text) > LONGEST:
        raise _too_much()
    return text


def _laid_out(content: bytes, name: str, policy: Policy, *, seconds: float, now: str) -> Decoded:
    """What the process does: a table that says what is wrong, if anything is, and the text in bytes."""
    template, values = json.loads(content.decode(*_UTF8))
    sandbox.SECONDS = seconds
    _clock[0] = lambda: datetime.fromisoformat(now)
    try:
        with _killed_after(1.5 * seconds):
            text = lay_out(template, values).encode(*_UTF8)
    except MmhubError as error:
        if isinstance(error.__context__, MemoryError):
            raise MemoryError from None  # what is left of it would be in the way of others
        yield {"error": type(error).__name__, "message": error.message[:_ERROR], "hint": error.hint}
        return
    yield {}
    yield np.frombuffer(text, np.uint8)


@contextmanager
def _killed_after(seconds: float) -> Iterator[None]:
    """Let the system end this process if it computes for so long, also where it runs no Python."""
    if not hasattr(signal, "setitimer"):  # Windows: the process that asks watches the clock
        yield
        return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_much() -> TrustError:
    return TrustError(f"{_NAME} needs more time or memory than it may", "give another one")


def _forbidden(error: SecurityError) -> TrustError:
    return TrustError(f"{_NAME} does what none may do: {error}", "give another one")


_clock: list[Callable[[], datetime]] = [datetime.now]


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own, which has a limit
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _refuse,
        "strftime_now": lambda style: _clock[0]().strftime(style),
    }
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise TrustError(f"{_NAME} is damaged: line {error.lineno}: {error.message}") from None
    except SecurityError as error:
        raise _forbidden(error) from None
    except (RecursionError, MemoryError, SyntaxError):  # of what jinja2 writes in Python
        raise TrustError(f"{_NAME} is nested too deeply", "give another one") from None


class _Generation(Extension):
    """The tag {% generation %}, by which templates mark what an assistant wrote; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """A namespace whose entries cannot reach what belongs to Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it sets {name!r}")
        super().__setitem__(name, value)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    """Write JSON without the escapes for HTML that jinja2's own filter adds."""
    return json.dumps(value, **({"ensure_ascii": False} | options))
