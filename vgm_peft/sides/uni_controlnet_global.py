"""Uni-ControlNet's global adapter: a picture as four more words of the prompt (Zhao et al. 2023, arXiv 2305.16322).

Two gated feed-forward layers turn the embedding of a frozen CLIP encoder into tokens, which are put behind those of the text,
times the strength (section 3.3, eq. 3). Every cross-attention reads the longer prompt, and so does every ControlNet beside.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vgm_peft.desk import spread
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.folders import replace_file
from vgm_peft.header import listed, open_header
from vgm_peft.side import Features, Side, Speaker, load_file, question
from vgm_peft.sides.image_encoder import Eye, Need, find_eye
from vgm_peft.words import text_embeddings

PREFIX = "global_adapter."
TOKENS = 4
"""Of the picture; the authors' code has no other number."""
SHAPES: Mapping[str, int] = {"norm1.weight": 1, "ff2.net.2.weight": 2}
"""Tensors that tell how wide embedding and tokens are, and how many axes they have."""


@dataclass(frozen=True, kw_only=True)
class UniControlNetGlobalOptions:
    """What may be chosen when one is made."""

    encoder: str = ""
    """Folder or hub id of the CLIP image encoder; left out: the base's own."""


class GlobalAdapter(nn.Module):
    """From an embedding of E values to tokens as wide as those of the text; E = D gives the authors' shapes."""

    def __init__(self, embeds: int, context: int, eye: Eye | None = None) -> None:
        """For embeddings of `embeds` values and tokens of `context`."""
        from diffusers.models.attention import FeedForward

        super().__init__()
        self.ff1 = FeedForward(embeds, 2 * embeds, mult=4, dropout=0.1, activation_fn="geglu")
        self.ff2 = FeedForward(2 * embeds, TOKENS * context, mult=4, dropout=0.3, activation_fn="geglu")
        self.norm1, self.norm2 = nn.LayerNorm(embeds), nn.LayerNorm(2 * embeds)
        self.eye = eye
        """What it looks through; no part of it."""

    def forward(self, embeds: Tensor) -> Tensor:
        """Return tokens (B, 4, D) of embeddings (B, E)."""
        hidden = self.ff1(self.norm1(embeds.to(self.norm1.weight.dtype)))
        return self.ff2(self.norm2(hidden)).unflatten(-1, (TOKENS, -1))


class UniControlNetGlobal(Side):
    """More tokens in the prompt of a U-Net."""

    name: ClassVar[str] = "uni-controlnet-global"
    Options: ClassVar[type] = UniControlNetGlobalOptions
    paired: ClassVar[bool] = False
    zero: ClassVar[bool] = False

    def create(self, base: Base, options: object = None, seed: int = 0) -> GlobalAdapter:
        """Draw all of it from `seed`, as in the authors' code. Raises `BaseModelError` when there is no image encoder."""
        eye = find_eye(base, options.encoder if isinstance(options, UniControlNetGlobalOptions) else "")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = GlobalAdapter(eye.need.embeds, _context(base), eye)
        return network.to(base.device, torch.float32).requires_grad_(True).train()

    def recognises(self, place: Path) -> bool:
        """Say whether a safetensors file holds tensors of the authors' `global_adapter` and of no other."""
        if not place.is_file():
            return False
        names = open_header(place).tensors
        return bool(names) and all(name.startswith(PREFIX) for name in names)

    def load(self, place: Path, base: Base) -> GlobalAdapter:
        """Load a file of the authors' names, frozen, on the base's device and dtype.

        Raises `DeltaError` when it was made for tokens of another width, `BaseModelError` without the image encoder that it
        needs: the base's own, or a folder `image_encoder` beside the file.
        """
        header = open_header(place)
        shapes = {name.removeprefix(PREFIX): entry.shape for name, entry in header.tensors.items()}
        if lacking := [name for name, axes in SHAPES.items() if len(shapes.get(name, ())) != axes]:
            raise DeltaError(f"{place}: {PREFIX}{lacking[0]} is missing or of another shape", fix="fetch or copy it anew")
        embeds, context = shapes["norm1.weight"][0], shapes["ff2.net.2.weight"][0] // TOKENS
        if context != _context(base):
            raise DeltaError(
                f"{place}: a uni-controlnet-global made for tokens of {context} values",
                expected=f"{_context(base)}, as {base.source} ({base.family.name}) has them",
                fix="use it with the family of base models it was made for",
            )
        with torch.device("meta"):
            network = GlobalAdapter(embeds, context)
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if wrong := sorted({name for name, _ in wanted.items() ^ shapes.items()}):
            raise DeltaError(
                f"{place}: {len(wrong)} tensors are missing, left over or of another shape ({listed(wrong)})",
                fix="fetch or copy it anew",
            )
        network.eye = find_eye(base, need=Need.told(header.metadata, embeds=embeds), near=place.parent)
        network.load_state_dict({name.removeprefix(PREFIX): t for name, t in load_file(place).items()}, assign=True)
        return network.to(base.device, next(base.denoiser.parameters()).dtype).requires_grad_(False).eval()

    def save(self, network: nn.Module, place: Path) -> Path:
        """Write `place.safetensors` in the authors' names."""
        place = place if place.suffix == ".safetensors" else place.with_name(f"{place.name}.safetensors")
        tensors = {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        with replace_file(place, owned=self.recognises) as aside:
            save_file(tensors, aside, _eye(network).need.metadata())
        return place

    def read(self, base: Base, network: nn.Module, pictures: Tensor) -> Features:
        """Tokens of what the encoder sees in pictures of any size, from the square in the middle."""
        return (network(_eye(network).embeds(pictures)),)

    def silence(self, base: Base, network: nn.Module, features: Features) -> Features:
        """Those of an embedding of zeros (not: no tokens)."""
        return (network(_eye(network).no_embeds).expand(len(features[0]), -1, -1),)

    def join(self, base: Base, network: nn.Module, speaker: Speaker) -> list[RemovableHandle]:
        """One hook before all others: whatever else reads the prompt reads the longer one."""
        widths = tuple(embedding.embedding_dim for embedding in text_embeddings(base.pipe).values())

        def lengthen(
            unet: nn.Module, args: tuple[Any, ...], told: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            noisy, t = question(args, told)
            heard = speaker.heard(len(noisy), t)
            if heard is None:
                return None
            if heard.mask is not None:
                raise ConfigError(f"a mask for a {self.name}", expected="none: its tokens are read by every place")
            text: Tensor = told["encoder_hidden_states"] if len(args) < 3 else args[2]
            tokens = heard.strength * heard.features[0].to(text.dtype)
            layers = text.shape[-1] // tokens.shape[-1]
            if layers > 1:  # with layer-wise words there is a prompt for each cross-attention, side by side
                tokens = spread(tokens, layers, widths)
            longer = torch.cat([text, tokens], dim=1)
            if len(args) > 2:
                return (*args[:2], longer, *args[3:]), told
            return args, {**told, "encoder_hidden_states": longer}

        return [base.denoiser.register_forward_pre_hook(lengthen, with_kwargs=True, prepend=True)]

    def facts(self, network: nn.Module) -> dict[str, object]:
        """The digest of its image encoder."""
        return {"encoder": _eye(network).need.digest}


def _context(base: Base) -> int:
    """How wide a token of the text is."""
    return cast(Any, base.denoiser.config).cross_attention_dim


def _eye(network: nn.Module) -> Eye:
    eye = cast(GlobalAdapter, network).eye
    if eye is None:
        raise ConfigError("a uni-controlnet-global without its image encoder", fix="make it with create or load")
    return eye
