"""DiffFit against its formula, y = g * (W x + b + db), and the counts of its port for the U-Net.

Here the bias is a free value per output, so g * (b + db) there is b + shift here, and the two ways learn the same layers.
"""

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas.difffit import DiffFit
from vgm_peft.families import family_named
from vgm_peft.site import choose, find_sites


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(24, 16), (2, 5, 24)), (nn.Conv2d(8, 16, 3), (2, 8, 5, 5)), (nn.Linear(24, 16, bias=False), (2, 24))],
    ids=["linear", "3x3", "no bias"],
)
def test_the_formula(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = layer.double().requires_grad_(False)
    root, x = nn.ModuleDict({"layer": layer}), torch.randn(shape, dtype=torch.float64)
    g, db = 1 + 0.3 * torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    delta = Delta.fit("any", DiffFit, find_sites("part", root)).to(dtype=torch.float64)
    values = {"gain": g - 1} if layer.bias is None else {"gain": g - 1, "shift": g * (layer.bias + db) - layer.bias}
    with torch.no_grad():
        for name, parameter in delta.parameters():
            parameter.copy_(values[name.rpartition("/")[2]])
        outputs = (-1, *[1] * (x.dim() - 2)) if x.dim() == 4 else (-1,)
        expected = g.view(outputs) * (layer(x) + (0 if layer.bias is None else db.view(outputs)))
        with torch.autograd.profiler.profile() as profile, Attachment({"part": root}, delta):
            found = layer(x)
    assert_close(found, expected)
    assert sum(e.name in ("aten::linear", "aten::conv2d") for e in profile.function_events) == 1


def test_what_other_tools_get_is_dense() -> None:
    """No UI reads an (IA)^3 vector and a changed bias on one module; all read a dense difference."""
    layer = nn.Linear(6, 5)
    delta = Delta.fit("any", DiffFit, find_sites("part", nn.ModuleDict({"layer": layer})))
    draw(delta)
    packed = [p.pack(getattr(layer, p.site.tensor).detach()) for p in delta]
    assert [list(t) for t in packed] == [["diff"], ["diff_b"]]


def test_count_on_the_unet() -> None:
    """Biases, norms, and a factor per output of q, k, v, out in both attentions and of the feed-forward's end.

    The port counts 581,124. Of its 11 factors per block the two on a whole attention branch are one with those of `to_out`.
    """
    family = family_named("sd15")
    sites = [s for part, root in family.published().items() for s in find_sites(part, root)]
    plain = choose(sites, ["unet.*.bias", "unet.*norm*"], {}, {"bias", "norm"})
    gains = choose(sites, ["unet.*.attn?.to_*.weight", "unet.*.ff.net.2.weight"], {}, {"linear"})
    delta = Delta.fit("sd15", DiffFit, [*plain, *gains])
    widths = sum(s.rows for s in gains if s.module.endswith("ff.net.2"))
    assert delta.count() == 581_124 - 2 * widths == 343_684 + 200_320 // 2 + 9 * widths
