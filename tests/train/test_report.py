"""The page of a run: everything on it, nothing from outside runs or is fetched, the same run the same page."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.train.ground import picture
from vgm_peft.train.report import write_report

HOSTILE = "<img src=x onerror=window.__xss=1>\"'&</td><script>window.__xss=1</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose every text is hostile."""
    lines: list[dict[str, Any]] = [{"step": i, "loss": 1.0 / i, "rate": 0.1, "norm": 1.0} for i in range(1, 41)]
    lines[20] |= {"held_out": 0.25, "warnings": [HOSTILE], "scores": {"subject": 0.5, "prompt": 0.5, "total": 0.5}}
    lines[25] |= {name: lines[20][name] for name in ("held_out", "scores")}
    lines[30] |= {"scores": {"subject": 1.0, "prompt": 0.1, "total": 0.18}}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 41, "lo')
    facts = {
        "task": HOSTILE,
        "steps": 40,
        "base": {"name": HOSTILE, "family": HOSTILE, "sha256": HOSTILE},
        "notices": [HOSTILE],
        "scores": {"by": HOSTILE, "prompts": [HOSTILE], "base": {"subject": 0.0, "prompt": 0.9, "total": 0.0}},
        "weights": f"step 26 of 40 {HOSTILE}",
        "result": {HOSTILE: "0"},
        "settings": {"task": {"token": HOSTILE}, HOSTILE: HOSTILE},
        "versions": {"torch": HOSTILE},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    row = {"file": HOSTILE, "width": 64, "height": 64, "repeats": 1, "caption": HOSTILE}
    data = {"pictures": [row] * 3, "notes": [HOSTILE], "buckets": [{HOSTILE: HOSTILE, "seen": 3}]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    for step in (10, 20):
        picture(tmp_path / "samples" / f"step-{step:06d}-0.png", step)
    return tmp_path


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_is_there_and_nothing_hostile_comes_through(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and names.count("svg") == 2 and names.count("polyline") == 6
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 and all(source.startswith("data:image/png;base64,") for source in images)
    assert not [a for _, attributes in page.tags for a in attributes if a in ("href", "srcset", "action")]
    assert page.text.count(HOSTILE) >= 15  # shown as what it is, everywhere
    assert "step 26 of 3 measured: subject 0.500" in page.text and "subject 0.000, prompt 0.900" in page.text
    assert "0.25 at step 26" in page.text and "weightsstep 26 of 40" in page.text  # of equals the later is returned
    assert "40 of 40" in page.text and "step 20" in page.text
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")
    first = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == first


def test_a_run_that_did_nothing_has_a_page(tmp_path: Path) -> None:
    assert "No step was done" in write_report(tmp_path).read_text()


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here")
def test_it_opens_offline_in_a_browser(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    address = write_report(folder).as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url[:100]))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.set_default_timeout(120_000)
        page.goto(address)
        assert page.evaluate("window.__xss") is None and not faults
        assert [url for url in asked if not url.startswith("data:")] == [address[:100]]
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.locator("svg polyline").count() == 6
        browser.close()
