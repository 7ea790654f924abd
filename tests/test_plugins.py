"""Plugins are found without being imported, and a bad one costs one line and nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from mmhub import discovery
from mmhub.discovery import command_table, find_plugins, problem_lines
from mmhub.errors import ExitCode, NotFoundError, PluginError, TrustError
from mmhub.plugins import Plugin, call_hook, get_index
from mmhub.registry import find_component
from mmhub.requirements import explain_unmet, unmet_requirements
from mmhub.stdout import diverted_stdout
from tests.fake_plugins import NOSE, PARTS, Site, fresh_process, make_site, run

COMMAND = """
api = 1
[[commands]]
name = "sniff"
factory = "{package}.parts:sniff"
summary = "Sniff at something"
"""
HOOK = 'api = 1\nhooks = ["mmhub_train_callbacks"]\n'


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


def plugin(name: str) -> Plugin:
    found = get_index().plugin(name)
    assert found
    return found


def test_a_component_is_found_without_importing_its_plugin_and_loaded_on_demand(site: Site) -> None:
    site.install("mmhub-fake", init="import sys; sys.modules['mmhub_fake_was_imported'] = sys\n")
    component = find_component("smell_encoder", "nose")
    assert (component.id, component.version) == ("mmhub-fake/nose", "0.1.0")
    assert "mmhub_fake" not in sys.modules
    assert component.load().__name__ == "Nose"
    assert component.config_type().__name__ == "Config"


def test_a_component_answers_to_its_full_id(site: Site) -> None:
    site.install("mmhub-fake")
    assert get_index().find("smell_encoder", "mmhub-fake/nose") == get_index().find("smell_encoder", "Mmhub_Fake/nose")
    with pytest.raises(NotFoundError):
        get_index().find("smell_encoder", "mmhub-other/nose")


def test_the_core_lists_its_fusions() -> None:
    names = [component.spec.name for component in get_index().components("fusion") if component.distribution == "mmhub"]
    assert names == ["streams", "concat", "gated", "attention", "interleave"]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise ImportError('libfoo.so\\nmore')", "ImportError: libfoo.so"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("class E(BaseException): pass\nraise E", "E"),
        ("def f(:", "SyntaxError"),
        ("", "AttributeError"),
    ],
)
def test_whatever_an_import_raises_becomes_one_line_that_names_plugin_version_and_cause(
    site: Site, code: str, cause: str
) -> None:
    site.install("mmhub-fake", parts=code, version="0.2")
    with pytest.raises(PluginError) as caught:
        find_component("smell_encoder", "nose").load()
    assert caught.value.message.startswith(f"plugin mmhub-fake 0.2 cannot load smell_encoder 'nose': {cause}")
    assert "\n" not in caught.value.message
    assert "mmhub plugins show mmhub-fake" in str(caught.value.hint)


def test_ctrl_c_during_an_import_is_not_swallowed(site: Site) -> None:
    site.install("mmhub-fake", parts="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find_component("smell_encoder", "nose").load()


@pytest.mark.parametrize(
    ("manifest", "status", "problem"),
    [
        (b"api = [", "broken", "cannot be read: TOMLDecodeError"),
        (b"\xff\xfe", "broken", "cannot be read: UnicodeDecodeError"),
        (None, "broken", "does not exist"),
        ("", "broken", "missing required field 'api'"),
        ("api = 'x'", "broken", ".api: expected 'int', got 'str'"),
        ("api = 9\nnew_key = 1", "incompatible", "needs plugin interface 9 and mmhub 0.1.0 has 1; upgrade mmhub"),
        ("api = -1", "incompatible", "upgrade the plugin"),
        ('api = 1\nrequires_mmhub = ">=9"', "incompatible", "it needs mmhub >=9, and this is 0.1.0"),
        ('api = 1\nrequires_mmhub = "soon"', "incompatible", "not a version specifier"),
        ("api = 1\nhoks = []", "broken", "unknown key 'hoks'; did you mean 'hooks'?"),
        (NOSE + 'kin = "x"', "broken", "mmhub.toml: components #1 'nose': unknown key 'kin'; did you mean 'kind'?"),
        (NOSE + "schema = 'one'", "broken", "components #1 'nose'.schema: expected 'int', got 'str'"),
        (NOSE + NOSE.replace("api = 1", ""), "broken", "components #2 'nose': the name is already taken"),
        (NOSE.replace("{package}.parts:Nose", "os:system"), "broken", "'os:system' lies outside the package"),
        (NOSE.replace(":Nose", ""), "broken", "is not 'module:attribute'"),
        ("api = 1\ncomponents = 3", "broken", "components: expected an array of tables, got int"),
        ("api = 1\n[models.x]\nreff = 'hub:a/b'", "broken", "[models.x]: unknown key 'reff'; did you mean 'ref'?"),
        ("api = 1\n[models.x]\ntask = 'chat'", "broken", "exactly one of 'ref' and 'compose'"),
        ('api = 1\nhooks = ["mmhub_train_callback"]', "broken", "did you mean 'mmhub_train_callbacks'?"),
    ],
)
def test_a_bad_manifest_costs_one_line_that_names_the_file_and_the_key(
    site: Site, manifest: Any, status: str, problem: str
) -> None:
    site.install("mmhub-fake", manifest)
    site.install("mmhub-fake-good")
    assert plugin("mmhub-fake").status == status
    assert problem in plugin("mmhub-fake").problem
    lines = [line for line in problem_lines() if "mmhub-fake" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"plugin mmhub-fake 0.1.0 {status}: ")
    assert lines[0].endswith("(mmhub plugins show mmhub-fake)")
    assert "\n" not in lines[0]
    assert find_component("smell_encoder", "nose").distribution == "mmhub-fake-good"


@pytest.mark.parametrize(
    ("entry_points", "problem"),
    [
        ("[mmhub]\nfake = mmhub_fake\n", "declares no mmhub.manifest"),
        ("[mmhub.manifest]\na = mmhub_fake:a.toml\nb = mmhub_fake:b.toml\n", "declares 2 mmhub.manifest"),
        ("[mmhub.manifest]\na = mmhub_fake.sub:a.toml\n", "is not 'top_level_package:file.toml'"),
        ("[mmhub.manifest]\na = mmhub_fake:../../a.toml\n", "is not 'top_level_package:file.toml'"),
        ("[mmhub.manifest]\na = mmhub_fake_gone:mmhub.toml\n", "cannot be found"),
    ],
)
def test_bad_entry_points_are_reported(site: Site, entry_points: str, problem: str) -> None:
    site.install("mmhub-fake", entry_points=entry_points)
    assert plugin("mmhub-fake").status == "broken"
    assert problem in plugin("mmhub-fake").problem


def test_unreadable_entry_points_of_one_distribution_do_not_hide_the_others(site: Site) -> None:
    site.install("mmhub-fake")
    site.install("mmhub-fake-bad")
    (site.packages / "mmhub_fake_bad-0.1.0.dist-info" / "entry_points.txt").write_bytes(b"[mmhub]\n\xff")
    assert plugin("mmhub-fake").status == "ok"
    assert "entry points cannot be read" in plugin("mmhub-fake-bad").problem


def test_an_import_hook_that_exits_while_a_plugin_is_looked_up_is_contained(site: Site, monkeypatch: Any) -> None:
    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "mmhub_fake":
                raise SystemExit("from a finder")

    site.install("mmhub-fake")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert plugin("mmhub-fake").problem == "SystemExit: from a finder"


# --- two providers


def test_two_providers_are_an_error_that_shows_the_line_that_settles_it(site: Site) -> None:
    site.install("mmhub-fake-a", version="0.1")
    site.install("mmhub-fake-b", version="0.2")
    with pytest.raises(PluginError) as caught:
        find_component("smell_encoder", "nose")
    assert caught.value.message == "smell_encoder 'nose' is provided by mmhub-fake-a 0.1 and mmhub-fake-b 0.2"
    assert '"smell_encoder:nose" = "mmhub-fake-a"' in str(caught.value.hint)
    assert find_component("smell_encoder", "mmhub-fake-b/nose").version == "0.2"


def test_prefer_settles_it_and_the_project_wins_over_the_user(site: Site) -> None:
    site.install("mmhub-fake-a")
    site.install("mmhub-fake-b")
    line = 'schema = 1\n[prefer]\n"smell_encoder:nose" = "mmhub-fake-{}"\n'
    site.registry(line.format("a"), "user")
    assert find_component("smell_encoder", "nose").distribution == "mmhub-fake-a"
    site.registry(line.format("b"), "project")
    assert find_component("smell_encoder", "nose").distribution == "mmhub-fake-b"


def test_a_command_of_two_plugins_names_both_when_it_is_run(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake-a", COMMAND)
    site.install("mmhub-fake-b", COMMAND)
    code, _, err = run(capsys, "sniff")
    assert code == ExitCode.PLUGIN
    assert "'sniff' is provided by mmhub-fake-a 0.1.0 and mmhub-fake-b 0.1.0" in err
    assert "MMHUB_DISABLE_PLUGINS=mmhub-fake-a" in err


# --- nothing found


def test_a_missing_component_suggests_near_names_and_lists_what_exists(site: Site) -> None:
    site.install("mmhub-fake")
    with pytest.raises(NotFoundError) as caught:
        find_component("smell_encoder", "nos")
    assert str(caught.value) == "there is no smell_encoder 'nos'; did you mean 'nose'? available: nose"
    with pytest.raises(NotFoundError, match="no installed plugin provides any taste_encoder"):
        find_component("taste_encoder", "tongue")


def test_a_missing_component_of_a_known_plugin_says_what_to_install(site: Site) -> None:
    site.registry(
        'schema = 1\n[plugins.mmhub-fake]\nrequirement = "mmhub-fake>=0.1,<1"\nprovides = ["smell_encoder:nose"]\n'
    )
    for name in ("nose", "mmhub-fake/nose"):
        with pytest.raises(PluginError) as caught:
            find_component("smell_encoder", name)
        assert "mmhub-fake, which is not installed" in caught.value.message
        assert caught.value.hint == 'install: mmhub plugins install "mmhub-fake>=0.1,<1"'


def test_a_component_of_an_unusable_plugin_is_not_called_missing(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake", NOSE + "\n[x]\ny = 1")
    site.install("mmhub-fake-old", NOSE.replace("api = 1", 'api = 1\nrequires_mmhub = ">9"').replace("nose", "beak"))
    site.registry('schema = 1\n[plugins.mmhub-fake]\nrequirement = "mmhub-fake"\nprovides = ["smell_encoder:nose"]\n')
    with pytest.raises(PluginError, match=r"'nose' is in mmhub-fake 0.1.0, which is broken: .*unknown key 'x'"):
        find_component("smell_encoder", "nose")
    with pytest.raises(PluginError, match=r"mmhub-fake-old 0.1.0, which is incompatible: it needs mmhub >9"):
        find_component("smell_encoder", "beak")


# --- switches


def test_plugins_can_be_allowed_and_denied_by_name(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake-a", COMMAND)
    site.install("mmhub-fake-b")
    states = {"mmhub-fake-a": "ok", "mmhub-fake-b": "ok"}

    def current() -> dict[str, str]:
        return {r["distribution"]: r["status"] for r in find_plugins() if "fake" in r["distribution"]}

    assert current() == states
    monkeypatch.setenv("MMHUB_DISABLE_PLUGINS", "Mmhub_Fake_A")
    assert current() == states | {"mmhub-fake-a": "disabled"}
    assert "sniff" not in command_table()
    monkeypatch.delenv("MMHUB_DISABLE_PLUGINS")
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake-a, mmhub-x")
    assert current() == states | {"mmhub-fake-b": "disabled"}
    monkeypatch.setenv("MMHUB_PLUGINS", "")
    assert set(current().values()) == {"disabled"}
    assert [r["status"] for r in find_plugins() if r["distribution"] == "mmhub"] == ["ok"]
    assert problem_lines() == []


def test_strict_mode_makes_a_problem_fatal(site: Site, monkeypatch: Any, capsys: Any) -> None:
    site.install("mmhub-fake", b"?")
    assert run(capsys, "version")[0] == ExitCode.OK
    monkeypatch.setenv("MMHUB_STRICT_PLUGINS", "1")
    code, out, err = run(capsys, "version")
    assert (code, out) == (ExitCode.PLUGIN, "")
    assert "mmhub-fake 0.1.0 broken" in err
    fresh_process(monkeypatch)
    with pytest.raises(PluginError):
        get_index()


# --- the cache


def no_scan() -> list[Any]:
    raise AssertionError("scanned")


def test_the_second_process_reads_the_cache(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake", COMMAND)
    first = find_plugins()
    fresh_process(monkeypatch)
    monkeypatch.setattr(discovery, "_scan", no_scan)
    assert find_plugins() == first
    assert command_table()["sniff"] == ("mmhub_fake.parts:sniff", "Sniff at something", "mmhub-fake", "0.1.0")


def test_an_install_an_uninstall_and_an_edited_manifest_each_invalidate_the_cache(site: Site, monkeypatch: Any) -> None:
    def commands() -> set[str]:
        fresh_process(monkeypatch)
        return {name for name, row in command_table().items() if "fake" in row[2]}

    package = site.install("mmhub-fake", COMMAND)
    assert commands() == {"sniff"}
    site.install("mmhub-fake-b", COMMAND.replace('"sniff"', '"snort"'))
    assert commands() == {"sniff", "snort"}
    (site.packages / "mmhub_fake_b-0.1.0.dist-info" / "entry_points.txt").unlink()
    (site.packages / "mmhub_fake_b-0.1.0.dist-info").rename(site.packages / "trash")
    assert commands() == {"sniff"}
    manifest = package / "mmhub.toml"
    manifest.write_text(manifest.read_text().replace('"sniff"', '"inhale"'))
    assert commands() == {"inhale"}
    manifest.unlink()
    assert commands() == set()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "[" * 5000, "mmhub plugins 2 00000000\n{}", None])
def test_a_corrupt_cache_is_rescanned(site: Site, monkeypatch: Any, content: str | None) -> None:
    site.install("mmhub-fake", COMMAND)
    find_plugins()
    file = next(site.cache.glob("index-*.json"))
    if content is None:  # well-formed, and wrong inside
        content = file.read_text().replace("sniff", "snuff")
    file.write_text(content)
    fresh_process(monkeypatch)
    assert plugin("mmhub-fake").commands[0].name == "sniff"
    assert len(get_index().components("fusion")) >= 4


def test_a_cache_that_cannot_be_written_costs_nothing_else(site: Site, monkeypatch: Any, capsys: Any) -> None:
    site.install("mmhub-fake", COMMAND)
    (site.work / "file").write_text("")
    monkeypatch.setenv("MMHUB_CACHE", str(site.work / "file" / "cache"))
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert "sniff" in out
    assert [path.name for path in site.work.iterdir()] == ["file"]


# --- hooks


def test_a_hook_imports_just_the_plugins_that_declare_it_and_gives_a_flat_list(
    site: Site, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake mmhub-fake-idle")
    good = """
        from mmhub.spec import hookimpl
        @hookimpl
        def mmhub_train_callbacks(run):
            yield run + 1
            yield run + 2
    """
    site.install("mmhub-fake", HOOK, parts=good)
    site.install("mmhub-fake-idle", parts="raise AssertionError('imported')")
    assert call_hook("mmhub_train_callbacks", run=40) == [41, 42]
    assert call_hook("mmhub_train_callbacks", run=0) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(3)",
        "from mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_train_callbacks(run):\n    yield 1 / 0\n",
        "from mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_train_callbacks(nonsense): return []\n",
        "from mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_train_callbacks(run): return 7\n",
    ],
)
def test_a_plugin_that_fails_in_a_hook_costs_one_line_and_the_others_go_on(
    site: Site, capsys: Any, monkeypatch: Any, code: str
) -> None:
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake-a mmhub-fake-b")
    good = "from mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_train_callbacks(): return ['good']\n"
    site.install("mmhub-fake-a", HOOK, parts=code)
    site.install("mmhub-fake-b", HOOK, parts=good)
    assert call_hook("mmhub_train_callbacks", run=None) == ["good"]
    err = capsys.readouterr().err
    assert err.startswith("plugin mmhub-fake-a 0.1.0 failed in mmhub_train_callbacks: ")
    assert err.count("\n") == 1


def test_a_hook_that_only_the_manifest_or_only_the_module_knows_costs_one_line_once(
    site: Site, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake")
    code = "from mmhub.spec import hookimpl\n@hookimpl\ndef mmhub_load_foreign(): return []\n"
    site.install("mmhub-fake", HOOK, parts=code)
    assert call_hook("mmhub_train_callbacks", run=None) == call_hook("mmhub_train_callbacks", run=1) == []
    assert capsys.readouterr().err == (
        "plugin mmhub-fake 0.1.0: its manifest declares mmhub_train_callbacks, which mmhub_fake.parts does not"
        " implement; mmhub_fake.parts implements mmhub_load_foreign, not declared in its manifest"
        " (mmhub plugins check mmhub-fake)\n"
    )
    monkeypatch.setenv("MMHUB_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match="does not implement"):
        call_hook("mmhub_train_callbacks", run=None)


# --- what plugins print


def test_what_a_plugin_prints_at_import_does_not_reach_the_result(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", init="print('hello from init')", parts=f"print('and from parts')\n{PARTS}")
    code, out, err = run(capsys, "plugins", "show", "mmhub-fake", "--load", "--json")
    assert (code, json.loads(out)["failures"]) == (0, [])
    assert err == "hello from init\nand from parts\n"


def test_what_a_plugin_prints_in_a_hook_does_not_reach_the_result(site: Site, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake")
    hook = "@hookimpl\ndef mmhub_train_callbacks():\n    print('called')\n    yield 1\n    print('resumed')\n"
    site.install("mmhub-fake", HOOK, parts=f"from mmhub.spec import hookimpl\n{hook}")
    assert call_hook("mmhub_train_callbacks", run=None) == [1]
    assert capsys.readouterr() == ("", "called\nresumed\n")


def test_stdout_of_other_threads_stays_and_overlapping_diversions_end(capsys: Any) -> None:
    before = sys.stdout
    entered, leave = Event(), Event()

    def import_slowly() -> None:
        with diverted_stdout():
            entered.set()
            leave.wait(10)
            print("import")

    with ThreadPoolExecutor() as pool:
        done = pool.submit(import_slowly)
        entered.wait(10)
        kept = sys.stdout  # as a plugin that makes a log handler at import would
        print("result")
        with diverted_stdout():
            leave.set()
            done.result(10)
            print("another")
    print("after", file=kept)
    assert sys.stdout is before
    assert capsys.readouterr() == ("result\nafter\n", "import\nanother\n")


# --- plugins that come and go while a process runs


def test_a_plugin_installed_while_the_process_runs_is_found_and_nothing_is_scanned_in_vain(
    site: Site, monkeypatch: Any
) -> None:
    site.install("mmhub-fake-a")
    index = get_index()
    with monkeypatch.context() as patched:
        patched.setattr(discovery, "_scan", no_scan)
        with pytest.raises(NotFoundError):
            find_component("smell_encoder", "beak")
    site.install("mmhub-fake-b", NOSE.replace('"nose"', '"beak"'))
    assert unmet_requirements([{"distribution": "mmhub-fake-b"}], index) == []
    assert find_component("smell_encoder", "beak").load().__name__ == "Nose"


def test_requirements_are_compared_with_what_was_upgraded_while_the_process_runs(site: Site) -> None:
    site.install("mmhub-fake")
    index, requires = get_index(), [{"distribution": "mmhub-fake", "specifier": ">=0.2"}]
    assert [unmet.problem for unmet in unmet_requirements(requires, index)] == ["0.1.0 installed"]
    uninstall(site)
    site.install("mmhub-fake", version="0.2")
    assert unmet_requirements(requires, index) == []


def test_a_component_added_to_an_edited_manifest_is_found_while_the_process_runs(site: Site) -> None:
    package = site.install("mmhub-fake")
    get_index()
    (package / "mmhub.toml").write_text(NOSE.replace('"nose"', '"beak"').format(package="mmhub_fake"))
    assert find_component("smell_encoder", "beak").load().__name__ == "Nose"


def uninstall(site: Site, version: str = "0.1.0") -> None:
    shutil.rmtree(site.packages / f"mmhub_fake-{version}.dist-info")
    shutil.rmtree(site.packages / "mmhub_fake")


def test_a_plugin_removed_while_the_process_runs_says_so_instead_of_a_missing_module(site: Site) -> None:
    site.install("mmhub-fake")
    component = find_component("smell_encoder", "nose")
    uninstall(site)
    with pytest.raises(PluginError) as caught:
        component.load()
    assert str(caught.value) == (
        "plugin mmhub-fake 0.1.0 was removed while this process ran; install it and start again"
    )
    with pytest.raises(NotFoundError):
        find_component("smell_encoder", "nose")


def test_a_plugin_upgraded_while_the_process_runs_never_mixes_two_versions(site: Site) -> None:
    site.install("mmhub-fake")
    component = find_component("smell_encoder", "nose")
    component.load()
    uninstall(site)
    site.install("mmhub-fake", version="0.2")
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            component.load()
        assert str(caught.value) == "plugin mmhub-fake 0.1.0 was replaced by 0.2 while this process ran; start again"
        component = find_component("smell_encoder", "nose")
        assert component.version == "0.2"


def test_a_plugin_edited_in_place_while_the_process_runs_says_so_when_it_fails(site: Site) -> None:
    package = site.install("mmhub-fake")
    component = find_component("smell_encoder", "nose")
    (package / "parts.py").rename(package / "organs.py")
    with pytest.raises(PluginError, match="cannot load smell_encoder 'nose': ModuleNotFoundError"):
        component.load()  # a fault of the plugin, as far as anybody can tell
    (package / "mmhub.toml").write_text(NOSE.replace(".parts", ".organs").format(package="mmhub_fake"))
    with pytest.raises(PluginError, match=r"mmhub-fake 0\.1\.0 was changed while this process ran; start again"):
        component.load()
    assert find_component("smell_encoder", "nose").load().__name__ == "Nose"


def test_a_plugin_removed_before_its_hook_fires_costs_one_line_that_says_so(
    site: Site, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MMHUB_PLUGINS", "mmhub-fake")
    site.install("mmhub-fake", HOOK)
    get_index()
    uninstall(site)
    assert call_hook("mmhub_train_callbacks", run=None) == []
    assert "plugin mmhub-fake 0.1.0 was removed while this process ran" in capsys.readouterr().err


# --- requirements of a checkpoint


def test_met_requirements_give_nothing(site: Site) -> None:
    site.install("mmhub-fake")
    records = [{"distribution": "mmhub-fake", "specifier": ">=0.1,<1", "saved_with": "0.1.0", "components": []}]
    assert unmet_requirements([*records, {"distribution": "mmhub", "specifier": ">=0.1"}], get_index()) == []


def test_unmet_requirements_are_explained_with_one_install_line(site: Site, monkeypatch: Any) -> None:
    site.install("mmhub-fake-text", version="0.1.9")
    site.install("mmhub-fake-off")
    monkeypatch.setenv("MMHUB_DISABLE_PLUGINS", "mmhub-fake-off")
    records = [
        {"distribution": "mmhub-fake-vision", "specifier": ">=0.3,<1"},
        {"distribution": "mmhub-fake-text", "specifier": ">=0.2,<1", "reason": "normalisation changed"},
        {"distribution": "mmhub-fake-off", "specifier": ""},
    ]
    error = explain_unmet("org/tiny@v1", unmet_requirements(records, get_index()))
    assert error.exit_code == ExitCode.PLUGIN
    assert error.message == (
        "org/tiny@v1 needs 3 plugins: mmhub-fake-vision >=0.3,<1 (not installed), "
        "mmhub-fake-text >=0.2,<1 (0.1.9 installed: normalisation changed), "
        "mmhub-fake-off (0.1.0 is disabled: it is listed in MMHUB_DISABLE_PLUGINS)"
    )
    assert error.hint == (
        'install: mmhub plugins install "mmhub-fake-vision>=0.3,<1" "mmhub-fake-text>=0.2,<1"; '
        "see `mmhub plugins show mmhub-fake-off`"
    )


@pytest.mark.parametrize(
    "record",
    [
        {"distribution": 'x"; rm -rf ~; "', "specifier": ""},
        {"distribution": "x", "specifier": " @ https://evil.example/x.whl"},
        {"distribution": "x", "specifier": "; python_version > '3'"},
        {"distribution": "--index-url=x", "specifier": ""},
        {"distribution": None},
        {},
    ],
)
def test_a_requirement_that_is_no_requirement_never_reaches_an_install_line(record: dict[str, Any]) -> None:
    with pytest.raises(TrustError, match=r"config\.json requires"):
        unmet_requirements([record], get_index())


# --- what people see


def test_plugins_ls_and_show_explain_a_broken_plugin(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", b"api = [")
    site.install("mmhub-fake-good", parts="raise ImportError('no libnose')")
    code, out, err = run(capsys, "plugins", "ls", "--json")
    rows = {row["distribution"]: row for row in json.loads(out)["plugins"]}
    assert code == 0
    assert rows["mmhub-fake"]["status"] == "broken"
    assert rows["mmhub-fake-good"]["components"][0]["id"] == "mmhub-fake-good/nose"
    assert err.count("\n") == 1
    code, out, _ = run(capsys, "plugins", "show", "fake")
    assert (code, "TOMLDecodeError" in out) == (0, True)
    code, out, err = run(capsys, "plugins", "show", "mmhub-fake-good", "--load")
    assert code == ExitCode.PLUGIN
    assert "fails: plugin mmhub-fake-good 0.1.0 cannot load smell_encoder 'nose': ImportError: no libnose" in out
    assert "error: 2 parts of mmhub-fake-good 0.1.0 cannot be used\n" in err
    assert (
        "hint: mmhub plugins check mmhub-fake-good tests it, mmhub plugins uninstall mmhub-fake-good removes it\n"
        in err
    )


def test_plugins_ls_counts_what_each_plugin_offers_and_show_tells_the_schema(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", NOSE.replace("[[", 'hooks = ["mmhub_train_callbacks"]\n[[', 1) + "schema = 3\n")
    site.install("mmhub-fake-bad", b"api = [")
    rows = [line.split("  ") for line in run(capsys, "plugins", "ls")[1].splitlines()]
    cells = {row[0]: [cell.strip() for cell in row if cell][3] for row in rows}
    assert cells["PLUGIN"] == "OFFERS"
    assert (cells["mmhub-fake"], cells["mmhub-fake-bad"]) == ("1 component, 1 hook", "-")
    assert ["smell_encoder", "nose", "3"] in [
        line.split()[:3] for line in run(capsys, "plugins", "show", "fake")[1].splitlines()
    ]
    assert json.loads(run(capsys, "plugins", "show", "fake", "--json")[1])["components"][0]["schema"] == 3


def test_plugins_show_of_a_known_plugin_says_how_to_install_it(site: Site, capsys: Any) -> None:
    site.registry('schema = 1\n[plugins.mmhub-fake]\nrequirement = "mmhub-fake>=0.1"\n')
    code, out, err = run(capsys, "plugins", "show", "fake")
    assert (code, out) == (ExitCode.NOT_FOUND, "")
    assert 'plugins install "mmhub-fake>=0.1"' in err


@pytest.mark.parametrize(("folder", "shown"), [(".", "."), ("mmhub-fake", "mmhub-fake")])
def test_plugins_show_of_a_plugin_whose_source_is_here_says_how_to_install_that(
    site: Site, capsys: Any, folder: str, shown: str
) -> None:
    project = site.work / folder / "pyproject.toml"
    project.parent.mkdir(exist_ok=True)
    project.write_text('[project]\nname = "Mmhub_Fake"\n')
    assert run(capsys, "plugins", "show", "fake")[2].endswith(
        f"hint: to work on it here: mmhub plugins install -e {shown}\n"
    )
    project.write_text('project = "mmhub-fake"\n')
    assert "see `mmhub plugins ls`" in run(capsys, "plugins", "show", "fake")[2]
