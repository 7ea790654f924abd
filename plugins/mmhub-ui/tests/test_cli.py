"""`mmhub ui`: what is wrong is one line before anything starts, and one run of it from its start to Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmhub.errors import MmhubError, UsageError
from mmhub_ui.cli import _free_port, _people, _wait, ui


def refused(*args: str) -> MmhubError:
    error = CliRunner().invoke(ui, args).exception
    assert isinstance(error, MmhubError), error
    return error


def test_a_wrong_name_ends_before_the_app_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mmhub_ui.app", None)  # it would be an ImportError
    assert "no folder './nothing'" in refused("./nothing").message
    assert refused("nothing-at-all").exit_code == 3


def test_others_are_let_in_only_to_named_models_and_by_a_password(tmp_path: Path) -> None:
    assert "no model but those named" in refused("--host", "0.0.0.0").message
    assert "everybody would be let in" in refused("./x", "--host", "0.0.0.0").message
    assert "--auth" in str(refused("./x", "--host", "::").hint)
    (tmp_path / "people").write_text("ada\n")
    assert "line 1 is not of the form USER:PASSWORD" in refused("./x", "--auth", str(tmp_path / "people")).message
    (tmp_path / "people").write_text("ada:se:cret\nbob:x\n")
    assert _people(tmp_path / "people") == [("ada", "se:cret"), ("bob", "x")]


def test_a_port_in_use_is_told_and_without_one_the_next_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        taken = door.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {taken} of 127.0.0.1 is in use"):
            _free_port("127.0.0.1", taken, quiet=True)
        monkeypatch.setattr("mmhub_ui.cli._PORT", taken)
        found = _free_port("127.0.0.1", None, quiet=False)
        assert found > taken and f"{found} is taken instead" in capsys.readouterr().err
    assert _free_port("127.0.0.1", 0, quiet=True) > 0


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(UsageError, match="cannot listen on"):
        _free_port("192.0.2.1", 0, quiet=True)


def test_gradio_that_is_missing_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    error = refused()
    assert error.exit_code == 4 and "pip install" in str(error.hint)


def test_an_app_with_passwords_offers_the_named_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []

    def build(context: Any) -> None:
        locked.append(context.locked)
        raise UsageError("enough")

    monkeypatch.setattr("mmhub_ui.app.build_app", build)
    (tmp_path / "people").write_text("ada:x\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for args in (["./model"], ["--auth", "people"], ["./model", "--auth", "people"]):
        assert refused(*args, "--port", "0").message == "enough"
    assert locked == [False, False, True]


@pytest.mark.parametrize("option", [["--host", "::1"], ["--port", "1"], ["--auth", "x"], ["--no-browser"]])
def test_an_option_that_a_space_does_not_have_is_told(option: list[str], tmp_path: Path) -> None:
    assert f"{option[0]} has no effect" in refused("./x", "--export-space", str(tmp_path / "space"), *option).message


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_the_end_of_a_service_and_of_a_terminal_end_it_in_order(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, lambda *_: pytest.fail(f"{name} would have killed it"))
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        _wait(quiet=True)
    finally:
        signal.signal(number, before)


def test_the_app_shares_tracks_and_keeps_nothing() -> None:
    from mmhub_ui.app import launch_options

    options = launch_options()
    off = ("share", "run_history", "enable_monitoring", "mcp_server", "pwa", "ssr_mode", "show_error")
    assert not any(options[name] for name in off) and options["allowed_paths"] == []
    css = options["theme"]._get_theme_css()
    assert "@import" not in css and css.count("url(") == css.count('url("data:')


@pytest.mark.slow
def test_the_app_answers_as_the_library_keeps_its_files_to_itself_and_ends_at_ctrl_c(
    tmp_path: Path, tiny: Any, picture: str
) -> None:
    import httpx
    from gradio_client import Client, handle_file

    tiny("image").save(tmp_path / "model")
    (tmp_path / "registry.toml").write_text("schema = 1\n")
    command = [sys.executable, "-m", "mmhub", "ui", "./model", "--port", "0", "--json", "-q"]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "TMPDIR": str(tmp_path / "tmp")},
    }
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as app:
        try:
            assert app.stdout is not None
            lines = ""
            while not lines.endswith("}\n"):
                lines += app.stdout.readline()
            url = json.loads(lines)["url"]
            client = Client(url, verbose=False, analytics_enabled=False)
            assert "classification" in client.predict("./model", api_name="/choose")[0]
            found = client.predict(model="./model", image=handle_file(picture), api_name="/run")
            assert found == tiny("image").predict([{"image": picture}])[0]
            for path in (
                "/etc/passwd",
                str(tmp_path / "registry.toml"),
                "registry.toml",
                str(tmp_path / "model/config.json"),
            ):
                assert httpx.get(f"{url}/gradio_api/file={path}").status_code in (403, 404)
            big = {"files": ("big.png", b"0" * (65 * 2**20))}
            assert httpx.post(f"{url}/gradio_api/upload", files=big, timeout=60).status_code == 413
            secret = tmp_path / "secret.png"
            secret.write_bytes(Path(picture).read_bytes())
            for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
                given = {"data": ["./model", None, None, {"path": str(secret), **meta}, None, None]}
                call = httpx.post(f"{url}/gradio_api/call/run", json=given).json()["event_id"]
                assert "event: error" in httpx.get(f"{url}/gradio_api/call/run/{call}", timeout=60).text
            client.close()
        finally:
            app.send_signal(signal.SIGINT)
            _, errors = app.communicate(timeout=60)
    assert not list((tmp_path / "tmp").glob("**/*.png"))
    assert app.returncode == 130 and "KeyboardInterrupt" not in errors
