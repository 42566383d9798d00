"""A `Site` is one named tensor of a base model, known without its values; this module finds, chooses and locates them.

Names are the base's own module names under the part they belong to (`unet`, `text_encoder`, ...), for example
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight`. Text encoders are named without the
`text_model.` wrapper that some transformers versions put around them, so that a site's name does not depend on the
installed library.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal, cast

from vgm_peft.errors import ConfigError, DeltaError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

Op = Literal["linear", "conv", "norm", "embedding", "bias"]
WRAPPER = "text_model."


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of a base model: the part and module that hold it, what it does there, and its shape.

    `op` is what the tensor is to its module: the weight of a linear, conv, norm or embedding, or a bias of any.
    """

    part: str
    module: str
    op: Op
    shape: tuple[int, ...]
    tensor: Literal["weight", "bias"] = "weight"

    @cached_property
    def name(self) -> str:
        """`part.module.tensor`, unique in a base model."""
        return f"{self.part}.{self.module}.{self.tensor}"

    @property
    def rows(self) -> int:
        """Outputs: the first axis of the weight."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Inputs: all axes of the weight but the first, flattened."""
        return prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.part}.{self.module} {self.op} {'x'.join(map(str, self.shape))}"


def find_sites(part: str, root: "nn.Module") -> tuple[Site, ...]:
    """List every site of one part of a base model, in module order; works on the meta device."""
    from torch import nn

    ops: tuple[tuple[tuple[type[nn.Module], ...], Op], ...] = (
        ((nn.Linear,), "linear"),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
        ((nn.LayerNorm, nn.GroupNorm), "norm"),
        ((nn.Embedding,), "embedding"),
    )
    sites: list[Site] = []
    for path, module in root.named_modules():
        op: Op | None = next((op for kinds, op in ops if isinstance(module, kinds)), None)
        if op is None:
            continue
        path = path.removeprefix(WRAPPER)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None:
            sites.append(Site(part, path, op, tuple(cast("Tensor", weight).shape)))
        if bias is not None:
            sites.append(Site(part, path, "bias", tuple(cast("Tensor", bias).shape), "bias"))
    return tuple(sites)


def locate(parts: "Mapping[str, nn.Module]", site: Site) -> "nn.Module":
    """Return the module that owns a site. Raises `DeltaError` when the base has no such module or another shape there."""
    root = parts.get(site.part)
    if root is None:
        raise DeltaError(f'{site} names the part "{site.part}"', expected="one of " + ", ".join(parts))
    module = _submodule(root, site.module) or _submodule(root, WRAPPER + site.module)
    if module is None:
        raise DeltaError(f"{site}: the base has no such module", fix="the delta belongs to another family of base models")
    # Where diffusers has put a LoRA of its own, peft's wrapper stands in the layer's place.
    module = cast("nn.Module", getattr(module, "base_layer", module))
    tensor = getattr(module, site.tensor, None)
    if tensor is None or tuple(tensor.shape) != site.shape:
        found = "nothing" if tensor is None else "x".join(map(str, tensor.shape))
        raise DeltaError(f"{site}: the base has {found} there", fix="use the delta with the base it was trained on")
    return module


def _submodule(root: "nn.Module", path: str) -> "nn.Module | None":
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def choose(
    sites: Iterable[Site],
    patterns: Sequence[str],
    presets: Mapping[str, Sequence[str]],
    ops: Iterable[Op] = ("linear", "conv"),
) -> tuple[Site, ...]:
    """Choose sites by presets and glob patterns, in the base's order.

    A pattern is a preset's name or a glob (`*` crosses dots) matched against `part.module` and `part.module.tensor`; a
    leading `-` takes matches away again. Only sites whose `op` is in `ops` are eligible. Raises `ConfigError` when a
    pattern matches nothing, naming near ones.
    """
    eligible = [s for s in sites if s.op in tuple(ops)]
    globs: list[tuple[bool, str]] = []
    for pattern in patterns:
        minus, name = pattern.startswith("-"), pattern.removeprefix("-")
        globs += [(minus != g.startswith("-"), g.removeprefix("-")) for g in presets.get(name, (name,))]
    chosen: dict[str, Site] = {}
    for minus, glob in globs:
        hits = [s for s in eligible if fnmatchcase(f"{s.part}.{s.module}", glob) or fnmatchcase(s.name, glob)]
        if not hits and glob in patterns:
            names = [f"{s.part}.{s.module}" for s in eligible]
            raise ConfigError(
                f'site pattern "{glob}" matches none of the {len(eligible)} eligible layers',
                fix=nearest(glob, [*presets, *names]) if eligible else "",
            )
        for site in hits:
            chosen.pop(site.name, None) if minus else chosen.setdefault(site.name, site)
    if not chosen:
        raise ConfigError(
            f"site patterns {list(patterns)} choose no layer", expected="at least one", fix=nearest("", list(presets))
        )
    return tuple(s for s in eligible if s.name in chosen)
