"""Chat templates: a conversation becomes the text that a model was trained on, in jinja2's sandbox.

Templates come with models and are data: they see the messages and the names of special tokens, nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from mmhub.errors import InputError, NotFoundError, TrustError, UsageError, did_you_mean
from mmhub.interfaces import describe_raw
from mmhub_text.frame import read_text
from mmhub_text.sandbox import LONGEST, Sandbox, limited_time

ROLES = ("system", "user", "assistant")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
BUILT_IN = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}{{ '\n' }}{{ message.content }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
    ),
}


def find_template(name: str) -> str:
    """Return the built-in template called `name`, or the content of that file.

    Raises:
        NotFoundError: there is neither. TrustError: the file is no readable text, or no template.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if not path.is_file():
        hint = did_you_mean(name, BUILT_IN) or f"give {' or '.join(map(repr, BUILT_IN))}, or the path of a jinja file"
        raise NotFoundError(f"no chat template '{name}'", hint)
    text = read_text(path)
    _compile(text)
    return text


def render(messages: Sequence[Mapping[str, Any]], template: str, names: Mapping[str, str], *, asks: bool = True) -> str:
    """Return the text of checked messages; if it `asks`, up to the assistant's next answer."""
    compiled = _compile(template)
    try:
        with limited_time():
            return _joined(
                compiled.generate(**names, messages=messages, tools=None, documents=None, add_generation_prompt=asks)
            )
    except (RecursionError, MemoryError):
        raise TrustError("the chat template needs more memory than it may", "give another one") from None
    except SecurityError as error:
        raise TrustError(f"the chat template does what none may do: {error}", "give another one") from None
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the chat template refuses the conversation: {error}", "check roles and their order"
        ) from None


def _joined(parts: Iterable[str]) -> str:
    found, length = [], 0
    for part in parts:
        length += len(part)
        if length > LONGEST:
            raise SecurityError(f"it writes more than {LONGEST:,} characters")
        found.append(part)
    return "".join(found)


def checked(messages: Any) -> list[dict[str, str]]:
    """Return a conversation of texts alone.

    Raises:
        InputError: it is none.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        given = "none" if isinstance(messages, (list, tuple)) else describe_raw(messages)
        hint = 'e.g. [{"role": "user", "content": "hello"}]'
        raise InputError(f"a conversation is a list of messages, got {given}", hint)
    return [_checked(message, number) for number, message in enumerate(messages)]


def _checked(message: Any, number: int) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        what = f"the keys {sorted(map(str, message))}" if isinstance(message, Mapping) else describe_raw(message)
        raise InputError(f"message {number + 1} should have a role and a content, got {what}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"message {number + 1} has the unknown role {role!r}", f"roles: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"the content of message {number + 1} should be a text, got {describe_raw(content)}")
    return {"role": role, "content": content}


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own, which has a limit
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _refuse,
        "strftime_now": lambda style: datetime.now().strftime(style),
    }
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise TrustError(f"the chat template is damaged: line {error.lineno}: {error.message}") from None
    except SecurityError as error:
        raise TrustError(f"the chat template does what none may do: {error}", "give another one") from None
    except (RecursionError, MemoryError, SyntaxError):  # of what jinja2 writes in Python
        raise TrustError("the chat template is nested too deeply", "give another one") from None


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


def no_template() -> UsageError:
    """The error of a model that knows no conversations."""
    return UsageError(
        "this model has no chat template",
        'give one in [model.tokenizer], chat_template = "plain", "chatml" or a file, or use text instead of chat',
    )
