"""registry.toml and mmhub.lock: strict reading, with errors that say where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmhub.errors import TrustError, UsageError
from mmhub.registry import (
    Pin,
    find_upward,
    lock_file,
    read_lock,
    read_registries,
    read_registry,
    shipped_file,
    write_lock,
    write_pins,
)
from tests.fake_plugins import Site, make_site

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


def test_the_shipped_registry_is_valid_and_knows_the_official_plugins() -> None:
    shipped = read_registry(shipped_file(), "shipped")
    official = {"mmhub-text", "mmhub-image", "mmhub-audio", "mmhub-heads", "mmhub-hubserver", "mmhub-tensorboard"}
    official.add("mmhub-trackers")
    assert official <= set(shipped.plugins)
    assert {entry.trust for entry in shipped.plugins.values()} == {"official"}
    registries = read_registries(Path("/"))
    assert registries.requirement("image_encoder:timm") == "mmhub-image>=0.1,<1"
    assert registries.requirement("command:hub") == "mmhub-hubserver>=0.1,<1"


def test_the_nearest_registry_upward_wins(site: Site) -> None:
    outer = site.registry("schema = 1")
    inner = site.work / "a" / "b"
    inner.mkdir(parents=True)
    assert find_upward("registry.toml", inner) == outer
    nearer = site.work / "a" / "registry.toml"
    nearer.write_text("schema = 1")
    assert [file.path for file in read_registries(inner).files if file.scope == "project"] == [nearer]


def test_scopes_stand_in_their_order(site: Site) -> None:
    site.registry("schema = 1")
    site.registry("schema = 1", "user")
    assert [file.scope for file in read_registries().files] == ["project", "user", "shipped"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = 1\nmodles = 1", "unknown key 'modles'; did you mean 'models'?"),
        (
            "schema = 1\n[models.a]\nref = 'hub:a/b'\ntaks = 'x'",
            ":2: [models.a]: unknown key 'taks'; did you mean 'task'?",
        ),
        ("schema = 1\n\n[models]\na = 3", "[models.a]: expected a table, got int"),
        ("schema = 1\n[models.a]\nref = 3", ":2: [models.a].ref: expected 'str', got 'int'"),
        ("schema = 1\n[models.a]", "exactly one of 'ref' and 'compose' is needed"),
        ("schema = 1\n[models.a]\nref = 'hub:a/b'\ncommit = 'abc'", "commit 'abc' is not 40 hex digits"),
        ("schema = 1\n[models.'a/b']\nref = 'hub:a/b'", "the name 'a/b' may hold only"),
        ("schema = 1\n[models.a]\nref = 'hub:a/b'\n[models.a]\nref = 'x'", "line 4"),
        (
            "schema = 1\n[models.a]\nref='hub:a/b'\n[models.b]\nref='hub:a/b'\naliases=['a']",
            ":4: [models.b]: the name 'a' is",
        ),
        ("schema = 1\n[hub]\nalow = []", ":2: [hub]: unknown key 'alow'; did you mean 'allow'?"),
        ("schema = 1\n[prefer]\nvit = 'mmhub-x'", '[prefer]: expected "kind:name" = "distribution"'),
        ("schema = 1\n[plugins.a]\nrequirement = 'b>=1'", ":2: [plugins.a]: requirement 'b>=1' is for another"),
        ("schema = 1\n[plugins.a]\nrequirement = 'a\"; rm -rf ~'", "is not a requirement such as"),
        ("schema = 1\n[plugins.a]\nrequirement = 'a @ https://x.example/a.whl'", "is not a requirement such as"),
        (
            "schema = 1\n[plugins.a]\nrequirement = 'a'\ntrust = 'total'",
            "[plugins.a].trust: invalid enum value 'total'",
        ),
        ("schema = 1\n[plugins.a]\nrequirement = 'a'\nprovides = ['timm']", 'expected "kind:name"'),
        ("schema = 2\nnew = 1", "it has schema 2, and this mmhub knows 1; upgrade mmhub"),
        ("", "the key 'schema' is missing"),
        ("schema = true", "the key 'schema' is missing or not a number"),
        ("schema = ", "cannot be read: Invalid value (at"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_file_and_the_place(site: Site, text: str, message: str) -> None:
    path = site.registry(text)
    with pytest.raises(UsageError) as caught:
        read_registries()
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_of_other_tools_are_allowed_under_x(site: Site) -> None:
    site.registry("schema = 1\n[x-team]\nanything = true")
    assert read_registries().files[0].scope == "project"


def test_a_project_can_tighten_the_users_allow_list_and_never_loosen_it(site: Site) -> None:
    site.registry('schema = 1\n[hub]\nallow = ["org/*", "team/one"]', "user")
    site.registry('schema = 1\n[hub]\nallow = ["*"]', "project")
    registries = read_registries()
    registries.check_allowed("org/x", None)
    for name in ("evil/x", "organic/x", "team/two", "ORG/x"):
        with pytest.raises(TrustError, match="is not allowed by"):
            registries.check_allowed(name, None)
    site.registry('schema = 1\n[hub]\nallow = ["*"]\nrequire_pinned = true', "project")
    with pytest.raises(TrustError, match="not pinned to a commit"):
        read_registries().check_allowed("org/x", None)
    read_registries().check_allowed("org/x", COMMIT)


def test_an_empty_allow_list_allows_nothing(site: Site) -> None:
    site.registry("schema = 1\n[hub]\nallow = []")
    with pytest.raises(TrustError, match="allow lists nothing"):
        read_registries().check_allowed("org/x", None)


def test_the_hf_endpoint_variable_wins(site: Site, monkeypatch: Any) -> None:
    assert read_registries().endpoint() == ""
    site.registry('schema = 1\n[hub]\nendpoint = "http://team"')
    assert read_registries().endpoint() == "http://team"
    monkeypatch.setenv("HF_ENDPOINT", "http://mine")
    assert read_registries().endpoint() == "http://mine"


def test_a_lock_is_written_beside_the_registry_and_read_back(site: Site) -> None:
    site.registry("schema = 1")
    inner = site.work / "deep"
    inner.mkdir()
    assert write_lock("digits", "org/digits@v1", COMMIT, inner) == site.work / "mmhub.lock"
    write_lock("another", "org/another", COMMIT, inner)
    pins = read_lock(inner)
    assert list(pins) == ["another", "digits"]
    assert (pins["digits"].ref, pins["digits"].commit) == ("hub:org/digits@v1", COMMIT)
    assert sorted(path.name for path in site.work.iterdir()) == ["deep", "mmhub.lock", "registry.toml"]
    with pytest.raises(UsageError, match="40 hex digits"):
        write_lock("digits", "org/digits", "main")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"schema": 1}', '{"schema": 9, "models": {}}', json.dumps({"schema": 1, "models": {"a": {"ref": 1}}})],
)
def test_a_damaged_lock_is_an_error_that_names_it(site: Site, text: str) -> None:
    (site.work / "mmhub.lock").write_text(text)
    with pytest.raises(UsageError, match=r"mmhub\.lock"):
        read_lock()


def test_pins_are_replaced_and_removed_and_the_others_stay(site: Site) -> None:
    for name in ("a", "b"):
        write_lock(name, f"org/{name}", COMMIT)
    moved = Pin(ref="hub:org/b", commit=COMMIT[::-1])
    path = write_pins({"a": None, "b": moved, "c": moved})
    assert read_lock() == {"b": moved, "c": moved}
    assert path == lock_file() == site.work / "mmhub.lock"
    assert list(site.work.iterdir()) == [path], "nothing is left beside it"
    with pytest.raises(UsageError, match="40 hex digits"):
        write_pins({"d": Pin(ref="hub:org/d", commit="main")})
    assert read_lock() == {"b": moved, "c": moved}


def test_a_repository_is_allowed_where_every_list_holds_it(site: Site) -> None:
    assert read_registries().allows("any/thing")
    site.registry('schema = 1\n[hub]\nallow = ["org/*", "team/one"]', "user")
    site.registry('schema = 1\n[hub]\nallow = ["*/one"]', "project")
    assert [name for name in ("org/one", "org/two", "team/one") if read_registries().allows(name)] == [
        "org/one",
        "team/one",
    ]


def test_a_registry_is_decoded_again_when_its_text_changes(tmp_path: Path) -> None:
    path = tmp_path / "registry.toml"
    for label in ("aa", "bb", "aa"):  # of one size, written within one tick of the file system's clock
        path.write_text(f'schema = 1\n[models.{label}]\nref = "hub:org/{label}"\n')
        assert list(read_registry(path, "project").models) == [label]
    assert read_registry(path, "project") is read_registry(path, "project")
