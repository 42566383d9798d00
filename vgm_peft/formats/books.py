"""Whose delta is it? Matching the modules that a foreign file names against a base, or against every family's published ones.

Files of other tools say neither their family nor their shapes. A `Book` is one base as a reader sees it: its modules under
every spelling, with their tensors. With a base at hand there is one book, that of the base; without, that published one is
found that has all the modules named. All or nothing: a file of which one module fits nowhere is refused, with the first few
names and the family that it fits better.

A name is split in two: what a tool writes before all modules of a part (`Naming.prefixes`), and the module itself, in any
of its spellings, its dots as `_`. Every spelling comes out of the family's table and the base's own list of modules; none
is guessed. Some files name no part at all (peft's, LyCORIS' own, the oldest of diffusers'): all of it is then one part's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from torch import Tensor

from vgm_peft.delta import Delta, Patch
from vgm_peft.errors import DeltaError
from vgm_peft.families import KNOWN, TABLE, naming_of
from vgm_peft.family import Base, Naming, Place, Share
from vgm_peft.formats.vocabulary import BIAS_SUFFIXES, Suffixes, shape_of, unpack
from vgm_peft.header import listed
from vgm_peft.site import WRAPPER, Site, find_sites

ROOTS = ("base_model_model_", "lycoris_", "")
"""What stands before the modules of files that do not name their part: peft's, LyCORIS', nothing."""

SAMPLE = 1000
"""How many names are looked up to say which book fits a file best that fits none."""


@dataclass(frozen=True)
class Book:
    """One base's modules: `sites` by place and tensor name, `spelled` by part and every spelling inside it."""

    family: Naming
    sites: Mapping[Place, Mapping[str, Site]]
    spelled: Mapping[str, Mapping[str, tuple[Share, ...]]]
    written: Mapping[Place, str]
    """Place -> the kohya name to write."""
    loaded: bool
    """The shapes are those of a base at hand, and not only of a published one."""

    def is_norm(self, place: Place) -> bool:
        """Say whether a module is a normalisation, which its bias alone does not tell."""
        weight = self.sites.get(place, {}).get("weight")
        return weight is not None and weight.op == "norm"

    def site(self, place: Place, tensor: str, tensors: Mapping[str, Tensor]) -> Site | None:
        """Return the site of a module's tensor; without a base its shape is that of the change that `tensors` spell.

        What they do not tell of it, as thin LoHa and LoKr do not tell a convolution's kernel, is as in the published base.
        """
        known = self.sites.get(place, {}).get(tensor)
        shape = None if known is None or self.loaded else shape_of(tensors, known.shape)
        if known is None or shape is None:
            return known
        if len(shape) not in ((2, 3, 4, 5) if known.op in ("linear", "conv") else (len(known.shape),)):
            return None
        op = known.op if known.op not in ("linear", "conv") else "conv" if len(shape) > 2 else "linear"
        return Site(known.part, known.module, op, shape, known.tensor)


@dataclass(frozen=True)
class Reading:
    """A book as one file uses it: `root` is the part of all modules that are named without one."""

    book: Book
    root: str

    def find(self, name: str) -> tuple[Share, ...]:
        """Return the modules that a name means, dotted or not: mostly one, none if it is unknown."""
        flat = name.replace(".", "_")
        prefixes = [(part, f"{prefix}_") for part, known in self.book.family.prefixes.items() for prefix in known]
        for part, prefix in [*prefixes, *((self.root, prefix) for prefix in ROOTS)]:
            found = self.book.spelled[part].get(flat.removeprefix(prefix)) if flat.startswith(prefix) else None
            if found:
                return found
        return ()


def book_of(base: Base) -> Book:
    """Return the book of a base at hand."""
    return _loaded(base.family, base.sites)


def family_book(name: str) -> Book:
    """Return the book of a family's published base, built without memory for its values."""
    return _published(name, next(iter(naming_of(name).editions())))


def books(names: Sequence[str]) -> Iterator[Book]:
    """Return the books of all published sizes of some families, each built when it is asked for."""
    return (_published(name, edition) for name in names for edition in naming_of(name).editions())


@cache
def _published(name: str, edition: str) -> Book:
    family = naming_of(name)
    sites = [site for part, root in family.editions()[edition]().items() for site in find_sites(part, root)]
    return _book(family, sites, loaded=False)


@lru_cache(maxsize=8)
def _loaded(family: Naming, sites: tuple[Site, ...]) -> Book:
    return _book(family, sites, loaded=True)  # asked for several times in every reading and writing


def _book(family: Naming, sites: Sequence[Site], loaded: bool) -> Book:
    table = family.key_table(sites)
    places: dict[Place, dict[str, Site]] = {}
    for site in sites:
        places.setdefault((site.part, site.module), {})[site.tensor] = site
    spelled: dict[str, dict[str, tuple[Share, ...]]] = {part: {} for part in family.parts}
    for part, module in places:
        own = [module] if part == family.denoiser else [module, WRAPPER + module]
        spelled[part].update((name.replace(".", "_"), (Share((part, module)),)) for name in own)
    single = {name: (Share(place),) for name, place in (*table.aliases.items(), *((n, p) for p, n in table.kohya.items()))}
    for name, shares in {**single, **table.fused}.items():
        part = shares[0].place[0]
        spelled[part].setdefault(name.removeprefix(f"{family.prefixes[part][0]}_"), shares)
    return Book(family, places, spelled, table.kohya, loaded)


def choose_book(
    named: Mapping[str, Suffixes], base: Base | None, where: str, version: str = "", root: str | None = None
) -> Reading:
    """Choose the book in which every module of a file is found.

    `named` holds the file's modules by their spelling; `version` is what the file says of its base
    (`ss_base_model_version`), and `root`, if it is a part's name, that of modules named without one. Among several that fit
    that word decides, then the number of equal shapes, then the order of the table. Families with a pipeline go before those
    known by name only. Raises `DeltaError` when none fits.
    """
    tiers = (
        [[book_of(base)]] if base is not None else [books(list(TABLE)), books([name for name in KNOWN if name not in TABLE])]
    )
    tried: list[Reading] = []
    for tier in tiers:
        readings = [Reading(book, part) for book in tier for part in _roots(book, root)]
        fitting = [reading for reading in readings if all(reading.find(name) for name in named)]
        if fitting:
            return max(fitting, key=lambda reading: _likeness(reading, named, version))
        tried += readings
    some = list(named)[:SAMPLE]
    best = min(tried, key=lambda reading: sum(not reading.find(name) for name in some))
    left = [name for name in named if not best.find(name)]
    raise DeltaError(
        f"{where}: {len(left)} of {len(named)} modules match nothing in {best.book.family.name} ({listed(left)})",
        expected="every module of the file to be one of the base's",
        fix=_advice(named, base),
    )


def _roots(book: Book, root: str | None) -> tuple[str, ...]:
    return (root,) if root in book.family.parts else book.family.parts


def _likeness(reading: Reading, named: Mapping[str, Suffixes], version: str) -> tuple[bool, int]:
    book, equal = reading.book, list[Site]()
    for name, tensors in named.items():
        shares = reading.find(name)
        known = book.sites.get(shares[0].place, {}).get("weight") if len(shares) == 1 else None
        if known is not None and shape_of(tensors, known.shape) == known.shape:
            equal.append(known)
    stamp = book.family.stamps(equal).get("ss_base_model_version", "").partition("_v")
    return bool(stamp[0]) and version.startswith(stamp[0] + stamp[1]), len(equal)


def _advice(named: Mapping[str, Suffixes], base: Base | None) -> str:
    """Say which family a file fits, when it is another than the base's."""
    if base is None:
        return "it belongs to a family of base models that is not known here"
    for book in books(list(KNOWN)):
        readings = [Reading(book, root) for root in book.family.parts]
        if book.family.name != base.family.name and any(all(r.find(name) for name in named) for r in readings):
            return f"it looks like a delta of {book.family.name}; use it with a base of that family"
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
