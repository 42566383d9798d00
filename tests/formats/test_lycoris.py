"""A Kronecker delta written as LoKr means the same to LyCORIS, the program that gave the format its names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.formats.ground import difference, make_delta, picture
from vgm_peft import formats
from vgm_peft.attachment import Attachment
from vgm_peft.family import Base

lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed (pip install -c constraints.txt '.[lycoris]')")


def test_lycoris_draws_the_same_picture(tiny: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("sd15")
    # LyCORIS' own loader rebuilds the factors from one number, so it takes no split but (n, n)
    delta = make_delta(base, "krona", ("attention", "conv"), a1=2, a2=2, size=0.1)
    path = formats.write(delta, tmp_path / "krona.safetensors", "kohya", base)
    plain = picture(base.pipe)
    with Attachment(base.parts, delta):
        ours = picture(base.pipe)
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base.denoiser)
    assert len(network.loras) == len(delta.patches)
    network.apply_to()
    theirs = picture(base.pipe)
    network.restore()
    assert difference(ours, plain) > 1e-2
    assert difference(theirs, ours) <= 1e-4


@pytest.mark.parametrize("a1,a2", ((1, 1), (4, 2), (2, 8), (8, 4)))
@pytest.mark.parametrize("pattern", ("attention", "conv"))
def test_any_split_means_the_same_to_lycoris(
    shared: Callable[[str], Base], a1: int, a2: int, pattern: str, tmp_path: Path
) -> None:
    from lycoris.functional import lokr
    from safetensors.torch import load_file

    base = shared("sdxl")
    delta = make_delta(base, "krona", (pattern,), a1=a1, a2=a2)
    stored = load_file(formats.write(delta, tmp_path / "krona.safetensors", "kohya", base))
    names = base.family.key_table(base.sites).kohya
    for patch in delta:
        prefix = names[patch.site.part, patch.site.module]
        w1, w2 = stored[f"{prefix}.lokr_w1"], stored[f"{prefix}.lokr_w2"]
        theirs = lokr.diff_weight(w1, None, None, w2, None, None, None)
        assert difference(theirs.reshape(patch.site.shape), patch.change(torch.zeros(patch.site.shape))) <= 1e-6
