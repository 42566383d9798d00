"""Tokens that travel in a file of weights: `bundle_emb.<token>.<key>`, the key as in a file of the token's own.

A1111 and SD.Next know them (LyCORIS and OneTrainer pack them). The token ends at the first dot.
"""

from collections.abc import Mapping

from torch import Tensor

from vgm_peft.delta import Delta, Word
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import embedding
from vgm_peft.formats.books import Book
from vgm_peft.formats.names import BUNDLED
from vgm_peft.header import Header, listed


def alone(tensors: Mapping[str, Tensor], base: Base | None, header: Header) -> Delta:
    """Read a file that holds bundled tokens and nothing else. Raises `DeltaError`."""
    tokens = _by_token(tensors, header)
    book = embedding.book_for(next(iter(tokens.values())), base, str(header.path))
    return Delta(book.family.name, {}, words(tensors, book, header), dict(header.metadata))


def words(tensors: Mapping[str, Tensor], book: Book, header: Header) -> dict[str, Word]:
    """Make the tokens of a file whose family is known. Raises `DeltaError` when their rows are not that family's."""
    where = str(header.path)
    return {token: embedding.word_of(token, rows, book, where) for token, rows in _by_token(tensors, header).items()}


def _by_token(tensors: Mapping[str, Tensor], header: Header) -> dict[str, dict[str, Tensor]]:
    tokens: dict[str, dict[str, Tensor]] = {}
    odd: list[str] = []
    for name, rows in tensors.items():
        token, _, key = name.removeprefix(BUNDLED).partition(".")
        if not token or key not in (*embedding.LONE, *embedding.ENCODERS) or not 1 <= rows.dim() <= 2:
            odd.append(name)
        tokens.setdefault(token, {})[key] = rows
    if odd:
        raise DeltaError(
            f"{header.path}: {len(odd)} bundled tensors are no token's rows ({listed(odd)})",
            expected="(vectors, width), called " + ", ".join((*embedding.LONE, *embedding.ENCODERS)),
        )
    return tokens
