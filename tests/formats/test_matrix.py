"""Every kind x family x target: exported, read back, the same dW, or refused; and docs/formats.md says just that."""

from collections.abc import Callable

import pytest

from tests.formats import matrix
from vgm_peft.deltas import TABLE
from vgm_peft.family import Base

TABLES: dict[str, dict[str, dict[str, matrix.Cell]]] = {}
"""What the cases below have found."""


def test_every_kind_has_a_row() -> None:
    assert {row.split(",")[0] for row in matrix.OPTIONS} == set(TABLE)


@pytest.mark.parametrize("family", matrix.FAMILIES)
def test_every_target_gets_it_exactly_or_says_why_not(shared: Callable[[str], Base], family: str) -> None:
    """`matrix.check_exact` compares what every file is read as with what was exported."""
    TABLES[family] = dict(matrix.rows(shared(family)))
    words = {cell.word for cells in TABLES[family].values() for cell in cells.values()}
    assert words == {*matrix.WORDS.values(), "refused"}
    assert {cell.word for cell in TABLES[family]["lora"].values()} == {"exact"}


def test_the_page_says_what_was_found() -> None:
    if set(TABLES) != set(matrix.FAMILIES):
        pytest.skip("the whole of this file is run to see")
    found = matrix.table({family: TABLES[family] for family in matrix.FAMILIES}).strip()
    assert matrix.written(matrix.PAGE.read_text(encoding="utf-8")) == found, "run: .venv/bin/python -m tests.formats.matrix"
