"""The Studio in a real Chromium: draw with deltas, change a strength, train from uploads, and no outside request."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageDraw

from tests.studio.conftest import HOSTILE

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIETER = ("--disable-background-networking", "--disable-component-update")
PATIENCE = 120_000
"""Milliseconds; a busy machine loads the base and imports the trainer slowly."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no Chromium here (apt-get install chromium): the Studio is not driven",
)


@pytest.fixture(scope="module")
def page(address: str) -> "Iterator[Page]":
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *QUIETER])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.add_init_script("window.__xss = 0")
        outside: list[str] = []
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        yield page
        assert outside == []
        assert page.evaluate("window.__xss") == 0
        assert faults == []
        browser.close()


def draw(page: "Page", home: Path) -> list[bytes]:
    """Press Draw, wait for a new picture, and return the new ones' pixels.

    What the page says meanwhile is no sign to wait for: on a busy machine the browser is told only of the end.
    """
    before = set((home / "pictures").glob("*.png"))
    page.get_by_role("button", name="Draw", exact=True).click()
    deadline = time.monotonic() + PATIENCE / 1000
    while not (new := sorted(set((home / "pictures").glob("*.png")) - before)) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    page.locator("#status").get_by_text(re.compile("drawn, seed")).wait_for()
    return [Image.open(path).tobytes() for path in new]


def set_number(page: "Page", label: str, value: str) -> None:
    field = page.get_by_label(f"number input for {label}", exact=True).first
    field.fill(value)
    field.press("Enter")


def choose(page: "Page", name: str) -> None:
    page.locator("#deltas input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")


def test_deltas_and_their_strengths_change_the_picture(page: "Page", home: Path) -> None:
    page.get_by_label("Prompt").fill("a red toy <img src=x onerror=window.__xss=2>")
    page.locator("#settings").get_by_role("button", name="Settings").click()
    set_number(page, "Steps", "2")
    set_number(page, "Pictures", "1")
    page.locator("#seed input").fill("7")
    (plain,) = draw(page, home)
    assert draw(page, home) == [plain]
    choose(page, "robot")
    page.get_by_label("number input for robot", exact=True).wait_for()
    (full,) = draw(page, home)
    set_number(page, "robot", "0.5")
    (half,) = draw(page, home)
    choose(page, "style")
    page.get_by_label("number input for style", exact=True).wait_for()
    assert page.get_by_label("number input for robot", exact=True).input_value() == "0.5"
    (both,) = draw(page, home)
    set_number(page, "style", "0")
    assert draw(page, home) == [half]
    set_number(page, "robot", "0")
    assert draw(page, home) == [plain]
    assert len({plain, full, half, both}) == 4


def test_a_picture_tells_how_it_was_made(page: "Page", home: Path) -> None:
    page.locator("#gallery .thumbnail-item").first.click()
    details = page.locator("#details textarea")
    page.wait_for_function("document.querySelector('#details textarea').value.length > 0")
    assert "Steps: 2" in details.input_value() and "<img src=x onerror=window.__xss=2>" in details.input_value()
    page.keyboard.press("Escape")


def test_stop_ends_a_long_drawing_and_the_next_one_works(page: "Page", home: Path) -> None:
    set_number(page, "Steps", "100")
    set_number(page, "Pictures", "8")  # long enough for a browser that hardly gets a turn
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#status").get_by_text(re.compile(r"step \d+ of 100")).wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("#status").get_by_text("Stopped.").wait_for()
    set_number(page, "Steps", "2")
    set_number(page, "Pictures", "1")
    assert len(draw(page, home)) == 1


def test_a_hostile_name_is_shown_as_text_and_mistakes_are_explained(page: "Page", home: Path) -> None:
    choose(page, HOSTILE)
    page.get_by_label(f"number input for {HOSTILE}", exact=True).wait_for()
    size = page.get_by_label("Size")
    size.fill("huge")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text('size "huge"').first.wait_for()
    size.fill("")
    assert len(draw(page, home)) == 1


def subject(folder: Path) -> list[str]:
    """Five pictures of a red disc in different places."""
    files: list[str] = []
    for i in range(5):
        image = Image.new("RGB", (64, 64), (40 * i, 120, 200 - 30 * i))
        ImageDraw.Draw(image).ellipse((8 + 4 * i, 12, 40 + 4 * i, 44), fill="#cc2222")
        image.save(folder / f"me-{i}.png")
        files.append(str(folder / f"me-{i}.png"))
    return files


def test_a_wrong_upload_is_explained_and_a_training_gives_a_new_delta(page: "Page", home: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.get_by_role("tab", name="Train").click()
    page.locator("#uploads input[type=file]").set_input_files(str(tmp_path / "notes.png"))
    page.get_by_text("notes.png: not a readable picture").first.wait_for()
    page.locator(".toast-close").first.click()
    page.get_by_text("notes.png: not a readable picture").first.wait_for(state="hidden")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text("notes.png: not a readable picture").first.wait_for()
    assert not (home / "runs" / "my-subject").exists()
    page.reload()
    page.get_by_role("tab", name="Train").click()
    page.locator("#uploads input[type=file]").set_input_files(subject(tmp_path))
    page.locator("#uploaded .thumbnail-item").nth(4).wait_for()
    page.locator("#train-name input, #train-name textarea").fill("red disc")
    page.locator("#train-steps input[type=number]").fill("2")
    page.locator("#train-steps input[type=number]").press("Enter")
    page.get_by_role("button", name="Train", exact=True).click()
    page.locator("#train-status").get_by_text("Done.").wait_for(timeout=3 * PATIENCE)
    assert (home / "runs" / "red-disc" / "delta.safetensors").is_file()
    page.get_by_role("tab", name="Create").click()
    choose(page, "red-disc")
    page.get_by_label("number input for red-disc", exact=True).wait_for()
