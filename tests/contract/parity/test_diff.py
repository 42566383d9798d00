"""Full differences, BitFit and norm tuning against LyCORIS' Full and Norm modules, and the counts of their usual sites."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.delta import Patch
from vgm_peft.deltas.diff import BitFit, Diff, DiffOptions, NormTuning
from vgm_peft.families import family_named
from vgm_peft.site import choose, find_sites


@pytest.mark.parametrize(
    ("make", "module"),
    [
        (lambda: nn.Linear(24, 16), "full.FullModule"),
        (lambda: nn.Conv2d(8, 16, 3), "full.FullModule"),
        (lambda: nn.LayerNorm(8), "norms.NormModule"),
        (lambda: nn.GroupNorm(2, 8), "norms.NormModule"),
    ],
)
def test_lycoris(make: type[nn.Module], module: str) -> None:
    """Ours are two patches, on weight and bias; of a norm's bias LyCORIS writes `b_norm`, which is read the same."""
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed (extra: lycoris)")
    file, _, name = module.partition(".")
    layer = make().double().requires_grad_(False)
    theirs = getattr(pytest.importorskip(f"lycoris.modules.{file}"), name)("theirs", layer).double()
    sites = find_sites("part", nn.ModuleDict({"layer": layer}))
    patches = [Diff(site, DiffOptions()).double() for site in sites]
    with torch.no_grad():
        for patch, seed in zip(patches, (1, 2), strict=True):
            draw(patch, seed)
            suffix = patch.site.tensor if file == "full" else {"weight": "w_norm", "bias": "b_norm"}[patch.site.tensor]
            getattr(theirs, suffix).copy_(patch.diff)
    for patch, expected in zip(patches, theirs.get_diff_weight(), strict=True):
        assert_close(patch.change(getattr(layer, patch.site.tensor)), expected)
    if file == "norms":
        assert (again := Diff.unpack(sites[1], {"b_norm": theirs.b_norm.data})) is not None
        assert torch.equal(again.diff, patches[1].diff.float())
        assert patches[0].pack(layer.weight).keys() == {"w_norm"}


@pytest.mark.parametrize(
    ("family", "method", "targets", "count"),
    [
        ("sd15", BitFit, ["all"], 343_684),
        ("sdxl", BitFit, ["all"], 1_289_284),
        ("sd15", NormTuning, ["unet.*norm*"], 200_320),
        ("sdxl", NormTuning, ["unet.*norm*"], 588_160),
        ("sd15", Diff, ["unet.*.attn2.to_k", "unet.*.attn2.to_v"], 19_169_280),  # Custom Diffusion
    ],
)
def test_published_counts(family: str, method: type[Patch], targets: Sequence[str], count: int) -> None:
    parts = family_named(family).published()
    sites = choose(
        [s for part, root in parts.items() for s in find_sites(part, root)], targets, family_named(family).presets, method.ops
    )
    assert sum(s.rows * s.columns for s in sites) == count
