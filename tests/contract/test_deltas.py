"""The battery that every delta method passes: parametrised over the table, so a new method is tested by existing.

Algebra is checked in float64 on single layers of every kind a base has (and a few that it has not), the whole way in
float32 and float64 on tiny bases of every family. A method brings nothing but its `examples`.
"""

import re
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from tests.contract.ground import TOLERANCE, assert_close, base_of, difference, draw, predict
from vgm_peft import socket
from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Call, Delta, Patch, apply_dense
from vgm_peft.deltas import TABLE, method_named
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.formats import read, write
from vgm_peft.site import Op, Site, find_sites, locate

KINDS = list(TABLE)
CASES = [(kind, index) for kind, method in TABLE.items() for index in range(len(method.examples))]

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "linear, no bias": (lambda: nn.Linear(8, 32, bias=False), (3, 8)),
    "1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 6)),
    "3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 5)),
    "3x3, stride 2": (lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1), (2, 8, 7, 6)),
    "3x3, dilated": (lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2), (2, 4, 7, 7)),
    "3x3, reflected": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "3x3, in groups": (lambda: nn.Conv2d(16, 8, 3, padding=1, groups=2), (2, 16, 5, 5)),
    "depth of time": (lambda: nn.Conv1d(8, 8, 3, padding=1), (2, 8, 9)),
    "volume": (lambda: nn.Conv3d(4, 8, (3, 1, 1), padding=(1, 0, 0)), (1, 4, 3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 6)),
    "embedding": (lambda: nn.Embedding(10, 6), (2, 5)),
    "bias of a linear": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "bias of a 3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 5)),
    "bias of a layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "bias of a group norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 5, 6)),
}
"""How to make a layer, and the shape of its input; the patch is on its weight, or on its bias where the name says so."""


def place(name: str, layer: nn.Module) -> Site:
    """The site that a name in `LAYERS` means."""
    tensor = "bias" if name.startswith("bias of") else "weight"
    return next(s for s in find_sites("part", nn.ModuleDict({"layer": layer})) if s.tensor == tensor)


def names_for(*kinds: str) -> list[str]:
    """Those of `LAYERS` that all the kinds can change; the test is skipped when there are none."""
    names = [n for n, (make, _) in LAYERS.items() if all(place(n, make()).op in TABLE[k].ops for k in kinds)]
    return names or pytest.skip(f"no layer is changed by {' and '.join(kinds)}")


def pair(kind: str, index: int, layer: nn.Module, dtype: torch.dtype = torch.float64, name: str = "") -> Patch:
    """A patch with random values on the weight of a lone layer, or what else `name` means."""
    site = place(name, layer)
    if site.op not in TABLE[kind].ops:
        pytest.skip(f"{kind} does not change a {site.op}")
    patch = TABLE[kind](site, TABLE[kind].examples[index]).to(dtype)
    draw(patch)
    return patch


def base_tensor(layer: nn.Module, patch: Patch) -> Tensor:
    """What the patch changes."""
    return getattr(layer, patch.site.tensor).detach()


def inputs(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Random input for a layer of `LAYERS`."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, shape, generator=torch.Generator().manual_seed(3))
    return sample(shape, dtype)


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def delta_on(base: Base, kind: str, index: int = 0, seed: int = 1) -> Delta:
    """A fresh delta of one kind on every layer of a base that it can change, in the base's dtype, evaluating."""
    method = TABLE[kind]
    sites = [s for s in base.sites if s.op in method.ops]
    dtype = next(base.denoiser.parameters()).dtype
    delta = Delta.fit(base.family.name, method, sites, method.examples[index], seed=seed)
    return delta.to(dtype=dtype).start(base.parts).train(False)


# --- single layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("kind", "index"), CASES)
def test_fast_is_dense(kind: str, index: int, name: str) -> None:
    """`contribution` and `add_to` are optimisations of `change`."""
    make, shape = LAYERS[name]
    for dtype in (torch.float64, torch.float32):
        layer = make().to(dtype)
        patch, x = pair(kind, index, layer, dtype, name), inputs(layer, shape, dtype)
        weight = base_tensor(layer, patch)
        with torch.no_grad():
            change = patch.change(weight)
            assert change.shape == weight.shape and change.dtype == dtype and bool(change.any())
            dense = apply_dense(change, x, layer, patch.site)
            assert_close(patch.contribution(Call(x, layer, weight)), dense)
            assert_close(patch.add_to(layer(x), Call(x, layer, weight), -0.7), layer(x) - 0.7 * dense)


@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3, stride 2"])
@pytest.mark.parametrize(("kind", "index"), CASES)
def test_fast_is_dense_with_channels_last(kind: str, index: int, name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double().to(memory_format=torch.channels_last)
    patch, x = pair(kind, index, layer), sample(shape).to(memory_format=torch.channels_last)
    with torch.no_grad():
        output, weight = layer(x), layer.weight
        dense = apply_dense(patch.change(weight), x, layer, patch.site)
        assert_close(patch.add_to(output, Call(x, layer, weight), 0.7), output + 0.7 * dense)


@pytest.mark.parametrize(
    "name",
    ["linear", "1x1", "3x3, stride 2", "3x3, in groups", "layer norm", "group norm", "bias of a linear", "bias of a 3x3"],
)
@pytest.mark.parametrize(("kind", "index"), CASES)
def test_gradients_are_those_of_finite_differences(kind: str, index: int, name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double().requires_grad_(False)
    patch, x = pair(kind, index, layer, name=name), sample(shape)[:1, ..., :4, :4] if len(shape) > 3 else sample(shape)[:1]
    x.requires_grad_(True)
    if not patch.gradient_is_exact:
        return compare_with_dense_gradients(patch, layer, x)
    names = [n for n, _ in patch.named_parameters()]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        for n, value in zip(names, values, strict=True):
            patch._parameters[n] = value  # pyright: ignore[reportArgumentType]
        return patch.add_to(layer(x), Call(x, layer, base_tensor(layer, patch)), 0.7)

    values = [p.detach().clone().requires_grad_(True) for p in patch.parameters()]
    assert torch.autograd.gradcheck(forward, (x, *values), atol=1e-6)


def compare_with_dense_gradients(patch: Patch, layer: nn.Module, x: Tensor) -> None:
    """What a method leaves out of its gradient by definition, it leaves out of the dense form's and the fast one's alike."""
    weight = cast(Tensor, layer.weight)
    wanted = [x, *(p for p in patch.parameters() if p.requires_grad)]
    with torch.no_grad():
        cotangent = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    dense = layer(x) + 0.7 * apply_dense(patch.change(weight), x, layer, patch.site)
    fast = patch.add_to(layer(x), Call(x, layer, weight), 0.7)
    for expected, *found in zip(
        torch.autograd.grad(dense, wanted, cotangent),
        torch.autograd.grad(fast, wanted, cotangent),
        torch.autograd.grad(layer(x) + 0.7 * patch.contribution(Call(x, layer, weight, layer(x))), wanted, cotangent),
        strict=True,
    ):
        assert all(bool(f.any()) and difference(f, expected) <= TOLERANCE[torch.float64] for f in found)


@pytest.mark.parametrize("name", ["linear", "3x3", "layer norm", "group norm", "embedding", "bias of a linear"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_base(kind: str, name: str) -> None:
    """float32 patches on a bfloat16 base, and under autocast on a float32 base: output in bfloat16, gradients in float32."""
    make, shape = LAYERS[name]
    exact = make().to(torch.bfloat16).double()  # the values that half precision has: some kinds depend on them exactly
    patch, x = pair(kind, 0, exact, name=name), inputs(exact, shape)
    expected = exact(x) + 0.7 * patch.contribution(Call(x, exact, base_tensor(exact, patch)))
    delta = Delta("any", {patch.site.name: patch.float()})
    mixed = [(torch.float32, True)] if isinstance(exact, (nn.Linear, nn.Conv2d)) else []  # autocast leaves the others alone
    for half, autocast in ((torch.bfloat16, False), *mixed):
        layer = make().to(half).requires_grad_(False)
        layer.load_state_dict(exact.state_dict())
        root = nn.ModuleDict({"layer": layer})
        with Attachment({"part": root}, delta, 0.7), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(inputs(layer, shape, half))
        assert output.dtype == torch.bfloat16
        assert_close(output, expected.detach(), torch.bfloat16)
        output.float().square().sum().backward()
        for parameter in (p for p in patch.parameters() if p.requires_grad):
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and bool(parameter.grad.any())
            parameter.grad = None


@pytest.mark.parametrize(("kind", "index"), CASES)
def test_packed_and_unpacked_the_change_is_the_same(kind: str, index: int) -> None:
    for name in names_for(kind):
        layer = LAYERS[name][0]()
        patch = pair(kind, index, layer, torch.float32, name)
        weight = base_tensor(layer, patch)
        packed = patch.pack(weight)
        read_back = [p for method in TABLE.values() if (p := method.unpack(patch.site, packed)) is not None]
        assert read_back
        for other in read_back:
            assert_close(other.change(weight), patch.change(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_its_own_is_not_unpacked(kind: str) -> None:
    name = names_for(kind)[0]
    layer = LAYERS[name][0]()
    patch = pair(kind, 0, layer, torch.float32, name)
    packed = patch.pack(base_tensor(layer, patch))
    assert TABLE[kind].unpack(patch.site, {**packed, "something_else": torch.zeros(1)}) is None
    assert TABLE[kind].unpack(patch.site, {}) is None
    larger = replace(patch.site, shape=tuple(n + 4 for n in patch.site.shape))
    with pytest.raises(DeltaError, match=re.escape(str(larger))):  # by whoever reads it: PiSSA packs as LoRA
        [method.unpack(larger, packed) for method in TABLE.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_values_and_the_global_generator_untouched(kind: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    sites = [s for s in find_sites("part", net) if s.op in TABLE[kind].ops]
    state = torch.get_rng_state()
    first, second, other = (Delta.fit("any", TABLE[kind], sites, TABLE[kind].examples[0], seed=s) for s in (5, 5, 6))
    TABLE[kind](sites[0], TABLE[kind].examples[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(first.parameters(), second.parameters(), strict=True))
    drawn = any(bool((p != p.flatten()[0]).any()) for _, p in first.parameters())  # many kinds begin at zeros alone
    differ = any(not torch.equal(p, q) for (_, p), (_, q) in zip(first.parameters(), other.parameters(), strict=True))
    assert differ == drawn


# --- whole bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "index"), CASES)
def test_a_fresh_delta_changes_nothing(base: Base, kind: str, index: int) -> None:
    with torch.no_grad():
        expected = predict(base)
        with Attachment(base.parts, delta_on(base, kind, index).train()):
            assert torch.equal(predict(base), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_live_is_fused(base64: Base, kind: str) -> None:
    delta = delta_on(base64, kind)
    draw(delta, size=0.05)
    with torch.no_grad():
        untouched = predict(base64)
        with Attachment(base64.parts, delta, 0.6):
            live = predict(base64)
        if TABLE[kind].timed:
            with pytest.raises(DeltaError, match="timestep"):
                Fusion(base64.parts, [(delta, 0.6)])
        else:
            with Fusion(base64.parts, [(delta, 0.6)]):
                assert_close(live, predict(base64))
    assert difference(live, untouched) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_strength(base64: Base, kind: str) -> None:
    """At 0 the base to the last bit; changeable while attached, for all, for one part, for one site."""
    delta = delta_on(base64, kind)
    draw(delta, size=0.05)
    with torch.no_grad(), Attachment(base64.parts, delta, 0.0) as attachment:
        nothing = predict(base64)
        attachment.strength = 1.0
        full = predict(base64)
        attachment.strengths = dict.fromkeys(delta.parts, 0.0)
        assert torch.equal(predict(base64), nothing)
        attachment.strengths = dict.fromkeys(delta.patches, 0.5)
        attachment.strength = 2.0
        assert_close(predict(base64), full)
        attachment.remove()
        assert torch.equal(predict(base64), nothing) and not torch.equal(full, nothing)


@pytest.mark.parametrize(("first", "second"), list(product(KINDS, KINDS)))
def test_kinds_add_in_any_order_and_linearly(first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that may join the weight do so in one order, and act by themselves in the other."""
    for name in names_for(first, second):
        make, shape = LAYERS[name]
        layer = make().double().requires_grad_(False)
        root, x = {"part": nn.ModuleDict({"layer": layer})}, inputs(layer, shape)
        patches = [pair(first, 0, layer, name=name), pair(second, -1, layer, name=name)]
        deltas = [Delta("any", {p.site.name: p}) for p in patches]
        with torch.no_grad():
            changes = [p.change(base_tensor(layer, p)) for p in patches]
            expected = layer(x) + apply_dense(0.3 * changes[0] - 1.7 * changes[1], x, layer, patches[0].site)
            for order, small in (((0, 1), float("inf")), ((1, 0), 0.0)):
                monkeypatch.setattr(socket, "SMALL", small)
                with (
                    Attachment(root, deltas[order[0]], (0.3, -1.7)[order[0]]),
                    Attachment(root, deltas[order[1]], (0.3, -1.7)[order[1]]),
                ):
                    assert_close(layer(x), expected)


@cache
def reached(family: str) -> frozenset[str]:
    """The sites whose own tensors a loss on the prediction reaches (SDXL never uses its first encoder's last layer)."""
    base = base_of(family)
    for root in base.parts.values():
        root.requires_grad_(True)
    predict(base).square().mean().backward()
    grads = {s.name: getattr(locate(base.parts, s), s.tensor).grad for s in base.sites}
    for root in base.parts.values():
        root.requires_grad_(False).zero_grad(set_to_none=True)
    return frozenset(name for name, grad in grads.items() if grad is not None and bool(grad.any()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_nothing_else(base: Base, kind: str) -> None:
    delta = delta_on(base, kind)
    draw(delta, size=0.05)
    with Attachment(base.parts, delta):
        predict(base).square().mean().backward()
    expected = {n for n, p in delta.parameters() if p.requires_grad and n.rpartition("/")[0] in reached(base.family.name)}
    found = {name for name, p in delta.parameters() if p.grad is not None and bool(p.grad.any())}
    assert found == expected and len(found) > 0.9 * sum(p.requires_grad for _, p in delta.parameters())
    assert all(p.grad is None for root in base.parts.values() for p in root.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_native_file_is_exact(base: Base, kind: str, tmp_path: Path) -> None:
    delta = delta_on(base, kind, -1)
    draw(delta)
    again = read(write(delta, tmp_path / "delta.safetensors"))
    assert list(again.patches) == list(delta.patches) and again.family == delta.family
    for name, patch in delta.patches.items():
        other = again.patches[name]
        assert (other.kind, other.options, other.site) == (patch.kind, patch.options, patch.site)
        assert not other.training
        assert torch.equal(other.change(torch.zeros(patch.site.shape)), patch.change(torch.zeros(patch.site.shape)))
    assert [n for n, _ in again.parameters()] == [n for n, _ in delta.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base(family: str, kind: str) -> None:
    """float32 patches train on a bfloat16 base; live and fused agree within its precision."""
    half = base_of(family, torch.bfloat16)
    delta = delta_on(half, kind).to(dtype=torch.float32)
    draw(delta, size=0.02)
    with Attachment(half.parts, delta):
        live = predict(half)
        live.float().square().mean().backward()
    assert live.dtype == torch.bfloat16
    fused = live
    if not TABLE[kind].timed:
        with torch.no_grad(), Fusion(half.parts, [(delta, 1.0)]):
            fused = predict(half)
    exact = base_of(family, torch.float64)
    with torch.no_grad(), Attachment(exact.parts, delta):
        expected = predict(exact)
    assert difference(live, expected) < 4 * TOLERANCE[torch.bfloat16] > difference(fused, expected)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for _, p in delta.parameters())


# --- what a user gets wrong --------------------------------------------------------------------------------------------


def test_unknown_method_and_unfit_layers() -> None:
    with pytest.raises(ConfigError, match=f'did you mean "{KINDS[0]}"'):
        method_named(KINDS[0] + "x")
    ops: tuple[Op, ...] = ("linear", "conv", "norm", "embedding", "bias")
    for kind, op in product(KINDS, ops):
        if op not in TABLE[kind].ops:
            with pytest.raises(DeltaError, match=kind):
                Delta.fit("any", TABLE[kind], [Site("part", "layer", op, (8,))], TABLE[kind].examples[0])
