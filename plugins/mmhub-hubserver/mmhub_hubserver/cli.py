"""`mmhub hub`: run the hub in a terminal or as a service, and look after its accounts and data."""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from mmhub.cli.output import emit, note, quiet_option, result_options, table
from mmhub.errors import NotFoundError, TrustError
from mmhub_hubserver.accounts import Accounts, Role
from mmhub_hubserver.errors import HubError

GRACE = 10  # seconds that requests have to end when the server is stopped
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
F = TypeVar("F", bound=Callable[..., Any])


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _SIZE.fullmatch(str(value).strip())
        unit = _UNITS[match[2].upper()] if match else 0
        if match is None or (match[3] and unit == 1) or not float(match[1]):
            self.fail(f"{value!r} is not a size such as 500GB, 2TB or 100GiB", param, ctx)
        if match[3]:
            unit = 1024 ** list(_UNITS).index(match[2].upper())
        return int(float(match[1]) * unit)


def _data_option(command: F) -> F:
    folder = click.Path(file_okay=False, path_type=Path)
    return click.option("--data", type=folder, help="The data folder [default: ~/.local/share/mmhub/hub].")(command)


@click.group()
def hub() -> None:
    """Run a team hub that speaks the Hugging Face Hub protocol."""


@hub.command()
@_data_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8377, show_default=True, help="0 takes a free port.")
@click.option("--tls-cert", type=click.Path(dir_okay=False, path_type=Path), help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(dir_okay=False, path_type=Path), help="Its private key, PEM.")
@click.option("--behind-proxy", is_flag=True, help="A proxy in front adds TLS; believe its X-Forwarded-Proto.")
@click.option("--public-url", help="How clients write this hub's address, such as https://hub.example.com.")
@click.option("--quota", type=_Size(), help="Refuse uploads beyond this much data, such as 500GB.")
@click.option("--access-log", is_flag=True, help="Write a line for each request to stderr, without secrets.")
@quiet_option
def serve(
    data: Path | None,
    host: str,
    port: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    behind_proxy: bool,
    public_url: str | None,
    quota: int | None,
    access_log: bool,
    quiet: bool,
) -> None:
    """Serve models and datasets until Ctrl-C or SIGTERM.

    Without accounts the hub is open to everybody on this machine, and to nobody else. Other machines are let in when
    there is an account (`mmhub hub user add`) and TLS, here or in a proxy.
    """
    from mmhub_hubserver.server import HubServer
    from mmhub_hubserver.tls import Certificate

    folder = _folder(data)
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together: give both.")
    if access_log:
        _log_to_stderr()
    with _told(f"serve {folder} on {host}:{port}"):
        certificate = Certificate(tls_cert, tls_key) if tls_cert and tls_key else None
        options: dict[str, Any] = {"behind_proxy": behind_proxy, "public_url": public_url}
        if quota is not None:
            options["quota"] = quota
        server = HubServer(folder, host, port, certificate=certificate, **options)
    note(_greeting(server.url, folder, Accounts(folder / "accounts.json")), quiet)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        note("\nStopping; once more to stop at once.", quiet)
        raise SystemExit(130) from None
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait
        note("Stopping.", quiet)
    finally:
        server.close(GRACE)
        signal.signal(signal.SIGTERM, previous)


class _Terminated(BaseException):
    pass


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


@hub.group()
def user() -> None:
    """Manage the accounts of a hub, also while it runs."""


@user.command()
@click.argument("name")
@click.option("--token", help="Use this token instead of a new one; '-' reads it from stdin, which `ps` does not show.")
@click.option("--role", type=click.Choice(["read", "write"]), default="write", show_default=True)
@click.option("--org", "orgs", multiple=True, help="An organization to be a member of; may be repeated.")
@click.option("--fullname", default="", help="The name shown to others.")
@click.option("--email", default="", help="The address in commits.")
@_data_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def add(
    name: str,
    token: str | None,
    role: Role,
    orgs: tuple[str, ...],
    fullname: str,
    email: str,
    data: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Add the account NAME and print its token, once: only a hash of it is stored.

    The account owns the repositories under its own name and under those of its organizations.
    """
    with _told("add the account"):
        made = _accounts(data).add(name, token=_given(token), role=role, orgs=orgs, fullname=fullname, email=email)
    shown = None if token else made
    emit({"name": name, "role": role, "orgs": list(orgs), "token": shown}, as_json, shown or "")
    note(f"Added {name} ({role})." + ("" if token else " Keep the token: it is not shown again."), quiet)


@user.command("token")
@click.argument("name")
@click.option("--token", help="Use this token instead of a new one; '-' reads it from stdin, which `ps` does not show.")
@_data_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def renew(name: str, token: str | None, data: Path | None, quiet: bool, as_json: bool) -> None:
    """Give NAME a new token; the old one stops working at once."""
    with _told("renew the token"):
        made = _accounts(data).renew(name, _given(token))
    shown = None if token else made
    emit({"name": name, "token": shown}, as_json, shown or "")
    note(f"The old token of {name} no longer works.", quiet)


@user.command()
@_data_option
@result_options
def ls(data: Path | None, as_json: bool) -> None:
    """List the accounts."""
    with _told("read the accounts"):
        found = _accounts(data).list()
    rows = [(one.name, one.role, ", ".join(one.orgs), one.fullname, one.email) for one in found]
    users = [
        {"name": one.name, "role": one.role, "orgs": list(one.orgs), "fullname": one.fullname, "email": one.email}
        for one in found
    ]
    emit({"users": users}, as_json, table(["name", "role", "orgs", "full name", "email"], rows) or "no accounts")


@user.command()
@click.argument("name")
@_data_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def rm(name: str, data: Path | None, quiet: bool, as_json: bool) -> None:
    """Remove the account NAME. Its repositories stay, and belong to whoever gets this name later."""
    with _told("remove the account"):
        accounts = _accounts(data)
        accounts.remove(name)
        left = len(accounts.list())
    emit({"name": name, "left": left}, as_json, "")
    note(f"Removed {name}." + ("" if left else " Without accounts a hub on loopback is open to this machine."), quiet)


@hub.command()
@_data_option
@click.option("--grace", type=click.FloatRange(0), default=24, show_default=True, help="Hours an upload may take.")
@result_options
def gc(data: Path | None, grace: float, as_json: bool) -> None:
    """Free the disk space of deleted repositories and of uploads that no commit uses. Stop the hub first."""
    with _told("collect garbage"), _opened(data) as store:
        report = store.gc(grace_seconds=grace * 3600)
    emit(asdict(report), as_json, str(report))


@hub.command()
@_data_option
@result_options
def verify(data: Path | None, as_json: bool) -> None:
    """Read everything again and compare it with its hashes; exit 5 and list what is damaged. Stop the hub first."""
    with _told("verify"), _opened(data) as store:
        problems = [str(problem) for problem in store.verify()]
    emit({"problems": problems}, as_json, "\n".join(problems) or "everything is as it was stored")
    if problems:
        raise TrustError(f"{len(problems)} problems in {_folder(data)}", "restore these files from a backup")


@contextmanager
def _opened(data: Path | None) -> Iterator[Any]:
    from mmhub_hubserver.store import Store

    folder = _folder(data)
    if not (folder / "format").exists():
        raise NotFoundError(f"there is no hub in {folder}", "give its folder with --data")
    store = Store(folder)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn what can go wrong here into one line."""
    try:
        yield
    except HubError as error:
        raise click.ClickException(error.message) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"Cannot {what}: {error.strerror or error}.") from None


def _accounts(data: Path | None) -> Accounts:
    return Accounts(_folder(data) / "accounts.json")


def _given(token: str | None) -> str | None:
    return sys.stdin.readline().strip() if token == "-" else token


def _folder(data: Path | None) -> Path:
    if data is None:
        data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share") / "mmhub" / "hub"
    return data.expanduser().absolute()


def _log_to_stderr() -> None:
    logger = logging.getLogger("mmhub_hubserver.access")
    logger.handlers[:] = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _greeting(url: str, folder: Path, accounts: Accounts) -> str:
    number = len(accounts.list())
    who = f"{number} account{'s' * (number != 1)}" if number else "everybody on this machine (no accounts)"
    return (
        f"mmhub hub at {url}\n"
        f"Data in      {folder}\n"
        f"Open to      {who}\n"
        f"Use it:      export HF_ENDPOINT={url}{' HF_TOKEN=...' if number else ''}\n"
        "Ctrl-C stops it."
    )
