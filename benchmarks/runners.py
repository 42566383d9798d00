"""What takes part in `methods.py`: one U-Net each, with a method of this package, of peft or of LyCORIS on it, and its step."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from cases import Options
from step import Span
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.attachment import Attachment
from vgm_peft.config import build
from vgm_peft.delta import Delta
from vgm_peft.deltas import method_named
from vgm_peft.family import Base
from vgm_peft.site import Site, choose

Batches = list[tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass
class Runner:
    """One U-Net with something on it, and the step that trains that."""

    name: str
    unet: nn.Module
    trained: list[nn.Parameter]
    step: Callable[[], float]
    spans: list[Span] = field(default_factory=list[Span])
    held: int = 0
    """Bytes held at the end of a forward."""

    @property
    def values(self) -> int:
        return sum(p.numel() for p in self.trained)


Attach = Callable[[nn.Module], list[nn.Parameter]]
"""Put something on a U-Net and return what is trained of it."""


def runner(name: str, base: Base, batches: Batches, attach: Attach) -> Runner:
    """Copy the U-Net, attach, and make the step, the same for all but for what is attached."""
    unet = deepcopy(cast(nn.Module, base.denoiser)).train().requires_grad_(False)
    trained = attach(unet)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    turn, saved = iter(range(10**9)), _Saved(unet)

    def loss() -> Tensor:
        x0, hidden, noise, t = batches[next(turn) % len(batches)]
        noisy = base.process.corrupt(x0, noise, t)
        prediction = cast(Any, unet)(noisy, t, encoder_hidden_states=hidden, return_dict=False)[0]
        return F.mse_loss(prediction.float(), base.process.target(x0, noise, t).float())

    def step() -> float:
        value = loss()
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(value.detach())

    out = Runner(name, unet, trained, step)
    loss()  # what differs in a first forward is not counted
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        value = loss()
    out.held = saved.bytes + _bytes(unet, trained)
    value.backward()
    optimiser.zero_grad()
    return out


class _Saved:
    """Counts the storages that autograd saves, each once, but for the model's own parameters and buffers."""

    def __init__(self, unet: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *unet.buffers())}
        self._seen: set[int] = set()
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._own and place not in self._seen:
            self._seen.add(place)  # saved, so alive until the backward: no other storage can get this place
            self.bytes += storage.nbytes()
        return tensor


def _bytes(unet: nn.Module, trained: Sequence[nn.Parameter]) -> int:
    """The U-Net with all that is on it, and gradient and two moments of what is trained."""
    tensors = {id(t): t for t in (*unet.parameters(), *unet.buffers(), *trained)}
    return sum(t.untyped_storage().nbytes() for t in tensors.values()) + 3 * sum(4 * p.numel() for p in trained)


def ours(sites: Sequence[Site], kind: str, options: Options) -> Attach:
    """A method of this package."""
    method = method_named(kind)

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        delta = Delta.fit("sd15", method, sites, build(method.Options, options)).start({"unet": unet})
        Attachment({"unet": unet}, delta)
        return [p for _, p in delta.parameters() if p.requires_grad]

    return attach


def of_peft(sites: Sequence[Site], config: str, options: Options) -> Attach:
    """The same through peft."""

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        import peft

        modules = list(dict.fromkeys(site.module for site in sites))
        put = peft.get_peft_model if config == "VeraConfig" else lambda model, told: peft.inject_adapter_in_model(told, model)
        put(cast(Any, unet), getattr(peft, config)(target_modules=modules, **options))  # either changes `unet` in place
        return [p for p in unet.parameters() if p.requires_grad]

    return attach


def of_lycoris(sites: Sequence[Site], place: str, options: Options) -> Attach:
    """The same through LyCORIS' modules, one a layer, which take the place of the layer's forward."""
    import importlib

    def attach(unet: nn.Module) -> list[nn.Parameter]:
        file, name = place.split(".")
        kind = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
        trained: list[nn.Parameter] = []
        for module in dict.fromkeys(site.module for site in sites):
            theirs = kind(module.replace(".", "_"), unet.get_submodule(module), 1.0, **options).train()
            theirs.apply_to()
            trained += [p for p in theirs.parameters() if p.requires_grad]
        return [p.requires_grad_() for p in dict.fromkeys(trained)]

    return attach


def equal_lora(base: Base, sites: Sequence[Site], values: int) -> tuple[list[Site], int]:
    """The sites and the rank (1 up to the narrowest layer's side) at which a LoRA trains about so many values."""
    if any(site.op not in ("linear", "conv") for site in sites):
        sites = choose(base.sites, ["attention"], base.family.presets)
    per_rank = sum(site.rows + site.columns for site in sites)
    most = min(min(site.rows, site.columns) for site in sites)
    return list(sites), min(max(1, round(values / per_rank)), most)
