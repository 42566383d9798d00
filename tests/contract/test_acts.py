"""The three ways in which a live patch acts, and their sum: whatever they are, y = (W + sum of s dW) x + b."""

from itertools import permutations
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import Gain, NoOptions, State, assert_close, draw
from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Acts, Call, Delta, Patch, apply_dense
from vgm_peft.deltas.lora import Lora, LoraOptions
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site, find_sites


class Weighing(Gain):
    """dW = g W, joining the weight."""

    kind: ClassVar[str] = "weighing"
    acts: Acts = "weight"


class Feeding(Gain):
    """dW = g W, acting on the input."""

    kind: ClassVar[str] = "feeding"
    acts: Acts = "input"

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        return self.g.to(x.dtype) * x


class Halving(Feeding):
    """dW = g W, of which half acts on the input and the rest at the output."""

    kind: ClassVar[str] = "halving"

    def feed(self, x: Tensor, base: Tensor) -> Tensor:
        return 0.5 * super().feed(x, base)

    def add_rest(self, output: Tensor, call: Call, strength: float) -> Tensor:
        return output + 0.5 * strength * self.g.to(call.x.dtype) * call.product(self.site)


class Scaling(Gain):
    """dW = g W, from the layer's own product; remembers whether that was at hand."""

    kind: ClassVar[str] = "scaling"
    free: bool = False

    def contribution(self, call: Call) -> Tensor:
        self.free = call.plain is not None
        return self.g.to(call.x.dtype) * call.product(self.site)


class Waning(Gain):
    """dW = g (1 - t / 1000) W."""

    kind: ClassVar[str] = "waning"
    timed: ClassVar[bool] = True
    time: float = 0.0

    def at(self, timestep: Tensor) -> None:
        self.time = float(timestep.reshape(-1)[0])

    def change(self, base: Tensor) -> Tensor:
        return (1 - self.time / 1000) * super().change(base)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (2, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
}


class Root(nn.Module):
    """A denoiser of one layer, called as diffusers calls one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(sample)


def site_of(layer: nn.Module, tensor: str = "weight") -> Site:
    return next(s for s in find_sites("part", Root(layer)) if s.tensor == tensor)


def deltas_on(layer: nn.Module, *methods: type[Patch]) -> list[Delta]:
    site = site_of(layer)
    patches = [m(site, LoraOptions(rank=2) if m is Lora else NoOptions()).double() for m in methods]
    for seed, patch in enumerate(patches):
        draw(patch, seed)
    return [Delta("any", {site.name: patch}) for patch in patches]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [(Weighing, Feeding), (Weighing, Halving), (Halving, Feeding)])
def test_the_sum_of_all_ways_in_any_order(name: str, fused: bool, first: tuple[type[Patch], ...]) -> None:
    make, shape = LAYERS[name]
    layer = make().double().requires_grad_(False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    norm, root = "norm" in name, Root(layer)
    methods = (Weighing, Gain) if norm else (*first, Scaling, Lora)
    deltas, x = deltas_on(layer, *methods), torch.randn(shape, dtype=torch.float64)
    extra = deltas_on(layer, Gain)[0]
    state, strengths = State.of({"part": root}), (0.5, -1.2, 0.3, 0.8)
    with torch.no_grad():
        weight = layer.weight.clone()
        changes = [s * next(iter(d)).change(weight) for d, s in zip(deltas, strengths, strict=False)]
        total = torch.stack(changes + ([0.7 * next(iter(extra)).change(weight)] if fused else [])).sum(0)
        expected = layer(x) + apply_dense(total, x, layer, site_of(layer))
        for order in permutations(range(len(methods))):
            fusion = Fusion({"part": root}, [(extra, 0.7)]) if fused else None
            on = [Attachment({"part": root}, deltas[i], strengths[i]) for i in order]
            assert_close(root(x, 0.0), expected)
            for owner in (*on, *([fusion] if fusion else [])):
                owner.remove()
            state.check({"part": root})


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_one_base_product_serves_all(name: str) -> None:
    """What acts on the input or the weight costs no second base product, and what scales the product has it at hand."""
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    for methods in ((Feeding, Feeding), (Weighing, Weighing), (Scaling, Scaling)):
        deltas = deltas_on(layer, *methods)
        on = [Attachment({"part": Root(layer)}, delta) for delta in deltas]
        with torch.autograd.profiler.profile() as profile:
            layer(x)
        products = [e for e in profile.function_events if e.name in ("aten::linear", "aten::conv2d")]
        assert len(products) == 1
        for owner in on:
            owner.remove()
    assert all(p.free for d in deltas for p in d if isinstance(p, Scaling))


@pytest.mark.parametrize("method", [Weighing, Feeding, Halving, Scaling])
def test_gradients_and_half_precision(method: type[Patch]) -> None:
    exact = nn.Linear(6, 5).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    found: list[Tensor] = []
    for dtype in (torch.float64, torch.bfloat16):
        layer = nn.Linear(6, 5).to(dtype).requires_grad_(False)
        layer.load_state_dict(exact.state_dict())
        delta = deltas_on(layer, method)[0].to(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        with Attachment({"part": Root(layer)}, delta, 0.7):
            output = layer(x.to(dtype))
        assert output.dtype == dtype
        output.double().square().sum().backward()
        gradient = next(iter(delta.parameters()))[1].grad
        assert gradient is not None and layer.weight.grad is None
        found.append(gradient)
    assert_close(found[1].double(), found[0], torch.bfloat16)


@pytest.mark.parametrize("method", [Weighing, Feeding])
def test_a_forward_that_fails_leaves_the_layer_as_it_was(method: type[Patch]) -> None:
    layer = nn.Linear(6, 5).double()
    root = Root(layer)
    state, x = State.of({"part": root}), torch.randn(2, 6, dtype=torch.float64)
    expected = layer(x)
    with Attachment({"part": root}, deltas_on(layer, method)[0]) as attachment:
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.randn(2, 7, dtype=torch.float64))
        changed = layer(x)
        attachment.strength = 0.0
        assert torch.equal(layer(x), expected) and not torch.equal(changed, expected)
        assert layer.weight is dict(layer.named_parameters())["weight"]
    state.check({"part": root})


def test_timed_patches_are_told_the_timestep_and_cannot_be_fused() -> None:
    layer = nn.Linear(6, 5).double().requires_grad_(False)
    root, x = Root(layer), torch.randn(2, 6, dtype=torch.float64)
    state, delta = State.of({"part": root}), deltas_on(layer, Waning)[0]
    product, (g,) = layer(x) - layer.bias, [p.detach() for _, p in delta.parameters()]
    with Attachment({"part": root}, delta):
        for given in (250, torch.tensor(250), torch.tensor([250, 250])):
            assert_close(root(x, given), product * (1 + 0.75 * g) + layer.bias)
        assert_close(root(x, timestep=1000.0), product + layer.bias)
    state.check({"part": root})
    with pytest.raises(DeltaError, match="waning changes with the timestep"):
        Fusion({"part": root}, [(delta, 1.0)])
    state.check({"part": root})
