"""Every test that `docs/trust.md` and `docs/studio.md` name exists, and every kind of fault is on the page."""

import ast
import re
from pathlib import Path

import pytest

from vgm_peft.data import KINDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
STUDIO = (ROOT / "docs" / "studio.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE + STUDIO)))


@pytest.mark.parametrize("node", NAMED)
def test_the_test_that_keeps_a_promise_exists(node: str) -> None:
    path, _, name = node.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name.startswith("test_") and name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def test_every_promise_names_its_test() -> None:
    tables = re.split(r"^\| promise \| kept by \|\n\|---\|---\|\n", PAGE, flags=re.MULTILINE)[1:]
    rows = [line for table in tables for line in re.match(r"(\|.*\n)*", table)[0].splitlines()]  # type: ignore[index]
    assert len(rows) >= 30 and all(re.search(r"`tests/[\w/]+\.py::\w+` \|$", row) for row in rows)


def test_every_kind_of_fault_is_explained() -> None:
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)[1:] == list(KINDS)
