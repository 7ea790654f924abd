"""Chat templates: a conversation becomes the text that a model was trained on, in jinja2's sandbox.

Templates come with models and are data: they see the messages and the names of special tokens, nothing else.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mmhub.errors import InputError, NotFoundError, TrustError, UsageError, did_you_mean
from mmhub.interfaces import describe_raw
from mmhub_text.frame import read_text

ROLES = ("system", "user", "assistant")
LONGEST = 4 * 2**20  # characters of a conversation that a template lays out
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


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    names: Mapping[str, str],
    controls: Mapping[str, Set[str]],
    encode: Callable[[str], Sequence[int]],
    normalise: Callable[[str], str] = str,
) -> list[int]:
    """Return the ids of a conversation up to the assistant's next answer.

    `encode` turns text into ids, special tokens in it into theirs; `names` are special tokens such as bos_token. Those
    that a message spells, as it stands or after `normalise`, become plain text, character by character, if they are
    among the `controls` of its role: only the template writes real ones.

    Raises:
        InputError: the conversation is malformed, or the template refuses it. TrustError: the template is damaged.
    """
    checked = [_checked(message, number) for number, message in enumerate(_listed(messages))]
    for message in checked:
        message["content"] = _revealed(message["content"], controls[message["role"]], normalise)
    texts = [message["content"] for message in checked]
    spelled = [{token for token in controls[one["role"]] if token in one["content"]} for one in checked]
    if not any(spelled):
        return list(encode(render(checked, template, names)))
    start, end = _unused(texts), _unused(texts, skip=1)
    for message, tokens in zip(checked, spelled, strict=True):
        if tokens:
            longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
            message["content"] = re.sub(longest_first, lambda found: f"{start}{found[0]}{end}", message["content"])
    return _encode_pieces(render(checked, template, names), start, end, encode)


def render(messages: Sequence[Mapping[str, Any]], template: str, names: Mapping[str, str], *, asks: bool = True) -> str:
    """Return the text of checked messages; if it `asks`, up to the assistant's next answer."""
    compiled = _compile(template)
    try:
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


def answers_of(
    messages: Sequence[Mapping[str, Any]], template: str, names: Mapping[str, str], whole: str
) -> list[tuple[int, int, int]]:
    """Return (number, start, end) of what `whole`, the layout of all messages, holds of each answer of the assistant.

    It begins where the model begins to write, and ends where the message does. An answer that the template writes
    otherwise once more is said after it is left out.
    """
    found = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:number], template, names) if number else ""
        after = render(messages[: number + 1], template, names, asks=False)
        if whole.startswith(before) and whole.startswith(after) and len(before) <= len(after):
            found.append((number, len(before), len(after)))
    return found


def _joined(parts: Iterable[str]) -> str:
    found, length = [], 0
    for part in parts:
        length += len(part)
        if length > LONGEST:
            raise SecurityError(f"it writes more than {LONGEST:,} characters")
        found.append(part)
    return "".join(found)


def _revealed(text: str, tokens: Set[str], normalise: Callable[[str], str]) -> str:
    """The text, normalised if that makes it spell more of the tokens, as </S> does in lower case."""
    normal = normalise(text)
    return normal if any(normal.count(token) > text.count(token) for token in tokens if token in normal) else text


def _encode_pieces(text: str, start: str, end: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
    """Encode a text in which what stands between `start` and `end` is plain; a mark without a partner only parts."""
    ids: list[int] = []
    for piece in re.split(f"({start}[^{start}{end}]*{end})|[{start}{end}]", text):
        plain = bool(piece) and piece[0] == start
        for part in list(piece[1:-1]) if plain else [piece] if piece else []:
            ids += encode(part)
    return ids


def _unused(texts: Sequence[str], skip: int = 0) -> str:
    """A character that no text holds, among those that Unicode keeps for such uses."""
    free = [char for char in map(chr, range(0xFDD0, 0xFDF0)) if not any(char in text for text in texts)]
    if len(free) <= skip:
        raise InputError("the conversation holds nearly all of Unicode's noncharacters", "remove U+FDD0 to U+FDEF")
    return free[skip]


def _listed(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, (list, tuple)) or not messages:
        given = "none" if isinstance(messages, (list, tuple)) else describe_raw(messages)
        hint = 'e.g. [{"role": "user", "content": "hello"}]'
        raise InputError(f"a conversation is a list of messages, got {given}", hint)
    return messages


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
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
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
    except (RecursionError, MemoryError):
        raise TrustError("the chat template is nested too deeply", "give another one") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit to what a multiplication makes: one line could ask for all memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            small = all(isinstance(one, (int, float)) and abs(one) <= 1000 for one in (left, right))
        else:
            sizes = [one if isinstance(one, (int, float)) else len(one) for one in (left, right)]
            small = abs(sizes[0] * sizes[1]) <= LONGEST or all(isinstance(one, float) for one in sizes)
        if not small:
            raise SecurityError(f"it computes a huge {operator}")
        return super().call_binop(context, operator, left, right)


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
