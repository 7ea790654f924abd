"""The app in a real browser: Chromium, driven by Playwright. Nothing but the app's own address may be asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmhub.cli.main import cli
from tests.conftest import SHARED, _one_thread, _own_caches, flac, png, tables, three_modalities, trained  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
REAL_MODELS = Path(os.environ.get("MMHUB_REAL_MODELS", "real-models"))
expect = playwright.expect
expect.set_options(timeout=30_000)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs Chromium"),
]

CARD = """---
license: apache-2.0
---
# A card

<script>window.ran = "script"</script>
<img src="http://tracker.invalid/pixel.png" onerror="window.ran = 'handler'">
![pixel](http://tracker.invalid/markdown.png)
[A link](javascript:window.ran='link')
"""
REGISTRY = """schema = 1
[models.tones]
ref = "local:./tones"
task = "classification"
summary = "Tones and squares"
[models.carded]
ref = "local:./carded"
task = "classification"
"""


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A working folder: two registered models, a run, and media."""
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(trained, place / "tones")
    three_modalities("a good thing", "a bad thing").save(place / "carded")
    (place / "carded" / "README.md").write_text(CARD)
    (place / "registry.toml").write_text(REGISTRY)
    shutil.copytree(trained.parent, place / "runs" / "first", ignore=shutil.ignore_patterns("model", "checkpoints"))
    (place / "square.png").write_bytes(png(2))
    _write_wav(place / "tone.wav", flac(1))
    _write_wav(place / "microphone.wav", flac(3, seconds=5.0))
    return place


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder, "tones") as address:
        yield address


@pytest.fixture(scope="module")
def chromium(folder: Path) -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=_arguments(folder / "microphone.wav"))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    """A page of the app; at its end nobody else was asked for anything, and the console has no error."""
    with opened(chromium, url) as tab:
        yield tab


# -- trying -------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_uploaded_gets_the_class_that_predict_gives(page: Any, folder: Path) -> None:
    page.locator("#try-image input[type=file]").set_input_files(folder / "square.png")
    expect(page.locator("#try-image img")).to_be_visible()
    page.locator("#try-run").click()
    _expect_label(page, predicted(folder, "tones", "--image", "square.png"))


def test_a_sound_alone_is_enough_and_so_are_both(page: Any, folder: Path) -> None:
    page.locator("#try-audio input[type=file]").set_input_files(folder / "tone.wav")
    expect(page.locator("#try-audio")).to_contain_text("0:00")
    page.locator("#try-run").click()
    _expect_label(page, predicted(folder, "tones", "--audio", "tone.wav"))
    page.locator("#try-image input[type=file]").set_input_files(folder / "square.png")
    expect(page.locator("#try-image img")).to_be_visible()
    page.locator("#try-run").click()
    _expect_label(page, predicted(folder, "tones", "--image", "square.png", "--audio", "tone.wav"))


def test_an_answer_is_explained_over_its_picture_and_the_page_can_be_kept(page: Any, folder: Path) -> None:
    page.locator("#try-image input[type=file]").set_input_files(folder / "square.png")
    expect(page.locator("#try-image img")).to_be_visible()
    page.locator("#try-explain").click()
    frame = page.frame_locator("#try-explanation iframe")
    expect(frame.locator("h1")).to_contain_text(predicted(folder, "tones", "--image", "square.png")["label"])
    expect(frame.locator(".picture .heat rect").first).to_be_attached()
    frame.locator(".picture input").uncheck()
    expect(frame.locator(".picture .heat")).to_be_hidden()
    with page.expect_download() as kept:
        page.locator("#try-keep").click()
    assert "default-src 'none'" in Path(kept.value.path()).read_text("utf-8")


def test_what_the_microphone_hears_gets_its_class(page: Any) -> None:
    record(page)
    page.locator("#try-run").click()
    expect(page.locator("#try-label")).to_contain_text("c3")
    assert page.locator("#try-label").inner_text().replace("Scores", "").split()[0] == "c3"


def test_a_text_is_typed_for_another_model_whose_name_is_typed(page: Any, folder: Path) -> None:
    choose(page, "carded")
    page.locator("#try-text textarea").fill("a bad thing")
    page.locator("#try-run").click()
    _expect_label(page, predicted(folder, "carded", "--text", "a bad thing"))


def test_nothing_given_and_a_wrong_name_are_told_in_words(page: Any) -> None:
    page.locator("#try-run").click()
    expect(page.locator("#try-status")).to_contain_text(re.compile("image|audio"))
    choose(page, "tonse", wait=False)
    expect(page.locator("#try-status")).to_contain_text("no model is registered as 'tonse'")
    expect(page.locator("#try-status")).to_contain_text("tones")
    assert "Traceback" not in page.locator("body").inner_text()


def test_the_keyboard_alone_reaches_run(page: Any) -> None:
    page.locator("#try-model input").focus()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "try-run":
            break
    assert page.evaluate("document.activeElement.id") == "try-run"
    page.keyboard.press("Enter")
    expect(page.locator("#try-status")).to_contain_text(re.compile("image|audio"))


# -- looking through models --------------------------------------------------------------------------------------


def test_the_models_tab_lists_what_models_ls_lists(page: Any, folder: Path) -> None:
    open_tab(page, "Models")
    expect(page.locator("#models-table")).to_contain_text("tones")
    listed = json.loads(mmhub(folder, "models", "ls", "--json"))["models"]
    cells = page.locator("#models-table [role=gridcell][data-col='0']").all()
    assert [cell.inner_text().strip() for cell in cells] == [one["name"] for one in listed]


def test_a_card_is_shown_and_what_strangers_wrote_into_it_does_nothing(page: Any) -> None:
    open_tab(page, "Models")
    page.locator("#models-table [role=gridcell]", has_text="carded").first.click()
    expect(page.locator("#models-card")).to_contain_text("A card")
    expect(page.locator("#models-facts")).to_contain_text("apache-2.0")
    for link in page.locator("#models-card a").all():
        assert not str(link.get_attribute("href")).startswith("javascript")
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    page.locator("#models-try").click()
    expect(page.locator("#try-status")).to_contain_text("carded")


def test_two_models_are_compared(page: Any, folder: Path) -> None:
    open_tab(page, "Compare")
    for field, name in (("#compare-a", "tones"), ("#compare-b", "carded")):
        page.locator(f"{field} input").fill(name)
        page.locator(f"{field} input").press("Enter")
    expect(page.locator("#compare-run")).to_be_visible()
    page.locator("#compare-image input[type=file]").set_input_files(folder / "square.png")
    expect(page.locator("#compare-image img")).to_be_visible()
    page.locator("#compare-run").click()
    for side, name in (("a", "tones"), ("b", "carded")):
        best = predicted(folder, name, "--image", "square.png")
        expect(page.locator(f"#compare-answer-{side}")).to_contain_text(f"{best['score']:.0%}")


# -- training -------------------------------------------------------------------------------------------------------


def test_curves_grow_while_a_run_goes_on(page: Any, folder: Path) -> None:
    open_tab(page, "Training")
    expect(page.locator("#training-charts svg").first).to_be_visible()
    run = folder / "runs" / "second"
    shutil.copytree(folder / "runs" / "first", run)
    start = (run / "sessions.jsonl").read_text().splitlines()[0]
    (run / "sessions.jsonl").write_text(start + "\n")
    (run / "metrics.jsonl").write_text(_line(10))
    expect(page.locator("#training-table")).to_contain_text("second")
    expect(page.locator("#training-table .running")).to_have_count(1)
    expect(page.locator("#training-charts svg").first).to_be_visible()
    page.locator("#training-runs input").click()
    page.get_by_role("option", name="second").click()
    expect(page.locator("#training-charts .k1.line").first).to_be_attached()
    before = page.locator("#training-charts .k1.line").first.get_attribute("points")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(_line(20) + _line(30) + '{"step": 40, "lo')
    expect(page.locator("#training-table")).to_contain_text("30")
    expect(page.locator("#training-charts .k1.line").first).not_to_have_attribute("points", str(before))
    shutil.rmtree(run)
    expect(page.locator("#training-table")).not_to_contain_text("second")


# -- the whole page -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_tab_is_wider_than_a_phone(chromium: Any, url: str, scheme: str) -> None:
    with opened(chromium, url, viewport={"width": 375, "height": 700}, color_scheme=scheme) as page:
        for name in ("Try", "Compare", "Models", "Training"):
            open_tab(page, name)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, name
        brightness = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgba()").split(",")[0]
        assert (int(brightness) < 128) == (scheme == "dark")


def test_a_conversation_is_written_piece_by_piece(chromium: Any, tmp_path_factory: Any) -> None:
    import mmhub

    decoder = {"use": "transformer-lm", "config": {"dim": 16, "depth": 1, "heads": 2}}
    model = mmhub.compose(task="chat", decoder=decoder, tokenizer={"kind": "byte"}, texts=["hello"])
    model.decoder.processor.take_template("plain")
    place = tmp_path_factory.mktemp("talk")
    model.save(place / "talker")
    with served(place, "./talker") as address, opened(chromium, address) as page:
        page.locator("#try-message textarea").fill("hello")
        page.locator("#try-message textarea").press("Enter")
        expect(page.locator("#try-chat .bot, #try-chat [data-testid=bot]").first).to_contain_text(re.compile(r"\S"))


def test_speech_from_the_microphone_is_transcribed(tmp_path: Path) -> None:
    model = REAL_MODELS / "whisper-tiny.en"
    speech = SHARED / "data" / "fsdd" / "valid.parquet"
    if not (model.is_dir() and speech.is_file()):
        pytest.skip("needs whisper-tiny.en in MMHUB_REAL_MODELS and data/fsdd in MMHUB_SHARED")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(speech)
    row = next(row for row in table.to_pylist() if row["digit"] == 7)
    _write_wav(tmp_path / "speech.wav", row["audio"]["bytes"], before=0.5)
    (tmp_path / "whisper").symlink_to(model.resolve())
    with (
        playwright.sync_playwright() as tool,
        served(tmp_path, "./whisper") as address,
        tool.chromium.launch(executable_path=CHROMIUM, args=_arguments(tmp_path / "speech.wav")) as browser,
        opened(browser, address) as page,
    ):
        record(page)
        page.locator("#try-run").click()
        expect(page.locator("#try-written textarea")).to_have_value(re.compile("7|seven", re.I))


# -- driving it -----------------------------------------------------------------------------------------------------


class served:
    """Run `mmhub ui` in a folder."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.command = [sys.executable, "-m", "mmhub", "ui", *names, "--port", "0", "--no-browser", "--json"]
        self.folder = folder

    def __enter__(self) -> str:
        self.process = subprocess.Popen(self.command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            if line.rstrip() == "}":
                break
        return str(json.loads(text)["url"])

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)


class opened:
    """Open the app in a new tab, and close it with a look at what it asked for and complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        self.url, self.asked, self.errors = url, list[str](), list[str]()

    def __enter__(self) -> Any:
        self.context.grant_permissions(["microphone"], origin=self.url)
        page = self.context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.url)
        expect(page.locator("#try-status")).to_contain_text("parameters")
        return page

    def __exit__(self, kind: object, *error: object) -> None:
        self.context.close()
        if kind is None:
            foreign = [one for one in self.asked if not one.startswith((self.url, "data:", "blob:"))]
            assert foreign == []
            assert self.errors == [], self.errors


def open_tab(page: Any, name: str) -> None:
    """Choose a tab, on a narrow page from the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()


def choose(page: Any, name: str, *, wait: bool = True) -> None:
    page.locator("#try-model input").fill(name)
    page.locator("#try-model input").press("Enter")
    if wait:
        expect(page.locator("#try-status")).to_contain_text(f"{name}: ")


def record(page: Any, seconds: float = 2.0) -> None:
    page.locator("#try-audio").get_by_label("Record audio").click()
    page.locator("#try-audio").get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(seconds * 1000)
    page.locator("#try-audio").get_by_role("button", name="Stop").first.click()
    expect(page.locator("#try-audio")).to_contain_text("0:0")


def mmhub(folder: Path, *args: str) -> str:
    """What a command prints in a folder."""
    with chdir(folder):
        return CliRunner().invoke(cli, args, standalone_mode=False, catch_exceptions=False).stdout


def predicted(folder: Path, *args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mmhub(folder, "predict", *args, "--json"))["predictions"][0]
    return found


def _expect_label(page: Any, expected: dict[str, Any]) -> None:
    """The bars are those of the expected scores, the best first."""
    expect(page.locator("#try-label")).to_contain_text(f"{expected['score']:.0%}")
    words = [word for word in page.locator("#try-label").inner_text().split() if word != "Scores"]
    assert words[0] == expected["label"]
    shown = {word: words[place + 1] for place, word in enumerate(words) if word in expected["scores"]}
    assert shown == {label: f"{score:.0%}" for label, score in expected["scores"].items()}


def _line(step: int) -> str:
    values = {"step": step, "epoch": step / 10, "loss": 1 / step, "learning_rate": 0.1, "seconds": step * 1.0}
    return json.dumps(values) + "\n"


def _arguments(sound: Path) -> list[str]:
    return [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={sound}",
    ]


def _write_wav(path: Path, content: bytes, before: float = 0.0) -> None:
    """Write a sound as the WAV that Chromium takes for a microphone."""
    import io

    import numpy
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    silence = numpy.zeros(int(before * rate), "float32")
    soundfile.write(path, numpy.concatenate([silence, samples, silence]), rate, subtype="PCM_16")
