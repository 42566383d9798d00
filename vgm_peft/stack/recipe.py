"""The `Stack`: everything that determines a picture, as plain frozen data; written as TOML, carried in PNGs as JSON.

Files named in a stack file are relative to the folder that holds it. A `digest` (SHA-256 of the file) is optional in a
stack written by hand; where it is given the file must still have it, so that a picture is remade from the very bytes it
was made from or not at all.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from vgm_peft.config import Table, build, read_toml, to_table, to_toml
from vgm_peft.errors import ConfigError, DeltaError, nearest
from vgm_peft.stack.files import DIGEST_OF, FileKind, Named, Renaming, with_files
from vgm_peft.stack.uses import ControlUse, DeltaUse, Region, check_hex, check_length, check_number, check_text

if TYPE_CHECKING:
    from vgm_peft.delta import Delta
    from vgm_peft.family import Base
    from vgm_peft.stack.runtime import Applied

SCHEDULERS: Mapping[str, tuple[str, str]] = {
    "ddim": ("DDIMScheduler", "DDIM"),
    "ddpm": ("DDPMScheduler", "DDPM"),
    "dpmpp": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "euler": ("EulerDiscreteScheduler", "Euler"),
    "euler_a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "unipc": ("UniPCMultistepScheduler", "UniPC"),
}
"""Our name -> diffusers' class, and the name that other tools show. All of these know v-prediction and zero-terminal SNR."""

Combine = Literal["sum", "switch", "composite"]
Regional = Literal["noise", "attention"]

LISTS = ("deltas", "controls", "regions")
ALWAYS = frozenset({"base", "prompt", "negative", "steps", "seed", "count", "scheduler", "file", "network", "strength"})
"""Keys that a table has even where their values are the defaults; the image of a control has none."""

MAX_PROMPT = 8_000
"""Characters; a prompt encoder reads far fewer, so more is a mistake or an attack."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A picture's description: base, deltas, sides, prompt and sampling. Every limit is checked on construction."""

    base: str = "toybox"
    """`toybox`, a diffusers folder, a single `.safetensors` file, or a hub id."""
    base_digest: str = ""
    """SHA-256 over the base's weights; checked where given."""
    prompt: str = ""
    negative: str = ""
    """What the picture should not show."""
    steps: int = 25
    """Denoising steps, 1 .. 1000."""
    guidance: float | None = None
    """Classifier-free guidance, 0 .. 100, at 1 and below none; the base's own when left out."""
    seed: int = 0
    """Picture `i` of `count` is drawn from the seed `seed + i`."""
    count: int = 1
    """Pictures, 1 .. 64."""
    width: int | None = None
    """Pixels, a multiple of 8; the base's own size when left out."""
    height: int | None = None
    scheduler: str = "dpmpp"
    """One of `SCHEDULERS`; made from the base's own scheduler, so prediction type and noise schedule stay right."""
    image: str = ""
    """Path of a picture to begin from instead of noise alone."""
    image_digest: str = ""
    """SHA-256 of that picture's file; checked where given."""
    change: float = 0.75
    """How much of that picture is drawn anew, above 0 .. 1: the share of the steps that is done."""
    paint: str = ""
    """Path of a mask that is white where that picture is drawn anew and black where it stays; all of it, without one."""
    paint_digest: str = ""
    """SHA-256 of the mask's file; checked where given."""
    combine: Combine = "sum"
    """How several deltas act: all at once, one after another from step to step (LoRA switch), or each in a forward of its
    own whose guidance is averaged (LoRA composite)."""
    regional: Regional = "noise"
    """How regions are held together: each is a forward of its own whose answers are blended by the masks, or one forward
    whose cross-attentions read each place's own prompt (Mix-of-Show)."""
    deltas: tuple[DeltaUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    regions: tuple[Region, ...] = ()
    folder: Path = field(default=Path(), init=False, compare=False)
    """Where relative paths begin: the folder of the stack file."""
    files: ClassVar[Named] = (("picture", "image", "image_digest"), ("picture", "paint", "paint_digest"))

    def __post_init__(self) -> None:
        check_text("base", self.base, 1, 4096)
        check_text("prompt", self.prompt, 0, MAX_PROMPT)
        check_text("negative", self.negative, 0, MAX_PROMPT)
        check_hex("base_digest", self.base_digest)
        check_number("steps", self.steps, 1, 1000)
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0.0, 100.0)
        check_number("seed", self.seed, 0, 2**63 - 65)
        check_number("count", self.count, 1, 64)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                check_number(name, side, 8, 4096)
                if side % 8:
                    raise ConfigError(f"{name} = {side}", expected="a multiple of 8", fix=f"try {round(side / 8) * 8}")
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f'scheduler "{self.scheduler}"', fix=nearest(self.scheduler, list(SCHEDULERS)))
        self._check_picture()
        self._check_uses()

    def _check_picture(self) -> None:
        for name in ("image", "paint"):
            check_text(name, getattr(self, name), 0, 4096)
            check_hex(f"{name}_digest", getattr(self, f"{name}_digest"))
        check_number("change", self.change, 0.0, 1.0)
        if self.change == 0.0:
            raise ConfigError("change = 0.0", expected="above 0: at 0 the picture stays as it is")
        if self.done < 1:
            raise ConfigError(
                f"change = {self.change:g} of {self.steps} steps leaves none to be done", fix="change more, or take more steps"
            )
        if self.paint and not self.image:
            raise ConfigError(f'paint = "{self.paint}" without an image', fix="name the picture to paint in as image")

    def _check_uses(self) -> None:
        check_length("deltas", self.deltas, 1000)
        check_length("controls", self.controls, 64)
        check_length("regions", self.regions, 16)
        names = [region.name for region in self.regions]
        for name, count in Counter(names).items():
            if count > 1:
                raise ConfigError(f'{count} regions are called "{name}"', expected="a name of its own for each")
        for use in self.deltas:
            if use.region and use.region not in names:
                raise ConfigError(
                    f'{use.file} acts in the region "{use.region}", which the stack does not have',
                    fix=nearest(use.region, names) if names else "add the region, or take it out of the delta",
                )
        for (file, region), count in Counter((use.file, use.region) for use in self.deltas).items():
            if count > 1:
                where = f' in the region "{region}"' if region else ""
                raise ConfigError(
                    f'delta "{file}" stands in the stack twice{where}', fix="name it once, with the sum of the strengths"
                )

    @property
    def done(self) -> int:
        """How many of the steps are done, as diffusers counts: from a picture the last ones only, by how much it changes."""
        return int(self.steps * self.change) if self.image else self.steps

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a stack file. Raises `ConfigError` naming the key for anything unknown, mistyped or out of range."""
        stack = build(cls, read_toml(path), f"{path.name}: ")
        return stack.beginning_at(path.parent)

    @classmethod
    def of_table(cls, table: Mapping[str, object], where: str = "") -> Self:
        """Bind a plain table, such as the JSON in a PNG, with the same checks as a file."""
        return build(cls, table, where)

    def beginning_at(self, folder: Path) -> Self:
        """Return a copy whose relative paths begin at `folder`."""
        copy = replace(self)
        object.__setattr__(copy, "folder", folder)
        return copy

    def changed(self, table: Mapping[str, object]) -> Self:
        """Return a copy with some keys replaced, checked like a file; relative paths keep their folder."""
        return build(type(self), {**self.table(), **table}).beginning_at(self.folder)

    def table(self) -> Table:
        """The stack as a nested table, without what is left at its default and says nothing."""
        table = _told(self)
        for key in LISTS:
            uses = cast("tuple[object, ...]", getattr(self, key))
            if uses:  # last, as TOML wants its tables
                table[key] = [_told(use) for use in uses]
        return table

    def toml(self) -> str:
        """The stack as TOML; `Stack.read` of it gives an equal stack."""
        return to_toml(self.table())

    def path(self, name: str) -> Path:
        """The place of a file named in the stack."""
        return self.folder / Path(name).expanduser()

    def renamed(self, of: Renaming) -> Self:
        """Return a copy in which every file that is named has the name and the digest that `of` gives it."""
        lists = {key: tuple(with_files(use, of) for use in getattr(self, key)) for key in LISTS}
        copy = replace(with_files(self, of), **lists)
        return copy.beginning_at(self.folder)

    def pinned(self, skip: Container[str] = ()) -> Self:
        """Return a copy with every file's SHA-256 filled in; a digest that is already there must hold.

        Deltas named in `skip` are in memory and stay as they are.
        """

        def pin(kind: FileKind, name: str, digest: str) -> tuple[str, str]:
            if kind == "delta" and name in skip:
                return name, digest
            return name, self._checked(name, DIGEST_OF[kind](self.path(name)), digest)

        return self.renamed(pin)

    def _checked(self, name: str, found: str, wanted: str) -> str:
        if wanted and found != wanted:
            raise DeltaError(
                f"{name}: its bytes changed (SHA-256 {found[:12]}...)",
                expected=f"{wanted[:12]}...",
                fix="bring the old file back, or delete the digest from the stack to use the new one",
            )
        return found

    def on(self, base: "Base", *, given: "Mapping[str, Delta] | None" = None, fuse: bool = True) -> "Applied":
        """Put the deltas and sides on a base; a context manager that gives the base back bit for bit.

        `given` holds deltas already in memory by the name that stands in the stack; other names are read as files.
        `fuse` adds constant strengths into the weights once (nothing to pay per step) instead of attaching live.
        """
        from vgm_peft.stack.runtime import Applied

        return Applied(base, self, given=given, fuse=fuse)


def parse_size(text: str) -> tuple[int, int]:
    """Parse `WxH` or one number for a square. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d{1,5})(?:[xX*](\d{1,5}))?", text.strip())
    if match is None:
        raise ConfigError(f'size "{text}"', expected="WIDTHxHEIGHT in pixels, for example 768x512")
    return int(match[1]), int(match[2] or match[1])


def _told(config: object) -> Table:
    """A dataclass as a table without its lists of others, and without what is at its default unless `ALWAYS` names it."""
    fields = dataclasses.fields(cast(Any, config))
    defaults = {f.name: {} if f.default_factory == dict[str, float] else f.default for f in fields}
    return {
        key: value
        for key, value in to_table(config).items()
        if key not in (*LISTS, "folder") and (key in ALWAYS or getattr(config, key) != defaults[key])
    }
