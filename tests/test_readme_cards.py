"""What is read from a README that a stranger wrote."""

from __future__ import annotations

import pytest

from mmhub.hub.readme import parse_card


@pytest.mark.parametrize(
    ("body", "summary"),
    [
        ("# Title\n\nOne [link](https://x.example/y).\nTwo.\n\nThree.", "One link. Two."),
        ("# Title\nRight below.", "Right below."),
        ("<!-- hidden\n\ntext -->\n\nSeen.", "Seen."),
        ("```sh\npip install x\n```\n\n| a | b |\n\n- item\n\nProse.", "Prose."),
        ("<!-- never closed\n\nNot prose.", ""),
        ("# Only a title", ""),
        ("", ""),
        ("x" * 400, "x" * 299 + "…"),
    ],
)
def test_the_summary_is_the_first_prose(body: str, summary: str) -> None:
    assert parse_card(f"---\nlicense: mit\n---\n{body}").summary == summary


@pytest.mark.parametrize(
    "front",
    [
        "license: [",
        "license: {a: 1}",
        "- a",
        "license: 3",
        "a: &a [*a]",
        "[" * 3000,
        "license: unknown",
        "1: 2",
        "\x00",
    ],
)
def test_metadata_of_another_form_counts_for_nothing(front: str) -> None:
    card = parse_card(f"---\n{front}\n---\nText.")
    assert (card.license, card.parents, card.summary) == ("", (), "Text.")


def test_licence_parents_and_tags_are_read() -> None:
    card = parse_card(
        "---\nlicense: other\nlicense_name: our-terms\nbase_model: [a/b, 3, c/d]\nbase_model_relation: adapter\n"
        "tags: x\n---\n"
    )
    assert card.license == "our-terms"
    assert card.parents == (("a/b", "adapter"), ("c/d", "adapter"))
    assert card.tags == ["x"]


@pytest.mark.timeout(20)  # quadratic time takes minutes
@pytest.mark.parametrize("piece", ["<!--", "```a", "[x](", "\n \n", "#\n", "---\n", "![a]("])
def test_no_text_takes_long(piece: str) -> None:
    parse_card("---\nlicense: mit\n---\n" + piece * 60_000)
