"""What is exported for diffusers, peft and LyCORIS does in their own code, unpatched, what the delta does here.

One delta has every kind, each on layers of its own, so that one file of each tool stands for all.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.formats.ground import difference, make_delta, shake
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.family import Base
from vgm_peft.formats.export import Wishes, export

FAMILIES = ("sd15", "sdxl")
Make = Callable[[str], Base]
UNTIMED = [kind for kind, method in TABLE.items() if not method.timed]


def mixed(base: Base, kinds: Iterable[str], ops: tuple[str, ...]) -> Delta:
    """A delta that has every example of some kinds, each on a layer of every sort that the kind can change and no other has."""
    sites = [site for site in base.sites if site.part == "unet"]
    norms = {site.module for site in sites if site.op == "norm"}
    free = {op: [site for site in sites if site.op == op and (op == "norm" or site.module not in norms)] for op in ops}
    delta = Delta(base.family.name)
    for kind in kinds:
        for options in TABLE[kind].examples:
            own = [free[op].pop(3) for op in ops if op in TABLE[kind].ops]
            delta.patches |= Delta.fit(base.family.name, TABLE[kind], own, options).patches
    return shake(delta.start(base.parts).train(False), size=0.2)


def predicted(base: Base) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    unet: Any = base.denoiser
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
    more: dict[str, Any] = {}
    if base.family.name == "sdxl":
        more["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 16), "time_ids": torch.full((1, 6), 64.0)}
    with torch.no_grad():
        return unet(noisy, torch.tensor([500]), text, **more).sample


def encoded(encoder: Any) -> Tensor:
    with torch.no_grad():
        return encoder(torch.arange(5)[None]).last_hidden_state


def live(base: Base, delta: Delta, answer: Callable[[], Tensor]) -> Tensor:
    """What the base answers with the delta, which is not what it answers without."""
    plain = answer()
    with Attachment(base.parts, delta):
        changed = answer()
    assert difference(changed, plain) > 1e-3
    return changed


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tiny: Make) -> Base:
    return tiny(request.param)


def test_diffusers_predicts_the_same_of_every_kind(base: Base, tmp_path: Path) -> None:
    kinds = [kind for kind in UNTIMED if kind != "dora" and {"linear", "conv"} & TABLE[kind].ops]
    delta = mixed(base, kinds, ("linear", "conv"))
    made = export(delta, tmp_path / "all.safetensors", "diffusers", base, Wishes(approximate=512))
    assert made.plan.loss <= 1e-5  # the rank is above that of every layer, so that nothing is lost
    ours = live(base, delta, lambda: predicted(base))
    pipe: Any = base.pipe
    pipe.load_lora_weights(str(made.files[0]), adapter_name="ours")
    assert pipe.get_list_adapters() == {"unet": ["ours"]}
    assert difference(predicted(base), ours) <= 1e-4


@pytest.mark.parametrize("kind", ("every", "dora"))
def test_peft_predicts_the_same(base: Base, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    kinds = [name for name in UNTIMED if name != "dora" and {"linear", "conv"} & TABLE[name].ops]
    delta = mixed(base, kinds, ("linear", "conv")) if kind == "every" else make_delta(base, kind, ("unet.mid_block.*",), rank=3)
    made = export(delta, tmp_path / "folder", "peft", base, Wishes(approximate=512 if kind == "every" else None))
    assert [file.relative_to(tmp_path).as_posix() for file in made.files] == ["folder/unet/adapter_model.safetensors"]
    ours = live(base, delta, lambda: predicted(base))
    PeftModel.from_pretrained(cast(Any, base.denoiser), str(tmp_path / "folder" / "unet"))
    assert difference(predicted(base), ours) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_lycoris_predicts_the_same_of_every_kind(tiny: Make, family: str, tmp_path: Path) -> None:
    """Its own loader, as released: of what it stumbles over nothing is in the file."""
    lycoris = pytest.importorskip(
        "lycoris", reason="lycoris-lora is not installed (pip install -c constraints.txt '.[lycoris]')"
    )
    base = tiny(family)
    delta = mixed(base, UNTIMED, ("linear", "conv", "norm", "bias"))
    (file,) = export(delta, tmp_path / "all.safetensors", "lycoris", base).files
    ours = live(base, delta, lambda: predicted(base))
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), base.denoiser)
    assert {lora.lora_name for lora in network.loras} == {f"lycoris_{p.site.module}".replace(".", "_") for p in delta}
    network.apply_to()
    theirs = predicted(base)
    network.restore()
    assert difference(theirs, ours) <= 1e-4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers the old way
def test_text_encoders_have_files_of_their_own(base: Base, tmp_path: Path) -> None:
    from peft import PeftModel

    lycoris = pytest.importorskip(
        "lycoris", reason="lycoris-lora is not installed (pip install -c constraints.txt '.[lycoris]')"
    )
    delta = make_delta(base, "lora", ("text", "unet.mid_block.*.to_k"), rank=2)
    made = export(delta, tmp_path / "me.safetensors", "lycoris", base)
    encoders = base.family.parts[1:]
    assert [file.name for file in made.files] == ["me.safetensors", *(f"me.{part}.safetensors" for part in encoders)]
    export(delta, tmp_path / "folder", "peft", base)
    for file, part in zip(made.files[1:], encoders, strict=True):
        encoder: Any = base.parts[part]
        ours = live(base, delta, lambda encoder=encoder: encoded(encoder))
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), encoder)
        network.apply_to()
        assert difference(encoded(encoder), ours) <= 1e-5
        network.restore()
        PeftModel.from_pretrained(encoder, str(tmp_path / "folder" / part))
        assert difference(encoded(encoder), ours) <= 1e-5
