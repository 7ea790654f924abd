"""Make the pictures of docs/images: the browser app, in Chromium, on models and files that are given.

    python tools/screenshots.py --model cifar=FOLDER --model chat=FOLDER --picture FILE --runs FOLDER --out docs/images

The first model must take images, that called `chat` converse. Folders are linked under their names into an empty
working folder, so that no path of this machine is in a picture. It needs playwright, Chromium, Pillow and mmhub-ui.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIZE = {"width": 1280, "height": 960}
SECONDS = 180_000  # milliseconds to wait for anything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--picture", type=Path, required=True, help="what the first model is shown, and talked about")
    parser.add_argument("--runs", type=Path, required=True, help="a folder of training runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    given = parser.parse_args()
    models = dict(one.split("=", 1) for one in given.model)
    expect.set_options(timeout=SECONDS)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        work = make_folder(Path(place), models, given.picture, given.runs)
        with served(work, *(f"./{name}" for name in models)) as url, sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=given.chromium, args=ARGUMENTS)
            for name, picture in PICTURES.items():
                for scheme in ("light", "dark") if name == "training" else ("light",):
                    page = browser.new_page(viewport=SIZE, color_scheme=scheme)
                    page.set_default_timeout(SECONDS)
                    page.goto(url)
                    expect(page.locator("#try-status")).to_contain_text("parameters")
                    picture(page, work, list(models))
                    keep(page, given.out / f"ui-{name}{'-dark' * (scheme == 'dark')}.png")
                    page.close()


def make_folder(place: Path, models: dict[str, str], picture: Path, runs: Path) -> Path:
    """Link everything under neutral names."""
    for name, folder in models.items():
        (place / name).symlink_to(Path(folder).resolve())
    (place / "runs").symlink_to(runs.resolve())
    shutil.copy(picture, place / f"picture{picture.suffix}")
    entries = [f'[models."{name}"]\nref = "local:./{name}"\ntask = "{task_of(place / name)}"' for name in models]
    (place / "registry.toml").write_text("\n".join(["schema = 1", *entries, ""]))
    return place


def task_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text()).get("task", ""))


@contextmanager
def served(folder: Path, *names: str) -> Iterator[str]:
    """Run `mmhub ui` in a folder, with settings and a cache of its own, and yield its address."""
    command = [sys.executable, "-m", "mmhub", "ui", *names, "--port", "0", "--no-browser", "--json"]
    own = {"MMHUB_CONFIG": str(folder / ".config"), "HF_HUB_CACHE": str(folder / ".cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.rstrip() == "}":
            break
    try:
        yield str(json.loads(text)["url"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def show_try(page: Page, work: Path, models: list[str]) -> None:
    upload(page, "#try-image", work)
    page.locator("#try-run").click()
    expect(page.locator("#try-label")).to_contain_text("%")


def show_chat(page: Page, work: Path, models: list[str]) -> None:
    choose(page, "./chat")
    page.locator("#try-message input[type=file]").set_input_files(picture_in(work))
    page.locator("#try-message textarea").fill("What is in this picture?")
    page.wait_for_timeout(1500)
    page.locator("#try-message textarea").press("Enter")
    expect(page.locator("#try-chat [data-testid=bot]").first).to_contain_text(re.compile(r"\w"))
    page.wait_for_timeout(3000)


def show_compare(page: Page, work: Path, models: list[str]) -> None:
    open_tab(page, "Compare")
    for field, name in zip(("#compare-a", "#compare-b"), models, strict=False):
        page.locator(f"{field} input").fill(f"./{name}")
        page.locator(f"{field} input").press("Enter")
    expect(page.locator("#compare-run")).to_be_visible()
    expect(page.locator("#compare-image")).to_be_visible()
    upload(page, "#compare-image", work)
    page.locator("#compare-run").click()
    expect(page.locator("#compare-answer-b")).to_contain_text("%")


def show_models(page: Page, work: Path, models: list[str]) -> None:
    open_tab(page, "Models")
    page.locator("#models-table [role=gridcell]", has_text=models[0]).first.click()
    expect(page.locator("#models-facts table").first).to_be_visible()


def show_training(page: Page, work: Path, models: list[str]) -> None:
    open_tab(page, "Training")
    expect(page.locator("#training-charts svg").first).to_be_visible()
    page.locator("#training-runs input").click()
    page.get_by_role("option").nth(1).click()
    page.locator("#training-runs input").press("Escape")
    page.get_by_label("steps", exact=True).check()
    expect(page.locator("#training-charts .k1.line").first).to_be_attached()


PICTURES: dict[str, Any] = {
    "try": show_try,
    "compare": show_compare,
    "models": show_models,
    "training": show_training,
    "chat": show_chat,
}


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page: Page, name: str) -> None:
    page.locator("#try-model input").fill(name)
    page.locator("#try-model input").press("Enter")
    expect(page.locator("#try-status")).to_contain_text(f"{name}: ")


def picture_in(work: Path) -> Path:
    return next(work.glob("picture.*"))


def upload(page: Page, field: str, work: Path) -> None:
    page.locator(f"{field} input[type=file]").set_input_files(picture_in(work))
    expect(page.locator(f"{field} img")).to_be_visible()


def keep(page: Page, path: Path) -> None:
    """Write the top of the page as a PNG of few colours."""
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
