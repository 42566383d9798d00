"""ControlNet-XS against diffusers' merged network and its pipelines, and the published counts."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.ground import base_of, draw
from tests.contract.parity.test_t2i_adapter import CALL, full_size, latents
from tests.contract.test_sides import control, query, trained
from vgm_peft.attachment import Attachment
from vgm_peft.beside import Beside
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE as DELTAS
from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families.latent import tiny_vae
from vgm_peft.family import Base
from vgm_peft.sides import TABLE, open_side
from vgm_peft.sides.controlnet_xs import ControlNetXSOptions

SIDE = TABLE["controlnet-xs"]
STOCK = {"sd15": "StableDiffusionControlNetXSPipeline", "sdxl": "StableDiffusionXLControlNetXSPipeline"}


def mended(merged: Any, base: Base) -> Any:
    """diffusers' network of both, which rebuilds the base's resnets with 1e-6 in their norms where the base has 1e-5."""
    for name, module in merged.named_modules():
        of_base = "base_resnets." in name or "base_midblock.resnets." in name or ("up_blocks." in name and ".resnets." in name)
        if of_base and isinstance(module, torch.nn.GroupNorm):
            assert module.eps == 1e-6, "diffusers has mended it: this is superfluous now"
            module.eps = base.denoiser.config.norm_eps  # pyright: ignore
    return merged


def merged_with(base: Base, network: Any) -> Any:
    from diffusers import UNetControlNetXSModel

    return mended(UNetControlNetXSModel.from_unet(base.denoiser, network), base)  # pyright: ignore[reportArgumentType]


def asked_of(merged: Any, base: Base, strength: float) -> Tensor:
    asked = query(base.family.name)
    told: dict[str, Any] = dict(added_cond_kwargs=base.family.extra(base, asked), return_dict=False)
    told |= dict(controlnet_cond=control(), conditioning_scale=strength, encoder_hidden_states=asked.condition.hidden)
    return merged(asked.noisy, asked.t, **told)[0]


def heard(base: Base, *networks: Any, strength: float = 0.7) -> Tensor:
    besides = [Beside(base, SIDE, network, strength) for network in networks]
    for beside in besides:
        beside.tell(control())
    found = base.family.predict(base, query(base.family.name))
    for beside in besides:
        beside.remove()
    return found


def timed(base: Base, seed: int) -> Any:
    """A network that has learned to hear the time otherwise, as some of the published ones have."""
    from diffusers import ControlNetXSAdapter

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = ControlNetXSAdapter.from_unet(
            base.denoiser,  # pyright: ignore[reportArgumentType]
            block_out_channels=[8] * len(base.denoiser.config.block_out_channels),  # pyright: ignore
            learn_time_embedding=True,
            time_embedding_mix=0.6,  # pyright: ignore[reportArgumentType]
        )
        for p in network.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return network.eval()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # diffusers keeps these pipelines, and says that it does no more
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_draws_what_the_stock_pipeline_draws(family: str, tmp_path: Path) -> None:
    """And the control picture is read once for all steps."""
    import diffusers

    base, calls = base_of(family), list[int]()
    SIDE.save(trained("controlnet-xs", family), tmp_path / "me")
    network: Any = diffusers.ControlNetXSAdapter.from_pretrained(tmp_path / "me", use_safetensors=True)
    kind: Any = getattr(diffusers, STOCK[family])
    parts = {**base.pipe.components, "controlnet": network, "requires_safety_checker": False}
    stock = kind(**{name: part for name, part in parts.items() if name in inspect.signature(kind.__init__).parameters})
    stock.set_progress_bar_config(disable=True)
    mended(stock.unet, base)
    call = {**CALL, "height": 64, "width": 64, "latents": latents()}
    theirs = stock(image=control(1), controlnet_conditioning_scale=0.7, **call).images
    network.controlnet_cond_embedding.register_forward_pre_hook(lambda *_: calls.append(1))  # pyright: ignore
    with Beside(base, SIDE, network, 0.7) as beside:
        beside.tell(control(1))
        ours = base.pipe(**call).images  # pyright: ignore
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (base.pipe(**call).images - theirs).abs().max() > 1e-2  # pyright: ignore
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_learned_time_is_heard_as_in_diffusers(family: str) -> None:
    base = base_of(family)
    first, second = timed(base, 1), timed(base, 2)
    expected = asked_of(merged_with(base, first), base, 0.7)
    torch.testing.assert_close(heard(base, first), expected, rtol=0, atol=1e-5)
    first.register_to_config(time_embedding_mix=0.0)  # then the base's own is heard
    assert (heard(base, first) - expected).abs().max() > 1e-3
    first.register_to_config(time_embedding_mix=0.6)
    torch.testing.assert_close(heard(base, first, second), heard(base, second, first), rtol=0, atol=1e-5)


@torch.no_grad()
def test_with_freeu_the_decoder_hears_it_before_that() -> None:
    base, network = base_of("sd15"), trained("controlnet-xs", "sd15")
    merged, unet, freeu = merged_with(base, network), base.denoiser, dict(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain = heard(base, network)
    merged.enable_freeu(**freeu)
    unet.enable_freeu(**freeu)  # pyright: ignore
    found = heard(base, network)
    unet.disable_freeu()  # pyright: ignore
    torch.testing.assert_close(found, asked_of(merged, base, 0.7), rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    """Layers of the base are run again in the backward pass, and with them those of the network."""
    base, network, found = base_of(family), trained("controlnet-xs", family), list[dict[str, Tensor]]()
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
def test_deltas_on_the_first_convolution_see_its_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever was put on first, and where they act on that output, as in half precision, instead of joining the weight."""
    monkeypatch.setattr("vgm_peft.socket.SMALL", 0)
    base, network = base_of("sd15"), trained("controlnet-xs", "sd15")
    sites = [site for site in base.sites if site.module == "conv_in" and site.tensor == "weight"]
    delta = Delta.fit("sd15", DELTAS["dora"], sites, DELTAS["dora"].examples[0])
    draw(delta)
    found: list[Tensor] = []
    with Attachment(base.parts, delta):
        found.append(heard(base, network))
    with Beside(base, SIDE, network, 0.7) as beside, Attachment(base.parts, delta):
        beside.tell(control())
        found.append(base.family.predict(base, query("sd15")))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert (found[0] - heard(base, network)).abs().max() > 1e-3


@torch.no_grad()
def test_nothing_is_heard_outside_its_mask() -> None:
    base, asked = base_of("sd15"), query("sd15")
    with Beside(base, SIDE, trained("controlnet-xs", "sd15")) as beside:
        beside.tell(control())
        beside.mask = torch.zeros(1, 1, 64, 64)
        assert torch.equal(base.family.predict(base, asked), heard(base))


@torch.no_grad()
def test_it_reads_pictures_at_the_bases_own_factor(tmp_path: Path) -> None:
    """Toybox has 4 pixels to a latent."""
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base = Base(pipe, FAMILIES["sd15"], "four").freeze()
    network = SIDE.create(base, SIDE.Options())
    with Beside(base, SIDE, network) as beside:
        beside.tell(control(side=32))
        assert torch.equal(base.family.predict(base, query("sd15")), heard(base_of("sd15")))
        with pytest.raises(DataError, match="30x32 pixels; expected sides that are multiples of 4 pixels"):
            beside.tell(control(side=32)[..., 2:])
    SIDE.save(network, tmp_path / "me")
    open_side(tmp_path / "me", base)
    with pytest.raises(DeltaError, match="4 pixels to a latent"):
        open_side(tmp_path / "me", base_of("sd15"))


@pytest.mark.parametrize(
    ("family", "ratio", "count"),
    [("sd15", 0.2, 52_661_392), ("sd15", 0.1, 28_118_768), ("sdxl", 0.05, 19_372_944), ("sdxl", 0.1, 38_206_608)],
)
def test_those_of_full_size_count_what_was_published(family: str, ratio: float, count: int) -> None:
    """The authors' 53 million of SD 1.5 and 20 million of SDXL; their 48 million of SDXL learn the embeddings too."""
    base = full_size(family)
    with torch.device("meta"):
        network = SIDE.create(base, ControlNetXSOptions(size_ratio=ratio))
    assert sum(p.numel() for p in network.parameters()) == count


def test_what_no_network_of_this_kind_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="size_ratio = 0"):
        ControlNetXSOptions(size_ratio=0.0)
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(DeltaError, match="in_channels 9; expected 4 for a controlnet-xs"):
        SIDE.create(Base(pipe, FAMILIES["sd15"], "inpainting"), SIDE.Options())
    assert SIDE.facts(trained("controlnet-xs", "sd15")) == {"channels": [8, 8, 8, 8]}
