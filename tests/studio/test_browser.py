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
from vgm_peft.formats import sniff

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

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


def draw(page: "Page", home: Path, button: str = "#draw") -> list[bytes]:
    """Press a button that draws, wait for a new picture, and return the new ones' pixels.

    What the page says meanwhile is no sign to wait for: on a busy machine the browser is told only of the end.
    """
    before = set((home / "pictures").glob("*.png"))
    page.locator(button).click()
    deadline = time.monotonic() + PATIENCE / 1000
    while not (new := sorted(set((home / "pictures").glob("*.png")) - before)) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    page.locator("#status").get_by_text(re.compile("drawn")).wait_for()
    return [Image.open(path).tobytes() for path in new]


def set_number(page: "Page", label: str, value: str) -> None:
    field = page.get_by_label(f"number input for {label}", exact=True).first
    field.fill(value)
    field.press("Enter")


def choose(page: "Page", name: str) -> None:
    """Add a delta of the library."""
    page.locator("#add-delta input").click()
    page.get_by_role("option", name=name, exact=True).click()
    strength(page, name).wait_for()


def strength(page: "Page", name: str) -> "Locator":
    return page.get_by_label(f"number for Strength of {name}", exact=True)


def weigh(page: "Page", name: str, value: str) -> None:
    strength(page, name).fill(value)
    strength(page, name).press("Enter")


def test_deltas_and_their_strengths_change_the_picture(page: "Page", home: Path) -> None:
    page.get_by_label("Prompt").first.fill("a red toy <img src=x onerror=window.__xss=2>")
    page.locator("#settings").get_by_role("button", name="Settings").click()
    set_number(page, "Steps", "2")
    set_number(page, "Pictures", "1")
    page.locator("#seed input").fill("7")
    (plain,) = draw(page, home)
    assert draw(page, home) == [plain]
    choose(page, "robot")
    (full,) = draw(page, home)
    weigh(page, "robot", "0.5")
    (half,) = draw(page, home)
    choose(page, "style")
    assert strength(page, "robot").input_value() == "0.5"
    (both,) = draw(page, home)
    page.get_by_label("Use style", exact=True).uncheck()
    assert draw(page, home) == [half]
    page.get_by_label("Move style up", exact=True).click()
    assert page.locator("#deltas .name").all_inner_texts() == ["style", "robot"]
    page.get_by_label("Use style", exact=True).check()
    assert draw(page, home) == [both]
    page.get_by_label("Remove style", exact=True).click()
    weigh(page, "robot", "0")
    assert draw(page, home) == [plain]
    assert len({plain, full, half, both}) == 4


def test_a_picture_tells_how_it_was_made(page: "Page", home: Path) -> None:
    page.locator("#gallery .thumbnail-item").first.click()
    details = page.locator("#details textarea")
    page.wait_for_function("document.querySelector('#details textarea').value.length > 0")
    assert "Steps: 2" in details.input_value() and "<img src=x onerror=window.__xss=2>" in details.input_value()
    page.keyboard.press("Escape")


def field(page: "Page", place: str) -> "Locator":
    return page.locator(f"{place} input, {place} textarea")


def upload(page: "Page", button: str, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(button).click()
    chooser.value.set_files(str(file))


def open_panel(page: "Page", panel: str) -> None:
    page.locator(panel).get_by_role("button").first.click()


def drag(page: "Page", canvas: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw on a canvas, from one place to another in shares of its sides."""
    page.locator(canvas).scroll_into_view_if_needed()
    box = page.locator(canvas).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=4)
    page.mouse.up()


def test_regions_are_drawn_by_hand_and_change_the_picture(page: "Page", home: Path) -> None:
    (plain,) = draw(page, home)
    open_panel(page, "#regions-panel")
    drag(page, "#region-sketch canvas", (0.1, 0.1), (0.5, 0.9))
    assert page.get_by_label("Right of the box in percent").input_value() == "50"
    field(page, "#region-name").fill("left")
    field(page, "#region-prompt").fill("a blue duck")
    page.locator("#add-region").click()
    page.get_by_label("Use left", exact=True).wait_for()
    (boxed,) = draw(page, home)
    page.get_by_label("More of robot", exact=True).click()
    page.get_by_label("Where of robot", exact=True).select_option("left")
    weigh(page, "robot", "1")
    (inside,) = draw(page, home)
    page.locator("#region-sketch").get_by_role("button", name="Brush").click()
    drag(page, "#region-sketch canvas", (0.6, 0.3), (0.9, 0.6))
    page.locator("#add-region").click()
    page.get_by_label("Use region 1", exact=True).wait_for()
    page.get_by_label("Prompt of region 1", exact=True).fill("a green frog")
    (painted,) = draw(page, home)
    assert len({plain, boxed, inside, painted}) == 4


def test_history_survives_a_reload_and_sends_a_picture_back_to_the_panel(page: "Page", home: Path) -> None:
    (last,) = draw(page, home)
    page.reload()
    page.get_by_role("tab", name="History").click()
    page.locator("#history .thumbnail-item").first.click()
    page.wait_for_function("document.querySelector('#details textarea').value.includes('Steps: 2')")
    page.locator("#send-back").click()
    page.get_by_label("Use robot", exact=True).wait_for()
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a red toy')")
    page.locator("#region-sketch, #regions-panel").first.wait_for()
    assert draw(page, home) == [last]
    page.get_by_role("tab", name="History").click()
    page.locator("#history .thumbnail-item").nth(1).wait_for()
    for number in (0, 1):
        page.locator("#history .thumbnail-item").nth(number).click()
        page.locator("#compare-with").click()
        page.get_by_role("tab", name="History").click() if number == 0 else page.locator("#compare img").first.wait_for()


def test_a_stack_is_saved_opened_and_a_wrong_one_explained(page: "Page", home: Path, tmp_path: Path) -> None:
    with page.expect_download() as download:
        page.locator("#save-stack").click()
    download.value.save_as(tmp_path / "mine.toml")
    text = (tmp_path / "mine.toml").read_text()
    assert 'file = "robot/delta.safetensors"' in text and 'region = "left"' in text and str(home) not in text
    page.get_by_label("Remove robot", exact=True).click()
    (tmp_path / "wrong.toml").write_text("[[deltas]]\nfile = '../base/unet/diffusion_pytorch_model.safetensors'\n")
    upload(page, "#open-stack", tmp_path / "wrong.toml")
    page.get_by_text("is in none of the folders searched").first.wait_for()
    upload(page, "#open-stack", tmp_path / "mine.toml")
    page.get_by_label("Use robot", exact=True).wait_for()
    page.reload()


def test_a_grid_is_drawn_over_two_settings(page: "Page", home: Path) -> None:
    page.get_by_label("Prompt").first.fill("a red toy")
    open_panel(page, "#settings")
    set_number(page, "Pictures", "1")
    page.locator("#seed input").fill("7")
    open_panel(page, "#plot-panel")
    page.locator("#plot-across input").click()
    page.get_by_role("option", name="steps", exact=True).click()
    field(page, "#plot-across-values").fill("1, 2")
    choose(page, "robot")
    page.locator("#plot-down input").click()
    page.get_by_role("option", name="strength of robot", exact=True).click()
    draw(page, home, "#draw-grid")
    (sheet,) = (home / "pictures").glob("*-grid.png")
    width, height = Image.open(sheet).size
    assert width > 2 * 192 and height > 3 * 192


def test_a_control_picture_and_a_picture_to_begin_from_change_what_is_drawn(page: "Page", home: Path, tmp_path: Path) -> None:
    set_number(page, "Steps", "2")
    (plain,) = draw(page, home)
    (tmp_path / "notes.png").write_text("not a picture")
    (picture, *_) = subject(tmp_path)
    open_panel(page, "#controls-panel")
    page.locator("#network input").click()
    page.get_by_role("option", name="edges").click()
    page.locator("#control-picture input[type=file]").set_input_files(str(tmp_path / "notes.png"))
    page.get_by_text("notes.png: not a readable picture").first.wait_for()
    page.locator("#control-picture").get_by_label("Clear", exact=True).click()
    page.locator("#control-picture input[type=file]").set_input_files(picture)
    page.locator("#annotator input").click()
    page.get_by_role("option", name="edges (canny)").click()
    page.locator("#control-preview img").wait_for()
    page.locator("#add-control").click()
    page.get_by_label("Use edges", exact=True).wait_for()
    (controlled,) = draw(page, home)
    page.get_by_label("Use edges", exact=True).uncheck()
    open_panel(page, "#begin-panel")
    page.locator("#begin-picture input[type=file]").set_input_files(picture)
    page.locator("#paint-sketch canvas").wait_for()
    (begun,) = draw(page, home)
    drag(page, "#paint-sketch canvas", (0.2, 0.2), (0.8, 0.4))
    (painted,) = draw(page, home)
    page.locator("#begin-without").click()
    page.locator("#paint-sketch canvas").wait_for(state="hidden")
    assert len({plain, controlled, begun, painted}) == 4


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
    page.locator("#train-check").click()
    page.locator("#train-report").get_by_text("5 pictures of 64 x 64").wait_for()
    page.get_by_role("button", name="Train", exact=True).click()
    rows = page.locator("#trainings label")
    rows.filter(has_text="red disc").wait_for()
    page.locator("#train-name input, #train-name textarea").fill("second")
    page.get_by_role("button", name="Train", exact=True).click()
    page.locator("#train-status").get_by_text("Waits; 1 comes first").wait_for()
    rows.filter(has_text="red disc").click()
    page.locator("#train-status").get_by_text("Done.").wait_for(timeout=3 * PATIENCE)
    assert (home / "runs" / "red-disc" / "delta.safetensors").is_file()
    page.locator("#train-curve svg").wait_for()
    rows.filter(has_text="second").click()
    page.locator("#train-status").get_by_text("Getting ready").wait_for()
    page.locator("#train-stop").click()
    page.locator("#train-status").get_by_text("Stopped").wait_for()
    page.locator("#train-go-on").wait_for()
    page.locator("#train-forget").click()
    rows.filter(has_text="second").wait_for(state="detached")
    page.get_by_role("tab", name="Create").click()
    choose(page, "red-disc")


def test_the_library_shows_what_was_trained_and_hands_it_out(page: "Page", tmp_path: Path) -> None:
    page.get_by_role("tab", name="Library").click()
    cards = page.locator("#cards .card")
    cards.filter(has_text="red-disc").click()
    page.locator("#library-details").get_by_text("fits the base").wait_for()
    page.locator("#export").click()
    with page.expect_download() as fetched:
        page.locator("#exported a").first.click()
    fetched.value.save_as(tmp_path / "fetched.safetensors")
    assert sniff(tmp_path / "fetched.safetensors") == "kohya" and "red-disc-comfyui" in fetched.value.suggested_filename
    page.locator("#search textarea, #search input").fill("onerror")
    page.wait_for_function("document.querySelectorAll('#cards .card').length === 1")
    assert cards.first.locator(".name").inner_text() == HOSTILE
    page.locator("#search textarea, #search input").fill("")


def test_deltas_are_compared_at_the_same_seeds(page: "Page", home: Path) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-prompt textarea").fill("a toy")
    page.locator("#compare-deltas input").click()
    page.get_by_role("option", name="robot", exact=True).click()
    page.keyboard.press("Escape")
    for field in ("#compare-seeds", "#compare-steps"):
        page.locator(f"{field} input[type=number]").fill("2")
        page.locator(f"{field} input[type=number]").press("Enter")
    page.locator("#compare").click()
    page.locator("#compare-status").get_by_text("Done.").wait_for()
    page.locator("#sheet img").wait_for()
    sheet = Image.open(max((home / "pictures").glob("*-grid*.png")))
    assert sheet.width > sheet.height > 2 * 64  # two seeds and a label across, two rows down
