"""Reading what peft saves: `adapter_model.safetensors` with an `adapter_config.json` beside it, in a folder.

Tensors are named from the network's root, `base_model.model.<path>.<suffix>`; nothing says which part of a pipeline that
network was, so it is the part that has all the modules, or the one that the folder is called by. The configuration holds
what the tensors leave open: alphas, the exact or truncated form of a rotation, seeds. The adapters of several parts of one
pipeline are read together, for only together do they tell the family.

| peft | read as |
|---|---|
| LoRA, with rsLoRA, DoRA, patterns, `lora_bias` | that |
| LoHa, LoKr | that, the scale alpha / r in it |
| OFT, BOFT, HRA | that, on the input side; HRA by Gram and Schmidt too |
| IA3 | that; where it scales outputs, the bias too, which takes the base |
| VeRA | the LoRA that it is with the matrices in the file |
| FourierFT, C3A | that |
| LN tuning, `bias=`, `modules_to_save` | differences: whole values are in the file, so it takes the base |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft.delta import Delta
from vgm_peft.errors import DeltaError
from vgm_peft.family import Base, Place
from vgm_peft.formats import foreign
from vgm_peft.formats.books import Book, Reading, assemble, choose_book
from vgm_peft.formats.canonical import read_values
from vgm_peft.formats.format import Format
from vgm_peft.formats.names import ALPHA, DOWN, MAGNITUDE, UP, by_module, cut
from vgm_peft.formats.peft_folder import spell
from vgm_peft.formats.placing import place
from vgm_peft.formats.settings import Settings, parse
from vgm_peft.formats.vocabulary import Suffixes
from vgm_peft.header import Header, listed, open_plain, shown
from vgm_peft.site import Site, locate
from vgm_peft.socket import untouched

ROOT = "base_model."
CONFIG = "adapter_config.json"
LARGEST = 10_000_000
"""Bytes of a configuration."""
VALUES = ("weight", "bias")
"""What whole values of a tensor are called, after the module."""


def recognises(header: Header) -> bool:
    """Say whether names are those of a network that peft has wrapped."""
    return any(name.startswith(ROOT) for name in header.tensors)


def read(header: Header, base: Base | None = None) -> Delta:
    """Read an adapter. Raises `DeltaError` when one tensor is not understood, or its kind is none of ours."""
    if not (header.path.parent / CONFIG).is_file() and _tells_alphas(header):
        return foreign.read(header, base)
    adapter, where = _open(header, base), str(header.path)
    reading = choose_book(adapter.modules, base, where, root=header.path.parent.name)
    return assemble(reading.book, adapter.groups(reading), where, header.metadata)


def read_parts(headers: Mapping[str, Header], base: Base | None, where: str) -> Delta:
    """Read the adapters of several parts as one delta. Raises `DeltaError` as `read`, and when they fit no one family."""
    adapters = {part: _open(header, base) for part, header in headers.items()}
    modules = {f"{part}.{name}": found for part, one in adapters.items() for name, found in one.modules.items()}
    book = choose_book(modules, base, where).book
    groups = {place: found for part, one in adapters.items() for place, found in one.groups(Reading(book, part)).items()}
    said = [header.metadata.items() for header in headers.values()]
    return assemble(book, groups, where, dict(item for item in said[0] if all(item in others for others in said)))


def _tells_alphas(header: Header) -> bool:
    return all(ALPHA in tensors for tensors in by_module(dict.fromkeys(header.tensors, torch.zeros(1, 1)), header).values())


def _open(header: Header, base: Base | None) -> "_Adapter":
    """Read an adapter's configuration and tensors."""
    config = header.path.parent / CONFIG
    if not config.is_file():
        raise DeltaError(
            f"{header.path}: a peft adapter ({listed(list(header.tensors))}) whose alpha is in its {CONFIG}",
            expected=f"{config}",
            fix="keep the two together, as peft saves them",
        )
    with open_plain(config) as file:
        table = parse(file.read(LARGEST).decode("utf-8", "replace"), str(config))
    kind = _KINDS.get(str(table.get("peft_type")))
    if kind is None:
        raise DeltaError(
            f"{config}: an adapter of peft's kind {shown(str(table.get('peft_type')))}",
            expected="one of " + ", ".join(_KINDS),
            fix="merge it with peft and extract the difference",
        )
    tensors = read_values(header)
    inner = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    shared = {name: inner.pop(name) for name in [n for n in inner if n.startswith(ROOT)]}
    values = {name: tensor for name, tensor in inner.items() if cut(name) is None and name.endswith(VALUES)}
    named = by_module({name: tensor for name, tensor in inner.items() if name not in values}, header)
    return _Adapter(header, base, Settings(table, str(config)), kind, named, _whole(values), shared)


@dataclass(frozen=True)
class _Layer:
    """One module of an adapter, as its kind's reader sees it."""

    tensors: Suffixes
    module: str
    sites: Mapping[str, Site]
    """Its sites in the base, by tensor name."""
    bias: Tensor | None
    """The base's bias, where a base is at hand."""
    shared: Mapping[str, Tensor]
    """Tensors of the whole adapter."""


@dataclass(frozen=True)
class _Adapter:
    header: Header
    base: Base | None
    settings: Settings
    kind: "_Kind"
    named: Mapping[str, Suffixes]
    """The kind's own tensors by module."""
    whole: Mapping[str, Suffixes]
    """The base's tensors that it holds as a whole, by module."""
    shared: Mapping[str, Tensor]
    """Tensors of the whole adapter."""

    @property
    def modules(self) -> dict[str, Suffixes]:
        """All modules, with the tensors that tell their shapes."""
        return {**{name: {} for name in self.whole}, **self.named}

    def groups(self, reading: Reading) -> dict[Place, Suffixes]:
        """Return the tensors of every module of ours, translated by their kind."""
        groups: dict[Place, Suffixes] = {}
        for name, found in place(self.named, reading, str(self.header.path)).items():
            odd = [suffix for suffix in found if not suffix.startswith(self.kind.names)]
            if odd:
                raise DeltaError(f"{self.header.path}: {'.'.join(name)}: {listed(odd)} is not of the kind that {CONFIG} says")
            groups[name] = self.kind.translated(self.settings, self._layer(reading.book, name, found))
        for name, found in place(self.whole, reading, str(self.header.path)).items():
            mine = groups.setdefault(name, {})
            for suffix, change in self._differences(reading.book, name, found).items():
                mine[suffix] = mine[suffix] + change if suffix in mine else change  # `lora_bias` and `bias` add
        unused = [name for name in self.shared if name.partition(".")[2] not in ("vera_A", "vera_B")]
        if unused:
            raise DeltaError(f"{self.header.path}: {len(unused)} tensors belong to nothing ({listed(unused)})", expected="none")
        return groups

    def _layer(self, book: Book, name: Place, tensors: Suffixes) -> _Layer:
        sites = book.sites[name]
        bias = self._value(sites["bias"]) if self.base is not None and "bias" in sites else None
        return _Layer(tensors, name[1], sites, bias, self.shared)

    def _value(self, site: Site) -> Tensor:
        """Return the base's own values at a site, in float32."""
        if self.base is None:
            raise DeltaError(f"{self.header.path}: holds the whole {site.tensor} of {site}", fix="name the base with --base")
        return untouched(locate(self.base.parts, site), site.tensor).detach().float().cpu()

    def _differences(self, book: Book, name: Place, tensors: Suffixes) -> Suffixes:
        out: Suffixes = {}
        for tensor, found in tensors.items():
            site = book.sites[name].get(tensor)
            own = None if site is None else self._value(site)
            if own is None or own.shape != found.shape:
                raise DeltaError(
                    f"{self.header.path}: {'.'.join(name)}.{tensor} {tuple(found.shape)} fits nothing in {book.family.name}"
                )
            suffix = "diff_b" if tensor == "bias" else "diff"
            out[suffix] = found.float() - own
        return out


def _whole(values: Mapping[str, Tensor]) -> dict[str, Suffixes]:
    """Sort whole values by module, without what peft's wrappers add to its name."""
    named: dict[str, Suffixes] = {}
    for name, tensor in values.items():
        module, _, suffix = name.rpartition(".")
        module = module.removesuffix(".ln_tuning_layers").removesuffix(".base_layer").removesuffix(".modules_to_save")
        named.setdefault(module, {})[suffix] = tensor
    return named


def _pair(settings: Settings, layer: _Layer) -> Suffixes:
    """LoRA, LoHa, LoKr: the scale is in the settings."""
    return foreign.plain(settings.scaled(layer.module, layer.tensors))


def _as_it_is(settings: Settings, layer: _Layer) -> Suffixes:
    return layer.tensors


def _rotation(settings: Settings, layer: _Layer) -> Suffixes:
    """OFT: by a series of so many terms, or exactly."""
    series = settings.table.get("use_cayley_neumann", True)
    terms = settings.number("num_cayley_neumann_terms", 5) if series else 0
    return {**layer.tensors, "oft_terms": torch.tensor(int(terms))}


def _reflections(settings: Settings, layer: _Layer) -> Suffixes:
    """HRA: reflections at vectors as they are, or made orthogonal to one another first."""
    u = layer.tensors.get("hra_u")
    if not settings.table.get("apply_GS") or u is None or u.dim() != 2:
        return layer.tensors
    return {**layer.tensors, "hra_u": torch.linalg.qr(u.double()).Q.float()}


def _scaling(settings: Settings, layer: _Layer) -> Suffixes:
    """(IA)^3: peft keeps the factor, we what is added to 1; where outputs are scaled, so is the bias."""
    factor = layer.tensors.get("ia3_l")
    weight = layer.sites.get("weight")
    if set(layer.tensors) != {"ia3_l"} or factor is None or weight is None:
        return layer.tensors
    by_input = _is_feedforward(settings, layer.module) if weight.op == "conv" else factor.shape[:1] == (1,)
    out = {"weight": factor.flatten() - 1, "on_input": torch.tensor(int(by_input))}
    if by_input or "bias" not in layer.sites:
        return out
    if layer.bias is None:
        raise DeltaError(
            f"{settings.where}: {layer.module}: peft's IA3 scales the layer's bias too, which is the base's",
            fix="name the base with --base",
        )
    return {**out, "diff_b": out["weight"] * layer.bias}


def _is_feedforward(settings: Settings, module: str) -> bool:
    names = settings.table.get("feedforward_modules")
    return isinstance(names, list) and any(f".{module}".endswith(f".{name}") for name in names)


def _frozen(settings: Settings, layer: _Layer) -> Suffixes:
    """VeRA: the frozen matrices are those of the widest layers, of which each takes its own rows and columns."""
    down, up = (layer.shared.get(f"{ROOT}vera_{half}") for half in "AB")
    if down is None or up is None:
        raise DeltaError(
            f"{settings.where}: a VeRA without its frozen matrices", fix="save it with save_projection = true, peft's default"
        )
    b, d = layer.tensors.get("vera_lambda_b"), layer.tensors.get("vera_lambda_d")
    weight = layer.sites.get("weight")
    if b is None or d is None or weight is None or weight.op != "linear" or len(layer.tensors) != 2:
        return layer.tensors
    rows, columns = len(b), weight.columns
    if min(down.dim(), up.dim()) < 2 or d.shape != down.shape[:1] or rows > len(up) or columns > down.shape[1]:
        raise DeltaError(f"{settings.where}: {layer.module}: its vectors do not fit the frozen matrices")
    return {DOWN: d[:, None] * down[:, :columns], UP: b[:, None] * up[:rows]}


def _spectrum(settings: Settings, layer: _Layer) -> Suffixes:
    """FourierFT: where the values stand is drawn from a seed."""
    seed, scale = settings.number("random_loc_seed", 777), settings.number("scaling", 150.0)
    return {**layer.tensors, "fourierft_seed": torch.tensor(int(seed)), "fourierft_scaling": torch.tensor(scale)}


@dataclass(frozen=True)
class _Kind:
    names: tuple[str, ...]
    """How the suffixes of its tensors begin."""
    translated: Callable[[Settings, _Layer], Suffixes] = _as_it_is
    """Puts one of its layers into our words."""


_KINDS: Mapping[str, _Kind] = {
    "LORA": _Kind(("lora_", MAGNITUDE), _pair),
    "LOHA": _Kind(("hada_",), _pair),
    "LOKR": _Kind(("lokr_",), _pair),
    "OFT": _Kind(("oft_R",), _rotation),
    "BOFT": _Kind(("boft_",)),
    "HRA": _Kind(("hra_u",), _reflections),
    "IA3": _Kind(("ia3_l",), _scaling),
    "VERA": _Kind(("vera_lambda_",), _frozen),
    "FOURIERFT": _Kind(("fourierft_spectrum",), _spectrum),
    "C3A": _Kind(("c3a_kernel",)),
    "LN_TUNING": _Kind(()),
}
"""peft's word for a kind -> how it is read."""


FORMAT = Format(
    "peft", "peft: LoRA, DoRA and its other kinds, a folder for each part", recognises, read, spell, by_part=True, folder=True
)
