"""What is around every request: who may ask, the form of errors, health, metrics, and how the command starts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from mmhub.errors import MmhubError, NotFoundError, UsageError
from mmhub_serve.access import check_address, check_origins, read_keys
from mmhub_serve.app import build_app
from mmhub_serve.errors import Refused
from mmhub_serve.run import Server, listen, tls_of
from mmhub_serve.settings import Limits, Settings
from tests.conftest import Cli

from .conftest import Running, Serving, read, serving

KEY = "0123456789abcdef"
PAGE = "http://page.example"


class Panic(BaseException):
    """As tokenizers' PanicException: no Exception."""


def _extend(app: FastAPI) -> None:
    @app.get("/fail/{how}")
    async def fail(how: str) -> None:
        errors: dict[str, BaseException] = {
            "bug": ZeroDivisionError("in /home/secret/file.py"),
            "panic": Panic("in /home/secret/file.py"),
            "ours": MmhubError("/home/secret/file is damaged"),
            "theirs": UsageError("no such thing", "ask for another"),
            "full": Refused(429, "the queue is full"),
            "deep": RecursionError(),
            "memory": MemoryError(),
            "text": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"),
        }
        raise errors[how]

    @app.get("/number")
    async def number(n: int) -> int:
        return n


@pytest.fixture(scope="module")
def running(toy: str) -> Iterator[Running]:
    with serving(toy, _extend) as found:
        yield found


@pytest.fixture(scope="module")
def locked(toy: str) -> Iterator[Running]:
    with serving(toy, keys=(KEY, KEY[::-1]), origins=(PAGE,)) as found:
        yield found


# --- errors


def test_a_prediction_is_answered(running: Running) -> None:
    answer = running.predict("a good film")
    assert answer.status == 200 and answer.json["predictions"][0]["label"] in ("bad", "good")


def test_every_answer_has_an_id_and_is_not_kept_by_caches(running: Running) -> None:
    headers = running.ask("GET", "/healthz", X_Request_Id="of-the-client").headers
    assert headers["x-request-id"] == "of-the-client"
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    assert headers["date"].endswith("GMT") and "server" not in headers
    assert running.ask("GET", "/healthz", X_Request_Id="a\tb").headers["x-request-id"] != "a\tb"


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("theirs", 400, "no such thing; ask for another"),
        ("full", 429, "the queue is full"),
        ("deep", 400, "nested too deeply"),
        ("memory", 503, "memory"),
        ("text", 400, "not valid Unicode"),
    ],
)
def test_errors_that_a_client_can_act_on_say_so(running: Running, how: str, status: int, words: str) -> None:
    answer = running.ask("GET", f"/fail/{how}")
    assert answer.status == status and words in answer.error
    assert ("retry-after" in answer.headers) == (status in (429, 503))


@pytest.mark.parametrize("how", ["bug", "panic", "ours"])
def test_failures_of_the_server_are_logged_and_the_client_gets_their_id(
    running: Running, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="mmhub_serve"):
        answer = running.ask("GET", f"/fail/{how}")
    assert answer.status == 500 and "secret" not in answer.body.decode()
    assert answer.headers["x-request-id"] in answer.error
    assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text
    assert running.ask("GET", "/healthz").status == 200


def test_unknown_paths_and_methods_are_refused_in_json(running: Running) -> None:
    assert "there is no /nope" in running.ask("GET", "/nope").error
    answer = running.ask("DELETE", "/predict")
    assert answer.status == 405 and "does not take DELETE" in answer.error and answer.headers["allow"] == "POST"


def test_a_query_of_the_wrong_form_is_refused_with_the_name_of_its_field(running: Running) -> None:
    answer = running.ask("GET", "/number?n=x")
    assert answer.status == 400 and answer.error.startswith("n: ") and answer.json["error"]["param"] == "n"


def test_the_pages_of_fastapi_that_load_scripts_from_elsewhere_are_off(running: Running) -> None:
    assert running.ask("GET", "/docs").status == running.ask("GET", "/redoc").status == 404
    schema = running.ask("GET", "/openapi.json").json
    assert "/predict" in schema["paths"] and "/healthz" in schema["paths"]


def test_an_answer_that_takes_too_long_is_503(serve: Serving) -> None:
    import asyncio

    def extend(app: FastAPI) -> None:
        @app.get("/slow")
        async def slow() -> None:
            await asyncio.sleep(30)

    with serve(extend, limits=Limits(answer_seconds=0.1)) as running:
        answer = running.ask("GET", "/slow")
    assert answer.status == 503 and answer.json["error"]["code"] == "timeout" and "0.1 s" in answer.error


# --- who may ask


@pytest.mark.parametrize("key", ["", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \xff\xff", KEY])
def test_without_a_key_nothing_is_answered(locked: Running, key: str) -> None:
    answer = locked.predict("a", Authorization=key)
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.json["error"]["code"] == "invalid_api_key" and KEY not in answer.error
    assert locked.ask("GET", "/metrics", Authorization=key).status == 401
    assert locked.ask("GET", "/nope", Authorization=key).status == 401


def test_each_of_the_keys_lets_in(locked: Running) -> None:
    for key in (KEY, KEY[::-1]):
        assert locked.ask("GET", "/metrics", Authorization=f"Bearer {key}").status == 200


def test_supervisors_need_no_key(locked: Running) -> None:
    assert locked.ask("GET", "/healthz").status == 200
    locked.wait()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.0.0.1", "127.0.0.1.evil.example"])
def test_a_server_on_loopback_does_not_answer_to_other_names(running: Running, host: str) -> None:
    answer = running.ask("GET", "/healthz", Host=host)
    assert answer.status == 403 and "loopback" in answer.error


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.9.9.9:80", "[::1]:8000"])
def test_a_server_on_loopback_answers_to_the_names_of_loopback(running: Running, host: str) -> None:
    assert running.ask("GET", "/healthz", Host=host).status == 200


def test_a_proxy_vouches_for_the_name(serve: Serving) -> None:
    with serve(behind_proxy=True) as running:
        assert running.ask("GET", "/healthz", Host="models.example").status == 200
        page = {"Host": "models.example", "Origin": "https://models.example"}
        assert running.predict("a", **page, X_Forwarded_Proto="https").status == 200
        assert running.predict("a", **page).status == 403


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("origin", [PAGE, "null", "http://127.0.0.1:1"])
def test_web_pages_of_other_origins_are_refused(running: Running, method: str, origin: str) -> None:
    answer = running.ask(method, "/predict", {}, Origin=origin, Access_Control_Request_Method="POST")
    assert answer.status == 403 and "--cors" in answer.error
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_page_of_the_server_itself_may_ask(running: Running) -> None:
    assert running.predict("a", Origin=running.url).status == 200


def test_a_page_that_is_allowed_may_ask_and_read_also_refusals(locked: Running) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, x-more"}
    before = locked.ask("OPTIONS", "/predict", Origin=PAGE, **asked)
    assert before.status == 204 and before.headers["access-control-allow-origin"] == PAGE
    assert "POST" in before.headers["access-control-allow-methods"]
    assert before.headers["access-control-allow-headers"] == "authorization, x-more"
    answer = locked.predict("a", Origin=PAGE, Authorization=f"Bearer {KEY}")
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["vary"] == "Origin"
    refused = locked.predict("a", Origin=PAGE)
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == PAGE
    assert locked.predict("a", Origin=PAGE + ".evil.example", Authorization=f"Bearer {KEY}").status == 403


def test_the_access_log_has_neither_queries_nor_headers(serve: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mmhub_serve.access"), serve(access_log=True) as running:
        running.ask("GET", "/nope%0aforged%1b?token=secret", Authorization="Bearer secret")
        refused = running.ask("GET", "/early?token=secret", Host="evil.example")
        broken = running.send(b"nonsense\r\n\r\n")
    line = next(record.getMessage() for record in caplog.records if "nope" in record.getMessage())
    assert line.startswith("127.0.0.1 GET /nope\\nforged\\x1b 404 ") and "secret" not in caplog.text
    assert f"127.0.0.1 GET /early 403 {len(refused.body)} bytes 0.0 ms {refused.headers['x-request-id']}" in caplog.text
    assert f"127.0.0.1 - - 400 {len(broken.body)} bytes" in caplog.text
    assert broken.headers["x-content-type-options"] == "nosniff"


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nabcdefgh\n\n  ijklmnop  \n")
    monkeypatch.setenv("MMHUB_SERVE_KEYS", "12345678, abcdefgh")
    assert read_keys(file) == ("12345678", "abcdefgh", "ijklmnop")
    assert "12345678" not in repr(Settings(models=("m",), keys=read_keys(None)))


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, NotFoundError, "there is no file"),
        ("# nothing\n", UsageError, "has no key"),
        ("short\n", UsageError, "key 1 is not 8 to 512"),
        ("abcdefgh\nüüüüüüüü\n", UsageError, "key 2 is not"),
    ],
)
def test_key_files_that_let_nobody_or_anybody_in_are_refused(
    tmp_path: Path, content: str | None, error: type[MmhubError], words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(error, match=words) as caught:
        read_keys(file)
    assert "short" not in str(caught.value)


def test_keys_and_no_keys_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="there are keys"):
        check_address(Settings(models=("m",), keys=(KEY,)), private=True)


def test_only_loopback_is_served_without_keys() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(Settings(models=("m",), host=host), private=False)
    for given in ({"host": "0.0.0.0"}, {"host": "models.example"}, {"behind_proxy": True}):
        with pytest.raises(UsageError, match="without keys only loopback is served"):
            check_address(Settings(models=("m",), **given), private=False)  # type: ignore[arg-type]
        check_address(Settings(models=("m",), keys=(KEY,), **given), private=False)  # type: ignore[arg-type]
        check_address(Settings(models=("m",), **given), private=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("origin", ["*", "page.example", "https://page.example/path", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="is no origin"):
        check_origins([origin])


# --- health and metrics


def test_a_server_is_alive_before_it_is_ready(serve: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmhub_serve.pool import Pool

    with serve() as running:
        monkeypatch.setattr(Pool, "ready", property(lambda pool: False))
        assert running.ask("GET", "/healthz").status == 200
        answer = running.ask("GET", "/readyz")
        assert answer.status == 503 and "being loaded" in answer.error and "retry-after" in answer.headers


def test_metrics_count_requests_by_route_and_status(running: Running) -> None:
    running.predict("a good film")
    for number in range(3):
        running.ask("GET", f"/invented/{number}")
    running.ask("INVENTED", "/nope")
    page = running.ask("GET", "/metrics")
    lines = page.body.decode().splitlines()
    assert page.headers["content-type"].startswith("text/plain")
    assert any('method="POST"' in line and 'route="/predict"' in line and 'status="200"' in line for line in lines)
    assert any(line.startswith("mmhub_batch_samples_count{") for line in lines)
    assert "mmhub_requests_in_flight 1.0" in lines  # this one
    assert not any("invented" in line.lower() for line in lines)


def test_the_labels_of_metrics_are_patterns_whatever_a_model_is_called(running: Running) -> None:
    for name in ("m", "v1", "models", "", "v1/models", "predict"):
        running.ask("GET", f"/v1/models/{name}")
        running.ask("POST", f"/v1/models/{name}/predict", {"samples": []})
    page = running.ask("GET", "/metrics").body.decode()
    routes = {line.split('route="')[1].split('"')[0] for line in page.splitlines() if 'route="/v1/models' in line}
    assert routes == {"/v1/models/{name}", "/v1/models/{name}/predict"}


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_load_balancers_may_ask_with_head(running: Running, path: str) -> None:
    answer = running.ask("HEAD", path)
    assert answer.status == 200 and not answer.body


# --- the command


def test_several_servers_count_apart(toy: str, serve: Serving, running: Running) -> None:
    with serve() as other:
        assert "/predict" not in other.ask("GET", "/metrics").body.decode()


def test_a_port_in_use_and_an_unknown_address_are_errors_of_one_line() -> None:
    with listen("127.0.0.1", 0) as taken:
        with pytest.raises(MmhubError, match=r"cannot listen at 127\.0\.0\.1 port \d+: .*in use") as caught:
            listen("127.0.0.1", taken.getsockname()[1])
        assert "--port" in str(caught.value) and caught.value.exit_code == 1
    with pytest.raises(MmhubError, match="--host"):
        listen("no-such-host.invalid", 0)


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    for name in ("cert.pem", "missing.pem"):
        file = str(tmp_path / name)
        with pytest.raises(UsageError, match="cannot be used"):
            tls_of(Settings(models=("m",), certificate=(file, file)))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_over_tls_predictions_are_answered_and_what_is_not_tls_is_closed(serve: Serving, tmp_path: Path) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += [
        "-keyout",
        str(key),
        "-out",
        str(chain),
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run(made, check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=str(chain))
    with serve(certificate=(str(chain), str(key))) as running:
        assert running.server is not None and running.server.url.startswith("https://127.0.0.1:")
        with trusting.wrap_socket(running.connect(), server_hostname="localhost") as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nOrigin: https://localhost\r\n\r\n")
            answer = read(sock)
        assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "https://localhost"
        assert running.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").status == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["no-such-model"], 3, "no-such-model"),
        (["./no-such-folder"], 3, "no-such-folder"),
        (["toy", "--host", "0.0.0.0"], 2, "without keys only loopback is served"),
        (["toy", "--tls-cert", "cert.pem"], 2, "belong together"),
        (["toy", "--key-file", "missing"], 3, "there is no file missing"),
        (["toy", "--grace", "nan"], 2, "no finite number"),
        (["toy", "--timeout", "nan"], 2, "no finite number"),
        (["toy", "--device", "nope"], 2, "unknown device"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_its_exit_code(
    args: list[str], code: int, words: str, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from mmhub.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMHUB_SERVE_KEYS", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--port", "0", "--json", *(toy if arg == "toy" else arg for arg in args)])
    out, err = capsys.readouterr()
    assert caught.value.code == code and not out
    assert words in err and len(err.strip().splitlines()) <= 2


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server(toy: str, tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(toy, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\1\2\3")
    done = cli("serve", str(folder), "--port", "0")
    assert done.returncode == 5, done.stderr
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr


def test_sigterm_ends_the_command_also_before_the_server_is_there(monkeypatch: pytest.MonkeyPatch, toy: str) -> None:
    from mmhub.cli.main import main

    before = signal.getsignal(signal.SIGTERM)
    handlers: list[Any] = []
    monkeypatch.setattr("mmhub_serve.cli._run", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    monkeypatch.setattr("os._exit", handlers.append)
    with contextlib.suppress(SystemExit):
        main(["serve", toy])
    handlers[0](signal.SIGTERM, None)
    assert handlers[1:] == [0] and signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_cannot_tell_its_address_ends_with_that_error_alone(
    toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with listen("127.0.0.1", 0) as listener:
        app = build_app(Settings(models=(toy,)))
        with pytest.raises(OSError, match="No space"):
            asyncio.run(Server(app, listener).serve(full))
    assert app.state.health.stopping and not caplog.records


def test_the_defaults_that_help_shows_are_those_of_the_server() -> None:
    from mmhub_serve.cli import _LIMITS, serve

    shown = {name: default for name, _, default, _ in _LIMITS.values()}
    shown["body"] *= 2**20
    assert {name: getattr(Limits(), name) for name in shown} == shown
    plain, known = Settings(models=("m",)), {option.name: option.default for option in serve.params}
    assert (known["host"], known["port"], known["max_batch"]) == (plain.host, plain.port, plain.batch)
    assert (known["max_loaded"], known["grace"]) == (plain.loaded, plain.grace)
