"""What the contract tests stand on: tiny bases, tolerances, and the memory of what a base was like before a test."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from vgm_peft.delta import Delta, Patch
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.family import Base, Condition, Query
from vgm_peft.site import Op, Site, find_sites

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference allowed, relative to the largest value compared. One table for all; raising one needs a reason."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest expected value."""
    scale = expected.detach().double().abs().max().clamp_min(1e-300)
    return float((found.detach().double() - expected.detach().double()).abs().max() / scale)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    assert found.shape == expected.shape
    assert difference(found, expected) <= TOLERANCE[dtype or expected.dtype]


def draw(delta: Delta | Patch, seed: int = 1, size: float = 0.3) -> None:
    """Give every parameter random values, so that no change is zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in delta.parameters() if isinstance(delta, Delta) else delta.named_parameters():
        with torch.no_grad():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class State:
    """Everything of a base that attaching must leave alone: values, storages, names, classes, hooks, attributes."""

    values: dict[str, Tensor]
    storages: dict[str, int]
    modules: dict[str, tuple[type, int, tuple[str, ...]]]

    @classmethod
    def of(cls, parts: dict[str, nn.Module]) -> "State":
        values: dict[str, Tensor] = {}
        storages: dict[str, int] = {}
        modules: dict[str, tuple[type, int, tuple[str, ...]]] = {}
        for part, root in parts.items():
            for name, tensor in root.state_dict().items():
                values[f"{part}.{name}"], storages[f"{part}.{name}"] = tensor.clone(), tensor.data_ptr()
            for name, module in root.named_modules():
                hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
                modules[f"{part}.{name}"] = type(module), hooks, tuple(sorted(module.__dict__))
        return cls(values, storages, modules)

    def check(self, parts: dict[str, nn.Module]) -> None:
        now = State.of(parts)
        assert list(now.values) == list(self.values)
        assert all(torch.equal(now.values[k], v) for k, v in self.values.items())
        assert now.storages == self.storages
        assert now.modules == self.modules


def tiny_eye() -> nn.Module:
    """A CLIP image encoder of toy size: pictures of 32 pixels, an embedding of 20 values, hidden states of 24."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=20, image_size=32, patch_size=8))


@cache
def base_of(family: str, dtype: torch.dtype = torch.float32) -> Base:
    """A tiny base, made once for all tests: those that change it must change it back."""
    pipe = FAMILIES[family].tiny()
    pipe.register_modules(image_encoder=tiny_eye())
    base = Base(pipe.to(dtype), FAMILIES[family], "tiny").freeze()
    base.pipe.set_progress_bar_config(disable=True)
    predict(base)  # transformers puts hooks of its own on text encoders at the first forward
    return base


def predict(base: Base, batch: int = 1) -> Tensor:
    """Run text encoders and denoiser once, on fixed inputs, through the family (so that every part's patches act)."""
    generator = torch.Generator().manual_seed(7)
    config = base.denoiser.config
    dtype = next(base.denoiser.parameters()).dtype
    condition: Condition = base.family.encode_prompt(base, ["a red duck"] * batch)
    noisy = torch.randn(batch, config.in_channels, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * batch)
    t = torch.full((batch,), 500)
    return base.family.predict(base, Query(noisy, t, condition.to(dtype=dtype), sizes))


@dataclass(frozen=True)
class NoOptions:
    """A toy has none."""


class Gain(Patch):
    """A change that depends on the base: dW = g * W, on anything."""

    kind: ClassVar[str] = "gain"
    Options: ClassVar[type] = NoOptions
    ops: ClassVar[frozenset[Op]] = frozenset({"linear", "conv", "norm", "embedding", "bias"})
    examples: ClassVar[tuple[NoOptions, ...]] = (NoOptions(),)
    base_free = False

    def __init__(self, site: Site, options: NoOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.g = nn.Parameter(torch.full((), 0.5))

    def change(self, base: Tensor) -> Tensor:
        return self.g * base.to(self.g.dtype)


def tiny_net() -> nn.Sequential:
    """Two linear layers, always of the same values."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).double().requires_grad_(False)


def delta_of(net: nn.Module, method: type[Patch], seed: int = 1) -> Delta:
    """A delta with random values on the linear layers of a net of that name."""
    sites = [s for s in find_sites("net", net) if s.op == "linear"]
    delta = Delta.fit("any", method, sites, method.examples[0]).to(dtype=torch.float64).train(False)
    draw(delta, seed)
    return delta


def sites_for(method: type[Patch], base: Base) -> list[Site]:
    """The linear layers of a denoiser, or what a method for other things can change of it."""
    ops = {"linear"} & method.ops or method.ops
    return [s for s in base.sites if s.part == base.family.denoiser and s.op in ops]
