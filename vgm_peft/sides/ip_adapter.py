"""IP-Adapter: a picture as a prompt, by cross-attention of its own (Ye et al. 2023, arXiv 2308.06721).

Tokens of the picture are read by keys and values that stand beside those of the text (section 3.2.2, eq. 4 and 5):
`out = Attn(Q, K, V) + s * Attn(Q, K', V')`, then the frozen output projection. Nobody's attention processor is touched: a
hook keeps the query, another adds to what goes into the output projection, whatever computed it. Layer by layer it may be
heard differently: InstantStyle (Wang et al. 2024, arXiv 2404.02733). The file is that of the authors' code.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.hooks import RemovableHandle

from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import replace_file
from vgm_peft.header import Header, open_header
from vgm_peft.side import Ear, Features, Side, Speaker, load_file
from vgm_peft.sides.image_encoder import Eye, Need, find_eye
from vgm_peft.sides.image_tokens import HEAD, TOKENS, ImageProjection, Resampler, attend

CHOICES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "sdxl": {"style": {"up_blocks.0.attentions.1.*": 1.0}, "layout": {"down_blocks.2.attentions.1.*": 1.0}},
    "sd15": {
        "style": dict.fromkeys(("down_blocks.[01].*", "up_blocks.[23].*", "mid_block.*"), 1.0),
        "layout": {"down_blocks.2.attentions.0.*": 0.25, "down_blocks.2.attentions.1.*": 1.0},
    },
}
"""Which layers carry style and which layout: of SDXL as InstantStyle found them, of SD1.5 as users settled on them."""


@dataclass(frozen=True, kw_only=True)
class IPAdapterOptions:
    """What may be chosen when one is made."""

    network: Literal["base", "plus"] = "base"
    """`base`: four tokens of the picture's embedding; `plus`: sixteen, read from its hidden states, nearer to the picture."""
    encoder: str = ""
    """Folder or hub id of the CLIP image encoder; left out: the base's own."""


class Adapter(nn.Module):
    """The image projection, and keys and values for every cross-attention; its state dict is the authors' file."""

    def __init__(self, image_proj: ImageProjection | Resampler, texts: Mapping[str, Any], eye: Eye | None = None) -> None:
        """For cross-attentions by their names in the denoiser, in its own order: down, up, middle. Keys and values have no
        values yet (device meta)."""
        super().__init__()
        self.image_proj = image_proj
        shapes: list[tuple[int, int]] = [attention.to_k.weight.shape for attention in texts.values()]
        with torch.device("meta"):
            pairs = [nn.ModuleDict({n: nn.Linear(s[1], s[0], bias=False) for n in ("to_k_ip", "to_v_ip")}) for s in shapes]
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): pair for i, pair in enumerate(pairs)})
        self.places = {name: shape[0] for name, shape in zip(texts, shapes, strict=True)}
        """Names of the cross-attentions, and how wide their keys are."""
        self.eye = eye
        """What it looks through; no part of it."""

    @property
    def plus(self) -> bool:
        """Whether it reads the hidden states of a picture instead of its embedding."""
        return isinstance(self.image_proj, Resampler)

    def forward(self, seen: Tensor) -> Features:
        """Return keys and values (B, T, sum of widths) for all layers side by side, of embeddings or of hidden states."""
        tokens = self.image_proj(seen)
        pairs = cast("list[nn.ModuleDict]", list(self.ip_adapter.values()))
        return tuple(torch.cat([pair[name](tokens) for pair in pairs], dim=-1) for name in ("to_k_ip", "to_v_ip"))


class IPAdapter(Side):
    """Decoupled cross-attention beside a U-Net."""

    name: ClassVar[str] = "ip-adapter"
    Options: ClassVar[type] = IPAdapterOptions
    paired: ClassVar[bool] = False
    zero: ClassVar[bool] = False
    fresh: ClassVar[tuple[str, ...]] = ("image_proj.*",)

    def create(self, base: Base, options: object = None, seed: int = 0) -> Adapter:
        """Keys and values begin as copies of the text's, as in the authors' code; the projection is drawn from `seed`.

        Raises `BaseModelError` when there is no image encoder.
        """
        chosen = options if isinstance(options, IPAdapterOptions) else IPAdapterOptions()
        eye, context = find_eye(base, chosen.encoder), _context(base.denoiser)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            plus = chosen.network == "plus"
            projection = Resampler(eye.need.states, context) if plus else ImageProjection(eye.need.embeds, context)
        texts = cross_attentions(base.denoiser)
        network = Adapter(projection.float(), texts, eye)
        for pair, text in zip(cast("Iterable[Any]", network.ip_adapter.values()), texts.values(), strict=True):
            for copy, source in ((pair["to_k_ip"], text.to_k), (pair["to_v_ip"], text.to_v)):
                copy.weight = nn.Parameter(source.weight.detach().to(torch.float32, copy=True))
        return network.to(base.device).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether a safetensors file holds `image_proj` and `ip_adapter`."""
        if not place.is_file():
            return False
        names = open_header(place).tensors
        return all(any(name.startswith(part) for name in names) for part in ("image_proj.", "ip_adapter."))

    def load(self, place: Path, base: Base) -> Adapter:
        """Load a file of the authors' layout, base or Plus, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for another kind of base, `BaseModelError` without the image encoder it needs:
        the base's own, or a folder `image_encoder` beside the file.
        """
        header = open_header(place)
        with torch.device("meta"):
            network = Adapter(_projection(header), cross_attentions(base.denoiser))
        _check_fit(header, network, base)
        network.eye = find_eye(base, need=_need(header), near=place.parent)
        network.load_state_dict(load_file(place), assign=True)
        return network.to(base.device, next(base.denoiser.parameters()).dtype).requires_grad_(False).eval()

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write `place.safetensors` in the authors' layout, which diffusers' `load_ip_adapter` reads."""
        place = place if place.suffix == ".safetensors" else place.with_name(f"{place.name}.safetensors")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        with replace_file(place, owned=self.recognises) as aside:
            save_file(tensors, aside, _eye(network).need.metadata())
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Keys and values of what the encoder sees in pictures of any size, from the square in the middle."""
        look = _eye(network).states if cast(Adapter, network).plus else _eye(network).embeds
        return network(look(pictures))

    def silence(self, base: Base, network: nn.Module, features: Features) -> Features:
        """Those of no picture: of an embedding of zeros (not: of no tokens), or of the hidden states of a blank picture."""
        eye = _eye(network)
        unseen = eye.no_states if cast(Adapter, network).plus else eye.no_embeds
        return tuple(f.expand(len(features[0]), -1, -1) for f in network(unseen))

    def layers(self, base: Base, choice: str) -> Mapping[str, float] | None:
        """Return the layers of `style`, `layout`, or `style+layout`. Raises `ConfigError` for another choice."""
        if not choice:
            return None
        known = CHOICES.get(base.family.name, {})
        if unknown := sorted(set(choice.split("+")) - set(known)):
            raise ConfigError(f'layers "{unknown[0]}" of an IP-Adapter', expected=f"some of {', '.join(known)}, joined by +")
        return {glob: share for name in choice.split("+") for glob, share in known[name].items()}

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """The denoiser is listened to once a call; every cross-attention has its query kept, and its result added to."""
        ear, begin = Ear(base, speaker), 0
        hooks = [ear.hook]
        for name, width in cast(Adapter, network).places.items():
            layer: Any = base.denoiser.get_submodule(name)
            hearing = _Hearing(name, layer, ear, slice(begin, begin + width))
            hooks.append(layer.to_q.register_forward_hook(hearing.keep))
            # before whatever else acts on the projection's input: a LoRA on it reads what the projection reads
            hooks.append(layer.to_out[0].register_forward_pre_hook(hearing.add, prepend=True))
            begin += width
        return hooks

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Which variant it is, and the digest of its image encoder."""
        return {"variant": "plus" if cast(Adapter, network).plus else "base", "encoder": _eye(network).need.digest}


class _Hearing:
    """One cross-attention with a second one beside it."""

    def __init__(self, name: str, layer: Any, ear: Ear, at: slice) -> None:
        self.name, self.layer, self.ear, self.at = name, layer, ear, at
        self.query: Tensor | None = None

    def keep(self, to_q: nn.Module, args: tuple[Any, ...], query: Tensor) -> None:
        self.query = None if self.ear.heard is None else query

    def add(self, to_out: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        heard, query, self.query = self.ear.heard, self.query, None
        share = 0.0 if heard is None else heard.share(self.name)
        if heard is None or query is None or share == 0.0:
            return None
        keys, values = (f[..., self.at].to(query.dtype) for f in heard.features)
        said = attend(query, keys, values, query.shape[-1] // self.layer.heads, self.layer.scale)
        if heard.mask is not None:
            said = said * _on_grid(heard.mask, said.shape[1], self.ear.latents).to(said)
        return args[0] + share * said.to(args[0].dtype), *args[1:]


def _on_grid(mask: Tensor, tokens: int, latents: tuple[int, int]) -> Tensor:
    """Bring a mask (1, 1, P, Q) to the tokens of a layer, (1, L, 1), resized as diffusers does."""
    height, width = latents
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise DataError(f"a mask on a layer of {tokens} tokens", expected=f"halves of {latents[0]}x{latents[1]} latents")
    return interpolate(mask, (height, width), mode="bicubic").flatten(2).transpose(1, 2)


def cross_attentions(denoiser: nn.Module) -> dict[str, Any]:
    """The cross-attentions of a U-Net by name, in the order of its `attn_processors`, which numbers them in files: the middle
    last. Raises `DeltaError` when there are none."""
    names = [name.removesuffix(".processor") for name in cast(Any, denoiser).attn_processors]
    found: dict[str, Any] = {name: denoiser.get_submodule(name) for name in names if name.endswith(".attn2")}
    if not found:
        raise DeltaError(f"a {type(denoiser).__name__} without cross-attention", expected="a U-Net that reads prompts")
    return found


def _context(denoiser: nn.Module) -> int:
    """How wide a token of the text is."""
    return next(iter(cross_attentions(denoiser).values())).to_k.weight.shape[1]


def _eye(network: nn.Module) -> Eye:
    eye = cast(Adapter, network).eye
    if eye is None:
        raise ConfigError("an IP-Adapter without its image encoder", fix="make it with IPAdapter().create or load")
    return eye


def _projection(header: Header) -> ImageProjection | Resampler:
    """The projection whose tensors a file holds. Raises `DeltaError` for kinds that read faces."""
    shapes = {name.removeprefix("image_proj."): entry.shape for name, entry in header.tensors.items() if all(entry.shape)}
    if len(shapes.get("proj.weight", ())) == 2:
        rows, embeds = shapes["proj.weight"]
        return ImageProjection(embeds, rows // TOKENS)
    axes = {"latents": 3, "proj_in.weight": 2, "proj_out.weight": 2, "layers.0.0.to_q.weight": 2}
    if all(len(shapes.get(name, ())) == count for name, count in axes.items()):
        _, queries, width = shapes["latents"]
        heads = shapes["layers.0.0.to_q.weight"][0] // HEAD
        return Resampler(shapes["proj_in.weight"][1], shapes["proj_out.weight"][0], queries, width, heads)
    raise DeltaError(f"{header.path}: an IP-Adapter of another kind (FaceID, full face)", expected="a base or a Plus one")


def _need(header: Header) -> Need:
    """The encoder that a file needs."""
    if "image_proj.proj.weight" in header.tensors:
        return Need.told(header.metadata, embeds=header.tensors["image_proj.proj.weight"].shape[1])
    return Need.told(header.metadata, states=header.tensors["image_proj.proj_in.weight"].shape[1])


def _check_fit(header: Header, network: Adapter, base: Base) -> None:
    wants = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    has = {name: entry.shape for name, entry in header.tensors.items()}
    layers = {name for name in has if name.startswith("ip_adapter.")}
    if any(has[name] != wants.get(name) for name in layers) or network.image_proj.context != _context(base.denoiser):
        raise DeltaError(
            f"{header.path}: {len(layers) // 2} cross-attentions of other widths",
            expected=f"the {len(network.places)} that {base.source} ({base.family.name}) has",
            fix="use it with the family of base models it was made for",
        )
    if missing := sorted(wants.keys() - has.keys()) or sorted(has.keys() - wants.keys()):
        raise DeltaError(f"{header.path}: {len(missing)} tensors missing or unknown (first: {missing[0]})", fix="fetch it anew")
    if wrong := [name for name in wants if wants[name] != has[name]]:
        raise DeltaError(f"{header.path}: {wrong[0]} is {has[wrong[0]]}", expected=str(wants[wrong[0]]))
