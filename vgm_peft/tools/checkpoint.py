"""A base on disk by the names of its sites: any tensor of it, one at a time, and no network built.

Takes a folder in diffusers' layout (sharded or not, every variant), or a single `.safetensors` file in the original layout,
whose names and fused text-encoder projections are looked up in `families.original_names`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vgm_peft.delta import Patch
from vgm_peft.errors import BaseModelError, DeltaError
from vgm_peft.families import TABLE, toybox_folder
from vgm_peft.families.index import family_of_folder
from vgm_peft.families.original_names import UNET, WHOLE, Cut, original_name
from vgm_peft.family import Family
from vgm_peft.formats.books import family_book
from vgm_peft.formats.canonical import read_tensor
from vgm_peft.formats.vocabulary import change
from vgm_peft.header import Entry, Header, open_header
from vgm_peft.site import WRAPPER, Op, Site
from vgm_peft.spelling import unet_spellings

TABLES = ("token_embedding", "position_embedding")


@dataclass(frozen=True)
class Place:
    """Where a site's tensor lies: in which file, under which name, and which cut of it."""

    header: Header
    key: str
    cut: Cut = WHOLE

    @property
    def entry(self) -> Entry:
        """The stored tensor, of which the site may be a part."""
        return self.header.tensors[self.key]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the site."""
        return self.cut.shape(self.entry.shape)


class Checkpoint:
    """The tensors of one base on disk. `source` is `toybox`, a diffusers folder or a single file; its family is found.

    Raises `BaseModelError` when it is none of these, or of no known family.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = toybox_folder() if str(source) == "toybox" else Path(source).expanduser()
        if self.path.is_dir():
            self.family: Family = family_of_folder(TABLE, self.path)
            self.headers = tuple(
                open_header(file) for part in self.family.parts for file in sorted((self.path / part).glob("*.safetensors"))
            )
            self._places = self._of_folder()
        elif self.path.is_file():
            header = open_header(self.path)
            self.headers, self.family = (header,), _family_of(header)
            self._places = {}
        else:
            raise BaseModelError(
                f"{source}: no such file or folder",
                expected="a base on this disk: toybox, a folder in diffusers' layout, or a .safetensors checkpoint",
            )
        self._unet = unet_spellings(m for part, m in family_book(self.family.name).sites if part == self.family.denoiser)

    @property
    def is_folder(self) -> bool:
        """Whether it is in diffusers' layout."""
        return self.path.is_dir()

    def _of_folder(self) -> dict[str, list[Place]]:
        places: dict[str, list[Place]] = {}
        for header in self.headers:
            for key in header.tensors:
                places.setdefault(f"{header.path.parent.name}.{key.removeprefix(WRAPPER)}", []).append(Place(header, key))
        return places

    def places(self, site: Site) -> list[Place]:
        """Every place of a site's tensor: one, or one in each variant that the folder holds."""
        if self.is_folder:
            return self._places.get(site.name, [])
        (header,) = self.headers
        found = original_name(site.part, site.module, site.tensor, self._unet, header.tensors)
        return [] if found is None else [Place(header, found.key, found.cut)]

    def sites(self) -> Iterator[Site]:
        """Every site whose tensor is here, in the shape that it has here."""
        if not self.is_folder:
            for table in family_book(self.family.name).sites.values():
                for site in table.values():
                    if places := self.places(site):
                        yield Site(site.part, site.module, site.op, places[0].shape, site.tensor)
            return
        for name, places in self._places.items():
            part, _, rest = name.partition(".")
            module, _, tensor = rest.rpartition(".")
            if tensor in ("weight", "bias") and places[0].entry.shape:
                yield Site(part, module, _op(module, tensor, places[0].entry.shape), places[0].entry.shape, tensor)

    def tensor(self, site: Site) -> Tensor:
        """Read a site's tensor as it is stored. Raises `DeltaError` when the base has none, or one of another shape."""
        self.check(site)
        place = self.places(site)[0]
        return place.cut.of(read_tensor(place.header, place.key)).reshape(site.shape)

    def check(self, site: Site) -> None:
        """Raise `DeltaError` unless the base has a tensor of this shape at a site, wherever it holds it."""
        places = self.places(site)
        if not places:
            raise DeltaError(f"{site}: {self.path} has no such tensor", fix="the delta belongs to another base")
        for place in places:
            # The published 1x1 convolutions are stored as such or as matrices.
            if tuple(n for n in place.shape if n != 1) != tuple(n for n in site.shape if n != 1):
                found = "x".join(map(str, place.shape))
                raise DeltaError(f"{site}: {self.path} has {found} there", fix="use the delta with the base it was trained on")


def _op(module: str, tensor: str, shape: tuple[int, ...]) -> Op:
    if tensor == "bias":
        return "bias"
    if module.endswith(TABLES):
        return "embedding"
    return "norm" if len(shape) == 1 else "linear" if len(shape) == 2 else "conv"


def _family_of(header: Header) -> Family:
    """The family whose names explain every tensor of a single file's denoiser."""
    stored = {key for key in header.tensors if key.startswith(UNET)}
    for family in TABLE.values():
        places = [module for part, module in family_book(family.name).sites if part == family.denoiser]
        known = {f"{UNET}{name}.{tensor}" for name in unet_spellings(places).values() for tensor in ("weight", "bias")}
        if stored and stored <= known:
            return family
    raise BaseModelError(
        f"{header.path}: no checkpoint of a known family in the original layout",
        expected="one of " + ", ".join(TABLE),
        fix="give the folder in diffusers' layout instead",
    )


def change_of(patch: Patch, checkpoint: Checkpoint | None) -> Tensor:
    """The dense dW of a patch. Raises `DeltaError` when it depends on the timestep, or on a base and none is at hand."""
    if patch.timed:
        raise DeltaError(f"{patch.site}: {patch.kind} changes with the timestep, so it is no one change", fix="attach it live")
    if not patch.base_free and checkpoint is not None:
        return patch.change(checkpoint.tensor(patch.site)).detach()
    return change(patch, None)
