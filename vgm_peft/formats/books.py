"""Whose delta is it? Matching the modules that a foreign file names against a base, or against every family's published one.

Files of other tools say neither their family nor their shapes. A `Book` is one family as a reader sees it: its modules
under every spelling, with their tensors. With a base at hand there is one book, that of the base; without, the family is
found that has all the modules named. All or nothing: a file of which one module fits nowhere is refused, with the first
few names and the family that it fits better.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.families import TABLE, family_named
from vgm_peft.family import Base, Family
from vgm_peft.formats.header import listed
from vgm_peft.formats.vocabulary import BIAS_SUFFIXES, Suffixes, shape_of, unpack
from vgm_peft.site import Site, find_sites

Place = tuple[str, str]
"""Part and module."""


@dataclass(frozen=True)
class Book:
    """One family's modules: `sites` by place and tensor name, `spelled` by every kohya name that may be read."""

    family: Family
    sites: Mapping[Place, Mapping[str, Site]]
    spelled: Mapping[str, Place]
    written: Mapping[Place, str]
    """Place -> the kohya name to write."""
    loaded: bool
    """The shapes are those of a base at hand, and not only of the published one."""

    def is_norm(self, place: Place) -> bool:
        """Say whether a module is a normalisation, which its bias alone does not tell."""
        weight = self.sites.get(place, {}).get("weight")
        return weight is not None and weight.op == "norm"

    def site(self, place: Place, tensor: str, tensors: Mapping[str, Tensor]) -> Site | None:
        """Return the site of a module's tensor; without a base its shape is that of the change that `tensors` spell.

        What they do not tell of it, as thin LoHa and LoKr do not tell a convolution's kernel, is as in the published base.
        """
        known = self.sites.get(place, {}).get(tensor)
        shape = None if known is None or self.loaded else shape_of(tensors, known.shape[2:])
        if known is None or shape is None:
            return known
        op = known.op if known.op not in ("linear", "conv") else "conv" if len(shape) > 2 else "linear"
        return Site(known.part, known.module, op, shape, known.tensor)


def book_of(base: Base) -> Book:
    """Return the book of a base at hand."""
    return _book(base.family, base.sites, loaded=True)


def family_book(name: str) -> Book:
    """Return the book of a family's published base, built without memory for its values."""
    return _published(name)


@cache
def _published(name: str) -> Book:
    family = family_named(name)
    sites = [site for part, root in family.published().items() for site in find_sites(part, root)]
    return _book(family, sites, loaded=False)


def _book(family: Family, sites: Sequence[Site], loaded: bool) -> Book:
    table = family.key_table(sites)
    places: dict[Place, dict[str, Site]] = {}
    for site in sites:
        places.setdefault((site.part, site.module), {})[site.tensor] = site
    spelled = {**table.aliases, **{name: place for place, name in table.kohya.items()}}
    return Book(family, places, spelled, table.kohya, loaded)


def choose_book(
    named: Mapping[str, Suffixes],
    lookup: Callable[[Book, str], Place | None],
    base: Base | None,
    where: str,
    version: str | None = None,
) -> Book:
    """Choose the book in which every module of a file is found.

    `named` holds the file's modules by their spelling, `lookup` finds one in a book; `version` is what the file says of
    its base (`ss_base_model_version`). Among several that fit, that word decides, then the number of equal shapes, then
    the order of the table. Raises `DeltaError` when none fits.
    """
    books = [book_of(base)] if base is not None else [family_book(name) for name in TABLE]
    fitting = [book for book in books if all(lookup(book, name) for name in named)]
    if not fitting:
        raise _misfit(named, lookup, books, base, where)
    return max(fitting, key=lambda book: _likeness(book, named, lookup, version))


def _likeness(
    book: Book, named: Mapping[str, Suffixes], lookup: Callable[[Book, str], Place | None], version: str | None
) -> tuple[bool, int]:
    equal: list[Site] = []
    for name, tensors in named.items():
        known = book.sites.get(lookup(book, name) or ("", ""), {}).get("weight")
        if known is not None and shape_of(tensors, known.shape[2:]) == known.shape:
            equal.append(known)
    stamp = book.family.stamps(equal).get("ss_base_model_version", "").partition("_v")
    return bool(stamp[0]) and (version or "").startswith(stamp[0] + stamp[1]), len(equal)


def _misfit(
    named: Mapping[str, Suffixes],
    lookup: Callable[[Book, str], Place | None],
    books: Sequence[Book],
    base: Base | None,
    where: str,
) -> DeltaError:
    best = min(books, key=lambda book: sum(lookup(book, name) is None for name in named))
    left = [name for name in named if lookup(best, name) is None]
    return DeltaError(
        f"{where}: {len(left)} of {len(named)} modules match nothing in {best.family.name} ({listed(left)})",
        expected="every module of the file to be one of the base's",
        fix=advice(named, lookup, base),
    )


def advice(named: Mapping[str, Suffixes], lookup: Callable[[Book, str], Place | None], base: Base | None) -> str:
    """Say which family a file fits, when it is another than the base's."""
    if base is None:
        return "it belongs to a family of base models that is not known here"
    for name in TABLE:
        book = family_book(name)
        if name != base.family.name and all(lookup(book, spelled) for spelled in named):
            return f"it looks like a delta of {name}; use it with a base of that family"
    return "use it with the base it was trained on"


def assemble(book: Book, groups: Mapping[Place, Suffixes], where: str, metadata: Mapping[str, str]) -> Delta:
    """Make the delta that modules' tensors spell; every tensor is used or named in the error."""
    patches: dict[str, Patch] = {}
    for place, tensors in groups.items():
        for tensor in ("weight", "bias"):
            share = {suffix: value for suffix, value in tensors.items() if (suffix in BIAS_SUFFIXES) == (tensor == "bias")}
            if not share:
                continue
            site = book.site(place, tensor, share)
            if site is None:
                raise DeltaError(f"{where}: {'.'.join(place)} has no {tensor} to change ({listed(sorted(share))})")
            patches[site.name] = unpack(site, share, where)
    order = [site.name for table in book.sites.values() for site in table.values() if site.name in patches]
    return Delta(book.family.name, {name: patches[name] for name in order}, {}, dict(metadata))
