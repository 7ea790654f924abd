"""Publishing with care: secrets stay here, proposals, gates and private repositories, interruptions, what arrived."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants

from mmhub.errors import MmhubError, NetworkError, NotFoundError, TrustError, UsageError
from mmhub.hub import load, pull, push
from mmhub.hub.card import read_card
from mmhub.hub.secrets import find_secret
from mmhub.hub.staging import stage
from mmhub_hubserver import HubServer
from mmhub_hubserver.accounts import Accounts
from tests.conftest import Cli, png
from tests.interop_clients import tiny_config, tiny_tokenizer
from tests.tiny_models import upload

pytestmark = [
    pytest.mark.usefixtures("client"),
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),  # how huggingface_hub uploads
]

REPO = "team/shapes"
TOKEN = "hf_" + "Zq9" * 12


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that a test may change."""
    return shutil.copytree(trained, tmp_path / "model")


@pytest.fixture
def split(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with a file for each part, as a large model has."""
    from mmhub import weights

    monkeypatch.setattr(weights, "SINGLE_FILE_BYTES", 0)
    return load(model).save(model.with_name("split"))


def api(hub: str, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub, token=token)


# -- secrets ----------------------------------------------------------------------------------------------------

SECRETS = {
    "a Hugging Face token": TOKEN,
    "an AWS key": "AKIA" + "ABCDEFGH12345678",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a GitHub access token": "github_pat_" + "a1B2_" * 10,
    "a GitLab token": "glpat-" + "a1B2" * 5,
    "an API key": "sk-" + "proj-a1B2c3D4" * 4,
    "a Slack token": "xoxb-" + "1234567890-abc",
    "a Google key": "AIza" + "a1B2c" * 7,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a web token": "eyJ" + "hbGciOiJIUzI1NiIsInR5" + ".eyJ" + "zdWIiOiIxMjM0NTY3ODkw" + ".sig",
    "a password in an address": "postgres" + "://ann:hunter2@db.example.com/x",
    "a package index token": "pypi-AgE" + "Ab1_" * 15,
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_known_by_its_form_and_not_repeated(kind: str) -> None:
    said = find_secret(f"one\ntwo: {SECRETS[kind]}\n")
    assert said == f"{kind} (line 2)"


def test_plain_text_holds_no_secret() -> None:
    for text in ("", "sk-learn", "https://host/path:8080/@x", "eyJ.eyJ.", "hf_hub_download", "risk-" + "a" * 40):
        assert find_secret(text) is None, text


def test_the_values_of_ones_own_secrets_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_DB_PASSWORD", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "short")
    assert find_secret("say: correct horse battery!") == "the value of TEAM_DB_PASSWORD (line 1)"
    assert find_secret("a short one") is None


def plant(folder: Path, outside: Path) -> list[str]:
    """Twelve things that must not be published; return how a refusal names each."""
    outside.write_text("mine")
    for name in (".env", "id_rsa", "secrets/key.pem", "optimizer.pt", "checkpoints/state.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TOKEN)
    for name in ("__pycache__", ".cache", "wandb"):
        (folder / name).mkdir()
        (folder / name / "x.json").write_text(TOKEN)
    (folder / "LICENSE").symlink_to(outside)
    (folder / "link").symlink_to(outside.parent, target_is_directory=True)
    (folder / "README.md").write_text((folder / "README.md").read_text() + SECRETS["a private key"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"note": TOKEN}, indent=1))
    return [
        ".env", "id_rsa", "secrets/key.pem", "optimizer.pt", "checkpoints/state.safetensors", "__pycache__/", ".cache/",
        "wandb/x.json", "link", "'LICENSE' is a symbolic link", "'README.md' holds what looks like a secret",
        "'config.json' holds what looks like a secret",
    ]  # fmt: skip


@pytest.mark.slow
def test_twelve_planted_secrets_are_named_and_nothing_is_sent(hub: str, model: Path, tmp_path: Path, cli: Cli) -> None:
    names = plant(model, tmp_path / "private.md")
    done = cli("push", "./model", REPO, "--license", "mit")
    assert done.returncode == 5
    for name in names:
        assert name in done.stderr, name
    assert TOKEN not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 2, "one line and a hint"
    assert not api(hub).repo_exists(REPO)


@pytest.mark.slow
def test_what_belongs_to_no_checkpoint_is_left_out_and_named(hub: str, model: Path, tmp_path: Path, cli: Cli) -> None:
    names = plant(model, tmp_path / "private.md")[:9]
    (model / "LICENSE").unlink()
    text = (model / "README.md").read_text().replace(SECRETS["a private key"], "")
    (model / "README.md").write_text(text)
    config = json.loads((model / "config.json").read_text())
    del config["note"]
    (model / "config.json").write_text(json.dumps(config))
    done = cli("push", "./model", REPO, "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout)["left_out"]) == sorted(names)
    assert all(name in done.stderr for name in names)
    there = api(hub).list_repo_files(REPO)
    assert not set(there) & set(names)
    assert all(TOKEN.encode() not in Path(api(hub).hf_hub_download(REPO, name)).read_bytes() for name in there)


def test_a_secret_in_the_metadata_of_weights_is_found(model: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "made_by": TOKEN})
    with pytest.raises(TrustError, match=r"'model.safetensors' holds what looks like a secret, a Hugging Face token"):
        stage(model)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_secret_in_the_commit_message_is_not_sent(hub: str, model: Path, dry_run: bool) -> None:
    with pytest.raises(TrustError, match="commit message holds what looks like a secret"):
        push(model, REPO, license="mit", message=f"with {TOKEN}", dry_run=dry_run)
    assert not api(hub).repo_exists(REPO)


# -- where it goes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_proposal_is_a_pull_request_and_main_stays(hub: str, model: Path, cli: Cli) -> None:
    push(model, REPO, license="mit")
    main = pull(REPO).name
    (model / "README.md").write_text((model / "README.md").read_text() + "\n## News\n")
    done = cli("push", "./model", REPO, "--revision", "pr", "--message", "Better", "--json")
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)
    assert pushed["pull_request"] == f"{hub}/{REPO}/discussions/1"
    assert pull(REPO).name == main
    assert pull(f"{REPO}@refs/pr/1").name == pushed["commit"]
    again = push(model, REPO, revision="refs/pr/1", message="Better still", license="apache-2.0")
    assert pull(f"{REPO}@refs/pr/1").name == again.commit != pushed["commit"]
    api(hub).merge_pull_request(REPO, 1)
    assert "## News" in (pull(REPO) / "README.md").read_text()


def test_a_proposal_needs_a_repository_and_takes_no_tag(hub: str, model: Path) -> None:
    with pytest.raises(NotFoundError, match="to propose a change to"):
        push(model, REPO, license="mit", revision="pr")
    with pytest.raises(UsageError, match="cannot be tagged"):
        push(model, REPO, license="mit", revision="pr", tag="v1")
    push(model, REPO, license="mit")
    with pytest.raises(NotFoundError, match="refs/pr/7"):
        push(model, REPO, revision="refs/pr/7")


def test_a_run_folder_says_where_its_model_is(trained: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        push(trained.parent, REPO, license="mit")
    assert str(trained) in str(caught.value.hint)


@pytest.mark.parametrize(
    ("card", "config", "whose"),
    [
        (b"---\nlicense: mit\n---\n", b'{"model_type": "bert"}', "transformers"),
        (b"---\nlibrary_name: mmhub\n---\n", b'{"architecture": "resnet18"}', "timm"),
        (b"---\nlibrary_name: keras\n---\n", b"{}", "keras"),
        (b"---\nlicense: mit\n---\n", b"nonsense", "another library"),
    ],
)
def test_another_librarys_repository_is_not_written_over(
    hub: str, model: Path, card: bytes, config: bytes, whose: str
) -> None:
    api(hub).create_repo(REPO)
    files = [CommitOperationAdd("README.md", card), CommitOperationAdd("config.json", config)]
    api(hub).create_commit(REPO, files, commit_message="x")
    with pytest.raises(UsageError, match=f"holds a model in the layout of {whose}, not mmhub"):
        push(model, REPO, license="mit", revision="next")
    assert api(hub).list_repo_commits(REPO)[0].title == "x"
    assert [branch.name for branch in api(hub).list_repo_refs(REPO).branches] == ["main"], "nothing was made"


def test_a_repository_that_holds_no_model_yet_is_used(hub: str, model: Path) -> None:
    upload(hub, REPO, {"README.md": b"---\nlicense: mit\n---\n# Soon\n", "notes.txt": b"mine"})
    push(model, REPO, license="mit")
    assert "notes.txt" in api(hub).list_repo_files(REPO)


@pytest.mark.slow
def test_a_push_of_the_same_says_that_nothing_was_made(hub: str, model: Path, cli: Cli) -> None:
    first = push(model, REPO, license="mit")
    done = cli("push", "./model", REPO, "--revision", "pr")
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "nothing differs from what 'team/shapes' holds; no commit was made"
    assert done.stdout.strip().endswith(first.commit)
    assert not push(model, REPO).changed


def test_a_card_that_is_no_text_and_a_hub_that_is_off_are_said(
    hub: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="nothing can be pushed while HF_HUB_OFFLINE is set"):
        push(model, REPO, license="mit")
    (model / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"README.md' is not UTF-8 text"):
        push(model, REPO, license="mit")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A hub with accounts, set as HF_ENDPOINT: its address and two tokens."""
    accounts = Accounts(tmp_path / "team-data" / "accounts.json")
    facts = {"ann": accounts.add("ann", orgs=["team"]), "sam": accounts.add("sam")}
    with HubServer(tmp_path / "team-data") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", facts["ann"])
        yield facts | {"url": server.url}


def test_a_private_repository_is_for_its_members(
    team: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit", private=True)
    assert api(team["url"], team["ann"]).model_info(REPO).private
    assert pull(REPO)
    with pytest.raises(UsageError, match="exists and is private; nothing was sent"):
        push(model, REPO, private=False)
    monkeypatch.setenv("HF_TOKEN", team["sam"])
    with pytest.raises(NotFoundError, match="no repository 'team/shapes'"):
        pull(REPO, revision="main")


def test_a_public_repository_is_never_taken_for_a_private_one(team: dict[str, str], model: Path) -> None:
    first = push(model, REPO, license="mit")
    with pytest.raises(UsageError, match="exists and is public") as caught:
        push(model, REPO, private=True, message="confidential")
    assert "settings" in str(caught.value.hint)
    assert api(team["url"]).model_info(REPO).sha == first.commit


def test_a_gated_repository_asks_strangers_to_ask_first(
    team: dict[str, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit", gated="manual")
    assert api(team["url"], team["ann"]).model_info(REPO).gated == "manual"
    monkeypatch.setenv("HF_TOKEN", team["sam"])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    with pytest.raises(MmhubError, match="is gated") as caught:
        pull(REPO)
    assert "accept its terms" in str(caught.value.hint)


def test_who_may_not_write_is_told_so_and_may_propose(
    team: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model, REPO, license="mit")
    monkeypatch.setenv("HF_TOKEN", team["sam"])
    with pytest.raises(MmhubError, match="does not let you do that to 'team/shapes'"):
        push(model, REPO, message="Mine")
    (model / "README.md").write_text((model / "README.md").read_text() + "\nMore.\n")
    assert push(model, REPO, revision="pr", message="Mine").pull_request


def test_a_part_is_loaded_alone_and_can_be_published_with_its_origin(
    hub: str, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(split)
    base = push(split, REPO, license="mit")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
        part = load(f"{REPO}#image")
        fetched = {path.name for path in pull(f"{REPO}#image").iterdir()}
    assert {name for name in fetched if name.endswith(".safetensors")} == {"model-image_encoder.safetensors"}
    samples = [{"image": png(1)}, {"image": png(2)}]
    alone = part.embed(samples)
    assert torch.isfinite(alone).all()
    for name, tensor in whole.encoders["image"].state_dict().items():
        assert torch.equal(tensor, part.encoders["image"].state_dict()[name])
    with pytest.raises(UsageError, match="no task head"):
        part.predict(samples)
    push(part.save(tmp_path / "part"), "team/eyes", license="mit")
    data, text = read_card(Path(api(hub).hf_hub_download("team/eyes", "README.md")).read_text())
    assert data["base_model"] == [REPO]
    assert f"The model started from `{REPO}#image` (commit {base.commit[:12]})." in text
    assert torch.equal(load("./part").embed(samples), alone)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A tiny BERT with a head, in the layout of transformers."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path / "bert"
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    BertForSequenceClassification(tiny_config(**labels)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_is_published_in_the_layout_of_its_library(
    hub: str, classifier: Path, tmp_path: Path, cli: Cli
) -> None:
    mine = load(classifier)
    expected = mine.predict([{"text": "a cat"}])
    mine.save(tmp_path / "mine")
    done = cli("push", "./mine", "team/bert", "--layout", "transformers", "--license", "mit", "--tag", "v1", "--json")
    assert done.returncode == 0, done.stderr
    there = set(api(hub).list_repo_files("team/bert"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= there
    data, text = read_card(Path(api(hub).hf_hub_download("team/bert", "README.md")).read_text())
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-classification",
        "mit",
    )
    assert 'AutoModelForSequenceClassification.from_pretrained("team/bert")' in text
    assert load("team/bert").predict([{"text": "a cat"}])[0]["label"] == expected[0]["label"]
    with pytest.raises(UsageError, match="holds a model in the layout of transformers, not mmhub"):
        push(tmp_path / "mine", "team/bert")
    others = {"onnx/model.safetensors": b"x", "model.fp16.safetensors": b"x", "model-00001-of-00002.safetensors": b"x"}
    upload(hub, "team/bert", others)
    again = push(tmp_path / "mine", "team/bert", layout="transformers", message="Again")
    assert again.deleted == ("model-00001-of-00002.safetensors",), "what the layout itself writes, and nothing else"


@pytest.mark.slow
def test_another_librarys_model_is_published_by_its_name_with_its_origin(hub: str, classifier: Path, cli: Cli) -> None:
    commit = upload(hub, "other/bert", {path.name: path.read_bytes() for path in classifier.iterdir()})
    done = cli("push", "other/bert", "team/copy", "--license", "mit", "--json")
    assert done.returncode == 0, done.stderr
    data, text = read_card(Path(api(hub).hf_hub_download("team/copy", "README.md")).read_text())
    assert (data["library_name"], data["base_model"]) == ("mmhub", ["other/bert"])
    assert f"started from `other/bert` (commit {commit[:12]}).\nNot trained by mmhub." in text
    with pytest.raises(NotFoundError) as caught:
        push(classifier, "team/copy")
    assert "load and save it first" in str(caught.value.hint)


def test_what_a_layout_cannot_hold_is_not_sent(hub: str, model: Path) -> None:
    with pytest.raises(UsageError, match="holds one encoder, and this model has image, audio"):
        push(model, REPO, license="mit", layout="transformers")
    assert not api(hub).repo_exists(REPO)


# -- interruptions ----------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sha256 of every large file that the hub is sent, when it begins to arrive."""
    from mmhub_hubserver.pool import Pool

    seen: list[str] = []
    real = Pool.add_stream

    def add_stream(self: Any, chunks: Any, sha256: str, size: int) -> None:
        seen.append(sha256)
        real(self, chunks, sha256, size)

    monkeypatch.setattr(Pool, "add_stream", add_stream)
    return seen


def test_an_interrupted_push_goes_on_without_sending_whole_files_again(
    hub: str, split: Path, uploads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmhub_hubserver.pool import Pool

    real, lock = Pool.add_stream, threading.Lock()
    arrived: list[str] = []

    def third_fails(self: Any, chunks: Any, sha256: str, size: int) -> None:
        with lock:
            if len(arrived) == 2:
                raise ConnectionResetError
            arrived.append(sha256)
        real(self, chunks, sha256, size)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "add_stream", third_fails)
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
        with pytest.raises(NetworkError) as caught:
            push(split, REPO, license="mit")
    assert "push again: files that arrived whole are not sent a second time" in str(caught.value.hint)
    assert [c.title for c in api(hub).list_repo_commits(REPO)] == ["initial commit"], "all or nothing"
    uploads.clear()
    pushed = push(split, REPO, license="mit")
    weights = [name for name in pushed.files if name.endswith(".safetensors")]
    assert len(weights) == 4
    assert len(uploads) == 2 and not set(uploads) & set(arrived)
    assert pull(REPO).name == pushed.commit


@pytest.mark.slow
def test_a_push_killed_while_it_sends_leaves_the_repository_as_it_was(
    hub: str, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmhub_hubserver.pool import Pool

    first = push(split, REPO, license="mit")
    changed = load(split)
    for parameter in changed.parameters():
        parameter.data = parameter.data + 1
    changed.save(tmp_path / "changed")
    real, arrives, killed = Pool.add_stream, threading.Event(), threading.Event()

    def held(self: Any, chunks: Any, sha256: str, size: int) -> None:
        arrives.set()
        assert killed.wait(60)
        real(self, chunks, sha256, size)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "add_stream", held)
        process = subprocess.Popen(
            [sys.executable, "-m", "mmhub", "push", "./changed", REPO], stderr=subprocess.DEVNULL
        )
        assert arrives.wait(60)
        process.kill()
        process.wait()
        killed.set()
    assert api(hub).model_info(REPO).sha == first.commit
    again = push(tmp_path / "changed", REPO)
    assert again.changed and api(hub).model_info(REPO).sha == again.commit


def test_what_arrived_is_compared_with_what_was_sent(hub: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub.hub import download

    real = download.list_files

    def other(repo: str, commit: str) -> Any:
        files = real(repo, commit)
        wrong = "0" * len(files["config.json"].hash)
        return files | {"config.json": download.Remote("config.json", 1, wrong)}

    monkeypatch.setattr(download, "list_files", other)
    with pytest.raises(TrustError, match=r"does not hold the 'config.json' that is in"):
        push(model, REPO, license="mit", tag="v1")
    assert not api(hub).list_repo_refs(REPO).tags, "a version that is wrong gets no name"


# -- the token --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_token_is_in_no_output_card_file_or_command_line(
    team: dict[str, str], model: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    settings = {"MMHUB_DEBUG": "1", "HF_DEBUG": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    commands = [
        ("push", "./model", REPO, "--license", "mit"),
        ("push", "./model", "sam/shapes", "--license", "mit"),
        ("pull", "team/nothing"),
        ("models", "show", REPO),
        ("predict", REPO, "--image", "1.png", "--json"),
    ]
    codes, said = [], ""
    for arguments in commands:
        done = cli(*arguments, **settings)
        codes.append(done.returncode)
        said += done.stdout + done.stderr
    assert codes == [0, 1, 3, 0, 0], said
    assert team["ann"] not in said
    folders = [tmp_path / "cache", model, tmp_path / "team-data"]
    kept = [path for folder in folders for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
    assert len(kept) > 20
    assert [path for path in kept if team["ann"].encode() in path.read_bytes()] == []
