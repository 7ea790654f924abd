"""The model card: what is generated, and that what the user wrote stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmhub.build import compose
from mmhub.checkpoint import read_config
from mmhub.errors import TrustError, UsageError
from mmhub.hub.card import END, START, join_cards, merge_card, read_card
from mmhub.hub.describe import describe
from mmhub.names import resolve


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "model")


def card(folder: Path, old: str = "", **options: Any) -> str:
    return merge_card(folder, read_config(folder), name="team/shapes", old=old, **options)


def test_the_metadata_is_what_the_hub_indexes(folder: Path) -> None:
    data, _ = read_card(card(folder, metadata={"license": "mit", "language": ["en"], "datasets": []}))
    assert data["library_name"] == "mmhub"
    assert data["license"] == "mit"
    assert data["language"] == ["en"]
    assert "datasets" not in data
    parts = ["mmhub-audio", "mmhub-heads", "mmhub-image"]
    assert data["tags"] == ["mmhub", "classification", "image", "audio", *parts]
    measured = json.loads((folder / "eval" / "classification.json").read_text())
    result = data["model-index"][0]["results"][0]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values["accuracy"] == measured["metrics"]["accuracy"]
    assert values["accuracy (image only)"] == measured["subsets"]["image"]["accuracy"]
    assert not [name for name in values if "rows" in name]


def test_huggingface_hub_reads_the_card(folder: Path) -> None:
    from huggingface_hub import ModelCard

    text = card(folder, metadata={"license": "mit"})
    found = ModelCard(text)
    assert found.data.license == "mit"
    assert found.data.eval_results
    assert found.data.model_name == "team/shapes"


def test_the_text_tells_use_results_training_and_limits(folder: Path) -> None:
    _, text = read_card(card(folder))
    for part in (
        "# team/shapes", "mmhub predict team/shapes --image FILE --audio FILE", 'pip install "mmhub', "| image only |",
        "18 optimizer steps over 48 rows of `train.parquet`", "## Intended use and limits",
    ):  # fmt: skip
        assert part in text, part


def test_each_stage_names_its_own_data(folder: Path) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    hub = {"rows": 5, "id": "team/talks", "revision": "0123456789abcdef"}
    table = {"rows": 9, "files": [{"name": "own.jsonl", "sha256": "f" * 64}]}
    facts["stages"] = [
        {"name": "still", "parts": ["fusion"], "steps": 2, "data": {"train": hub}},
        {"name": "all", "parts": ["fusion", "decoder"], "steps": 4, "data": {"train": table}},
    ]
    (folder / "provenance.json").write_text(json.dumps(facts | {"steps": 6}))
    data, text = read_card(card(folder))
    assert "6 optimizer steps, seed 0, in " in text and "train.parquet" not in text
    assert "Stage 1, still: 2 steps on fusion, over 5 rows of `team/talks` (0123456789ab)." in text
    assert "Stage 2, all: 4 steps on fusion, decoder, over 9 rows of `own.jsonl` (ffffffffffff)." in text
    assert data["datasets"] == ["team/talks"]


@pytest.mark.parametrize(("rows", "label"), [({"text": 2, "image+text": 3}, "all rows"), ({"text": 5, "image": 3}, "")])
def test_all_rows_are_no_rows_with_all_inputs_where_each_is_in_one_subset(
    folder: Path, rows: dict[str, int], label: str
) -> None:
    subsets = {name: {"exact_match": 0.5, "rows": count} for name, count in rows.items()}
    result = {"task": "visual-question-answering", "rows": 5, "metrics": {"exact_match": 0.5}, "subsets": subsets}
    (folder / "eval" / "classification.json").write_text(json.dumps(result))
    assert f"| {label or 'all inputs given'} | 0.5000 |" in card(folder)


def test_generating_a_card_twice_changes_nothing(folder: Path) -> None:
    once = card(folder, metadata={"license": "mit"})
    assert card(folder, old=once) == once


def test_text_around_the_generated_part_and_unknown_keys_stay(folder: Path) -> None:
    old = f"---\nlicense: mit\nfoo: [1, 2]\n---\n# My title here\n\nBefore.\n\n{START}\nold\n{END}\n\nAfter.\n"
    data, text = read_card(card(folder, old=old))
    assert data["foo"] == [1, 2]
    assert text.lstrip().startswith("# My title here\n\nBefore.")
    assert text.endswith("After.\n")
    assert "\nold\n" not in text


def test_a_card_without_markers_is_kept_whole_before_the_generated_part(folder: Path) -> None:
    _, text = read_card(card(folder, old="# Mine\n\nAll mine.\n"))
    assert text.index("All mine.") < text.index(START)


def test_a_title_we_generated_follows_the_name(folder: Path) -> None:
    text = merge_card(folder, read_config(folder), name="other/name", old=card(folder))
    assert "# other/name" in text
    assert "team/shapes" not in read_card(text)[1]


def test_joining_prefers_local_text_keeps_all_keys_and_all_tags() -> None:
    remote = f"---\nfoo: 1\nlicense: mit\ntags: [a]\n---\n# x\n\n{START}\n.\n{END}\n\nTheirs.\n"
    generated = f"---\nlicense: apache-2.0\ntags: [b]\n---\n# y\n\n{START}\n.\n{END}\n"
    data, text = read_card(join_cards(generated, remote))
    assert data == {"foo": 1, "license": "apache-2.0", "tags": ["a", "b"]}
    assert "Theirs." in text
    assert "Ours." in join_cards(generated + "\nOurs.\n", remote)


def test_metadata_that_is_not_yaml_is_an_error_and_not_lost() -> None:
    with pytest.raises(UsageError, match=r"README\.md is not YAML"):
        read_card("---\nfoo: [1\n---\ntext\n")


@pytest.mark.parametrize("text", ["", "no metadata", "--- not\n", "---\nno end"])
def test_a_card_without_metadata_is_all_text(text: str) -> None:
    assert read_card(text) == ({}, text)


def test_windows_line_ends_are_read(folder: Path) -> None:
    data, _ = read_card("---\r\nlicense: mit\r\n---\r\ntext\r\n")
    assert data == {"license": "mit"}


def test_the_front_matter_is_safe_yaml(folder: Path) -> None:
    text = card(folder, metadata={"license": "mit: [oops", "language": ["no"]})
    assert yaml.safe_load(text.split("---\n")[1])["language"] == ["no"]


def test_what_was_generated_for_an_older_version_goes_and_the_users_own_stays(folder: Path) -> None:
    facts = json.loads((folder / "provenance.json").read_text())
    facts["parents"] = [{"part": "image_encoder", "name": "old/base#image", "repo": "old/base", "commit": "1" * 40}]
    facts["data"]["train"] |= {"id": "hub:org/set@v1:train", "revision": "2" * 40}
    (folder / "provenance.json").write_text(json.dumps(facts))
    mine = "---\nbase_model: [own/base]\ndatasets: [own/set]\ntags: [own, text]\nthumbnail: x.png\n---\n"
    first = card(folder, mine)
    data, _ = read_card(first)
    assert data["base_model"] == ["own/base", "old/base"] and data["datasets"] == ["own/set", "org/set"]
    (folder / "provenance.json").unlink()
    shutil.rmtree(folder / "eval")
    for again in (card(folder, first), card(folder, join_cards("", first))):
        data, text = read_card(again)
        assert "model-index" not in data
        assert data["base_model"] == ["own/base"] and data["datasets"] == ["own/set"]
        assert data["tags"][0] == "own" and "text" not in data["tags"] and "mmhub-image" in data["tags"]
        assert data["thumbnail"] == "x.png"
        assert "Results on" not in text


def test_tags_may_be_one_word_and_a_byte_order_mark_changes_nothing(folder: Path) -> None:
    data, _ = read_card(card(folder, "\ufeff---\ntags: vision\nlicense: [mit]\n---\nMine.\n"))
    assert data["tags"][:2] == ["vision", "mmhub"]
    assert data["license"] == ["mit"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metrics": 1}', '{"metrics": {}, "subsets": 3}'])
def test_results_that_are_none_are_named(folder: Path, content: str) -> None:
    (folder / "eval" / "classification.json").write_text(content)
    with pytest.raises(TrustError, match=r"classification.json' holds no results"):
        card(folder)


def test_a_language_model_takes_text_and_is_shown_writing(tmp_path: Path) -> None:
    decoder = {"use": "transformer-lm", "config": {"dim": 8, "depth": 1, "heads": 1, "max_length": 8}}
    model = compose(task="language-modelling", decoder=decoder, tokenizer={"kind": "byte"})
    data, text = read_card(card(model.save(tmp_path / "lm")))
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"][:3] == ["mmhub", "language-modelling", "text"]
    assert "that takes text," in text
    assert '\nmmhub generate team/shapes "TEXT"\n' in text
    assert describe(resolve(str(tmp_path / "lm"))).modalities == ["text"]
