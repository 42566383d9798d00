"""Uni-ControlNet's two adapters against their equations, computed from what a saved file holds by the authors' names."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, scaled_dot_product_attention, silu

from tests.contract.ground import base_of
from tests.contract.parity.test_t2i_adapter import CALL, full_size, latents
from tests.contract.test_sides import control, query, trained
from vgm_peft.beside import Beside
from vgm_peft.desk import cross_attentions, hook_cross_attentions, spread
from vgm_peft.errors import ConfigError, DataError, DeltaError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families.latent import tiny_vae
from vgm_peft.family import Base
from vgm_peft.sides import TABLE, open_side
from vgm_peft.sides.uni_controlnet import UniControlNetOptions
from vgm_peft.sides.uni_controlnet_global import GlobalAdapter
from vgm_peft.stack import ControlUse, Stack
from vgm_peft.stack.controls import pixels_of
from vgm_peft.words import text_embeddings

LOCAL, GLOBAL = TABLE["uni-controlnet"], TABLE["uni-controlnet-global"]
GROUPS = 4
"""Of the tiny base's norms; 32 in the authors' code, which has no other base."""


def pictures(rows: int, conditions: int) -> Tensor:
    return torch.cat([control(rows * conditions)[i::conditions] for i in range(conditions)], dim=1)


@torch.no_grad()
def made(base: Base, conditions: int) -> Any:
    """A network that says something, in whose extractor no convolution is zero."""
    network = LOCAL.create(base, UniControlNetOptions(conditions=conditions, width=4))
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


class Theirs:
    """The authors' `LocalAdapter`, from its tensors: two resnets and an attention at every level but the last."""

    def __init__(self, file: Path, heads: list[int]) -> None:
        self.held = {name.removeprefix("local_adapter."): tensor for name, tensor in load_file(file).items()}
        self.heads = heads

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.held[f"{name}.weight"]
        return conv2d(x, weight, self.held[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def flat(self, name: str, x: Tensor) -> Tensor:
        weight = self.held[f"{name}.weight"]
        return linear(x, weight.flatten(1), self.held.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return group_norm(x, GROUPS, self.held[f"{name}.weight"], self.held[f"{name}.bias"], eps)

    def fdn(self, name: str, x: Tensor, found: Tensor) -> Tensor:
        gamma, beta = self.conv(f"{name}.conv_gamma", found), self.conv(f"{name}.conv_beta", found)
        return group_norm(x, GROUPS, eps=1e-5) * (1 + gamma) + beta

    def resnet(self, name: str, x: Tensor, time: Tensor, found: Tensor | None = None) -> Tensor:
        inward = self.norm(f"{name}.in_layers.0", x) if found is None else self.fdn(f"{name}.norm_in", x, found)
        h = self.conv(f"{name}.in_layers.2", silu(inward)) + self.flat(f"{name}.emb_layers.1", silu(time))[..., None, None]
        outward = self.norm(f"{name}.out_layers.0", h) if found is None else self.fdn(f"{name}.norm_out", h, found)
        skip = self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.held else x
        return skip + self.conv(f"{name}.out_layers.3", silu(outward))

    def attend(self, name: str, x: Tensor, read: Tensor, heads: int) -> Tensor:
        q, k, v = (self.flat(f"{name}.to_{n}", rows).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for n, rows in (("q", x), ("k", read), ("v", read)))  # fmt: skip
        return self.flat(f"{name}.to_out.0", scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def transformer(self, name: str, x: Tensor, text: Tensor, heads: int) -> Tensor:
        at = f"{name}.transformer_blocks.0"
        h = self.flat(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6).flatten(2).mT)
        one, two, three = (
            (h.shape[-1:], self.held[f"{at}.norm{n}.weight"], self.held[f"{at}.norm{n}.bias"]) for n in (1, 2, 3)
        )
        y = layer_norm(h, *one)
        h = h + self.attend(f"{at}.attn1", y, y, heads)
        h = h + self.attend(f"{at}.attn2", layer_norm(h, *two), text, heads)
        wide, gate = self.flat(f"{at}.ff.net.0.proj", layer_norm(h, *three)).chunk(2, dim=-1)
        h = h + self.flat(f"{at}.ff.net.2", wide * gelu(gate))
        return x + self.flat(f"{name}.proj_out", h).mT.unflatten(2, x.shape[-2:])

    def features(self, shown: Tensor) -> list[Tensor]:
        for layer, stride in ((0, 1), (2, 2), (4, 1), (6, 2), (8, 1)):
            shown = silu(self.conv(f"feature_extractor.pre_extractor.{layer}", shown, stride))
        found: list[Tensor] = []
        for level in range(len(self.heads)):
            shown = silu(self.conv(f"feature_extractor.extractors.{level}.0", shown, 2))
            found.append(self.conv(f"feature_extractor.zero_convs.{level}", shown))
        return found

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, shown: Tensor) -> list[Tensor]:
        """Thirteen residuals, the middle's last."""
        half = self.held["time_embed.0.weight"].shape[1] // 2
        angles = t[:, None] * torch.exp(-log(10000) * torch.arange(half) / half)
        time = self.flat("time_embed.2", silu(self.flat("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=-1))))
        found, block, h = self.features(shown), 0, self.conv("input_blocks.0.0", x)
        out = [self.conv("zero_convs.0.0", h)]
        for level, heads in enumerate(self.heads):
            for layer in range(3 if level + 1 < len(self.heads) else 2):
                block += 1
                here = f"input_blocks.{block}"
                if layer == 2:
                    h = self.conv(f"{here}.0.op", h, 2)
                else:  # the authors' inject_layers: 1, 4, 7, 10
                    h = self.resnet(f"{here}.0", h, time, found[level] if layer == 0 else None)
                if f"{here}.1.norm.weight" in self.held:
                    h = self.transformer(f"{here}.1", h, text, heads)
                out.append(self.conv(f"zero_convs.{block}.0", h))
        h = self.transformer("middle_block.1", self.resnet("middle_block.0", h, time), text, self.heads[-1])
        return [*out, self.conv("middle_block_out.0", self.resnet("middle_block.2", h, time))]


@torch.no_grad()
def test_the_local_one_says_what_its_equations_say(tmp_path: Path) -> None:
    """Three conditions, another for each row; residuals added to the skips and the middle of the U-Net by their names."""
    base, asked, shown = base_of("sd15"), query("sd15"), pictures(2, 3)
    saved = LOCAL.save(made(base, 3), tmp_path / "me")
    unet: Any = base.denoiser
    heads = unet.config.num_attention_heads or unet.config.attention_head_dim
    theirs = Theirs(saved, [heads] * 4 if isinstance(heads, int) else list(heads))
    *down, mid = (0.7 * r for r in theirs(asked.noisy, asked.t, asked.condition.hidden, shown))
    told: dict[str, Any] = dict(encoder_hidden_states=asked.condition.hidden, return_dict=False)
    expected = unet(asked.noisy, asked.t, **told, down_block_additional_residuals=down, mid_block_additional_residual=mid)[0]
    with Beside(base, *open_side(saved, base), 0.7) as beside:
        beside.tell(shown)
        found = base.family.predict(base, asked)
        beside.tell(torch.cat([shown[:, 3:6], shown[:, :3], shown[:, 6:]], dim=1))
        swapped = base.family.predict(base, asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (swapped - found).abs().max() > 1e-3 < (base.family.predict(base, asked) - found).abs().max()


@torch.no_grad()
def test_the_global_one_says_what_its_equations_say(tmp_path: Path) -> None:
    """Guided: tokens of the picture behind the prompt, those of an embedding of zeros behind the other; a ControlNet beside
    it reads the same ones, whichever came first."""
    base, network = base_of("sd15"), trained("uni-controlnet-global", "sd15")
    held = {n.removeprefix("global_adapter."): t for n, t in load_file(GLOBAL.save(network, tmp_path / "me")).items()}

    def tokens(embeds: Tensor) -> Tensor:
        for n in ("1", "2"):
            x = layer_norm(embeds, embeds.shape[-1:], held[f"norm{n}.weight"], held[f"norm{n}.bias"])
            wide, gate = linear(x, held[f"ff{n}.net.0.proj.weight"], held[f"ff{n}.net.0.proj.bias"]).chunk(2, dim=-1)
            embeds = linear(wide * gelu(gate), held[f"ff{n}.net.2.weight"], held[f"ff{n}.net.2.bias"])
        return 0.7 * embeds.unflatten(-1, (4, -1))

    eye: Any = getattr(network, "eye")  # noqa: B009
    both = torch.cat([tokens(torch.zeros(1, 20)), tokens(eye.embeds(control(1)))])
    call = {**CALL, "height": 64, "width": 64, "latents": latents()}
    plain = base.pipe(**call).images  # pyright: ignore
    for order in ((0, 1), (1, 0)):
        pair = [(GLOBAL, network, 0.7), (TABLE["controlnet"], trained("controlnet", "sd15"), 1.0)]
        besides = [Beside(base, *pair[i]) for i in order]
        for beside in besides:
            beside.tell(control(1))
        ours = base.pipe(**call).images  # pyright: ignore
        for beside in besides:
            beside.remove()
        with Beside(base, *pair[1]) as beside:
            beside.tell(control(1))
            hook = base.denoiser.register_forward_pre_hook(
                lambda _, args, told: (
                    args,
                    told | {"encoder_hidden_states": torch.cat([told["encoder_hidden_states"], both], dim=1)},
                ),
                with_kwargs=True,
                prepend=True,
            )
            theirs = base.pipe(**call).images  # pyright: ignore
            hook.remove()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert (theirs - plain).abs().max() > 1e-2


@torch.no_grad()
def test_the_global_one_joins_the_prompt_of_every_layer() -> None:
    """Where layer-wise words put prompts side by side, one for each cross-attention, its tokens are in all of them."""
    base, asked = base_of("sdxl"), query("sdxl")
    layers = {name: number for number, name in enumerate(cross_attentions(base.denoiser))}
    widths = tuple(embedding.embedding_dim for embedding in text_embeddings(base.pipe).values())
    wide = replace(asked.condition, hidden=spread(asked.condition.hidden, len(layers), widths))
    assert len(widths) == 2 and wide.hidden.shape[-1] == len(layers) * asked.condition.hidden.shape[-1]
    with Beside(base, GLOBAL, trained("uni-controlnet-global", "sdxl")) as beside:
        beside.tell(control(1))
        expected = base.family.predict(base, asked)
        hooks = hook_cross_attentions([base.denoiser], layers, widths)
        found = base.family.predict(base, replace(asked, condition=wide))
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (base.family.predict(base, asked) - expected).abs().max() > 1e-3


def test_those_of_full_size_have_as_many_values_as_the_authors_code_makes() -> None:
    """A ControlNet of 361,279,120 less its hint's 1,086,480 and the values of eight norms, with convolutions for these
    (43,511,680) and the extractor; the global one was published with 47 million."""
    base = full_size("sd15")
    with torch.device("meta"):
        local = LOCAL.create(base, UniControlNetOptions(conditions=7))
        other = GlobalAdapter(768, 768)
    extractor = sum(p.numel() for p in local.get_submodule("controlnet_cond_embedding").parameters())
    assert sum(p.numel() for p in local.parameters()) == 361_279_120 - 1_086_480 - 12_160 + 43_511_680 + extractor
    assert extractor == 8_211_392
    assert sum(p.numel() for p in other.parameters()) == 47_213_568


def test_the_file_has_the_authors_names_and_shapes(tmp_path: Path) -> None:
    shapes = {n: tuple(t.shape) for n, t in load_file(LOCAL.save(made(base_of("sd15"), 7), tmp_path / "me")).items()}
    assert all(name.startswith("local_adapter.") for name in shapes)
    expected = {
        "feature_extractor.pre_extractor.0.weight": (4, 21, 3, 3),
        "feature_extractor.extractors.3.0.weight": (64, 48, 3, 3),
        "feature_extractor.zero_convs.3.bias": (64,),
        "input_blocks.4.0.norm_in.conv_gamma.weight": (8, 32, 3, 3),
        "input_blocks.4.0.norm_out.conv_beta.weight": (16, 32, 3, 3),
        "input_blocks.5.0.in_layers.0.weight": (16,),
        "zero_convs.11.0.weight": (16, 16, 1, 1),
    }
    assert {name: shapes.get(f"local_adapter.{name}") for name in expected} == expected
    assert not [name for name in shapes if "input_blocks.4.0.in_layers.0" in name or "input_hint_block" in name]


def test_conditions_are_dropped_as_often_as_by_the_authors() -> None:
    """All are kept in a tenth, all dropped in a tenth, else each by a half; of black nothing else is left."""
    network, shown = made(base_of("sd15"), 3), torch.ones(40_000, 9, 1, 1)
    thin = LOCAL.thinned(network, shown, torch.Generator().manual_seed(0)).flatten(1).unflatten(1, (3, 3))
    assert torch.equal(thin, thin[..., :1].expand_as(thin)), "a condition goes as a whole"
    kept = thin[..., 0].bool()
    shares = [float(rows.float().mean()) for rows in (kept.all(1), (~kept).all(1), *kept.T)]
    assert shares == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.5], abs=0.01)
    assert torch.equal(TABLE["controlnet"].thinned(network, shown, torch.Generator()), shown)


@torch.no_grad()
def test_a_stack_shows_it_pictures_that_lie_side_by_side(tmp_path: Path) -> None:
    base, asked = base_of("sd15"), query("sd15")
    saved = LOCAL.save(made(base, 2), tmp_path / "me")
    halves = [Image.effect_noise((96, 96), 80).convert("RGB"), Image.new("RGB", (96, 96))]
    both = Image.new("RGB", (192, 96))
    both.paste(halves[0], (0, 0))
    both.save(tmp_path / "both.png")
    halves[0].save(tmp_path / "one.png")
    uses = [ControlUse(network=str(saved), image=str(tmp_path / f"{name}.png")) for name in ("both", "one")]
    with Stack(controls=(uses[0],)).on(base) as applied:
        applied.controls.show(64, 64)
        found = base.family.predict(base, asked)
    with Beside(base, *open_side(saved, base)) as beside:
        beside.tell(torch.cat([pixels_of(half, (64, 64)) for half in halves])[None])
        assert torch.equal(base.family.predict(base, asked), found)
        with pytest.raises(DataError, match=r"1 control pictures.*2 side by side"):
            beside.tell(control(1))
    with Stack(controls=(uses[1],)).on(base) as applied, pytest.raises(DataError, match=r"96x96.*that reads 2.*128x64"):
        applied.controls.show(64, 64)


def test_what_it_cannot_be_used_for_is_refused(tmp_path: Path) -> None:
    base = base_of("sd15")
    saved = LOCAL.save(made(base, 2), tmp_path / "me")
    held = load_file(saved)
    save_file({**held, "global_adapter.norm1.bias": torch.zeros(20)}, saved)
    with pytest.raises(DeltaError, match=r"global_adapter\.norm1.*take out what is not local_adapter"):
        open_side(saved, base)
    with Beside(base, GLOBAL, trained("uni-controlnet-global", "sd15")) as beside, pytest.raises(ConfigError, match="a mask"):
        beside.tell(control(1))
        beside.mask = torch.ones(1, 1, 64, 64)
        base.family.predict(base, query("sd15"))
    with pytest.raises(ConfigError, match="conditions = 0"):
        UniControlNetOptions(conditions=0)


@torch.no_grad()
def test_it_reads_pictures_at_the_bases_own_factor(tmp_path: Path) -> None:
    pipe: Any = FAMILIES["sd15"].tiny()
    pipe.register_modules(vae=tiny_vae(4))
    pipe.vae_scale_factor = 4
    base = Base(pipe, FAMILIES["sd15"], "four").freeze()
    saved = LOCAL.save(made(base, 1), tmp_path / "me")
    with Beside(base, *open_side(saved, base)) as beside:
        beside.tell(control(side=32))
        assert base.family.predict(base, query("sd15")).isfinite().all()
    with pytest.raises(DeltaError, match="made for 4 pixels to a latent"):
        open_side(saved, base_of("sd15"))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    base, network, found = base_of("sd15"), made(base_of("sd15"), 1).train(), list[dict[str, Tensor]]()
    for switch in (network.disable_gradient_checkpointing, network.enable_gradient_checkpointing):
        switch()
        with Beside(base, LOCAL, network) as beside:
            beside.tell(control())
            base.family.predict(base, query("sd15")).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None})
        network.zero_grad()
    assert found[0].keys() == found[1].keys() == {name for name, _ in network.named_parameters()}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6)
