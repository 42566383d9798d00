"""What form a change has as tensors: the words in which a target says what it can load, whatever method trained it.

Other tools do not know methods; they know tensors by suffix. A `Form` is the name of one such set of tensors and whatever
some loader is known to stumble over in it. The names are LyCORIS' and those of its suffixes, the marks are:

| mark | means | who stumbles |
|---|---|---|
| `output`, `input` | a `dora_scale`, one value for every output or every input | by output: every UI (another norm) |
| `tucker` | the kernel of a convolution is a factor of its own | |
| `split` | a LoKr that is not split as evenly as can be, or whose small half is factored | LyCORIS guesses the split |
| `coarse` | rotated blocks that are larger than their number | LyCORIS takes the one for the other |
| `cut` | a butterfly of fewer factors than there could be | LyCORIS makes them all |
| `rescale` | a rotation with a factor for every output | ComfyUI reads it with two axes (OFT) and ignores it |
| `kernel` | (IA)^3 on a convolution | every UI: it scales the wrong axis |
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vgm_peft.formats.names import MAGNITUDE, UP
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.site import Site

MAIN: Mapping[str, str] = {
    UP: "lora",
    "hada_w1_a": "loha",
    "lokr_w1": "lokr",
    "lokr_w1_a": "lokr",
    "b1.weight": "glora",
    "on_input": "ia3",
    "w_norm": "norm",
    "b_norm": "norm",
    "diff": "diff",
    "diff_b": "bias",
}
"""The suffix by which a form is known -> its name; a rotation is known by the axes of its blocks."""
ROTATION = "oft_blocks"


@dataclass(frozen=True)
class Form:
    """The name of a set of tensors, and what is special about it."""

    name: str
    marks: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return " ".join((self.name, *sorted(self.marks)))


def form_of(site: Site, tensors: Suffixes) -> Form:
    """Return the form of a patch's tensors, as `Patch.pack` spells them."""
    blocks = tensors.get(ROTATION)
    marks = _marks(site, tensors) if blocks is None else _marks_of_rotation(tensors, blocks)
    return Form(name_of(tensors), frozenset(marks))


def name_of(tensors: Suffixes) -> str:
    """Return the name of the form that a module's tensors have."""
    if ROTATION in tensors:
        return "oft" if tensors[ROTATION].dim() == 3 else "boft"
    return next(form for suffix, form in MAIN.items() if suffix in tensors)


def _marks(site: Site, tensors: Suffixes) -> list[str]:
    marks: list[str] = []
    if MAGNITUDE in tensors:
        marks.append("output" if tensors[MAGNITUDE].shape[:2] == (site.rows, 1) else "input")
    if "hada_t1" in tensors:
        marks.append("tucker")
    if "on_input" in tensors and site.op == "conv":
        marks.append("kernel")
    half = tensors.get("lokr_w1")
    if "lokr_w1_a" in tensors or half is not None and tuple(half.shape) != (_even(site.rows), _even(site.shape[1])):
        marks.append("split")
    return marks


def _marks_of_rotation(tensors: Suffixes, blocks: Tensor) -> list[str]:
    marks = ["rescale"] if "rescale" in tensors else []
    if blocks.dim() == 3:
        return marks + ["coarse"] * (blocks.shape[1] > blocks.shape[0])
    factors, count = blocks.shape[:2]
    return marks + ["cut"] * (factors < (count & -count).bit_length())


def _even(side: int) -> int:
    """Return the largest divisor of a side that is at most its root."""
    return next(n for n in range(int(side**0.5), 0, -1) if side % n == 0)
