"""GLoRA against LyCORIS. (peft's GLoRA is another method: W * A + B elementwise, and changed biases.)"""

import pytest
import torch
from torch import nn

from tests.contract.ground import assert_close, draw
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas.glora import Glora, GloraOptions
from vgm_peft.deltas.lora import Lora
from vgm_peft.errors import DeltaError
from vgm_peft.site import Site, find_sites

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (2, 5, 24)),
    "1x1": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 5, 6)),
    "3x3": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_lycoris(name: str) -> None:
    glora = pytest.importorskip("lycoris.modules.glora", reason="lycoris-lora is not installed (extra: lycoris)")
    make, shape = LAYERS[name]
    layer = make().double().requires_grad_(False)
    root = nn.ModuleDict({"layer": layer})
    patch = Glora(find_sites("part", root)[0], GloraOptions(rank=4, alpha=6.0)).double()
    draw(patch)
    packed = patch.pack(layer.weight)
    theirs = glora.GLoRAModule("theirs", layer, lora_dim=4, alpha=float(packed["alpha"])).double()
    for key in ("a1", "a2", "b1", "b2"):
        assert getattr(theirs, key).weight.shape == packed[f"{key}.weight"].shape
        getattr(theirs, key).weight.data.copy_(packed[f"{key}.weight"])
    assert_close(patch.change(layer.weight), theirs.get_diff_weight()[0])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = theirs.bypass_forward(x, 0.7)
    with Attachment({"part": root}, Delta("any", {patch.site.name: patch}), 0.7):
        assert_close(layer(x), expected)


def test_one_base_product_and_the_rest_beside_it() -> None:
    """The input's term rides on the layer's own product, also beside a LoRA; no dense dW is made."""
    layer = nn.Linear(24, 16).double().requires_grad_(False)
    root, x = nn.ModuleDict({"layer": layer}), torch.randn(3, 24, dtype=torch.float64)
    site = find_sites("part", root)[0]
    deltas = [Delta.fit("any", method, [site]).to(dtype=torch.float64) for method in (Glora, Lora)]
    for delta in deltas:
        draw(delta)
    changes = [next(iter(d)).change(layer.weight) for d in deltas]
    expected = layer(x) + x @ (0.5 * changes[0] - 2 * changes[1]).T
    with Attachment({"part": root}, deltas[0], 0.5), Attachment({"part": root}, deltas[1], -2.0):
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            found = layer(x)
    assert_close(found, expected)
    shapes = [list(map(tuple, e.input_shapes[:2])) for e in profile.function_events if e.name in ("aten::linear", "aten::mm")]
    assert sum((16, 24) in pair for pair in shapes) == 1


def test_old_files_are_refused() -> None:
    site = Site("unet", "to_q", "linear", (16, 24))
    old = {"a1.weight": (4, 24), "a2.weight": (24, 4), "b1.weight": (4, 24), "b2.weight": (16, 4)}
    with pytest.raises(DeltaError, match=r"unet\.to_q linear 16x24: a1\.weight is 4x24"):
        Glora.unpack(site, {k: torch.zeros(v) for k, v in old.items()})
    with pytest.raises(DeltaError, match=r"rank 17; expected 1 \.\. 16"):
        Delta.fit("any", Glora, [site], GloraOptions(rank=17))
