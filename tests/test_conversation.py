"""Conversations as people write them down: what is read, and what is refused instead of lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmhub.conversation import read_messages
from mmhub.data.inputs import usable
from mmhub.data.talks import read_talk
from mmhub.errors import InputError
from mmhub.interfaces import Policy, describe_raw, raw_bytes
from mmhub.interfaces.raw import local_path

TAKES = ("image", "audio", "text")


def read(*parts: Any, **more: Any) -> list[Any]:
    """The content of a message of the user."""
    (message,) = read_messages([{"role": "user", "content": list(parts), **more}], TAKES)
    content: list[Any] = message["content"]
    return content


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"type": "image", "image_path": "a.png"},
            "'image' that has the unknown key 'image_path'; did you mean 'image'?",
        ),
        (
            {"type": "text", "content": "hello"},
            "'text' that has the unknown key 'content'; it takes type, text, detail",
        ),
        ({"type": "text", "text": None, "txt": "a", "b": 1}, "unknown keys 'txt', 'b'; did you mean 'text'?"),
        ({"type": "image_url", "image": "a.png"}, "unknown key 'image'; did you mean 'image_url'?"),
        ({"type": "imgae", "imgae": "a.png"}, "a part of the type 'imgae'; this model takes image, audio, text"),
    ],
)
def test_a_misspelt_key_of_a_part_is_named(part: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(part)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("role", "says"),
    [("User", "'User'"), (None, "None"), (5, "5"), (10**400, "a int"), (np.zeros((2, 2)), "a ndarray")],
)
def test_a_wrong_role_is_shown_in_one_line(role: Any, says: str) -> None:
    with pytest.raises(InputError, match=f"^message 1 has the role {says}; roles are system, user, assistant$"):
        read_messages([{"role": role, "content": "a"}], TAKES)


def test_a_misspelt_key_of_a_message_is_named() -> None:
    with pytest.raises(InputError, match=r"message 1 has the unknown key 'weigth'; did you mean 'weight'\?"):
        read("a", weigth=0)


def test_keys_beside_what_a_part_holds_and_empty_ones_are_nobodys_concern() -> None:
    assert read({"type": "image", "image": "a.png", "index": 0}, {"type": "image", "path": "b.png", "text": None}) == [
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "b.png"},
    ]
    assert read({"type": "image", "detail": "low"}, {"type": "audio", "audio": None, "image": None}) == []
    assert read("a", name="Ada", id=7, interrupted=True, tool_calls=None, annotations=[]) == [
        {"type": "text", "text": "a"}
    ]


def test_openai_parts_are_read_with_their_data_inside_or_beside() -> None:
    data = "data:audio/wav;base64,QUJD"
    for part in (
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
        {"type": "input_audio", "data": "QUJD", "format": "wav"},
        {"type": "audio_url", "url": data},
    ):
        assert read(part) == [{"type": "audio", "audio": b"ABC"}]
    assert read({"type": "image_url"}, {"type": "image_url", "image_url": None}) == []


def test_arrays_without_dimensions_are_left_to_the_encoder_and_empty_ones_are_missing() -> None:
    scalars: list[Any] = [np.array(3.0), torch.tensor(3.0)]
    assert [part["image"] for part in read(*({"type": "image", "image": raw} for raw in scalars))] == scalars
    empty: list[Any] = [np.zeros(0), torch.zeros(0, 3), b"", []]
    assert read(*({"type": "image", "image": raw} for raw in empty)) == []


@pytest.mark.parametrize("weight", [2, 2.0, np.int64(2), np.float32(2)])
def test_any_real_number_is_a_weight(weight: Any) -> None:
    (message,) = read_messages([{"role": "assistant", "content": "a", "weight": weight}], TAKES)
    assert message["weight"] == 2 and type(message["weight"]) is float
    for wrong in (True, np.bool_(True), "2", -1, float("nan"), 10**400):
        with pytest.raises(InputError, match="a weight is a number"):
            read("a", weight=wrong)


def test_a_conversation_may_be_written_as_json() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert read_messages(" " + json.dumps(messages), TAKES) == read_messages(messages, TAKES)
    for text in ("[", "hi", "[" * 100_000):
        with pytest.raises(InputError, match="a conversation is a list of messages, got '"):
            read_messages(text, TAKES)


def test_a_table_may_hold_conversations_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    text = json.dumps([{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}])
    talk, answer = read_talk({"m": text}, {"text": "m", "image": "m"}, "", dict.fromkeys(TAKES), tmp_path)
    assert answer == "a cat" and talk[0]["content"][0]["image"] == tmp_path / "a.png"
    assert usable("image", text, tmp_path) == [tmp_path / "a.png"] and usable("audio", text) is None
    assert usable("text", text) == text  # it may be a text about JSON
    assert usable("image", "[a].png") == "[a].png"


@pytest.mark.parametrize("content", ["abc", [500], 10_000_000_000, np.zeros(3)])
def test_bytes_of_a_struct_are_bytes(content: Any) -> None:
    with pytest.raises(InputError, match=r"a struct holds as its bytes .*; give bytes, or a path"):
        raw_bytes({"bytes": content}, Policy())
    assert describe_raw({"bytes": content}) == "a struct"
    assert raw_bytes({"bytes": memoryview(b"abc")}, Policy()) == b"abc"


@pytest.mark.parametrize("path", ["~nosuch/b", "~\0/b", "~"])
def test_a_path_of_a_user_that_does_not_exist_is_an_input_error(path: str) -> None:
    assert local_path(path, Policy()) is not None
    with pytest.raises(InputError):
        raw_bytes(path, Policy())
