"""Looking through models: the lists, a model's facts, and cards that cannot act."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmhub_ui import listing
from mmhub_ui.browse import BrowseTab, described
from mmhub_ui.context import Context
from mmhub_ui.page import card

REGISTRY = """
schema = 1
[models.digits]
ref = "local:./digits"
task = "classification"
summary = "Told from pictures"
[models.far]
ref = "hub:org/far"
summary = "Elsewhere"
"""
BAD_CARD = """---
license: mit
---
# Title
<script>alert(1)</script> <img src="http://evil.example/x.png" onerror="alert(1)">

![a picture](http://evil.example/y.png) [click](javascript:alert(1)) [page](https://example.org/a?b=1&c=2)
${alert(1)} {{x}}

<!-- a comment -->

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.fixture
def project(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a registry, a model and a run."""
    (tmp_path / "registry.toml").write_text(REGISTRY)
    tiny("image").save(tmp_path / "digits")
    (tmp_path / "digits/README.md").write_text(BAD_CARD)
    tiny("text").save(tmp_path / "runs/first/model")
    (tmp_path / "runs/empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tab(in_blocks: Any, project: Path) -> BrowseTab:
    found: BrowseTab = in_blocks(lambda: BrowseTab(Context()))
    return found


def test_the_registered_models_are_those_of_models_ls(tab: BrowseTab) -> None:
    from mmhub.cli.models import ls

    rows = json.loads(CliRunner().invoke(ls, ["--json"]).stdout)["models"]
    found, told = tab.listed("Registered", "")
    assert [(row[0], row[2], row[3]) for row in found] == [(r["name"], r["task"], r["summary"]) for r in rows]
    assert {"digits", "far"} <= {row[0] for row in found} and told == ""


def test_every_word_of_a_search_must_stand_somewhere(tab: BrowseTab) -> None:
    assert [row[0] for row in tab.listed("Registered", "PICTURES classif")[0]] == ["digits"]
    rows, told = tab.listed("Registered", "pictures elsewhere")
    assert rows == [] and "No model of this list" in told


def test_local_models_and_those_of_runs_are_found_by_the_names_that_load_them(project: Path) -> None:
    import mmhub

    names = [one.name for one in listing.models(Context(), "Local folders")]
    assert names == ["./digits", "./runs/first/model"]
    assert mmhub.load(names[1]).task.name == "classification"
    assert listing.offered(Context(names=("x",)))[0] == "x" and {*names, "far"} <= {*listing.offered(Context())}


def test_a_broken_registry_is_told_and_costs_no_more_than_its_list(tab: BrowseTab, project: Path) -> None:
    (project / "registry.toml").write_text("schema = 1\n[modles]\n")
    rows, told = tab.listed("Registered", "")
    assert rows == [] and "did you mean" in told
    assert listing.offered(Context(names=("x",))) == ["x"]


def test_a_model_is_opened_with_its_facts_card_and_button(tab: BrowseTab) -> None:
    name, facts, text, button = tab.opened("digits")
    assert name == "digits" and button["visible"] and button["value"] == "Try digits"
    assert "classification" in facts and "mit" in facts and "mmhub-image/timm" in facts and "Title" in text
    assert "did you mean" in tab.opened("digist")[1]


def test_a_warning_names_the_model_and_not_its_folder(tab: BrowseTab, project: Path) -> None:
    (project / "digits/README.md").unlink()
    facts = tab.opened("digits")[1]
    assert "no licence is given for digits" in facts and str(project) not in facts


def test_what_is_not_here_is_told_from_the_registry(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    facts, text = described(Context(), "far")
    assert "Elsewhere" in facts and "only what the registry says" in facts and text == ""


def test_a_card_is_shown_and_not_obeyed() -> None:
    found = card(BAD_CARD)
    assert "<script" not in found and "<img" not in found and 'href="javascript' not in found
    assert "src=" not in found.replace("&lt;img src=", "") and "${" not in found and "{{" not in found
    assert "[a picture]" in found and '<a href="https://example.org/a?b=1&amp;c=2" target="_blank" rel=' in found
    assert "<h2>Title</h2>" in found and "<td>1</td>" in found and "license" not in found and "comment" not in found


def test_a_card_that_is_long_or_made_to_be_slow_is_shown_in_time() -> None:
    assert card("a <!-- b --> c <!-- d -->").count("<!--") == 0 and "&lt;!--" in card("a <!-- b")
    for piece in ("<!--", "[a]("):
        begin = time.process_time()
        assert "The rest is left out" in card(piece * 20_000)
        assert time.process_time() - begin < 4, piece


def test_no_more_of_a_card_is_read_than_is_shown(tab: BrowseTab, project: Path, monkeypatch: Any) -> None:
    (project / "digits/README.md").write_text("word " * 100_000)
    read: list[str] = []
    monkeypatch.setattr("mmhub_ui.browse.card", lambda text: read.append(text) or "")
    tab.opened("digits")
    assert 60_000 < len(read[0]) < 70_000


def test_facts_that_strangers_wrote_are_text(tab: BrowseTab, project: Path) -> None:
    (project / "digits/README.md").write_text(
        "---\nlicense: <b>x</b>\n---\n# A\n\n<script>bad()</script> is what it does.\n"
    )
    facts = tab.opened("digits")[1]
    assert "<script" not in facts and "<b>" not in facts and "&lt;" in facts


def test_a_locked_app_lists_and_describes_its_own_models_alone(project: Path) -> None:
    context = Context(names=("./digits",), locked=True)
    assert [one.name for one in listing.models(context)] == ["./digits"] == listing.offered(context)
    assert "Title" in described(context, "./digits")[1]
    assert "is not offered here" in described(context, "./runs/first/model")[0]


def test_plugins_are_listed_with_their_parts() -> None:
    rows = {row[0]: row for row in listing.plugins()}
    assert "image encoder timm" in rows["mmhub-image"][3] and rows["mmhub-image"][2] == "ok"


def test_the_button_opens_the_model_in_the_first_tab(in_blocks: Callable[[Any], Any], tab: BrowseTab) -> None:
    import gradio as gr

    def wired() -> Any:
        name, other = gr.Textbox(), BrowseTab(Context())
        other.on_try(name, lambda chosen: [chosen, gr.Tabs(selected="try")], [gr.Tabs()])
        return next(fn for fn in gr.context.Context.root_block.fns.values() if fn.targets[0][0] == other.button._id)

    wire = in_blocks(wired)
    assert wire.fn("digits")[0] == "digits" and len(wire.outputs) == 2
