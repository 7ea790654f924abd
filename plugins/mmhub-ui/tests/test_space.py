"""`mmhub ui NAME --export-space DIR`: what is written, and that it runs."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from mmhub.checkpoint import read_config, verify_files
from mmhub.errors import MmhubError, NotFoundError, TrustError, UsageError
from mmhub_ui.space import export_space
from tests.conftest import _own_caches, client, hub, png, three_modalities  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # how huggingface_hub uploads


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model of text, image and audio in a folder called toy."""
    return Path(three_modalities("a good thing", "a bad thing").save(tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture
def space(toy: Path, tmp_path: Path) -> Path:
    export_space([str(toy)], tmp_path / "space")
    return tmp_path / "space"


def front_matter(space: Path) -> dict[str, Any]:
    _, head, _ = (space / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_a_local_model_is_copied_whole_and_sound(space: Path, toy: Path) -> None:
    names = {path.relative_to(toy) for path in toy.rglob("*") if path.is_file()}
    assert {path.relative_to(space / "model") for path in (space / "model").rglob("*") if path.is_file()} == names
    verify_files(space / "model", read_config(space / "model"))
    assert "*.safetensors filter=lfs" in (space / ".gitattributes").read_text()


def test_the_space_has_the_settings_that_the_hub_reads(space: Path) -> None:
    import gradio

    settings = front_matter(space)
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] == gradio.__version__
    assert settings["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (space / settings["app_file"]).is_file()
    assert settings["title"] == "toy"
    assert "models" not in settings  # that would name a repository of the Hub


def test_the_requirements_are_those_of_the_model_with_their_ranges(space: Path, toy: Path) -> None:
    lines = [line for line in (space / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    needed = {f"{one['distribution']}{one['specifier']}" for one in read_config(toy).requires}
    assert set(lines) == needed | {"mmhub-ui>=0.1,<1"}


def test_no_folder_of_this_machine_is_in_the_space(space: Path, toy: Path) -> None:
    for path in space.rglob("*"):
        if path.is_file():
            assert str(toy.parent).encode() not in path.read_bytes(), path


def test_the_app_is_built_and_shows_that_model_alone(space: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    async def build() -> Any:  # Gradio leaves loops open that it makes where none runs
        return runpy.run_path(str(space / "app.py"))["app"]

    app = asyncio.run(build())
    assert Path.cwd() == space.resolve()
    shown = json.dumps(app.config, default=str)
    assert '"try-run"' in shown
    for other in ("training-table", "plugins-table", "compare-a"):
        assert f'"{other}"' not in shown
    assert str(tmp_path) not in shown


@pytest.mark.usefixtures("hub", "client")
def test_a_hub_model_is_pinned_to_its_commit_and_not_fetched(toy: Path, tmp_path: Path) -> None:
    import mmhub
    from mmhub.hub.client import cache_dir

    pushed = mmhub.push(mmhub.load(toy), "org/digits", license="apache-2.0")
    facts = export_space(["org/digits"], tmp_path / "space")
    entry = tomllib.loads((tmp_path / "space" / "registry.toml").read_text())["models"]["digits"]
    assert entry["ref"] == "hub:org/digits"
    assert entry["commit"] == pushed.commit
    assert front_matter(tmp_path / "space")["models"] == ["org/digits"]
    assert front_matter(tmp_path / "space")["license"] == "apache-2.0"
    assert not (tmp_path / "space" / "model").exists()
    assert facts["bytes"] == 0
    assert not list(cache_dir().rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ([], UsageError, "a Space is for one model"),
        (["./a", "./b"], UsageError, "a Space is for one model"),
        (["./nothing"], NotFoundError, "nothing"),
        (["hub:org/x#image"], UsageError, "whole model"),
    ],
)
def test_other_names_are_refused_and_nothing_is_written(
    names: list[str], error: type[MmhubError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        export_space(names, tmp_path / "space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        export_space([str(toy)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_space([str(toy)], tmp_path / "empty")
    assert (tmp_path / "empty" / "app.py").is_file()


def test_the_current_folder_is_refused_and_kept(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        export_space([str(toy)], Path("."))
    assert Path.cwd().samefile(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(toy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmhub_ui.space._write", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(MmhubError, match="cannot write the Space to 'space'"):
        export_space([str(toy)], Path("space"))


def test_a_secret_or_a_damaged_file_is_not_published(toy: Path, tmp_path: Path) -> None:
    import shutil

    for name, content in (("README.md", "token = hf_" + "aB3" * 12), ("model.safetensors", "damaged")):
        shutil.copytree(toy, tmp_path / name)
        (tmp_path / name / name).write_text(content)
        with pytest.raises(TrustError):
            export_space([str(tmp_path / name)], tmp_path / "space")
        assert not (tmp_path / "space").exists()


def test_large_weights_are_warned_of(toy: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("mmhub_ui.space._LARGE", 10)
    export_space([str(toy)], tmp_path / "space")
    assert "push the model" in capsys.readouterr().err


def test_a_run_gives_its_own_name_to_its_model(toy: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(toy, tmp_path / "my run" / "model")
    export_space([str(tmp_path / "my run" / "model")], tmp_path / "space")
    assert front_matter(tmp_path / "space")["title"] == "my-run"
    assert list(tomllib.loads((tmp_path / "space" / "registry.toml").read_text())["models"]) == ["my-run"]


@pytest.mark.slow
def test_the_space_answers_as_the_model_does_and_to_nothing_else(space: Path, toy: Path, tmp_path: Path) -> None:
    import mmhub

    picture = tmp_path / "picture.png"
    picture.write_bytes(png(1))
    sample = {"text": "a bad thing", "image": str(picture)}
    (expected,) = mmhub.load(toy).predict([sample])
    with running(space) as url:
        app = Client(url, verbose=False)
        shown = ask(app, "toy", **sample)
        assert shown["label"] == expected["label"] and shown["scores"] == pytest.approx(expected["scores"], abs=1e-5)
        for name in (str(toy), "./model", "hub:org/other"):
            with pytest.raises((AppError, ValueError)):
                ask(app, name, **sample)
        for path in ("/etc/passwd", "registry.toml", str(space / "app.py"), str(space / "model" / "config.json")):
            assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)


def ask(app: Client, name: str, *, text: str | None = None, image: str | None = None) -> dict[str, Any]:
    """What the Space answers."""
    picture = handle_file(image) if image else None
    found: dict[str, Any] = app.predict(model=name, text=text, image=picture, api_name="/run")
    return found


@contextmanager
def running(space: Path) -> Iterator[str]:
    """Start the Space's app.py as a Space does, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment)
    url = f"http://127.0.0.1:{port}/"
    try:
        while not answers(url):
            assert process.poll() is None, "app.py ended"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
