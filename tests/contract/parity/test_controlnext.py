"""ControlNeXt against a U-Net with its weights changed for good and the control added by hand; its authors' files; counts."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.contract.ground import base_of, draw
from tests.contract.parity.test_t2i_adapter import full_size
from tests.contract.test_sides import control, query, trained
from vgm_peft import socket
from vgm_peft.attachment import Attachment
from vgm_peft.beside import Beside
from vgm_peft.delta import Delta
from vgm_peft.deltas.oft import Oft, OftOptions
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families.latent import tiny_vae
from vgm_peft.family import Base
from vgm_peft.side import Heard
from vgm_peft.sides import TABLE, open_side
from vgm_peft.sides.controlnext import ControlNeXtOptions

SIDE = TABLE["controlnext"]
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
CALL: dict[str, Any] = {
    **dict(prompt="a duck", negative_prompt="dark", num_inference_steps=3),
    **dict(output_type="latent", height=64, width=64, latents=LATENTS),
}
MODULE, WEIGHTS, WHOLE = "controlnet.safetensors", "unet_weight_increasements.safetensors", "unet.safetensors"


def crossed(control: Tensor, stream: Tensor) -> Tensor:
    """The authors' normalisation, row by row, in float64."""
    rows: list[Tensor] = []
    for c, m in zip(control.double(), stream.double(), strict=True):
        c = nn.functional.interpolate(c[None], m.shape[-2:], mode="area")[0]
        rows.append((c - c.mean()) / c.std() * m.std() + m.mean())
    return torch.stack(rows).float()


def changed(base: Base, network: Any, picture: Tensor, strength: float, scale: float) -> nn.Module:
    """A copy of the base's U-Net with W + strength dW, to which the control is added before or after its first block."""
    unet: Any = deepcopy(base.denoiser)
    with torch.no_grad():
        for name, increment in network.increments.named_parameters():
            unet.get_parameter(name).add_(increment, alpha=strength)
    block, forward, now = unet.down_blocks[0], unet.down_blocks[0].forward, dict[str, Tensor]()

    def injected(stream: Tensor) -> Tensor:
        features = network.module(network.module.see(picture.expand(len(stream), -1, -1, -1)), now["t"])
        return stream + strength * scale * crossed(features, stream)

    def stem(hidden_states: Tensor, **told: Any) -> Any:
        return forward(hidden_states=injected(hidden_states), **told)

    def after(hidden_states: Tensor, **told: Any) -> Any:
        hidden, skips = forward(hidden_states=hidden_states, **told)
        return injected(hidden), skips

    block.forward = after if unet.config.addition_embed_type is None else stem
    unet.register_forward_pre_hook(lambda _, args: now.update(t=torch.as_tensor(args[1])))  # pyright: ignore
    return unet


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_draws_what_a_changed_u_net_draws(family: str) -> None:
    base = base_of(family)
    network = SIDE.create(base, ControlNeXtOptions(scale=0.35))
    network.load_state_dict(trained("controlnext", family).state_dict())
    plain: Any = base.denoiser
    base.pipe.register_modules(unet=changed(base, network, control(1), 0.7, 0.35))
    theirs = base.pipe(**CALL).images  # pyright: ignore
    base.pipe.register_modules(unet=plain)
    with Beside(base, SIDE, network, 0.7) as beside:
        beside.tell(control(1))
        ours = base.pipe(**CALL).images  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base.pipe(**CALL).images - theirs).abs().max() > 1e-2  # pyright: ignore


@torch.no_grad()
def test_what_does_not_depend_on_the_step_is_computed_once() -> None:
    base, network, calls = base_of("sd15"), trained("controlnext", "sd15"), list[int]()
    hook = network.get_submodule("module.embedding").register_forward_pre_hook(lambda *_: calls.append(1))  # pyright: ignore
    with Beside(base, SIDE, network) as beside:
        beside.tell(control(1))
        base.pipe(**CALL)  # pyright: ignore
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("side", ["output", "input"])
@torch.no_grad()
def test_it_adds_to_a_delta_on_the_same_layer_whichever_came_first(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation reads the layer's product or its input; neither may hold what the increment makes of it, nor the reverse."""
    monkeypatch.setattr(socket, "SMALL", 0)  # or it would join the weight of a layer as small as these
    base, network, asked = base_of("sd15"), trained("controlnext", "sd15"), query("sd15")
    site = next(s for s in base.sites if s.name.endswith("attn1.to_out.0.weight"))
    patch = Oft(site, OftOptions(side=side), torch.Generator())
    draw(patch)
    delta, found = Delta("sd15", {site.name: patch}), list[Tensor]()
    with Beside(base, SIDE, network) as beside:
        beside.tell(control())
        with Attachment(base.parts, delta, 1.0):
            found.append(base.family.predict(base, asked))
        alone = base.family.predict(base, asked)
    with Attachment(base.parts, delta, 1.0), Beside(base, SIDE, network) as beside:
        beside.tell(control())
        found.append(base.family.predict(base, asked))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0] - alone).abs().max() > 1e-3


def test_tokens_are_placed_as_the_picture_is() -> None:
    mask = torch.zeros(1, 1, 40, 24)
    mask[..., :20, :] = 1.0
    heard = Heard((), 0.5, mask=mask)
    for height, width in ((5, 3), (3, 2)):
        places = torch.rand(2, 7, height, width)
        expected = heard.placed(places).flatten(2).transpose(1, 2)
        assert torch.equal(heard.placed_tokens(places.flatten(2).transpose(1, 2), (5, 3)), expected)
    assert not expected[:, -1].any() and expected[:, 0].any()


@torch.no_grad()
def test_nothing_is_heard_outside_its_mask() -> None:
    base, asked = base_of("sd15"), query("sd15")
    with Beside(base, SIDE, trained("controlnext", "sd15")) as beside:
        beside.tell(control())
        beside.mask = torch.zeros(1, 1, 64, 64)
        assert torch.equal(base.family.predict(base, asked), base_of("sd15").family.predict(base_of("sd15"), asked))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    """Layers are run again in the backward pass, when the denoiser itself is not asked again."""
    base, network, found = base_of(family), trained("controlnext", family), list[dict[str, Tensor]]()
    unet: Any = base.denoiser
    for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
        switch()
        with Beside(base, SIDE, network) as beside, torch.enable_grad():
            beside.tell(control())
            base.family.predict(base, query(family)).square().mean().backward()
        found.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
        network.zero_grad(set_to_none=True)
    unet.disable_gradient_checkpointing()
    assert len(found[0]) == len(list(network.parameters()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@torch.no_grad()
def test_it_fits_a_base_of_four_pixels_to_a_latent(tmp_path: Path) -> None:
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base = Base(pipe, FAMILIES["sd15"], "four").freeze()
    network: Any = SIDE.create(base, ControlNeXtOptions(width=8))
    assert network.module(network.module.see(control(side=32)), torch.tensor(5)).shape == (2, 8, 8, 8)
    with Beside(base, SIDE, network) as beside:
        beside.tell(control(side=32))
        base.family.predict(base, query("sd15"))
    SIDE.save(network, tmp_path / "me")
    open_side(tmp_path / "me", base)
    with pytest.raises(DeltaError, match="made for factor 4; expected 8"):
        open_side(tmp_path / "me", base_of("sd15"))


def test_full_size_counts_are_the_published_ones() -> None:
    """28.33 and 106.01 million: with the larger module of the first release these are the paper's 30 and 108."""
    for family, count in (("sd15", 24_805_760), ("sdxl", 102_483_200)):
        base = full_size(family)
        with torch.device("meta"):
            network: Any = SIDE.create(base, ControlNeXtOptions())
        assert sum(p.numel() for p in network.module.parameters()) == 3_526_400
        assert sum(p.numel() for p in network.increments.parameters()) == count


def test_the_bases_weights_learn_ten_times_slower() -> None:
    network = trained("controlnext", "sd15")
    assert {(n.partition(".")[0], SIDE.rate(n)) for n, _ in network.named_parameters()} == {
        ("module", 1.0),
        ("increments", 0.1),
    }


def folder_of(place: Path, base: Base, **files: str) -> Path:
    """A saved network's two files under other names, without a configuration."""
    SIDE.save(trained("controlnext", base.family.name), place)
    (place / "config.json").unlink()
    for old, new in ((MODULE, files["module"]), (WEIGHTS, files["weights"])):
        (place / old).rename(place / new)
    return place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("module", "weights"), [(MODULE, WEIGHTS), ("controlnext.safetensors", WHOLE)])
def test_the_authors_folders_are_read(family: str, module: str, weights: str, tmp_path: Path) -> None:
    base, network = base_of(family), trained("controlnext", family)
    place = folder_of(tmp_path / "me", base, module=module, weights=weights)
    if weights == WHOLE:
        tensors = {n: t * 0.1 + base.denoiser.get_parameter(n) for n, t in load_file(place / weights).items()}
        save_file(tensors, place / weights)
    side, opened = open_side(place, base)
    assert side is SIDE
    for name, tensor in network.state_dict().items():
        share = 0.1 if weights == WHOLE and name.startswith("increments") else 1.0
        torch.testing.assert_close(opened.state_dict()[name], tensor * share, rtol=0, atol=1e-7)


def test_what_a_file_holds_must_be_what_it_is_said_to_hold(tmp_path: Path) -> None:
    """The authors' script for SDXL writes whole weights under the name of increments."""
    base = base_of("sd15")
    place = folder_of(tmp_path / "me", base, module=MODULE, weights=WEIGHTS)
    increments = load_file(place / WEIGHTS)
    save_file({n: t * 0.1 + base.denoiser.get_parameter(n) for n, t in increments.items()}, place / WEIGHTS)
    with pytest.raises(DeltaError, match="should hold increments and seems to hold whole weights"):
        open_side(place, base)
    (place / "config.json").write_text(json.dumps({"_class_name": "ControlNeXt", "weights": "absolute", "scale": 0.35}))
    network: Any = open_side(place, base)[1]
    assert network.form.scale == 0.35
    save_file(increments, place / WEIGHTS)
    with pytest.raises(DeltaError, match="should hold absolute and seems to hold increments"):
        open_side(place, base)


def test_files_that_are_missing_or_strange_are_named(tmp_path: Path) -> None:
    base = base_of("sd15")
    place = folder_of(tmp_path / "me", base, module=MODULE, weights=WEIGHTS)
    tensors = load_file(place / WEIGHTS)
    save_file({**tensors, "conv_in.weight": torch.zeros(1)}, place / WEIGHTS)
    with pytest.raises(DeltaError, match="1 tensors fit no layer that may learn along .'conv_in.weight'."):
        open_side(place, base)
    save_file(tensors, place / WHOLE)
    with pytest.raises(DeltaError, match="2 files of the base's weights"):
        open_side(place, base)
    (place / WHOLE).unlink()
    (place / WEIGHTS).unlink()
    with pytest.raises(DeltaError, match=r"0 files of the base's weights; expected unet_weight_.*\(increments\) or unet"):
        open_side(place, base)


def test_options_out_of_range_are_refused() -> None:
    for options in ({"width": 6}, {"scale": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ControlNeXtOptions(**options)  # pyright: ignore[reportArgumentType]
