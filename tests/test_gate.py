"""The publishing gate: secrets and personal paths in every disguise, statements, overlap, and what force may do."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

import mmhub
from mmhub.checkpoint import read_config
from mmhub.cli.main import main
from mmhub.errors import MmhubError, TrustError, UsageError
from mmhub.hub import push
from mmhub.hub.card import END, START, merge_card, read_card
from mmhub.hub.findings import Finding, Unstated, Untrusted
from mmhub.hub.gate import decide, findings
from mmhub.hub.leaks import find_leaks
from mmhub.hub.secrets import _KINDS
from mmhub.hub.staging import look
from mmhub.hub.statements import overlap_line, stated_under_headings
from tests.conftest import SHARED

pytestmark = [
    pytest.mark.usefixtures("client"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub uploads
]

REPO = "team/films"
TOKEN = "hf_" + "Zq9" * 12
ESCAPED = f"\\u0068{TOKEN[1:]}"
ENCODERS = {"text": {"use": "lstm", "config": {"dim": 8, "embedding_dim": 4}}}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was never trained."""
    decoder = {"use": "classification", "config": {"labels": ["good", "bad"]}}
    model = mmhub.compose(encoders=ENCODERS, decoder=decoder, texts=["a good bad film"])
    return model.save(tmp_path_factory.mktemp("composed") / "model")


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint of which two in eight validation rows were trained on; its recipe names absolute paths."""
    folder = tmp_path_factory.mktemp("home") / "ann"
    folder.mkdir()
    words = ["good", "bad"]
    train = [{"text": f"a {words[i % 2]} film, the {i}.", "label": words[i % 2]} for i in range(16)]
    valid = train[:2] + [row | {"text": f"no {row['text']}"} for row in train[2:8]]
    for name, rows in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    recipe = {
        "task": "classification",
        "model": {"encoders": ENCODERS},
        "data": {"train": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl"), "target": "label"},
        "train": {"epochs": 1, "device": "cpu"},
        "card": {"license": "mit", "summary": "Likes films.", "intended_use": "To sort films.", "language": ["en"]},
    }
    return mmhub.train(recipe, folder / "run").model


@pytest.fixture
def folder(composed: Path, tmp_path: Path) -> Path:
    """A copy of the composed checkpoint, in the current folder as `model`."""
    return shutil.copytree(composed, tmp_path / "model")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(args)
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def found_in(folder: Path, old: str = "", **options: Any) -> list[Finding]:
    card = merge_card(folder, read_config(folder), name=REPO, old=old, metadata={"license": "mit"})
    return findings(folder, card, look(folder).findings, repo=REPO, **options)


def strict(*, refuse_overlap: bool) -> None:
    Path("registry.toml").write_text(f"schema = 1\n[hub]\nrefuse_overlap = {str(refuse_overlap).lower()}\n")


def refused(found: list[Finding]) -> list[tuple[str, bool]]:
    return [(one.kind, one.forceable) for one in found if one.severity == "refuse"]


def change(path: Path, **values: Any) -> None:
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(table | values))


# -- secrets in disguise ----------------------------------------------------------------------------------------

DISGUISES: dict[str, tuple[str, Any]] = {
    "escaped in JSON": ("json", '{"a": {"note": "' + ESCAPED + '"}}'),
    "a key of JSON": ("json", '{"a": {"' + ESCAPED + '": 1}}'),
    "escaped in a card": ("card", '---\nnote: "' + ESCAPED.replace("u00", "x") + '"\n---\n'),
    "base64": ("text", f"# x\n{base64.b64encode(f'token {TOKEN}'.encode()).decode()}\n"),
    "base64 for addresses": ("text", base64.urlsafe_b64encode(b"?>?>?> " + TOKEN.encode()).decode().rstrip("=")),
    "base64 with another letter": ("text", base64.b64encode(f"\u00e4 {TOKEN}".encode()).decode()),
    "base64 in several lines": ("text", base64.encodebytes(b"y" * 40 + b" " + TOKEN.encode() + b" z" * 30).decode()),
    "base64 in lines of JSON": ("json", json.dumps([base64.encodebytes(b"y" * 40 + b" " + TOKEN.encode()).decode()])),
    "base64 escaped in JSON": (
        "json",
        json.dumps({"a": base64.b64encode(b"????" + TOKEN.encode()).decode()}).replace("/", "\\/"),
    ),
    "Markdown": ("card", TOKEN.replace("_", "\\_")),
    "base64 in JSON": ("json", json.dumps({"a": [base64.b64encode(TOKEN.encode()).decode()]})),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_secret_is_found_in_disguise_and_not_repeated(disguise: str) -> None:
    form, text = DISGUISES[disguise]
    (leak,) = find_leaks(text, form=form)  # type: ignore[arg-type]
    assert leak.kind == "secret" and "a Hugging Face token" in leak.what
    assert TOKEN[3:] not in leak.what + leak.public


SECRETS = {
    "an npm token": "npm_" + "a1B" * 12,
    "an address of a Slack hook": "https://hooks.slack.com/services/T0A1B2C3D/B0A1B2C3D/" + "aB3" * 8,
    "an address of a Discord hook": "https://discord.com/api/webhooks/123456789012345678/" + "a-B3" * 17,
    "an Azure key": "AccountName=x;AccountKey=" + "aB3/" * 21 + "aB==",
    "an AWS secret": 'aws_secret_access_key = "' + "aB3/" * 10 + '"',
    "an AWS secret key": "AWS_SECRET_ACCESS_KEY=" + "aB3/" * 10,
    "a secret key of AWS": '{"SecretAccessKey": "' + "aB3/" * 10 + '"}',
    "a bearer token": 'curl -H "Authorization: Bearer ' + "a1" * 20,
    "an API key": "sk-proj-" + "A1b2" * 10,
    "a web token": ".".join(["eyJ" + "aB3" * 10] * 3),
    "a password in an address": "postgres://user:hunter2@db.example.org/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_of_a_known_form_is_found(kind: str) -> None:
    (leak,) = find_leaks(f"a\n{SECRETS[kind]}\n")
    assert leak.what == f"holds what looks like a secret, {kind} (line 2)"


@pytest.mark.parametrize(
    "text",
    [
        "Trained on opus-en-sk-news-commentary-parallel-corpus-v16-cleaned.", "export HF_TOKEN=hf_" + "x" * 34,
        "https://example.org/blog/sk-learn-based-classification-of-documents-2024", "sk-" + "x" * 48,
        "postgres://user:password@localhost/db", "curl http://user:pass@example.org/", "a classification model",
        "see https://hub.example.org/models", "https://hooks.slack.com/services/T00000000/B00000000/" + "X" * 24,
        'curl -H "Authorization: Bearer hf_' + "x" * 34,
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_ENDPOINT", "https://hub.example.org/")
    monkeypatch.setenv("CSRF_SECRET_NAME", "classification")
    assert find_leaks(text, form="card") == []


@pytest.mark.parametrize("kind", _KINDS)
def test_a_text_made_to_keep_the_search_busy_does_not(kind: str) -> None:
    piece, pattern = _KINDS[kind]
    started = time.process_time()
    for more in ("", "a" * 20 + "-", "a:"):
        text = (piece + more) * (500_000 // len(piece + more))
        re.findall(pattern, text)
    assert time.process_time() - started < 4, "it grows with the square of the text"


def test_a_decoded_secret_is_named_by_its_key() -> None:
    (leak,) = find_leaks('{"a": {"note": "' + ESCAPED + '"}}', form="json")
    assert leak.what == "holds what looks like a secret, a Hugging Face token (at a.note)"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "eval/x.json", "provenance.json", "LICENSE"])
def test_every_kind_of_file_is_scanned(folder: Path, name: str) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    text = json.dumps({"metrics": {}, "note": TOKEN}) if name.endswith(".json") else f"x {TOKEN}"
    (folder / name).write_text(text)
    (secret,) = [one for one in found_in(folder) if one.severity == "refuse"]
    assert (secret.kind, secret.forceable) == ("secret", False)
    assert secret.message.startswith(f"'{name}' holds what looks like a secret, a Hugging Face token (line 1)")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "model.safetensors"])
def test_a_pipe_is_refused_and_nobody_waits_for_it(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    code, _, err = run(capsys, "push", "./model", REPO, "--license", "mit", "--dry-run")
    assert code == 5 and f"'{name}' is no file, but a pipe or a device" in err


def test_names_of_tensors_are_scanned(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({f"layer.{TOKEN}": torch.zeros(1)}, folder / "model.safetensors", metadata={"made": "/home/ann/x.py"})
    told = [one.message for one in look(folder).findings]
    assert told[0].startswith("'model.safetensors' holds what looks like a secret")
    assert told[1].startswith("'model.safetensors' holds a path or address of this machine or its user, '/home/ann/'")


# -- personal paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "see /home/ann/data.csv", "/Users/ann.lee/x", "C:\\Users\\Ann Lee\\x.csv", "d:/Users/ann/x",
        "/home/ann", "(/Users/ann)", "C:\\Users\\ann",
        "\\\\server\\share\\x", "file:///data/x", "(/home/ann/x)", "http://workstation:8000/", "git@workstation:x",
        "/srv/me/own/x",
    ],
)  # fmt: skip
def test_a_personal_path_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/me/own")
    monkeypatch.setattr("socket.gethostname", lambda: "workstation")
    assert [leak.kind for leak in find_leaks(f"a\nb {text}")] == ["path"], text
    assert [leak.kind for leak in find_leaks(json.dumps({"a": [text]}), form="json")] == ["path"], text
    assert "(line 2)" in find_leaks(f"a\nb {text}")[0].what


@pytest.mark.parametrize(
    "text",
    [
        "/home/user", "in /home/user.", "C:\\Users\\Public",
        "/home/user/app", "/Users/you/x", "/home/$USER/x", "/home/<name>/x", "https://example.org/home/ann/x",
        "~/data", "/home/", "home/ann/x", "C:\\Users\\Public\\x", "\\\\alpha + \\\\beta", "\\\\begin{x}\\\\hline",
        "x \\\\[2pt] \\alpha\\beta", "/data/train.csv", "file:///path/to/x", "https://workstations.org/", "/homes/ann/",
    ],
)  # fmt: skip
def test_what_is_nobodys_path_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/me/own")
    monkeypatch.setattr("socket.gethostname", lambda: "workstation")
    assert find_leaks(text) == [] and find_leaks(json.dumps([text]), form="json") == []


def test_words_that_a_tokenizer_learned_are_nobodys_paths_but_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/me/own")
    vocab = {"/home/": 1, "/home/travis/": 2, "\\\\server\\share\\": 3}
    model = {"vocab": vocab, "merges": [["/home/ann", "/"], "/home/ann/ x"]}
    assert find_leaks(json.dumps({"model": model}), form="json") == []
    own = {"model": {"vocab": vocab | {"/srv/me/own/x": 4}}}
    assert [leak.kind for leak in find_leaks(json.dumps(own), form="json")] == ["path"]
    named = {"name_or_path": "/home/ann/model", "model": model}
    assert len(find_leaks(json.dumps(named), form="json")) == 1


def test_a_path_is_refused_and_may_be_forced_and_named_by_file_and_line(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n\nFrom /home/ann/data/x.csv.\n")
    (path,) = [one for one in found_in(folder, (folder / "README.md").read_text()) if one.severity == "refuse"]
    assert path.message == "'README.md' holds a path or address of this machine or its user, '/home/ann/' (line 3)"
    assert path.forceable and "ann" not in path.public


@pytest.mark.parametrize("where", ["message", "reason"])
def test_the_commit_message_and_the_reason_are_published_too(folder: Path, where: str) -> None:
    assert refused(found_in(folder, **{where: TOKEN})) == [("secret", False)]
    assert refused(found_in(folder, **{where: "as in /home/ann/x"})) == [("path", True)]


def test_training_on_absolute_paths_leaves_none_of_them(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(leaky.parents[1]))  # the folder of its data, as if it were this user's
    assert str(leaky.parents[1]) in (leaky.parent / "recipe.toml").read_text()
    assert look(leaky).findings == ()
    assert refused(found_in(leaky)) == []


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs shared/data (MMHUB_SHARED)")
def test_real_texts_hold_nothing_private() -> None:
    for name in ("sst2/dev.tsv", "wikitext2-small/train.txt"):
        assert find_leaks((SHARED / "data" / name).read_text()) == []


# -- statements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("## Use\nmmhub predict\n", {}),
        ("## Intended Use\nToys.\n", {"intended_use": True}),
        ("### Intended uses & limitations\nToys.\n", {"intended_use": True, "limits": True}),
        ("## Uses\n\n<!-- how -->\n\n### Direct Use\n\n[More Information Needed]\n", {"intended_use": False}),
        ("## Uses\n### Direct Use\nToys.\n### Downstream Use [optional]\nTODO\n", {"intended_use": True}),
        ("## Bias, Risks, and Limitations\n\n[More Information Needed]\n", {"limits": False}),
        ("## Limitations\n- **Languages:** TBD\n- ...\n", {"limits": False}),
        ("## Limitations\n- **Languages:** English\n", {"limits": True}),
        ("## Training Data\n\n## Other\nText.\n", {"training_data": False}),
        ("## Training Data\n```\n# Limits\n```\n", {"training_data": True}),
        (f"## Limits{' ' * 90_000}x\n{'- ' * 90_000}x", {"limits": True}),
        (f"## Limits\n{'-' * 90_000}a\n", {"limits": True}),
        ("## Limits\nto do it well, todo lists are not enough\n", {"limits": True}),
    ],
)
def test_headings_state_something_if_more_than_a_placeholder_stands_under_them(
    text: str, expected: Mapping[str, bool]
) -> None:
    assert stated_under_headings(text) == expected


def test_an_empty_heading_is_refused_and_what_is_said_elsewhere_is_none_of_it(folder: Path) -> None:
    found = found_in(folder, "# Mine\n\n## Limitations\n\n[More Information Needed]\n")
    assert refused(found) == [("statement", True)]
    assert "the card has a heading for limits, and nothing stands under it" in found[0].message
    generated = f"# Mine\n\n{START}\n## Limits\n{END}\n\n## Limits\n\nMany.\n"
    assert refused(found_in(folder, generated)) == []


def test_one_note_tells_what_the_card_says_from_records_alone(folder: Path, leaky: Path) -> None:
    (note,) = found_in(folder)
    assert (note.kind, note.severity) == ("statement", "note")
    assert note.message == "of intended use, limits, training data the card says only what was recorded"
    said = "## Intended use\nToys.\n## Limitations\nMany.\n## Training data\nMine.\n"
    assert found_in(folder, said) == []
    notes = [one for one in found_in(leaky) if one.kind == "statement"]
    assert [one.message for one in notes] == ["of limits, training data the card says only what was recorded"]


def test_the_card_says_what_the_recipe_said_and_what_was_recorded(leaky: Path) -> None:
    pushed = merge_card(leaky, read_config(leaky), name=REPO, old=(leaky / "README.md").read_text())
    for card in ((leaky / "README.md").read_text(), pushed):
        for text in (
            "Likes films.", "## Intended use and limits\n\nTo sort films.",
            "Measured on 8 rows of valid.jsonl: accuracy ", "## Training data\n\nTrained on 16 rows of `train.jsonl` (",
            "Validated on 8 rows of `valid.jsonl` (",
            "2 of 8 evaluation rows (25.0%) are in the training data as they are",
        ):  # fmt: skip
            assert text in card, text
    assert merge_card(leaky, read_config(leaky), name=REPO, old=pushed) == pushed


def test_a_card_of_a_model_that_nothing_is_known_of_says_so(composed: Path) -> None:
    text = read_card(merge_card(composed, read_config(composed), name=REPO, metadata={"language": ["en"]}))[1]
    assert "Made for classification from text in en, into the labels good and bad." in text
    assert "## Training data\n\nNot recorded." in text and "No measured result is recorded" in text


def test_a_registry_may_ask_that_training_data_be_named(folder: Path, leaky: Path) -> None:
    Path("registry.toml").write_text("schema = 1\n[hub]\nrequire_statements = true\nrefuse_overlap = true\n")
    found = found_in(folder)
    assert refused(found) == [("statement", True)]
    assert "nothing says what the model was trained on, and" in found[0].message
    assert refused(found_in(folder, "## Training data\nMine.\n")) == []
    assert refused(found_in(leaky)) == [("overlap", True)], "what was recorded is a statement"


# -- overlap ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "repeats", "expected"),
    [(0.005, 0.0, []), (0.05, 0.0, ["note"]), (0.21, 0.0, ["refuse"]), (0.5, 0.4, ["note"]), (0.9, 0.4, ["refuse"])],
)
def test_rows_that_were_trained_on_are_noted_and_many_are_refused(
    folder: Path, share: float, repeats: float, expected: list[str]
) -> None:
    strict(refuse_overlap=True)
    found = {"checked_rows": 1000, "exact": int(1000 * share), "exact_share": share, "repeats": repeats}
    change(folder / "provenance.json", overlap={"valid": found})
    assert [one.severity for one in found_in(folder) if one.kind == "overlap"] == expected
    (folder / "provenance.json").unlink()
    (folder / "eval").mkdir()
    change(folder / "eval" / "x.json", metrics={}, overlap=found)
    assert [one.severity for one in found_in(folder) if one.kind == "overlap"] == expected, "as `mmhub eval` tells it"
    strict(refuse_overlap=False)
    noted = [one.severity for one in found_in(folder) if one.kind == "overlap"]
    assert noted == ["note"] * len(expected), "nobody asked for more"


@pytest.mark.parametrize("overlap", [[], {"valid": 3}, {"valid": {"exact_share": "x"}}, {"valid": {"exact_share": 7}}])
def test_an_overlap_that_is_nonsense_is_none(folder: Path, overlap: Any) -> None:
    change(folder / "provenance.json", overlap=overlap)
    assert refused(found_in(folder)) == []


def test_a_line_tells_the_overlap() -> None:
    found = {"checked_rows": 872, "exact": 9, "exact_share": 9 / 872, "repeats": 0.002, "ngram_rows": 700}
    found |= {"ngram": 70, "ngram_share": 0.1, "n": 8, "ngram_half": 7}
    assert overlap_line(found) == (
        "9 of 872 evaluation rows (1.0%) are in the training data as they are, 70 of 700 texts (10.0%) share 8 words "
        "in a row with it and 7 most of theirs (0.2% of them occur more than once among themselves)"
    )
    assert overlap_line({"skipped": "it is streamed"}).endswith("was not looked up: it is streamed")


# -- what happens -----------------------------------------------------------------------------------------------


def finding(kind: Any, **options: Any) -> Finding:
    return Finding(kind=kind, message=f"a {kind}", hint=f"mend the {kind}", **options)


def test_one_error_names_all_and_its_code_is_that_of_the_worst() -> None:
    found = [finding("licence"), finding("statement", forceable=True), finding("overlap", forceable=True)]
    with pytest.raises(Untrusted) as caught:
        decide(Path("m"), found, None)
    assert caught.value.exit_code == 5 and isinstance(caught.value, TrustError)
    assert caught.value.message == (
        "nothing of 'm' was sent: a licence (mend the licence); a statement (mend the statement); "
        "a overlap (mend the overlap)"
    )
    assert caught.value.hint == "correct them, then push again", "the licence cannot be forced"
    with pytest.raises(Unstated, match="a licence; mend the licence") as usage:
        decide(Path("m"), found, "because")
    assert usage.value.exit_code == 2 and isinstance(usage.value, UsageError)
    assert [one.forced for one in usage.value.findings] == [False, True, True]


def test_force_lets_pass_what_may_be_forced_and_never_a_secret() -> None:
    assert [one.forced for one in decide(Path("m"), [finding("path", forceable=True)], "")] == [True]
    for kind in ("secret", "licence", "damage", "link"):
        with pytest.raises(MmhubError):
            decide(Path("m"), [finding(kind)], "because")


def test_a_model_measured_on_its_training_data_is_pushed_by_force_alone_and_says_so(
    hub: str, leaky: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(leaky, tmp_path / "model")
    before = (tmp_path / "model" / "provenance.json").read_text()
    strict(refuse_overlap=True)
    call = ("push", "./model", REPO)
    code, out, err = run(capsys, *call)
    assert code == 5 and out == ""
    assert "2 of 8 evaluation rows (25.0%)" in err and 'or insist with --force "WHY"' in err
    assert len(err.strip().splitlines()) == 2
    assert not HfApi(endpoint=hub, token=False).repo_exists(REPO)
    code, out, err = run(capsys, *call, "--dry-run", "--json")
    assert code == 5 and "the card says only what was recorded" in err
    assert {one["kind"] for one in json.loads(out)["findings"]} == {"overlap", "statement"}

    code, out, err = run(capsys, *call, "--json", "--force", "a demonstration")
    assert code == 0, err
    assert "forced: 2 of 8 evaluation rows" in err
    assert [one["forced"] for one in json.loads(out)["findings"]] == [False, True]
    assert (tmp_path / "model" / "provenance.json").read_text() == before, "the folder stays as it was"
    there = HfApi(endpoint=hub, token=False).hf_hub_download(REPO, "provenance.json")
    facts = json.loads(Path(there).read_text())
    (forced,) = facts.pop("forced")
    assert facts == json.loads(before)
    assert forced["finding"].startswith("overlap: 2 of 8") and forced["reason"] == "a demonstration"
    assert len(forced["date"]) == 10
    assert mmhub.load(REPO).predict([{"text": "a good film"}])

    again = push(mmhub.pull(REPO), "team/copy", force="")
    assert [one.kind for one in again.findings if one.forced] == ["overlap"]
    there = HfApi(endpoint=hub, token=False).hf_hub_download("team/copy", "provenance.json")
    assert [one["reason"] for one in json.loads(Path(there).read_text())["forced"]] == ["a demonstration", ""]


@pytest.mark.slow
def test_a_composed_model_is_published_with_a_note_and_a_forced_one_gets_a_provenance(hub: str, folder: Path) -> None:
    pushed = push(mmhub.load(folder), REPO, license="mit")
    assert [one.severity for one in pushed.findings] == ["note"]
    with pytest.raises(TrustError, match="the commit message holds a path or address"):
        push(folder, REPO, message="from /home/ann/x")
    assert "provenance.json" not in pushed.files
    forced = push(folder, REPO, message="from /home/ann/x", force="why not")
    assert "provenance.json" in forced.files
    told = Path(HfApi(endpoint=hub, token=False).hf_hub_download(REPO, "provenance.json")).read_text()
    assert "ann" not in told and "why not" in told, "what is forced is not repeated elsewhere"


def test_what_lacks_a_licence_is_refused_as_ever(folder: Path) -> None:
    with pytest.raises(UsageError, match="no licence is given for the model") as caught:
        push(folder, REPO, dry_run=True, force="really")
    assert caught.value.exit_code == 2 and "--license apache-2.0" in str(caught.value.hint)
