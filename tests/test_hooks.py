"""Every hook: documented with its arguments, fired by a plugin, and what happens when the plugin fails in it."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmhub import hookspecs
from mmhub.data.sources import open_rows
from mmhub.errors import InputError, MmhubError, NotFoundError, PluginError
from tests.fake_parts import fake_model
from tests.fake_plugins import ROOT, Site, make_site
from tools.hook_reference import reference, users

HOOKS = hookspecs.hook_names()
MANIFEST = 'api = 1\nhooks = ["{hook}"]\n'
SOURCE = """
from mmhub.errors import InputError
from mmhub.spec import DataSource, hookimpl

def read(request):
    if request.address == "broken":
        raise KeyError("no such key")
    if request.address == "refused":
        raise InputError("the address is refused", "name another")
    if request.address == "odd":
        return [1]
    if request.address == "nothing":
        return []
    for line in request.find(request.address).read_text().splitlines():
        text, label = line.split("|")
        yield {"text": text, "label": label, "split": request.split}

def opened(request):
    return list(read(request)) if request.address in ("broken", "refused") else read(request)

@hookimpl
def mmhub_datasets():
    return [DataSource(scheme="pipe", open=opened)]
"""
GUARD = """
from mmhub.spec import hookimpl

class Words:
    name = "words"
    def check(self, sample):
        text = str(sample.get("numbers") or sample.get("text"))
        if "13" in text:
            raise ValueError("unlucky")
        return "it has a 7" if "7" in text else ""
    def review(self, sample, answer):
        if "99" in str(sample.get("numbers")):
            raise ValueError("too many")
        return answer | {"seen": True}

@hookimpl
def mmhub_generation_guards(model):
    return [Words()]
"""
RECIPE = """
task = "classification"
[model.encoders.text]
use = "rnn"
config = { dim = 4, embedding_dim = 4 }
[model.tokenizer]
kind = "word"
[data]
train = "ROWS"
valid = "ROWS"
target = "label"
[train]
epochs = 2
log_every = 1
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


def install(site: Site, hook: str, code: str, name: str = "mmhub-fake-hook") -> None:
    site.install(name, MANIFEST.replace("{hook}", hook), parts=code)


# Documents.


def test_the_reference_is_made_from_the_code() -> None:
    assert (ROOT / "docs" / "hooks.md").read_text() == reference(), (
        "run: python tools/hook_reference.py > docs/hooks.md"
    )


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_what_each_argument_is(name: str) -> None:
    function = getattr(hookspecs, name)
    text = inspect.getdoc(function) or ""
    assert text.startswith("Return ") and "Called " in text
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    {argument}: \S", text, re.MULTILINE), argument


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_fired_by_the_core_and_by_a_test(name: str) -> None:
    core = "".join(path.read_text() for path in (ROOT / "mmhub").rglob("*.py") if path.name != "hookspecs.py")
    assert f'"{name}"' in core
    tests = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "plugins").glob("*/tests/test_*.py")]
    assert any(f"{name}(" in path.read_text() for path in tests) or users(name)


# Data sources.


def test_a_recipe_reads_the_rows_of_a_plugins_data_source(site: Site, tmp_path: Path) -> None:
    install(site, "mmhub_datasets", SOURCE)
    (tmp_path / "rows.txt").write_text("good|yes\nbad|no\n")
    rows = open_rows("pipe:rows.txt", base=tmp_path, split="validation")
    assert list(rows) == [
        {"text": "good", "label": "yes", "split": "validation"},
        {"text": "bad", "label": "no", "split": "validation"},
    ]
    assert rows.where(1) == "pipe:rows.txt row 2"


def test_the_files_a_source_finds_are_in_the_fingerprint_without_absolute_folders(site: Site, tmp_path: Path) -> None:
    install(site, "mmhub_datasets", SOURCE)
    (tmp_path / "rows.txt").write_text("good|yes\n")
    found = open_rows(f"pipe:{tmp_path}/rows.txt").fingerprint()
    assert found["source"] == "pipe:rows.txt"
    assert [(file["name"], file["bytes"]) for file in found["files"]] == [("rows.txt", 9)]
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("pipe:absent.txt", NotFoundError, "no file or folder 'absent.txt'"),
        ("pipe:refused", InputError, "the address is refused"),
        ("pipe:broken", PluginError, "plugin mmhub-fake-hook 0.1.0 cannot read 'pipe:broken': KeyError"),
        ("pipe:odd", PluginError, "it gave a int for a row, not a dict"),
        ("pipe:nothing", InputError, "data source 'pipe:nothing' has no rows"),
        ("pip:rows.txt", NotFoundError, "did you mean 'pipe'?"),
        ("zzz:rows.txt", NotFoundError, "schemes: hub:, pipe:"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_line(
    site: Site, address: str, kind: type[MmhubError], words: str
) -> None:
    code = SOURCE.replace(
        'if request.address == "odd":\n        return [1]', 'if request.address == "odd":\n        yield 1'
    )
    install(site, "mmhub_datasets", code.replace('"nothing":\n        return []', '"nothing":\n        return'))
    with pytest.raises(kind) as caught:
        open_rows(address)
    assert type(caught.value) is kind
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_two_plugins_of_one_scheme_are_an_error_and_a_registry_knows_a_missing_one(site: Site) -> None:
    site.registry('schema = 1\n[plugins.mmhub-rows]\nrequirement = "mmhub-rows>=1"\nprovides = ["data_source:rows"]\n')
    with pytest.raises(PluginError, match='mmhub plugins install "mmhub-rows>=1"'):
        open_rows("rows:x")
    install(site, "mmhub_datasets", SOURCE)
    install(site, "mmhub_datasets", SOURCE, "mmhub-fake-second")
    from mmhub.plugins import get_index

    get_index(rescan=True)
    with pytest.raises(PluginError, match=r"provided by mmhub-fake-hook 0\.1\.0 and mmhub-fake-second 0\.1\.0"):
        open_rows("pipe:x")


def test_a_source_that_is_none_costs_a_line_and_the_others_go_on(site: Site, capsys: Any, tmp_path: Path) -> None:
    install(site, "mmhub_datasets", SOURCE)
    bad = SOURCE.replace("DataSource(scheme=", "dict(scheme=")
    install(site, "mmhub_datasets", bad, "mmhub-fake-bad")
    (tmp_path / "rows.txt").write_text("good|yes\n")
    assert len(open_rows("pipe:rows.txt", base=tmp_path)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plugin mmhub-fake-bad 0.1.0 gives no valid data source")


@pytest.mark.slow
def test_data_sources_and_guards_work_through_the_command_line(site: Site) -> None:
    install(site, "mmhub_datasets", SOURCE)
    (site.work / "rows.txt").write_text("a good thing|yes\na bad thing|no\n" * 4)
    (site.work / "recipe.toml").write_text(RECIPE.replace("ROWS", "pipe:rows.txt"))
    done = site.python("-m", "mmhub", "train", "recipe.toml", "--out", "run", "-q", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads((site.work / "run/model/provenance.json").read_text())["data"]["train"]
    assert data["id"] == "pipe:rows.txt" and data["readers"] == ["mmhub-fake-hook 0.1.0"] and len(data["files"]) == 1
    done = site.python("-m", "mmhub", "eval", "./run/model", "--data", "pipe:rows.txt", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == 8, done.stderr
    install(site, "mmhub_generation_guards", GUARD, "mmhub-fake-guard")
    done = site.python("-m", "mmhub", "predict", "./run/model", "--text", "a good 7", "--text", "a good thing")
    first, second = done.stdout.splitlines()
    assert first == "(refused by mmhub-fake-guard/words: it has a 7)" and "\t" in second


# Guards.


@pytest.fixture
def guarded(site: Site) -> Any:
    install(site, "mmhub_generation_guards", GUARD)
    return fake_model()


def test_a_guard_refuses_samples_and_changes_answers_one_for_each_sample(guarded: Any) -> None:
    texts = ["1 2", "7", "3", "13", "99"]
    answers = guarded.predict([{"numbers": text} for text in texts])
    name = {"guard": "mmhub-fake-hook/words"}
    assert answers[1] == {"refused": "it has a 7"} | name
    assert answers[3] == {"refused": "the guard failed"} | name
    assert answers[4] == {"refused": "the guard failed"} | name
    assert answers[0]["seen"] and answers[2]["seen"]
    assert guarded.predict({"numbers": "1 2"}) == answers[:1]


def test_a_refused_sample_never_reaches_the_model(guarded: Any) -> None:
    guarded.predict([{"numbers": "7 7 7"}])
    assert guarded.encoders["numbers"].seen == []


def test_an_unreadable_sample_behind_a_refused_one_is_named_by_its_own_place(guarded: Any) -> None:
    with pytest.raises(InputError) as caught:
        guarded.predict([{"numbers": "7"}, {"numbers": "1"}, {"numbers": "x"}])
    assert caught.value.row == 2
    assert caught.value.__notes__ == ["in sample 2"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (GUARD.replace("[Words()]", "1 / 0"), "failed in mmhub_generation_guards: ZeroDivisionError"),
        (GUARD.replace("[Words()]", "[object()]"), "gives a guard without 'name': a object"),
        ("import nowhere\n", "failed in mmhub_generation_guards: ModuleNotFoundError"),
    ],
)
def test_a_guard_that_cannot_be_had_stops_predict_instead_of_letting_everything_pass(
    site: Site, code: str, words: str
) -> None:
    install(site, "mmhub_generation_guards", code)
    with pytest.raises(PluginError, match=re.escape(words)):
        fake_model().predict([{"numbers": "1"}])


def test_a_guard_whose_plugin_does_not_fit_this_mmhub_stops_predict(site: Site) -> None:
    old = MANIFEST.replace("{hook}", "mmhub_generation_guards") + 'requires_mmhub = "<0.0.1"\n'
    site.install("mmhub-fake-hook", old, parts=GUARD)
    with pytest.raises(PluginError, match=r"guard in plugin mmhub-fake-hook 0\.1\.0 cannot be used: it needs mmhub"):
        fake_model().predict([{"numbers": "1"}])


def test_without_guards_predict_is_as_before_and_a_disabled_guard_is_off(site: Site, monkeypatch: Any) -> None:
    install(site, "mmhub_generation_guards", GUARD)
    monkeypatch.setenv("MMHUB_DISABLE_PLUGINS", "mmhub-fake-hook")
    assert "refused" not in fake_model().predict([{"numbers": "7"}])[0]


# Trackers.


@pytest.mark.slow
def test_a_tracker_that_fails_is_named_with_its_plugin_and_the_run_goes_on(site: Site) -> None:
    code = (
        "from mmhub.spec import hookimpl\nclass T:\n    def on_start(self, run): print('started', run.total_steps)\n"
        "    def on_log(self, step, metrics): raise OSError('disk')\n"
        "@hookimpl\ndef mmhub_train_callbacks(run): return [T()]\n"
    )
    install(site, "mmhub_train_callbacks", code)
    (site.work / "rows.csv").write_text("text,label\ngood,yes\nbad,no\n")
    (site.work / "recipe.toml").write_text(RECIPE.replace("ROWS", "rows.csv"))
    done = site.python("-m", "mmhub", "train", "recipe.toml", "--out", "run", "-q", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: plugin mmhub-fake-hook 0.1.0 is off: T.on_log failed: OSError: disk") == 1
