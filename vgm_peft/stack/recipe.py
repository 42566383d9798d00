"""The `Stack`: everything that determines a picture, as plain frozen data; written as TOML, carried in PNGs as JSON.

Files named in a stack file are relative to the folder that holds it. A `digest` (SHA-256 of the file) is optional in a
stack written by hand; where it is given the file must still have it, so that a picture is remade from the very bytes it
was made from or not at all.
"""

import hashlib
import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from vgm_peft.config import Table, build, read_toml, to_table, to_toml
from vgm_peft.digests import digests_of
from vgm_peft.errors import ConfigError, DeltaError, nearest

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

MAX_PROMPT = 8_000
"""Characters; a prompt encoder reads far fewer, so more is a mistake or an attack."""


@dataclass(frozen=True, kw_only=True)
class DeltaUse:
    """One delta of a stack."""

    file: str
    """Path of the delta, in any format that can be read."""
    strength: float = 1.0
    """`W + strength * dW`; 0 is the same as leaving the delta out, bit for bit."""
    digest: str = ""
    """SHA-256 of the file; checked where given."""

    def __post_init__(self) -> None:
        _text("deltas.file", self.file, 1, 4096)
        _number(f"strength of {self.file}", self.strength, -100.0, 100.0)
        _hex("deltas.digest", self.digest)


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """One side network of a stack, with the picture it looks at."""

    network: str
    """Path of the network's folder or file."""
    image: str
    """Path of the picture it looks at."""
    strength: float = 1.0
    """Factor on what the network adds; 0 is the same as leaving it out, bit for bit."""
    start: float = 0.0
    """From which share of the steps it is heard, 0 .. 1."""
    end: float = 1.0
    """Until which."""
    mask: str = ""
    """Path of a picture that is white where the network is heard; everywhere without one."""
    layers: str = ""
    """Which layers hear it, where its kind knows choices: `style`, `layout`, `style+layout` (IP-Adapters); else all."""
    guess: bool = False
    """Whether the half without the prompt does not hear it, for pictures from the control alone (ControlNets)."""
    network_digest: str = ""
    """SHA-256 over the network's files; checked where given."""
    image_digest: str = ""
    """SHA-256 of the control picture's file; checked where given."""
    mask_digest: str = ""
    """SHA-256 of the mask's file; checked where given."""

    def __post_init__(self) -> None:
        _text("controls.network", self.network, 1, 4096)
        _text("controls.image", self.image, 1, 4096)
        _text("controls.mask", self.mask, 0, 4096)
        _text("controls.layers", self.layers, 0, 200)
        _number(f"strength of {self.network}", self.strength, -100.0, 100.0)
        _number(f"start of {self.network}", self.start, 0.0, 1.0)
        _number(f"end of {self.network}", self.end, self.start, 1.0)
        for name in ("network_digest", "image_digest", "mask_digest"):
            _hex(f"controls.{name}", getattr(self, name))


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
    deltas: tuple[DeltaUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    folder: Path = field(default=Path(), init=False, compare=False)
    """Where relative paths begin: the folder of the stack file."""

    def __post_init__(self) -> None:
        _text("base", self.base, 1, 4096)
        _text("prompt", self.prompt, 0, MAX_PROMPT)
        _text("negative", self.negative, 0, MAX_PROMPT)
        _hex("base_digest", self.base_digest)
        _number("steps", self.steps, 1, 1000)
        if self.guidance is not None:
            _number("guidance", self.guidance, 0.0, 100.0)
        _number("seed", self.seed, 0, 2**63 - 65)
        _number("count", self.count, 1, 64)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                _number(name, side, 8, 4096)
                if side % 8:
                    raise ConfigError(f"{name} = {side}", expected="a multiple of 8", fix=f"try {round(side / 8) * 8}")
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f'scheduler "{self.scheduler}"', fix=nearest(self.scheduler, list(SCHEDULERS)))
        _unique(d.file for d in self.deltas)

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
        """The stack as a nested table, without what is empty."""
        table = to_table(self)
        del table["folder"]
        for key in ("deltas", "controls"):
            uses = cast("list[Table]", table.pop(key))
            if uses:  # last, as TOML wants its tables
                table[key] = [{k: v for k, v in use.items() if v != ""} for use in uses]
        return {k: v for k, v in table.items() if k != "base_digest" or v}

    def toml(self) -> str:
        """The stack as TOML; `Stack.read` of it gives an equal stack."""
        return to_toml(self.table())

    def path(self, name: str) -> Path:
        """The place of a file named in the stack."""
        return self.folder / Path(name).expanduser()

    def pinned(self, skip: Container[str] = ()) -> Self:
        """Return a copy with every file's SHA-256 filled in; a digest that is already there must hold.

        Deltas named in `skip` are in memory and stay as they are.
        """
        deltas = tuple(
            d if d.file in skip else replace(d, digest=self._checked(d.file, delta_sha256(self.path(d.file)), d.digest))
            for d in self.deltas
        )
        controls = tuple(
            replace(
                c,
                network_digest=self._checked(c.network, network_sha256(self.path(c.network)), c.network_digest),
                image_digest=self._checked(c.image, sha256(self.path(c.image)), c.image_digest),
                mask_digest=self._checked(c.mask, sha256(self.path(c.mask)), c.mask_digest) if c.mask else "",
            )
            for c in self.controls
        )
        return replace(self, deltas=deltas, controls=controls).beginning_at(self.folder)

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


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; remembered if it is large. Raises `DeltaError` when it cannot be read."""
    try:
        return digests_of([path])[0]
    except OSError as error:
        raise DeltaError(f"{path}: cannot be read ({error.strerror})", fix="check the path") from None


def delta_sha256(path: Path) -> str:
    """SHA-256 of a delta's file, in hex; of a folder with one for every part over the names and bytes of all in it."""
    if not path.is_dir():
        return sha256(path)
    from vgm_peft.formats import files_of

    files = files_of(path)
    if len(files) == 1:
        return sha256(files[0])
    all_of = [p for file in files for p in (file, file.with_name("adapter_config.json")) if p.is_file()]
    return hashlib.sha256("".join(f"{p.relative_to(path).as_posix()}:{sha256(p)}\n" for p in all_of).encode()).hexdigest()


def network_sha256(folder: Path) -> str:
    """SHA-256 of a network's file, or over the names and bytes of the configuration and weights in its folder, in hex."""
    if folder.is_file():
        return sha256(folder)
    files = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".json"))
    if not files:
        raise DeltaError(
            f"{folder}: no network there", expected="a .safetensors file, or a folder with config.json and weights"
        )
    return hashlib.sha256("".join(f"{p.name}:{sha256(p)}\n" for p in files).encode()).hexdigest()


def _unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f'delta "{name}" stands in the stack twice', fix="name it once, with the sum of the strengths")
        seen.add(name)


def _number(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} = {value}", expected=f"{low:g} .. {high:g}" if high < 1e6 else f"at least {low:g}")


def _text(name: str, value: str, low: int, high: int) -> None:
    if not low <= len(value) <= high:
        raise ConfigError(f"{name} has {len(value)} characters", expected=f"{low} .. {high}")
    if "\0" in value:
        raise ConfigError(f"{name} holds a NUL character", fix="remove it")


def _hex(name: str, value: str) -> None:
    if value and (len(value) != 64 or set(value) - set("0123456789abcdef")):
        raise ConfigError(f'{name} = "{value[:80]}"', expected="a SHA-256 in 64 lower-case hexadecimal digits")
