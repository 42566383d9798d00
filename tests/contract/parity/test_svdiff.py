"""SVDiff against its formula written out; what it keeps of the base follows the base."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.attachment import Attachment, Fusion
from vgm_peft.delta import Delta
from vgm_peft.deltas import svdiff
from vgm_peft.deltas.svdiff import Svdiff, SvdiffOptions
from vgm_peft.families import family_named
from vgm_peft.site import Site, choose, find_sites


@pytest.mark.parametrize("layer", [nn.Linear(24, 16), nn.Conv2d(4, 40, 3), nn.GroupNorm(2, 8)], ids=["wide", "tall", "norm"])
def test_the_formula(layer: nn.Module) -> None:
    layer = layer.double().requires_grad_(False)
    patch = Svdiff(find_sites("part", nn.ModuleDict({"layer": layer}))[0], SvdiffOptions()).double()
    draw(patch, size=2.0)  # so that some singular values are cut off
    flat = layer.weight.flatten(1) if layer.weight.dim() > 1 else layer.weight[None]
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    changed = u @ torch.diag(torch.relu(s + patch.shift)) @ v
    assert_close(patch.change(layer.weight), (changed - flat).view(layer.weight.shape).detach())
    assert bool((s + patch.shift < 0).any()) or layer.weight.dim() == 1


def test_decomposed_once_and_again_when_the_base_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in inference mode, fused and live, in place and elsewhere: never the old factors for a new weight."""
    layer = nn.Linear(6, 5).requires_grad_(False)
    root, x = nn.ModuleDict({"layer": layer}), torch.randn(3, 6)
    delta = Delta.fit("any", Svdiff, [s for s in find_sites("part", root) if s.op == "linear"]).train(False)
    draw(delta)
    (patch,) = delta
    count, original = [0], torch.linalg.svd

    def counted(*args: object, **kwargs: object) -> object:
        count[0] += 1
        return original(*args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(svdiff.torch.linalg, "svd", counted)
    for step in range(3):
        with Attachment({"part": root}, delta):
            live = [layer(x) for _ in range(3)][-1]
        with torch.inference_mode(), Attachment({"part": root}, delta):
            layer(x)
        with Fusion({"part": root}, [(delta, 1.0)]):
            assert_close(layer(x), live.detach())
        assert count[0] <= 2 * step + 2, "fusing writes to the weight in place, which costs one more"
        layer.weight.mul_(-1.5)
    with torch.inference_mode():
        assert torch.isfinite(patch.change(layer.weight)).all()
    patch.change(layer.weight).sum().backward()
    assert patch.shift.grad is not None


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("sd15", ["all", "-*norm*"], 222_696),
        ("sd15", ["all"], 222_805),
        ("sdxl", ["all", "-*norm*"], 909_800),
    ],
)
def test_published_counts(family: str, targets: Sequence[str], count: int) -> None:
    """One value per singular value, of a norm's weight one in all."""

    def size(site: Site) -> int:
        return Svdiff(site, SvdiffOptions()).shift.numel()

    sites = [s for part, root in family_named(family).published().items() for s in find_sites(part, root)]
    assert sum(map(size, choose(sites, targets, family_named(family).presets, Svdiff.ops))) == count
