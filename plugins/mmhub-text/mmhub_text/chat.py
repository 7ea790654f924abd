"""Chat templates: a conversation becomes the text that a model was trained on, in jinja2's sandbox.

Templates come with models and are data: they see the messages and the names of special tokens, nothing else. All but
those built in here are laid out in a process of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmhub.errors import InputError, NotFoundError, UsageError, did_you_mean
from mmhub.interfaces import describe_raw
from mmhub_text.frame import read_text
from mmhub_text.typesetting import lay_out, lay_out_apart

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
    lay_out_apart(text, None)
    return text


def render(messages: Sequence[Mapping[str, Any]], template: str, names: Mapping[str, str], *, asks: bool = True) -> str:
    """Return the text of checked messages; if it `asks`, up to the assistant's next answer."""
    values = {**names, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": asks}
    return (lay_out if template in BUILT_IN.values() else lay_out_apart)(template, values)


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


def no_template() -> UsageError:
    """The error of a model that knows no conversations."""
    return UsageError(
        "this model has no chat template",
        'give one in [model.tokenizer], chat_template = "plain", "chatml" or a file, or use text instead of chat',
    )
