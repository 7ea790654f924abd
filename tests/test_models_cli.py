"""`mmhub models show`, `which` and `lock`: what a model is, what a name means, and what holds it at one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils._http import close_session

from mmhub.checkpoint import FORMAT
from mmhub.cli.main import cli
from mmhub.errors import ExitCode
from mmhub.hub import describe, licences
from mmhub.names import resolve
from mmhub.registry import read_lock, write_lock
from tests.fake_plugins import ROOT, Site, fresh_process, make_site, run
from tests.test_import_hygiene import PROBE
from tests.tiny_models import SIZES, files, upload

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads

REPO = "team/digits"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _client(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def requests(hub: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every "METHOD path" that huggingface_hub's client sends."""
    from huggingface_hub.utils import get_session

    seen: list[str] = []
    client = get_session()
    real = client.send

    def send(request: Any, **kwargs: Any) -> Any:
        seen.append(f"{request.method} {request.url.path}")
        return real(request, **kwargs)

    monkeypatch.setattr(client, "send", send)
    return seen


def show(capsys: Any, *args: str) -> dict[str, Any]:
    code, out, err = run(capsys, "models", "show", *args, "--json")
    assert code == 0, err
    return json.loads(out)


# --- show


def test_show_of_a_hub_name_tells_its_parts_sizes_licence_and_results_without_its_weights(
    hub: str, requests: list[str], capsys: Any
) -> None:
    commit = upload(hub, REPO, files(("image", "audio")))
    requests.clear()
    data = show(capsys, REPO)
    assert requests, "they are seen"
    assert (data["library"], data["task"], data["commit"]) == ("mmhub", "classification", commit)
    assert (data["summary"], data["license"], data["modalities"]) == ("Tells things apart.", "mit", ["image", "audio"])
    sizes = {role: part["bytes"] for role, part in data["components"].items()}
    assert sizes == {role: SIZES[role] for role in ("image_encoder", "audio_encoder", "fusion", "decoder")}
    assert data["components"]["image_encoder"]["config"] == {"dim": 8}
    assert data["results"][0]["subsets"] == {"image": {"accuracy": 0.5}}
    assert data["size"] > sum(sizes.values())
    assert data["cached"] == ""
    fetched = list(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*"))
    assert "config.json" in {path.name for path in fetched}
    assert "model.safetensors" not in {path.name for path in fetched}
    text = run(capsys, "models", "show", REPO)[1]
    for part in ("image_encoder  mmhub-x/image_encoder", "400 B", "all inputs", "0.75", f"mmhub pull {REPO}"):
        assert part in text, part


def test_show_says_what_to_install_in_one_line(hub: str, site: Site, capsys: Any, monkeypatch: Any) -> None:
    upload(hub, REPO, files(requires={"mmhub-nose": ">=1,<2", "mmhub-ear": ""}))
    data = show(capsys, REPO)
    assert data["unmet"] == ["mmhub-nose >=1,<2 (not installed)", "mmhub-ear (not installed)"]
    assert data["install"] == 'install: mmhub plugins install "mmhub-nose>=1,<2" "mmhub-ear"'
    assert data["loadable"] == "not before what it needs is installed"
    site.install("mmhub-nose", version="1.0")
    fresh_process(monkeypatch)
    assert show(capsys, REPO)["unmet"] == ["mmhub-ear (not installed)"]


def test_sharded_weights_are_weighed_by_their_index(hub: str, capsys: Any) -> None:
    content = files()
    index = {
        "weight_map": {"image_encoder.a": "model-image_encoder.safetensors", "fusion.b": "model-fusion.safetensors"}
    }
    content["model.safetensors.index.json"] = json.dumps(index).encode()
    content |= {"model-image_encoder.safetensors": b"i" * 70, "model-fusion.safetensors": b"f" * 30}
    del content["model.safetensors"]
    upload(hub, REPO, content)
    parts = show(capsys, REPO)["components"]
    assert (parts["image_encoder"]["bytes"], parts["fusion"]["bytes"], parts["decoder"]["bytes"]) == (70, 30, None)


def test_the_licence_chain_warns_where_a_parent_asks_for_more_or_is_unknown(hub: str, capsys: Any) -> None:
    upload(hub, "team/grand", {"README.md": b"---\nlicense: gpl-3.0\n---\n"})
    upload(hub, "team/parent", {"README.md": b"---\nlicense: mit\nbase_model: team/grand\n---\n"})
    content = files(card={"base_model": ["team/parent", "team/gone"], "base_model_relation": "finetune"})
    facts = {"model": {"encoders": {"image": {"init": "team/eyes#image"}, "audio": 3}}}
    content["provenance.json"] = json.dumps(facts).encode()
    upload(hub, "team/eyes", {"README.md": b"---\nlicense: other\nlicense_name: eye-terms\n---\n"})
    upload(hub, REPO, content)
    data = show(capsys, REPO)
    chain = {one["name"]: (one["relation"], one["license"]) for one in data["licences"]}
    assert chain == {
        REPO: ("this model", "mit"),
        "team/parent": ("finetune", "mit"),
        "team/gone": ("finetune", ""),
        "team/eyes": ("starts the image encoder", "eye-terms"),
        "team/grand": ("base model", "gpl-3.0"),
    }
    assert len(data["warnings"]) == 3
    assert "the licence of team/gone (finetune) is unknown" in data["warnings"]
    text = run(capsys, "models", "show", REPO)[1]
    assert "warning: team/grand (base model) is under gpl-3.0 (strong copyleft), more restrictive than mit" in text


def test_a_chain_that_bites_its_tail_ends() -> None:
    links = licences.chain("a", "mit", [("b", "base model")], lambda name: ("mit", [("a", "x"), ("b", "x")]))
    assert [link.name for link in links] == ["a", "b"]
    endless = licences.chain("a", "mit", [("b", "x")], lambda name: ("mit", [(name + "b", "x")]))
    assert len(endless) == 13


@pytest.mark.parametrize(
    ("license", "family"),
    [
        ("Apache-2.0", "permissive"), ("cc-by-4.0", "permissive"), ("cc-by-sa-4.0", "strong copyleft"),
        ("lgpl-3.0", "weak copyleft"), ("agpl-3.0", "strong copyleft"), ("cc-by-nc-sa-4.0", "non-commercial"),
        ("cc-by-nc-nd-4.0", "no-derivatives"), ("llama3", "own terms"), ("openrail", "own terms"),
    ],
)  # fmt: skip
def test_licences_are_told_apart_by_what_they_ask_for(license: str, family: str) -> None:
    assert licences.family(license)[0] == family


MODULES = json.dumps(
    [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"}
        for i, kind in enumerate(("Transformer", "Pooling"))
    ]
).encode()
BERT, WEIGHTS = b'{"model_type": "bert"}', {"model.safetensors": b"x"}


@pytest.mark.parametrize(
    ("content", "library", "loadable"),
    [
        ({"config.json": BERT} | WEIGHTS, "transformers", "start of a text encoder"),
        ({"config.json": b'{"model_type": "whisper"}'} | WEIGHTS, "transformers", 'use = "whisper"'),
        ({"config.json": b'{"architecture": "vit", "pretrained_cfg": {}}'} | WEIGHTS, "timm", 'use = "timm"'),
        ({"modules.json": MODULES, "config.json": BERT} | WEIGHTS, "sentence-transformers", "yes, and as the start"),
        (
            {"modules.json": MODULES, "0_Transformer/config.json": BERT, "0_Transformer/model.safetensors": b"x"},
            "sentence-transformers",
            "yes, and as the start of a text encoder",
        ),
        (
            {"modules.json": b'[{"type": "sentence_transformers.models.CLIPModel", "path": ""}]'} | WEIGHTS,
            "sentence-transformers",
            "no: it is made of CLIPModel",
        ),
        ({"modules.json": b"[]", "config.json": b"{}"} | WEIGHTS, "sentence-transformers", "no: 'modules.json' should"),
        ({"config.json": b'{"model_type": "vit"}'} | WEIGHTS, "transformers", "no: it is a transformers model of type"),
        ({"config.json": b'{"model_type": "clip"}'} | WEIGHTS, "transformers", "does not read"),
        ({"config.json": b'{"model_type": "detr"}'} | WEIGHTS, "transformers", "does not read"),
        ({"config.json": BERT}, "transformers", "no: it has no safetensors"),
        ({"README.md": b"---\nlibrary_name: keras\n---\n"} | WEIGHTS, "keras", "no: no part"),
        ({"config.json": b"[1]"} | WEIGHTS, None, None),
    ],
)
def test_another_librarys_model_says_whose_it_is_and_whether_mmhub_can_use_it(
    hub: str, capsys: Any, content: dict[str, bytes], library: str | None, loadable: str | None
) -> None:
    upload(hub, REPO, content)
    code, out, err = run(capsys, "models", "show", REPO, "--json")
    if library is None:
        assert (code, out) == (ExitCode.USAGE, "")
        assert "config.json" in err
        return
    data = json.loads(out)
    assert data["library"] == library
    assert str(loadable) in data["loadable"]


def test_a_damaged_or_newer_configuration_is_said_and_breaks_nothing(hub: str, capsys: Any) -> None:
    content = files()
    config = json.loads(content["config.json"])
    for change, said in (
        ({"mmhub_format": FORMAT + 1}, "upgrade mmhub"),
        ({"components": {"fusion": 3}}, "malformed"),
        ({"components": [1], "files": 3, "requires": "x", "task": None}, "malformed"),
    ):
        upload(hub, REPO, content | {"config.json": json.dumps(config | change).encode()})
        assert said in show(capsys, REPO)["loadable"]


def test_the_format_of_show_and_of_loading_is_one_number() -> None:
    assert describe.FORMAT == FORMAT


def test_show_offline_tells_what_is_cached_and_says_so(hub: str, capsys: Any, monkeypatch: Any) -> None:
    upload(hub, REPO, files())
    online = show(capsys, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = run(capsys, "models", "show", REPO, "--json")
    assert (code, err) == (0, "note: HF_HUB_OFFLINE is set: from the cache\n")
    offline = json.loads(out)
    for key in ("task", "license", "results", "commit", "requires", "modalities"):
        assert offline[key] == online[key]
    code, out, err = run(capsys, "models", "show", "team/other")
    assert (code, out) == (ExitCode.NETWORK, "")
    assert "not in the cache" in err


def test_a_pinned_and_cached_model_is_shown_without_a_request(
    hub: str, requests: list[str], capsys: Any, monkeypatch: Any
) -> None:
    commit = upload(hub, REPO, files())
    HfApi(endpoint=hub, token=False).snapshot_download(REPO, cache_dir=_cache(hub))
    write_lock(REPO, REPO, commit)
    requests.clear()
    data = show(capsys, REPO)
    assert data["cached"].endswith(commit)
    assert requests == []


def _cache(hub: str) -> Path:
    from mmhub.hub.client import cache_dir

    return cache_dir()


def test_a_registered_name_is_shown_by_its_entry_where_the_hub_is_away(
    site: Site, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    site.registry("schema = 1\n[models.digits]\nref = 'hub:team/digits'\ntask = 'tagging'\nlicense = 'mit'\n")
    code, out, err = run(capsys, "models", "show", "digits", "--json")
    data = json.loads(out)
    assert (code, data["task"], data["license"], data["kind"]) == (0, "tagging", "mit", "hub")
    assert "only what the registry says is shown" in err


def test_a_repository_that_is_not_there_exits_3(hub: str, capsys: Any) -> None:
    code, out, err = run(capsys, "models", "show", "team/none")
    assert (code, out) == (ExitCode.NOT_FOUND, "")
    assert "no repository 'team/none'" in err


def test_a_local_folder_is_shown_like_a_repository(site: Site, capsys: Any) -> None:
    folder = site.work / "model"
    for name, content in files(("text",)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    data = show(capsys, "./model")
    assert (data["task"], data["license"], data["components"]["text_encoder"]["bytes"]) == (
        "classification",
        "mit",
        120,
    )
    assert data["results"][0]["metrics"] == {"accuracy": 0.75}
    assert data["cached"] == str(data["path"])


def test_a_composition_shows_its_parts_what_starts_them_and_what_they_need(
    hub: str, site: Site, capsys: Any, monkeypatch: Any
) -> None:
    upload(hub, "team/nose", {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    site.registry(
        "schema = 1\n[models.mix]\nlicense = 'mit'\n[models.mix.compose]\ntask = 'classification'\nfusion = 'streams'\n"
        "[models.mix.compose.encoders.smell]\nuse = 'nose'\ninit = 'team/nose'\n"
        "[plugins.mmhub-fake]\nrequirement = 'mmhub-fake>=1'\nprovides = ['smell_encoder:nose']\n"
    )
    data = show(capsys, "mix")
    assert (data["kind"], data["task"], data["modalities"]) == ("compose", "classification", ["smell"])
    assert data["components"]["smell_encoder"]["init"] == "team/nose"
    assert data["install"] == 'install: mmhub plugins install "mmhub-fake>=1"'
    assert "cc-by-nc-4.0 (non-commercial), more restrictive than mit" in data["warnings"][0]
    site.install("mmhub-fake", version="1.0")
    fresh_process(monkeypatch)
    data = show(capsys, "mix")
    assert (data["unmet"], "mmhub-fake" in data["requires"]) == ([], True)


# --- which


def which(capsys: Any, name: str) -> dict[str, Any]:
    code, out, err = run(capsys, "models", "which", name, "--json")
    assert code == 0, err
    return json.loads(out)


def test_which_names_every_scope_it_looked_at_and_the_alias(site: Site, capsys: Any) -> None:
    path = site.registry("schema = 1\n[models.digits]\nref = 'hub:org/digits@v1'\naliases = ['numbers']\n", "user")
    data = which(capsys, "numbers#image")
    assert data["alias_of"] == "digits"
    assert [(look["scope"], look["found"]) for look in data["looked_at"]] == [
        ("project", ""), ("user", "digits"), ("plugins", ""), ("shipped", ""),
    ]  # fmt: skip
    assert data["looked_at"][1]["source"] == str(path)
    assert data["pin"] is None
    assert data["fetch"]["revision"] == "v1"
    text = run(capsys, "models", "which", "numbers")[1]
    for line in ("looked at: project: no registry.toml", "alias of digits", "pinned: no;", "org/digits at v1"):
        assert line in text, line


def test_which_tells_what_pins_a_name_and_when_a_pin_is_void(site: Site, capsys: Any) -> None:
    write_lock("a", "org/a@v1", COMMIT)
    site.registry("schema = 1\n[models.a]\nref = 'hub:org/a@v1'\n")
    assert which(capsys, "a")["pin"]["holds"] is True
    assert which(capsys, "a")["fetch"]["revision"] == COMMIT
    site.registry("schema = 1\n[models.a]\nref = 'hub:org/a@v2'\n")
    data = which(capsys, "a")
    assert (data["pin"]["holds"], data["commit"]) == (False, None)
    assert "void: the name leads elsewhere now" in run(capsys, "models", "which", "a")[1]
    path = site.registry(f"schema = 1\n[models.a]\nref = 'hub:org/a'\ncommit = '{COMMIT}'\n")
    assert which(capsys, "a")["pin"]["by"] == str(path)
    assert which(capsys, f"org/b@{COMMIT}")["pin"]["by"] == "the name itself"


def test_which_says_what_is_cached_of_a_pinned_name(hub: str, site: Site, capsys: Any) -> None:
    commit = upload(hub, REPO, files())
    assert run(capsys, "models", "show", REPO)[0] == 0
    assert which(capsys, f"{REPO}@{commit}")["fetch"]["cached"].endswith(commit)
    assert which(capsys, f"{REPO}@{COMMIT}")["fetch"]["cached"] is None
    assert which(capsys, REPO)["fetch"] == {
        "endpoint": hub, "repo_id": REPO, "revision": "main", "cached": None,
    }  # fmt: skip


def test_which_of_a_folder_needs_no_hub(site: Site, capsys: Any) -> None:
    (site.work / "model").mkdir()
    data = which(capsys, "./model")
    assert (data["kind"], data["fetch"], data["pin"]) == ("local", None, None)


# --- lock


def lock(capsys: Any, *args: str) -> list[dict[str, Any]]:
    code, out, err = run(capsys, "models", "lock", *args, "--json")
    assert code == 0, err
    return json.loads(out)["names"]


def test_a_locked_name_never_follows_its_branch_until_it_is_updated(hub: str, site: Site, capsys: Any) -> None:
    site.registry("schema = 1\n[models.digits]\nref = 'hub:team/digits'\n")
    first = upload(hub, REPO, files())
    assert [(one["state"], one["new"]) for one in lock(capsys, "digits", REPO)] == [("added", first)] * 2
    second = upload(hub, REPO, files(dim=16, license="gpl-3.0") | {"eval/extra.json": b"{}"})
    assert (resolve("digits").commit, resolve(REPO).commit, resolve(f"hub:{REPO}").commit) == (first,) * 3
    assert show(capsys, "digits")["commit"] == first
    assert lock(capsys, "digits")[0]["state"] == "kept"
    assert resolve("digits").commit == first
    planned = lock(capsys, "--update", "--dry-run")
    assert {one["state"] for one in planned} == {"moved"}
    assert resolve("digits").commit == first, "a dry run writes nothing"
    moved = lock(capsys, "--update", "digits")[0]
    assert (moved["state"], moved["old"], moved["new"]) == ("moved", first, second)
    changes = moved["changes"]
    for line in ("+ eval/extra.json (2 bytes)", "licence: mit -> gpl-3.0", "fusion.dim: 8 -> 16"):
        assert line in changes, line
    assert not any("model.safetensors" in line for line in changes), "the weights are the same"
    assert (resolve("digits").commit, resolve(REPO).commit) == (second, first)
    assert lock(capsys, "digits", "--update")[0]["state"] == "unchanged"


def test_a_tag_is_pinned_by_its_own_name(hub: str, capsys: Any) -> None:
    first = upload(hub, REPO, files(), tag="v1")
    upload(hub, REPO, files(dim=16))
    assert lock(capsys, f"{REPO}@v1")[0]["new"] == first
    assert resolve(f"{REPO}@v1").commit == first
    assert resolve(REPO).commit is None


def test_a_name_can_be_pinned_where_pins_are_required(hub: str, site: Site, capsys: Any) -> None:
    commit = upload(hub, REPO, files())
    site.registry("schema = 1\n[hub]\nrequire_pinned = true\nallow = ['team/*']\n")
    code, _, err = run(capsys, "models", "show", REPO)
    assert (code, f"`mmhub models lock {REPO}`" in err) == (ExitCode.TRUST, True)
    assert lock(capsys, REPO)[0]["new"] == commit
    assert show(capsys, REPO)["commit"] == commit
    assert run(capsys, "models", "lock", "evil/x")[0] == ExitCode.TRUST


def test_pins_are_listed_and_removed(hub: str, site: Site, capsys: Any) -> None:
    commit = upload(hub, REPO, files())
    assert "nothing is pinned" in run(capsys, "models", "lock")[1]
    lock(capsys, REPO)
    assert lock(capsys) == [{"name": REPO, "ref": f"hub:{REPO}", "commit": commit}]
    assert lock(capsys, "--remove", REPO)[0]["old"] == commit
    assert read_lock() == {}
    assert run(capsys, "models", "lock", "--remove", REPO)[0] == ExitCode.NOT_FOUND


@pytest.mark.parametrize(
    "args", [["--remove"], ["--remove", "--update", "a/b"], ["./model"], [f"a/b@{COMMIT}"], ["mix"]]
)
def test_what_cannot_be_pinned_is_a_usage_error(site: Site, capsys: Any, args: list[str]) -> None:
    (site.work / "model").mkdir()
    site.registry("schema = 1\n[models.mix.compose]\nfusion = 'streams'\n")
    assert run(capsys, "models", "lock", *args)[0] == ExitCode.USAGE


def test_without_the_hub_nothing_is_pinned_and_old_pins_hold(site: Site, capsys: Any, monkeypatch: Any) -> None:
    write_lock("a/b", "a/b", COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = (site.work / "mmhub.lock").read_text()
    for args in (["--update"], ["c/d"]):
        code, out, err = run(capsys, "models", "lock", *args)
        assert (code, out) == (ExitCode.NETWORK, "")
        assert "pins that are there still hold" in err
    assert (site.work / "mmhub.lock").read_text() == before


def test_a_commit_that_is_gone_is_said_in_the_diff(hub: str, site: Site, capsys: Any) -> None:
    commit = upload(hub, REPO, files())
    write_lock(REPO, REPO, COMMIT)
    moved = lock(capsys, REPO, "--update")[0]
    assert (moved["old"], moved["new"]) == (COMMIT, commit)
    assert "no longer on the Hub" in moved["changes"][0]


# --- what it costs


@pytest.mark.parametrize(
    "args",
    [
        ["models", "search", "--source", "cache"],
        ["models", "show", "./model"],
        ["models", "lock"],
        ["cache", "ls"],
        ["cache", "verify"],
        ["cache", "where"],
    ],
)
def test_looking_at_models_imports_no_torch(site: Site, args: list[str]) -> None:
    for name, content in files().items():
        (site.work / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (site.work / "model" / name).write_bytes(content)
    done = site.python("-c", PROBE.format(args=args), HF_HOME=str(site.work / "hf"))
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "transformers"} & set(done.stderr.split())


def documented() -> list[str]:
    text = (ROOT / "docs" / "find.md").read_text()
    lines = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("mmhub ")]
    assert len(lines) > 20
    return lines


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_has_these_options(line: str) -> None:
    command: click.Command = cli
    words = line.split()[1:]
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
    command.make_context(line, words)  # raises what a user would see
