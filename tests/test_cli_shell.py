"""The command line: one line per error, the right exit code, results on stdout and nothing else there."""

from __future__ import annotations

import errno
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from mmhub import __version__
from mmhub.cli import main as shell
from mmhub.cli import output
from mmhub.cli.output import emit, table
from mmhub.errors import ExitCode, NetworkError
from tests.fake_plugins import Site, fresh_process, make_site, run

COMMAND = 'api = 1\n[[commands]]\nname = "sniff"\nfactory = "{package}.parts:sniff"\nsummary = "Sniff at something"\n'
SNIFF = "import click\n@click.command()\ndef sniff(): click.echo('sniffed')\n"


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return make_site(tmp_path, monkeypatch)


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `mmhub version` raise."""

    def callback() -> None:
        raise error

    monkeypatch.setattr(output, "_import", lambda target: click.Command("version", callback=callback))


def test_help_shows_every_command_and_imports_none(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(output, "_import", lambda target: pytest.fail(f"imported {target}"))
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for name, (_, summary) in shell.COMMANDS.items():
        assert f"  {name}  " in out
        assert summary in out


def test_version_in_its_two_spellings(capsys: Any) -> None:
    assert run(capsys, "--version") == (0, f"mmhub {__version__}\n", "")
    assert run(capsys, "version") == (0, f"mmhub {__version__}\n", "")
    assert json.loads(run(capsys, "version", "--json")[1])["mmhub"] == __version__


def test_a_plugins_command_stands_in_help_and_runs(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", COMMAND, parts=SNIFF)
    assert "Sniff at something" in run(capsys, "--help")[1]
    assert run(capsys, "sniff") == (0, "sniffed\n", "")


def test_a_plugin_cannot_replace_a_command_of_the_core(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", COMMAND.replace('"sniff"', '"version"'), parts=SNIFF)
    assert run(capsys, "version")[1] == f"mmhub {__version__}\n"


@pytest.mark.parametrize("code", ["raise OSError('libfoo.so')", "import sys; sys.exit(0)", "sniff = 3"])
def test_a_plugins_command_that_cannot_be_imported_exits_4_and_harms_no_other(
    site: Site, capsys: Any, code: str
) -> None:
    site.install("mmhub-fake", COMMAND, parts=code)
    exit_code, out, err = run(capsys, "sniff")
    assert (exit_code, out) == (ExitCode.PLUGIN, "")
    assert err.startswith("error: plugin mmhub-fake 0.1.0")
    for args in (["--help"], ["plugins", "ls"], ["models", "ls"], ["version"]):
        assert run(capsys, *args)[0] == 0


def test_a_broken_plugin_costs_every_command_one_line_on_stderr(site: Site, capsys: Any) -> None:
    site.install("mmhub-fake", b"?")
    for args in (["--help"], ["plugins", "ls", "--json"], ["models", "ls"], ["env"], ["version"]):
        code, out, err = run(capsys, *args)
        assert (code, err.count("\n"), bool(out)) == (0, 1, True)


def test_an_unknown_command_suggests_a_near_one(capsys: Any) -> None:
    code, out, err = run(capsys, "modles")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err == "error: there is no command 'modles'\nhint: did you mean 'models'?\n"


def test_a_command_of_a_plugin_that_is_not_installed_says_what_to_install(
    site: Site, capsys: Any, monkeypatch: Any
) -> None:
    site.registry(
        'schema = 1\n[plugins.mmhub-fake]\nrequirement = "mmhub-fake>=0.1,<1"\nprovides = ["command:sniff"]\n'
    )
    code, _, err = run(capsys, "sniff")
    assert code == ExitCode.PLUGIN
    assert 'hint: install: mmhub plugins install "mmhub-fake>=0.1,<1"\n' in err
    site.install("mmhub-fake", COMMAND)
    fresh_process(monkeypatch)
    monkeypatch.setenv("MMHUB_DISABLE_PLUGINS", "mmhub-fake")
    code, _, err = run(capsys, "sniff")
    assert code == ExitCode.PLUGIN
    assert "mmhub-fake 0.1.0, which is disabled" in err


@pytest.mark.parametrize(
    "args", [["--nonsense"], ["version", "--nonsense"], ["models", "which"], ["models", "nonsense"]]
)
def test_a_usage_mistake_exits_2_with_an_error_and_a_hint(capsys: Any, args: list[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (ExitCode.USAGE, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
    assert "--help`" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NetworkError("no route", "try\nlater"), 6, "error: no route\nhint: try later\n"),
        (OSError(errno.ENOSPC, "x", "/full/disk"), 1, "error: no space left on device: '/full/disk'\n"),
        (PermissionError(errno.EACCES, "x", "/secret"), 1, "error: permission denied: '/secret'\n"),
        (BrokenPipeError(errno.EPIPE, "x"), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 1, "error: aborted\n"),
        (NetworkError("evil \x1b[2J name"), 6, "error: evil \N{REPLACEMENT CHARACTER}[2J name\n"),
    ],
)
def test_each_error_has_its_exit_code_and_its_line(
    capsys: Any, monkeypatch: Any, error: BaseException, code: int, text: str
) -> None:
    raising(monkeypatch, error)
    assert run(capsys, "version") == (code, "", text)


def test_a_bug_is_one_line_and_a_traceback_only_when_asked_for(capsys: Any, monkeypatch: Any) -> None:
    raising(monkeypatch, ZeroDivisionError("a\nb"))
    line = "unexpected error: ZeroDivisionError: a b (set MMHUB_DEBUG=1 for the traceback; please report it)\n"
    assert run(capsys, "version") == (1, "", line)
    monkeypatch.setenv("MMHUB_DEBUG", "1")
    code, out, err = run(capsys, "version")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.endswith(line)


def test_what_a_command_returns_is_no_exit_code_but_ctx_exit_is(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(output, "_import", lambda target: click.Command("version", callback=lambda: 7))
    assert run(capsys, "version")[0] == 0
    leave = click.Command("version", callback=lambda: click.get_current_context().exit(3))
    monkeypatch.setattr(output, "_import", lambda target: leave)
    assert run(capsys, "version")[0] == 3


def test_an_error_under_json_leaves_stdout_empty(capsys: Any) -> None:
    code, out, err = run(capsys, "models", "which", "zzz", "--json")
    assert (code, out) == (ExitCode.NOT_FOUND, "")
    assert err.startswith("error: no model is registered as 'zzz'")


def test_ctrl_c_ends_a_real_process_with_130_and_one_line(site: Site) -> None:
    parts = "import time, click\n@click.command()\ndef sniff():\n    print('up', flush=True)\n    time.sleep(60)\n"
    site.install("mmhub-fake", COMMAND, parts=parts)
    command = [sys.executable, "-m", "mmhub", "sniff"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=site.work, env=site.environment(), **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_a_closed_pipe_is_quiet(site: Site) -> None:
    code = (
        "import subprocess, sys\np = subprocess.Popen([sys.executable, '-m', 'mmhub', 'env'], stdout=subprocess.PIPE)\n"
    )
    result = site.python("-c", code + "p.stdout.close()\np.wait()\n")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said(site: Site) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mmhub", "version"]
        done = subprocess.run(
            command, env=site.environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "error: no space left on device\n")


def test_shell_completion_knows_the_commands_and_prints_nothing_else(site: Site) -> None:
    site.install("mmhub-fake", b"?")
    done = site.python("-m", "mmhub", _MMHUB_COMPLETE="bash_complete", COMP_WORDS="mmhub mod", COMP_CWORD="1")
    assert (done.stdout, done.stderr) == ("plain,models\n", "")


# --- output


def test_json_output_is_json_whatever_the_numbers(capsys: Any) -> None:
    emit({"loss": math.nan, "path": Path("a"), "names": ("ü", "\udc80")}, True, "")
    assert json.loads(capsys.readouterr().out) == {"loss": None, "path": "a", "names": ["ü", "\udc80"]}
    with pytest.raises(TypeError, match="object is not JSON data"):
        emit(object(), True, "")


def test_output_survives_a_terminal_without_unicode(site: Site) -> None:
    code = "from mmhub.cli.output import emit; emit({'a': 'ü'}, AS_JSON, 'ü')"
    for as_json, expected in (("True", '{\n  "a": "\\u00fc"\n}\n'), ("False", "\\xfc\n")):
        done = site.python("-c", code.replace("AS_JSON", as_json), PYTHONIOENCODING="ascii")
        assert (done.stdout, done.stderr) == (expected, "")


def test_a_table_is_aligned_and_empty_without_rows() -> None:
    assert table(["a", "bcd"], [["xx", 1]]) == "A   BCD\nxx  1"
    assert table(["a"], []) == ""


# --- models


def test_models_ls_which_and_show(site: Site, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    entry = "schema = 1\n[models.digits]\nref = 'hub:{}/digits@v1'\ntask = 'classification'\nsummary = 'Ten digits'\n"
    site.registry(entry.format("one"), "project")
    user = site.registry(entry.format("two"), "user")
    code, out, _ = run(capsys, "models", "ls")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "SCOPE", "TASK", "SUMMARY"],
        ["digits", "project", "classification", "Ten", "digits"],
        ["digits", "user", "(shadowed)", "classification", "Ten", "digits"],
    ]
    data = json.loads(run(capsys, "models", "which", "digits", "--json")[1])
    assert (data["repo_id"], data["revision"], data["scope"]) == ("one/digits", "v1", "project")
    assert [row["source"] for row in data["shadows"]] == [str(user)]
    out = run(capsys, "models", "show", "digits")[1]
    assert "task: classification" in out
    assert "mmhub pull digits" in out


def test_models_show_reads_a_local_checkpoint_and_says_what_is_missing(site: Site, capsys: Any) -> None:
    config = {
        "mmhub_format": 1,
        "task": "classification",
        "components": {"fusion": {"use": "mmhub/streams"}},
        "requires": [{"distribution": "mmhub-fake", "specifier": ">=1"}],
    }
    (site.work / "model").mkdir()
    (site.work / "model" / "config.json").write_text(json.dumps(config))
    data = json.loads(run(capsys, "models", "show", "./model", "--json")[1])
    assert (data["task"], data["requires"]) == ("classification", ["mmhub-fake >=1"])
    assert data["unmet"] == ["mmhub-fake >=1 (not installed)"]
    assert "fusion  mmhub/streams" in run(capsys, "models", "show", "./model")[1]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_models_show_of_a_folder_that_is_no_checkpoint_says_so(site: Site, capsys: Any, content: str | None) -> None:
    (site.work / "model").mkdir()
    if content is not None:
        (site.work / "model" / "config.json").write_text(content)
    code, out, err = run(capsys, "models", "show", "./model")
    assert (code, out) == (ExitCode.USAGE, "")
    assert "config.json" in err


def test_a_broken_registry_is_a_usage_error_that_names_it(site: Site, capsys: Any) -> None:
    path = site.registry("schema = 1\n[modles.x]\n")
    code, out, err = run(capsys, "models", "ls")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err == f"error: {path}: unknown key 'modles'\nhint: did you mean 'models'?\n"


def test_env_reports_versions_and_no_token(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, out, _ = run(capsys, "env", "--json")
    data = json.loads(out)
    assert (code, data["mmhub"]) == (0, __version__)
    assert data["libraries"]["click"]
    assert data["plugins"]["mmhub"] == f"{__version__} ok"
    assert "hf_secret" not in out


def test_the_commands_the_demo_suggests_name_models_that_resolve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmhub.cli.demo import _next_steps
    from mmhub.names import resolve

    (tmp_path / "run" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    sample = {"image": tmp_path / "1.png", "audio": tmp_path / "1.flac"}
    lines = [line.split() for line in _next_steps(tmp_path, [sample, sample], 1.0).splitlines()]
    named = [words[2] for words in lines if words[:2] in (["mmhub", "predict"], ["mmhub", "eval"])]
    assert len(named) == 3
    assert all(resolve(name).kind == "local" for name in named)


@pytest.mark.parametrize("command", [["models", "ls"], ["plugins", "ls"], ["env"], ["version"]])
def test_quiet_is_taken_by_commands_that_only_print_a_result(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from mmhub.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main([*command, "-q", "--json"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)


def test_the_demo_says_how_to_have_the_command_where_its_environment_is_not_active(monkeypatch: Any) -> None:
    from mmhub.cli.demo import _next_steps

    samples = [{}, {"image": Path("out/3.png"), "audio": Path("out/3.flac")}]
    monkeypatch.setenv("PATH", "/nowhere")
    assert "/bin/activate" in _next_steps(Path("out"), samples, 9.0)
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin")
    assert "activate" not in _next_steps(Path("out"), samples, 9.0)
