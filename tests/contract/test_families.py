"""What every family of base models promises, on its tiny pipeline of the real classes: parametrised over the table."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tests.contract.ground import base_of
from vgm_peft.errors import BaseModelError, ConfigError, VgmError
from vgm_peft.families import TABLE, family_named, family_of
from vgm_peft.family import Base, Condition, Family, Query
from vgm_peft.site import Op, choose, locate

PROMPTS = ["a photo of a robot on grass", "", "ein Häuschen, 日本 " + "very " * 90]
FULL = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.fixture(params=sorted(TABLE))
def family(request: pytest.FixtureRequest) -> Family:
    return TABLE[request.param]


@pytest.fixture
def base(family: Family) -> Base:
    return base_of(family.name)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock_prompt(pipe: Any, prompts: list[str], negative: list[str]) -> tuple[Condition, Condition]:
    """The stock pipeline's own encoding, whatever its signature."""
    answer = pipe.encode_prompt(
        prompt=prompts, negative_prompt=negative, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    if len(answer) == 2:
        return Condition(answer[0]), Condition(answer[1])
    return Condition(answer[0], answer[2]), Condition(answer[1], answer[3])


def same(ours: Condition, theirs: Condition) -> bool:
    pooled = ours.pooled is theirs.pooled or torch.equal(ours.pooled, theirs.pooled)  # pyright: ignore
    return torch.equal(ours.hidden, theirs.hidden) and pooled


def test_tiny_is_small_and_decided_by_its_seed(family: Family) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        parts = Base(family.tiny(seed), family, "tiny").pipe.components
        return {f"{n}.{k}": v for n, p in parts.items() if isinstance(p, torch.nn.Module) for k, v in p.state_dict().items()}

    before = torch.random.get_rng_state()
    first, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(before, torch.random.get_rng_state()), "the global generator was left alone"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert sum(v.numel() for v in first.values()) < 1_000_000


def test_every_text_tokenises(base: Base) -> None:
    vocab = base.pipe.tokenizer.get_vocab()  # pyright: ignore
    for text in ("plain words", "ÄÖÜ ß", "日本語", "🦆\u202e\x00", "a" * 500):
        ids = base.pipe.tokenizer(text).input_ids  # pyright: ignore
        assert len(ids) > 2 and max(ids) < len(vocab)


def test_family_of_recognises_every_task(family: Family, base: Base) -> None:
    import diffusers

    from vgm_peft.sides import TABLE as sides

    for name in family.pipelines:
        build = getattr(diffusers, name)
        parts = dict(base.pipe.components)
        if "ControlNet" in name:
            parts["controlnet"] = sides["controlnet"].create(base, sides["controlnet"].Options())
        if "XL" not in name:
            parts["requires_safety_checker"] = False
        assert family_of(build(**parts)) is family


def test_family_of_names_what_it_found() -> None:
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    with pytest.raises(BaseModelError, match=r"DDPMPipeline \(unet: UNet2DModel.*sd15"):
        family_of(DDPMPipeline(unet, DDIMScheduler()))
    with pytest.raises(ConfigError, match='did you mean "sdxl"'):
        family_named("sdxx")


def test_presets_choose_what_they_say(family: Family, base: Base) -> None:
    every: tuple[Op, ...] = ("linear", "conv", "norm", "bias", "embedding")
    chosen = {name: choose(base.sites, [name], family.presets, every) for name in family.presets}
    sizes = {name: len(sites) for name, sites in chosen.items()}
    ours = [s for s in base.sites if s.part == family.denoiser]
    assert set(chosen["weights"]) == {s for s in ours if s.op in ("linear", "conv", "embedding")}
    assert set(chosen["biases"]) == {s for s in ours if s.op == "bias"}
    norms = {s.module for s in ours if s.op == "norm"}
    assert set(chosen["norms"]) == {s for s in ours if s.module in norms}
    assert sizes["attention"] == sizes["self-attention"] + sizes["cross-attention"]
    assert sizes["attention"] < sizes["attention+mlp"] < sizes["all"]
    for site in choose(base.sites, ["attention"], family.presets):
        assert site.part == family.denoiser and site.module.rsplit("attn", 1)[1][2:] in ("to_q", "to_k", "to_v", "to_out.0")
    for site in choose(base.sites, ["conv"], family.presets):
        assert site.op == "conv" and site.shape[2:] == (3, 3)
    convs = [s for s in base.sites if s.op == "conv" and s.shape[2:] == (3, 3)]
    assert {s.module for s in convs} - {s.module for s in choose(base.sites, ["conv"], family.presets)} == {
        "conv_in",
        "conv_out",
    }
    text = choose(base.sites, ["text"], family.presets)
    layers = sum(base.parts[p].config.num_hidden_layers for p in family.parts[1:])  # pyright: ignore
    assert len(text) == 4 * layers and {s.part for s in text} == set(family.parts[1:])


def test_full_size_counts_and_presets(family: Family) -> None:
    parts = family.published()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counts == FULL.get(family.name, counts)
    assert all(p.is_meta for part in parts.values() for p in part.parameters())


def test_prompts_have_the_stock_pipelines_numbers(family: Family, base: Base) -> None:
    negative = ["", "blurry", ""]
    theirs, theirs_negative = stock_prompt(base.pipe, PROMPTS, negative)
    assert same(family.encode_prompt(base, PROMPTS), theirs)
    assert same(family.encode_prompt(base, negative), theirs_negative)
    with torch.no_grad():
        alone = Condition.cat([family.encode_prompt(base, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(alone.hidden, theirs.hidden, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_text_encoders(family: Family) -> None:
    base = Base(family.tiny(), family, "tiny").freeze()
    last = [
        next(p for n, p in base.parts[part].named_parameters() if n.endswith("0.self_attn.q_proj.weight"))
        for part in family.parts[1:]
    ]
    for p in last:
        p.requires_grad_(True)
    condition = family.encode_prompt(base, ["a robot"])
    condition.hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in last)


def test_predict_is_the_stock_call(family: Family, base: Base) -> None:
    noisy, t = noise(3, 4, 8, 8), torch.tensor([0, 500, 999])
    condition = family.encode_prompt(base, PROMPTS)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [128, 96, 8, 0, 64, 64], [640, 512, 0, 7, 64, 64]])
    told = None
    if condition.pooled is not None:
        told = {"text_embeds": condition.pooled, "time_ids": sizes.float()}
    unet: Any = base.denoiser
    theirs = unet(noisy, t, encoder_hidden_states=condition.hidden, added_cond_kwargs=told).sample
    assert torch.equal(family.predict(base, Query(noisy, t, condition, sizes)), theirs)
    default = family.predict(base, Query(noisy, t, condition))
    assert torch.equal(default[0], theirs[0])
    assert torch.equal(default[1], theirs[1]) == (told is None), "sizes are heard where the family hears them"


def test_half_precision_bases_are_asked_in_single(family: Family) -> None:
    base = Base(family.tiny().to(torch.bfloat16), family, "half").freeze()
    whole = base_of(family.name)
    sizes = torch.tensor([[1001, 777, 3, 0, 64, 64]])
    asked = Query(noise(1, 4, 8, 8), torch.tensor([500]), family.encode_prompt(base, ["a duck"]), sizes)
    answer = family.predict(base, asked)
    assert answer.dtype == torch.bfloat16
    told = Query(asked.noisy, asked.t, family.encode_prompt(whole, ["a duck"]), sizes)
    torch.testing.assert_close(answer.float(), family.predict(whole, told), rtol=0, atol=0.05)


def test_pictures_to_latents_and_back(family: Family, base: Base) -> None:
    vae: Any = base.pipe.vae  # pyright: ignore
    pixels = noise(2, 3, 64, 48).clamp(-1, 1)
    posterior = family.encode_image(base, pixels)
    stock = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    assert torch.equal(posterior.mean, stock.mean * scale) and torch.equal(posterior.std, stock.std * scale)
    draw = noise(2, 4, 8, 6, seed=1)
    torch.testing.assert_close(posterior.sample(draw), (stock.mean + stock.std * draw) * scale)
    theirs = vae.decode(posterior.mean / scale).sample.clamp(-1, 1)
    torch.testing.assert_close(family.decode(base, posterior.mean), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "unit", [{"shift_factor": 0.25}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}]
)
def test_shifted_latents_invert(family: Family, unit: dict[str, Any]) -> None:
    base = Base(family.tiny(), family, "tiny").freeze()
    vae: Any = base.pipe.vae.double()  # pyright: ignore
    pixels = noise(1, 3, 64, 64).clamp(-1, 1).double()
    plain = family.encode_image(base, pixels)
    expected = family.decode(base, plain.mean)
    vae.register_to_config(**unit)
    shifted = family.encode_image(base, pixels)
    scale = vae.config.scaling_factor
    mean = torch.tensor(unit.get("latents_mean", [unit.get("shift_factor")] * 4)).double().view(1, 4, 1, 1)
    std = torch.tensor(unit.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    torch.testing.assert_close(shifted.mean, (plain.mean / scale - mean) * scale / std)
    torch.testing.assert_close(shifted.std, plain.std / std)
    torch.testing.assert_close(family.decode(base, shifted.mean), expected, rtol=0, atol=1e-9)


def test_half_precision_goes_through_a_vae_that_overflows(family: Family) -> None:
    base = Base(family.tiny(), family, "tiny").freeze()
    vae: Any = base.pipe.vae  # pyright: ignore
    vae.to(torch.float16)
    before = copy.deepcopy(vae.state_dict())
    pixels = noise(1, 3, 32, 32).clamp(-1, 1)
    posterior = family.encode_image(base, pixels)
    assert posterior.mean.dtype == torch.float32 and vae.dtype == torch.float16
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())
    assert family.decode(base, posterior.mean).isfinite().all()


def test_sampling_through_ours_draws_the_stock_picture(family: Family, base: Base) -> None:
    pipe: Any = copy.copy(base.pipe)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, timestep_spacing="leading", steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    latents = noise(1, 4, 8, 8)
    prompt, negative = ["a photo of a duck"], ["dark"]
    theirs = pipe(
        prompt=prompt,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=latents,
        output_type="pt",
        height=64,
        width=64,
    ).images
    ours = _ddim(
        base, Condition.cat([family.encode_prompt(base, p) for p in (negative, prompt)]), latents, steps=4, guidance=5.0
    )
    torch.testing.assert_close(ours / 2 + 0.5, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def _ddim(base: Base, condition: Condition, x: Tensor, steps: int, guidance: float) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502 eq. 12), with nothing of diffusers' schedulers."""
    process, stride = base.process, base.process.steps // steps
    for t in range(stride * (steps - 1) + 1, 0, -stride):
        index = torch.tensor([t])
        without, told = base.family.predict(base, Query(x.repeat(2, 1, 1, 1), index.repeat(2), condition)).chunk(2)
        answer = without + guidance * (told - without)
        x0 = process.clean(x, answer, index)
        rate = process.alphas[index].float().view(1, 1, 1, 1)
        eps = (x - rate.sqrt() * x0) / (1 - rate).sqrt()
        before = torch.tensor([max(t - stride, 0)])
        set_to_one = t - stride < 0 and base.pipe.scheduler.config.get("set_alpha_to_one", True)
        x = x0 if set_to_one else process.corrupt(x0, eps, before)
    return base.family.decode(base, x)


def test_kohya_spelling_is_a_bijection(family: Family, base: Base) -> None:
    table = family.key_table(base.sites)
    modules = {(s.part, s.module) for s in base.sites}
    assert set(table.kohya) == modules
    assert len(set(table.kohya.values())) == len(modules)
    assert not set(table.aliases) & set(table.kohya.values())
    assert all("." not in name for name in (*table.kohya.values(), *table.aliases))
    for part, module in table.aliases.values():
        site = next(s for s in base.sites if (s.part, s.module) == (part, module))
        locate(base.parts, site)


def test_known_kohya_names() -> None:
    sd15, sdxl = (TABLE[n].key_table(base_of(n).sites) for n in ("sd15", "sdxl"))
    unet = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert sd15.kohya["unet", unet] == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    te = "encoder.layers.1.self_attn.q_proj"
    assert sd15.kohya["text_encoder", te] == "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    assert {"lora_te", "lora_te1"} <= set(TABLE["sd15"].prefixes["text_encoder"])
    assert sd15.aliases["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"] == ("unet", unet)
    assert sdxl.kohya["unet", unet] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    assert sdxl.aliases["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"] == ("unet", unet)
    assert sdxl.kohya["text_encoder_2", te] == "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    assert sdxl.kohya["text_encoder_2", "text_projection"] == "lora_te2_text_projection"
    assert sdxl.kohya["unet", "up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert sdxl.kohya["unet", "down_blocks.0.downsamplers.0.conv"] == "lora_unet_input_blocks_3_0_op"
    assert sdxl.kohya["unet", "add_embedding.linear_2"] == "lora_unet_label_emb_0_2"


def test_original_names_agree_with_diffusers_own_map(family: Family, base: Base) -> None:
    """diffusers' reader of original names for SDXL brings every attention and sampler name of ours back to its own."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers  # pyright: ignore

    table = family.key_table(base.sites)
    if not any("input_blocks" in name for name in table.kohya.values()):
        pytest.skip("this family writes diffusers' block names")
    # Only names with numbered blocks: diffusers' map takes no other.
    names = {v: k[1] for k, v in table.kohya.items() if any(b in v for b in ("input_blocks", "middle_block", "output_blocks"))}
    names = {v: module for v, module in names.items() if not v.startswith("lora_unet_input_blocks_0")}
    state = {f"{name}.lora_down.weight": torch.zeros(1) for name in names}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state), base.denoiser.config)  # pyright: ignore
    # What is left to diffusers' next step are the rows' own names; inside resnets it renames later still.
    rows = {"input_blocks": "down_blocks", "middle_block": "mid_block", "output_blocks": "up_blocks", "0_op": "0_conv"}
    theirs = {re.sub("|".join(rows), lambda m: rows[m[0]], name) for name in mapped}
    ours = {f"lora_unet_{m.replace('.', '_')}.lora_down.weight" for m in names.values() if "resnets" not in m}
    assert len(ours) > 40 and ours <= theirs


def test_conditions_pick_and_move(base: Base) -> None:
    condition = base.family.encode_prompt(base, PROMPTS)
    picked = condition.pick([2, 0])
    assert torch.equal(picked.hidden[1], condition.hidden[0]) and len(picked) == 2
    assert condition.to(dtype=torch.float64).hidden.dtype == torch.float64


def test_pooled_is_wanted_where_it_is_heard() -> None:
    base = base_of("sdxl")
    condition = Condition(base.family.encode_prompt(base, ["a"]).hidden)
    with pytest.raises(VgmError, match="pooled"):
        base.family.predict(base, Query(noise(1, 4, 8, 8), torch.tensor([5]), condition))


def test_velocity_base_comes_with_its_process() -> None:
    family: Any = TABLE["sd15"]
    base = Base(family.tiny(prediction="v_prediction"), family, "tiny")
    assert base.process.prediction == "v_prediction" and base.process.alphas[-1] == 0


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield
