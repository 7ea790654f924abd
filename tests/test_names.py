"""What a name means, and what is said when it means nothing or two things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmhub.errors import NotFoundError, PluginError, TrustError, UsageError
from mmhub.names import looked_at, pin_of, repository_of, resolve
from mmhub.registry import read_registries, write_lock
from tests.fake_plugins import Site, make_site

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("name", "repo", "revision", "component"),
    [
        ("org/x", "org/x", None, None),
        ("org/x@v1", "org/x", "v1", None),
        ("org/x@v1#image", "org/x", "v1", "image"),
        ("org/x#image", "org/x", None, "image"),
        ("hub:org/x@refs/pr/3", "org/x", "refs/pr/3", None),
        ("hf-hub:timm/vit.a_b", "timm/vit.a_b", None, None),
        ("hub:gpt2", "gpt2", None, None),
        ("hf://org/x@v1", "org/x", "v1", None),
        ("hf://models/org/x", "org/x", None, None),
        ("hf://org/x@refs%2Fpr%2F3", "org/x", "refs/pr/3", None),
        ("https://huggingface.co/org/x", "org/x", None, None),
        ("https://huggingface.co/org/x/", "org/x", None, None),
        ("https://hf.co/org/x/tree/v1.0#image", "org/x", "v1.0", "image"),
        (f"https://huggingface.co/org/x/commit/{COMMIT}", "org/x", COMMIT, None),
    ],
)
def test_every_spelling_of_a_hub_repository(name: str, repo: str, revision: Any, component: Any) -> None:
    found = resolve(name)
    assert (found.kind, found.repo_id, found.revision, found.component) == ("hub", repo, revision, component)


def test_a_full_commit_is_known_without_a_request() -> None:
    assert resolve(f"org/x@{COMMIT}").commit == COMMIT
    assert resolve("org/x@main").commit is None


@pytest.mark.parametrize(
    "name",
    ["", " ", "hub:", "hub:a/b/c", "hub:../x", "hub:a/..", "hub:-a/b", "hub:a/b@", "hub:a/b#", "hub:a/b@x y",
     "a/b@../c", "hf:org/x", "hf://datasets/org/x", "hf://org/x/file.txt", "https://evil.example/org/x", "a/b\n",
     "https://huggingface.co/datasets/org/x", "https://huggingface.co/org", "https://huggingface.co/org/x/blob/main/f",
     "https://[bad"],
)  # fmt: skip
def test_a_malformed_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError):
        resolve(name)


def test_an_unknown_scheme_suggests_a_known_one() -> None:
    with pytest.raises(UsageError, match="unknown scheme 'hubb:' in 'hubb:a/b'; did you mean 'hub'"):
        resolve("hubb:a/b")


def test_the_endpoint_variable_makes_its_own_web_addresses_known(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:8080/hub")
    assert resolve("http://127.0.0.1:8080/hub/org/x").repo_id == "org/x"


def test_a_path_is_local_and_never_falls_through_to_the_hub(site: Site, monkeypatch: Any) -> None:
    folder = site.work / "runs" / "a@v1"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(site.work))
    for name in ("./runs/a@v1", str(folder), "~/runs/a@v1", "local:runs/a@v1", "local-dir:./runs/a@v1"):
        found = resolve(name)
        assert found.kind == "local"
        assert found.path is not None
        assert found.path.samefile(folder)
        assert found.component is None
        assert resolve(name + "#image").component == "image"
    for name in ("./org/x", "/org/x", "local:org/x", "../nothing"):
        with pytest.raises(NotFoundError, match="no folder"):
            resolve(name)


def test_a_mistyped_path_suggests_its_neighbour(site: Site) -> None:
    (site.work / "digits").mkdir()
    with pytest.raises(NotFoundError, match="did you mean 'digits'"):
        resolve("./digit")


def test_a_run_folder_of_three_parts_needs_no_dot_because_it_cannot_be_a_repository(site: Site) -> None:
    (site.work / "runs" / "a" / "model").mkdir(parents=True)
    assert resolve("runs/a/model").path == Path("runs/a/model")


@pytest.mark.parametrize("name", ["C:\\models\\x", "c:/models/x", "D:x"])
def test_one_letter_before_a_colon_is_a_drive_and_not_a_scheme(name: str) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        resolve(name)


def test_a_name_that_is_both_a_folder_and_a_repository_shows_both_spellings(site: Site) -> None:
    (site.work / "org" / "x").mkdir(parents=True)
    with pytest.raises(UsageError) as caught:
        resolve("org/x")
    assert caught.value.hint == "write './org/x' for the folder or 'hub:org/x' for the Hub"
    assert resolve("./org/x").kind == "local"
    assert resolve("hub:org/x").kind == "hub"


def test_the_project_hides_the_user_and_the_user_hides_plugins(site: Site) -> None:
    entry = "schema = 1\n[models.digits]\nref = 'hub:{}/digits@v1'\naliases = ['numbers']\n"
    site.install("mmhub-fake", entry.format("plugin").replace("schema", "api"))
    assert (resolve("digits").scope, resolve("numbers").repo_id) == ("plugins", "plugin/digits")
    site.registry(entry.format("user"), "user")
    assert (resolve("digits").scope, resolve("numbers").repo_id) == ("user", "user/digits")
    path = site.registry(entry.format("project"), "project")
    found = resolve("numbers#image")
    assert (found.scope, found.repo_id, found.revision) == ("project", "project/digits", "v1")
    assert (found.name, found.source, found.component) == ("digits", str(path), "image")
    assert resolve("plugin:mmhub-fake/digits").repo_id == "plugin/digits"


def test_two_plugins_with_one_model_name_are_an_error_that_names_both(site: Site) -> None:
    for name in ("mmhub-fake-a", "mmhub-fake-b"):
        site.install(name, "api = 1\n[models.digits]\nref = 'hub:org/digits'\n")
    with pytest.raises(
        PluginError, match="provided by mmhub-fake-a and mmhub-fake-b; write 'plugin:mmhub-fake-a/digits'"
    ):
        resolve("digits")


def test_a_plugin_that_is_missing_says_what_to_install(site: Site) -> None:
    site.registry("schema = 1\n[plugins.mmhub-fake]\nrequirement = 'mmhub-fake>=1'\nprovides = ['model:digits']\n")
    for name in ("digits", "plugin:mmhub-fake/digits"):
        with pytest.raises(PluginError, match='plugins install "mmhub-fake>=1"'):
            resolve(name)


def test_an_unknown_name_shows_close_matches_and_the_other_spellings(site: Site) -> None:
    site.registry("schema = 1\n[models.digits]\nref = 'hub:org/digits'\naliases = ['spoken-digits']")
    with pytest.raises(NotFoundError, match="no model is registered as 'digit'; did you mean 'digits'"):
        resolve("digit")
    with pytest.raises(NotFoundError, match="did you mean 'spoken-digits'"):
        resolve("spoken-digit")
    with pytest.raises(NotFoundError, match="write 'org/name' for a Hub repository"):
        resolve("zzz")
    (site.work / "folder").mkdir()
    with pytest.raises(NotFoundError, match=r"for the local folder write '\./folder'"):
        resolve("folder")


def test_a_reference_to_a_folder_starts_at_the_registry(site: Site, monkeypatch: Any) -> None:
    site.registry("schema = 1\n[models.a]\nref = 'local:models/a'\n[models.b]\nref = './models/a#text'")
    (site.work / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(site.work / "models")
    for name in ("a", "b"):
        found = resolve(name).path
        assert found is not None
        assert found.samefile(site.work / "models" / "a")
    assert resolve("b").component == "text"
    assert resolve("b#image").component == "image"


def test_a_bad_reference_names_the_registry_that_holds_it(site: Site) -> None:
    path = site.registry("schema = 1\n[models.a]\nref = 'digits'\n[models.b]\nref = 'hub:a/b/c'")
    for name in ("a", "b"):
        with pytest.raises(UsageError) as caught:
            resolve(name)
        assert caught.value.message.startswith(f"{path}: [models.{name}]: ref")


def test_a_composition_is_handed_on_as_it_is(site: Site) -> None:
    site.registry("schema = 1\n[models.mix.compose]\ndecoder = {use = 'classification'}")
    found = resolve("mix")
    assert found.kind == "compose"
    assert found.entry
    assert found.entry.compose == {"decoder": {"use": "classification"}}
    with pytest.raises(UsageError, match="composition"):
        resolve("mix@v2")


def test_a_deprecated_name_says_so_on_stderr(site: Site, capsys: Any) -> None:
    site.registry("schema = 1\n[models.old]\nref = 'hub:org/old'\ndeprecated = 'use new'")
    resolve("old")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: 'old' is deprecated: use new\n")


def test_the_revision_as_written_wins_then_the_entrys_commit_then_the_lock(site: Site) -> None:
    site.registry(f"schema = 1\n[models.a]\nref='hub:org/a@v1'\n[models.b]\nref='hub:org/b@v1'\ncommit='{COMMIT}'")
    assert resolve("a").commit is None
    write_lock("a", "org/a@v1", OTHER)
    write_lock("b", "org/b@v1", OTHER)
    write_lock("org/c@v1", "org/c@v1", OTHER)
    assert (resolve("a").commit, resolve("a").revision) == (OTHER, "v1")
    assert resolve("b").commit == COMMIT
    assert resolve("org/c@v1").commit == OTHER
    assert resolve("hub:org/c@v1#text").commit == OTHER
    assert resolve("org/c@v2").commit is None
    assert (resolve("b@v2").revision, resolve("b@v2").commit) == ("v2", None)
    assert resolve(f"a@{COMMIT}").commit == COMMIT


def test_a_pin_is_void_once_the_registry_points_elsewhere(site: Site) -> None:
    write_lock("a", "org/a@v1", OTHER)
    for ref in ("hub:org/a@v2", "hub:org/z@v1"):
        site.registry(f"schema = 1\n[models.a]\nref = '{ref}'")
        assert resolve("a").commit is None


def test_the_allow_list_and_pinning_are_enforced_on_every_spelling(site: Site) -> None:
    site.registry("schema = 1\n[hub]\nallow = ['org/*']\nrequire_pinned = true\n[models.a]\nref = 'hub:evil/a'")
    for name in ("evil/x", "hub:evil/x", "hf://evil/x", "https://huggingface.co/evil/x", "a", f"evil/x@{COMMIT}"):
        with pytest.raises(TrustError, match="is not allowed"):
            resolve(name)
    with pytest.raises(TrustError, match="not pinned"):
        resolve("org/x")
    write_lock("org/x", "org/x", COMMIT)
    assert resolve("org/x").commit == COMMIT


def test_every_scope_that_a_name_is_looked_for_in_is_told_in_order(site: Site) -> None:
    site.install("mmhub-fake", "api = 1\n[models.digits]\nref = 'hub:plugin/digits'\naliases = ['numbers']\n")
    path = site.registry("schema = 1\n[models.numbers]\nref = 'hub:org/x'\n")
    looks = looked_at("numbers", read_registries())
    assert [(look.scope, look.found, look.alias) for look in looks] == [
        ("project", "numbers", False),
        ("user", "", False),
        ("plugins", "digits", True),
        ("shipped", "", False),
    ]
    assert looks[0].source == str(path)
    assert "no registry.toml" in looks[1].source


def test_the_repository_of_an_entry_is_told_without_following_it(site: Site) -> None:
    site.registry(
        "schema = 1\n[models.a]\nref='hub:org/a@v1'\n[models.b]\nref='local:./none'\n"
        "[models.c.compose]\nfusion='streams'\n"
        "[models.d]\nref='https://huggingface.co/org/d'\n"
    )
    found = {named.name: repository_of(named) for named in read_registries().named()}
    assert found == {"a": ("org/a", "v1"), "b": ("", ""), "c": ("", ""), "d": ("org/d", "")}


def test_a_name_that_is_to_be_pinned_passes_over_its_old_pin_and_over_require_pinned(site: Site) -> None:
    write_lock("org/x", "org/x", OTHER)
    site.registry("schema = 1\n[hub]\nallow = ['org/*']\nrequire_pinned = true\n")
    assert resolve("org/x").commit == OTHER
    assert resolve("org/x", to_pin=True).commit is None
    assert resolve("org/y", to_pin=True).repo_id == "org/y"
    with pytest.raises(TrustError, match="is not allowed"):
        resolve("evil/x", to_pin=True)


def test_a_pin_is_told_with_whether_it_holds(site: Site) -> None:
    write_lock("a", "org/a@v1", OTHER)
    for ref, holds in (("hub:org/a@v1", True), ("hub:org/a@v2", False)):
        site.registry(f"schema = 1\n[models.a]\nref = '{ref}'")
        pin, held = pin_of(resolve("a"))
        assert pin is not None
        assert (pin.commit, held) == (OTHER, holds)
    assert pin_of(resolve("org/z")) == (None, False)
