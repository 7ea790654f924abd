"""`mmhub ui`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import FrameType
from typing import Any

import click

from mmhub.cli.options import device_option
from mmhub.cli.output import emit, json_option, note, quiet_option
from mmhub.errors import MmhubError, PluginError, UsageError

_PORT = 7860
_TRIED = 50  # ports behind it


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help=f"0 takes a free one. [default: {_PORT}, or the next free]")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Training runs.")
@click.option(
    "--auth",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Let in who knows a line USER:PASSWORD of this file.",
)
@click.option(
    "--decode-workers",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Processes that decode media; 0 = in the app's own.",
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
@click.option("--export-space", "space", type=click.Path(path_type=Path), help="Write a Space for NAME to this folder.")
@device_option
@quiet_option
@json_option
def ui(
    names: tuple[str, ...],
    host: str,
    port: int | None,
    runs: Path,
    auth: Path | None,
    decode_workers: int,
    no_browser: bool,
    space: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Try models, compare them and watch training in a browser, until Ctrl-C.

    The models NAME are offered first. On an address that other machines reach, and with --auth, they are the only ones;
    --auth says who may use them.
    """
    if space is not None:
        _check_alone()
        _write_space(names, space, quiet, as_json)
        return
    local = _is_loopback(host)
    people = _people(auth) if auth is not None else None
    if not local:
        _check_open(host, names, people)
    _check_names(names)
    with _gradio():
        from mmhub_ui.app import build_app, launch_options
        from mmhub_ui.context import Context, policy_of

        number = _free_port(host, port, quiet)
        locked = not local or bool(people and names)
        policy = policy_of(decode_workers)
        app = build_app(Context(names=names, runs=runs, device=device, locked=locked, policy=policy))
        with _running(app, launch_options() | {"server_name": host, "server_port": number, "auth": people}):
            url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
            emit({"url": url, "models": list(names)}, as_json, "")
            sys.stdout.flush()
            note(f"mmhub ui at {url}\nCtrl-C stops it.", quiet)
            if not no_browser and _has_browser():
                webbrowser.open(url)
            _wait(quiet)


def _check_alone() -> None:
    """Refuse what has no effect on a Space."""
    context = click.get_current_context()
    for option in ("host", "port", "runs", "auth", "decode_workers", "no_browser", "device"):
        if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            name = f"--{option.replace('_', '-')}"
            raise UsageError(f"{name} has no effect on a Space", f"leave out {name}, or --export-space")


def _write_space(names: tuple[str, ...], space: Path, quiet: bool, as_json: bool) -> None:
    from mmhub_ui.space import export_space

    found = export_space(names, space, quiet=quiet)
    emit(found, as_json, str(space))
    note(f"a Space for {', '.join(names)} in {space}", quiet)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_open(host: str, names: tuple[str, ...], people: Any) -> None:
    """Refuse to let everybody in: whoever may name a model may make this machine load it."""
    if not names:
        raise UsageError(f"{host} can be reached by others, who may use no model but those named", "mmhub ui NAME")
    if not people:
        hint = "give --auth FILE with a line USER:PASSWORD for each of them, or leave --host out"
        raise UsageError(f"{host} can be reached by others, and everybody would be let in", hint)


def _people(file: Path) -> list[tuple[str, str]]:
    """The names and passwords in a file."""
    from mmhub.cli.writing import read_lines

    found = []
    for number, line in enumerate(read_lines(file), 1):
        user, colon, password = line.partition(":")
        if not (user and colon and password):
            raise UsageError(f"'{file}', line {number} is not of the form USER:PASSWORD", "write one a line")
        found.append((user, password))
    return found


def _check_names(names: tuple[str, ...]) -> None:
    """Report a wrong name before anything starts."""
    from mmhub.names import resolve

    for name in names:
        found = resolve(name)
        if found.kind == "local" and found.path is not None and not found.path.exists():
            raise UsageError(f"there is no folder '{name}'", "check the path")


def _free_port(host: str, port: int | None, quiet: bool) -> int:
    """The port that was asked for, or without one the first free."""
    if port is not None:
        return _tried(host, port)
    for number in range(_PORT, _PORT + _TRIED):
        try:
            found = _tried(host, number)
        except UsageError as error:
            if "in use" not in error.message:
                raise
            continue
        if found != _PORT:
            note(f"port {_PORT} is in use, {found} is taken instead", quiet)
        return found
    raise UsageError(f"the ports {_PORT} to {_PORT + _TRIED - 1} are all in use", "name another with --port")


def _tried(host: str, port: int) -> int:
    """The port, a free one for 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except OSError as error:
            if error.errno in (48, 98, 10048):
                raise UsageError(f"port {port} of {host} is in use", "name another with --port, or 0") from None
            what = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise UsageError(what, "name another --host or --port") from None
        return int(door.getsockname()[1])


@contextmanager
def _gradio() -> Iterator[None]:
    """Have gradio keep what people hand over in a folder that nobody else reads, until the app ends, and tell nobody.

    Raises:
        PluginError: it is not installed.
    """
    with TemporaryDirectory(prefix="mmhub-ui-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)  # gradio reads both when it is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            what = f"mmhub ui needs gradio, and it cannot be imported: {error}"
            raise PluginError(what, "pip install 'mmhub-ui'") from None
        yield


@contextmanager
def _running(app: Any, options: dict[str, Any]) -> Iterator[None]:
    """Run the app in the background; the server prints nothing."""
    try:
        app.launch(prevent_thread_lock=True, **options)
    except MmhubError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"the app does not start: {error}", "name another --host or --port") from None
    try:
        yield
    finally:
        app.close(verbose=False)


def _has_browser() -> bool:
    """Does somebody sit at a terminal of a machine with a screen?"""
    screen = sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return screen and sys.stderr.isatty()


def _wait(quiet: bool) -> None:
    """Wait for Ctrl-C, which ends with 130, or SIGTERM or SIGHUP: the end of a service or of its terminal."""
    ended = Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    previous = {one: signal.signal(one, end) for one in numbers if signal.getsignal(one) is not signal.SIG_IGN}
    try:
        while not ended.wait(0.5):
            pass
    except KeyboardInterrupt:
        note("\nStopping.", quiet)
        raise SystemExit(130) from None
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
