"""A guarded model from recipe to server: trained, published, fetched, asked on the command line and over HTTP."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mmhub
from mmhub.cli.main import cli
from mmhub.hub import pull, push
from mmhub.model import Model
from tests.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads
RECIPE = """
task = "classification"
[[guards]]
use = "wordlist"
config = { words = ["bomb"] }
[[guards]]
use = "personal-data"
config = { kinds = ["email"], action = "refuse" }
[model.encoders.text]
use = "rnn"
config = { dim = 4, embedding_dim = 4 }
[model.tokenizer]
kind = "word"
[data]
train = "rows.csv"
valid = "rows.csv"
inputs = { text = "text" }
target = "label"
[train]
epochs = 1
"""
ROWS = "text,label\n" + "good thing,yes\nbad thing,no\n" * 4
REFUSED = {"refused": "it holds a listed word", "guard": "mmhub-guards/wordlist"}


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, args)), standalone_mode=False)


@pytest.mark.slow
def test_guards_of_a_recipe_go_wherever_the_model_goes(
    hub: str, client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.toml").write_text(RECIPE)
    Path("rows.csv").write_text(ROWS)
    assert run("train", "recipe.toml", "--out", "run", "-q").exception is None
    resolved = Path("run/recipe.toml").read_text()
    assert resolved.count("[[guards]]") == 2
    config = json.loads(Path("run/model/config.json").read_text())
    assert [guard["use"] for guard in config["guards"]] == ["mmhub-guards/wordlist", "mmhub-guards/personal-data"]

    push("run/model", "org/guarded", license="mit")
    card = (pull("org/guarded") / "README.md").read_text()
    assert "Guards, without which it is not loaded: `mmhub-guards/wordlist`, `mmhub-guards/personal-data`." in card
    assert "bomb" not in card
    done = run("predict", "org/guarded", "--text", "a bomb", "--text", "good thing", "--text", "me@x.org", "--json")
    first, second, third = json.loads(done.stdout)["predictions"]
    assert first == REFUSED
    assert "label" in second
    assert third["guard"] == "mmhub-guards/personal-data"
    shown = run("predict", "org/guarded", "--text", "a bomb").stdout
    assert "guards: mmhub-guards/wordlist, mmhub-guards/personal-data" in run("models", "show", "org/guarded").stdout
    assert shown == "(refused by mmhub-guards/wordlist: it holds a listed word)\n"
    measured = json.loads(run("eval", "org/guarded", "--data", "rows.csv", "--json").stdout)
    assert measured["rows"] == 8


def ask(url: str, path: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def writer(**options: Any) -> Model:
    return mmhub.compose(
        "language-modelling",
        decoder={"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2, "max_length": 128}},
        tokenizer={"kind": "byte", "chat_template": "plain"},
        texts=["a"],
        **options,
    ).eval()


def test_a_server_says_what_is_refused_whatever_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "guards.toml"
    path.write_text('[[guards]]\nuse = "wordlist"\nconfig = { words = ["bomb"] }\n')
    monkeypatch.setenv("MMHUB_GUARDS", str(path))
    labels = {"use": "classification", "config": {"labels": ["no", "yes"]}}
    text = {"text": {"use": "rnn", "config": {"dim": 4, "embedding_dim": 4}}}
    models = {"labels": mmhub.compose(encoders=text, decoder=labels, texts=["a"]).eval(), "writer": writer()}
    with serving(models) as url:
        body = {"model": "labels", "samples": [{"text": "a bomb"}, {"text": "a"}]}
        first, second = json.loads(ask(url, "/predict", body))["predictions"]
        assert first == REFUSED and "label" in second
        said = {"model": "writer", "messages": [{"role": "user", "content": "a bomb"}], "max_tokens": 3}
        (choice,) = json.loads(ask(url, "/v1/chat/completions", said))["choices"]
        assert choice["finish_reason"] == "content_filter"
        assert choice["message"]["refusal"] == REFUSED["refused"]
        lines = [line[6:] for line in ask(url, "/v1/chat/completions", said | {"stream": True}).splitlines() if line]
        chunks = [json.loads(line) for line in lines if line != "[DONE]"]
        assert [one["choices"][0].get("finish_reason") for one in chunks][-1] == "content_filter"
        assert "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks) == ""


def test_the_writing_commands_show_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    input_only = {"use": "wordlist", "config": {"words": ["bomb"], "on": ["input"]}}
    redacting = {"use": "personal-data", "config": {"on": ["input"]}}
    writer(guards=[input_only, redacting]).save(tmp_path / "model")
    done = run("generate", "./model", "a bomb", "good", "--max-new-tokens", 2)
    assert done.stdout.startswith("(refused by mmhub-guards/wordlist: it holds a listed word)\n")
    table = Path("rows.csv")
    table.write_text("text\na bomb\ngood\n")
    found = run("predict", "./model", "--data", table, "--out", "out.jsonl", "--inputs", "text=text")
    assert found.exception is None, found.exception
    assert json.loads(Path("out.jsonl").read_text().splitlines()[0]) == REFUSED
