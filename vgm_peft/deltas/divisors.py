"""How the sides of a layer are cut into equal parts, and what is said when they cannot be."""

from vgm_peft.errors import DeltaError
from vgm_peft.site import Site


def divisors(size: int) -> list[int]:
    """Return all divisors of `size`, rising."""
    return [n for n in range(1, size + 1) if size % n == 0]


def divisor(site: Site, name: str, asked: int | None, usual: int, side: tuple[int, str]) -> int:
    """Return the asked divisor of a layer's side, or the largest up to the usual one where none is asked for.

    `side` is its size and what it consists of ("outputs", "inputs"). Raises `DeltaError` naming those allowed.
    """
    size, noun = side
    allowed = divisors(size)
    if asked is None:
        return max(n for n in allowed if n <= usual)
    if asked not in allowed:
        raise DeltaError(
            f"{site}: {name} = {asked} does not divide its {size} {noun}",
            expected="one of " + ", ".join(map(str, allowed)),
            fix=f"set {name} to one of them, or leave the layer out of the targets",
        )
    return asked


def split(size: int, factor: int) -> tuple[int, int]:
    """Split `size` into two factors, the smaller first, as LyCORIS does.

    A positive factor that divides `size` is one of them. Otherwise the two are as near to each other as divisors get, the
    smaller no larger than `factor` unless that is -1.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small = max(n for n in divisors(size) if n * n <= size and (n <= limit or n == 1))
    return small, size // small
