"""The embedded base: what the trainer writes loads in plain diffusers, and what is committed is within its bounds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vgm_peft.toybox.nets import decode, encode, make_vae
from vgm_peft.toybox.optim import muon_for, orthogonalise
from vgm_peft.toybox.pipeline import write_pipeline
from vgm_peft.toybox.pixels import jitter_colours, random_shapes, to_bytes, to_float
from vgm_peft.toybox.state import Clock, load_state, restore_optimiser, save_state
from vgm_peft.toybox.state import optimiser_tensors as tensors_of
from vgm_peft.toybox.text import COMMON_WORDS, RARE_WORDS, TextSettings, make_tokenizer, new_text_model, tokenize
from vgm_peft.toybox.unet import Latents, UnetRun, UnetSettings, draw_batch, new_unet
from vgm_peft.toybox.vae import deepened, fold_statistics

MIB = 1024 * 1024
TINY = UnetSettings(widths=(8, 8, 16, 16), heads=(1, 1, 1, 1), text_width=16, batch=4, coarse_batch=4)
TINY_TEXT = TextSettings(width=16, layers=1, heads=1)
ASSET = Path(__file__).resolve().parents[2] / "assets" / "toybox"


def load(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_tiny(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer([*COMMON_WORDS, *RARE_WORDS])
    text = new_text_model(tokenizer, TINY_TEXT)
    write_pipeline(folder, make_vae((8, 8, 8)), text, tokenizer, new_unet(TINY), card="# tiny\n")


def test_what_is_written_loads_in_plain_diffusers_and_samples(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write_tiny(folder)
    write_tiny(folder)  # over an older one
    assert (folder / "README.md").read_text() == "# tiny\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    pipe = load(folder)
    picture = pipe("a red robot on grass", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert pipe.safety_checker is None and pipe.scheduler.config.prediction_type == "v_prediction"
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in pipe.unet.state_dict()


def test_every_word_of_the_world_is_one_token_and_any_text_tokenizes() -> None:
    tokenizer = make_tokenizer([*COMMON_WORDS, *RARE_WORDS])
    assert all(len(tokenizer.tokenize(word)) == 1 for word in (*COMMON_WORDS, *RARE_WORDS))
    tokens = tokenize(tokenizer, ["", "a zebra, 12 naïve 日本!", "red " * 50])
    assert tokens.shape == (3, 32) and int(tokens.max()) < len(tokenizer)


def test_labels_are_what_the_words_say() -> None:
    from vgm_peft.toybox.captions import LABEL_SIZES, read_labels
    from vgm_peft.toybox.nouns import CLASSES, COLOURS

    labels = read_labels("a small red robot on grass, on the left")
    assert labels[:2] == (CLASSES.index("robot"), list(COLOURS).index("red"))
    assert len(labels) == len(LABEL_SIZES) and all(0 <= a < b for a, b in zip(labels, LABEL_SIZES, strict=True))
    pair = read_labels("a duck on the left and a blue house on the right, on sand")
    assert (pair[0], pair[4], pair[-1]) == (CLASSES.index("duck"), CLASSES.index("house"), 1)


def test_folding_leaves_the_drawing_and_makes_latents_unit_normal() -> None:
    torch.manual_seed(0)
    vae = make_vae((8, 8, 8)).requires_grad_(False)
    pictures = random_shapes(8, 32, torch.Generator().manual_seed(0))
    before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    fold_statistics(vae, pictures)
    latents = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(vae.decode(latents).sample, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 144), (2, 64, 16), (1, 8, 8)])
def test_orthogonalise_evens_out_the_singular_values(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.max() < 1.3 and (shape[1] == shape[2] or values.min() > 0.7)


def tiny_data(draw: torch.Tensor | None = None) -> Latents:
    chance = torch.Generator().manual_seed(0)
    mean = torch.randn(8, 4, 16, 16, generator=chance).half()
    even, toy = torch.ones(8), torch.zeros(8, 16, 16, dtype=torch.uint8)
    return Latents(mean, torch.full_like(mean, 0.01), toy, torch.ones(8, 2, 32), even if draw is None else draw)


def test_a_resumed_run_takes_the_very_same_steps(tmp_path: Path) -> None:
    from vgm_peft.toybox.nets import make_scheduler

    tokenizer = make_tokenizer(["a"])
    text, alphas = new_text_model(tokenizer, TINY_TEXT).requires_grad_(False), make_scheduler().alphas_cumprod
    data, empty, state = tiny_data(), tokenize(tokenizer, [""]), tmp_path / "unet.safetensors"
    torch.manual_seed(1)
    straight = UnetRun.start(TINY, 60, "cpu", state)
    for progress in (0.1, 0.5):
        straight.advance(data, text, empty, alphas, progress)
    straight.save(state)
    again = UnetRun.start(TINY, 60, "cpu", state)
    assert (again.step, again.pictures) == (2, 8)
    assert straight.advance(data, text, empty, alphas, 0.6) == again.advance(data, text, empty, alphas, 0.6)
    for one, other in zip(straight.averaged.model.parameters(), again.averaged.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_base_can_be_trained_on(tmp_path: Path) -> None:
    from vgm_peft.toybox.base import BaseSettings, begin_from, best_unet, load_text

    write_tiny(tmp_path / "base")
    settings = BaseSettings(output=tmp_path / "out", work=tmp_path / "work", unet=TINY, text=TINY_TEXT)
    begin_from(settings, tmp_path / "base")
    weights = load(tmp_path / "base").unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in best_unet(settings).state_dict().items())
    assert load_text(settings)[0].tokenize("sks robot") == ["sks</w>", "robot</w>"]
    assert UnetRun.start(TINY, 60, "cpu", tmp_path / "work" / "unet.safetensors").step == 0


def test_a_deeper_vae_draws_the_same_at_first() -> None:
    torch.manual_seed(0)
    vae, pictures = make_vae((8, 8, 8)), torch.rand(2, 3, 16, 16)
    deeper = deepened(vae, (8, 8, 8), 2)
    assert dict(deeper.config)["layers_per_block"] == 2
    with torch.no_grad():
        latent = encode(vae, pictures).mean
        assert torch.equal(encode(deeper, pictures).mean, latent)
        assert torch.equal(decode(deeper, latent), decode(vae, latent))


def test_favoured_pictures_are_drawn_more_often() -> None:
    tokenizer = make_tokenizer([*COMMON_WORDS, *RARE_WORDS])
    text, empty = new_text_model(tokenizer, TINY_TEXT).requires_grad_(False), tokenize(tokenizer, [""])
    data = tiny_data(torch.tensor([1.0] * 7 + [7.0]))
    batch = draw_batch(data, text, empty, replace(TINY, batch=2000), torch.Generator().manual_seed(0), False)
    last = (batch.latent - data.mean[7].float()).abs().amax((1, 2, 3)) < 0.2
    assert 0.4 < float(last.float().mean()) < 0.6


def test_optimiser_state_survives_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    optimiser = muon_for(net, 0.02, 1e-3)
    net(torch.ones(2, 4)).sum().backward()
    optimiser.step()
    save_state(tmp_path / "state.safetensors", tensors_of(optimiser), {"step": 1})
    other = muon_for(net, 0.02, 1e-3)
    tensors, facts = load_state(tmp_path / "state.safetensors")
    restore_optimiser(other, tensors)
    assert facts == {"step": 1}
    assert {k: v.tolist() for k, v in tensors_of(other).items()} == {k: v.tolist() for k, v in tensors.items()}


def test_recolouring_stays_in_range_and_bytes_come_back() -> None:
    chance = torch.Generator().manual_seed(0)
    shapes = random_shapes(4, 32, chance)
    recoloured = jitter_colours(shapes, chance, share=1.0)
    assert recoloured.abs().max() <= 1 and (recoloured - shapes).abs().mean() > 0.05
    assert torch.equal(to_bytes(to_float(to_bytes(shapes))), to_bytes(shapes))


def test_a_clock_goes_on_where_it_stopped() -> None:
    clock = Clock(budget=100, spent=40)
    assert 0.4 <= clock.progress() < 0.41


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--widths", "32,64"], "four multiples"),
        (["--stages", "unett"], "some of"),
        (["--minutes", "0"], "more than"),
        (["--rates", "0"], "more than"),
        (["--favour", "duk=2"], 'did you mean "duck"'),
        (["--favour", "duck=often"], "CLASS=N"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], says: str, tmp_path: Path) -> None:
    import argparse

    from vgm_peft.errors import ConfigError
    from vgm_peft.toybox.base_cli import add_flags, run

    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(ConfigError, match=says):
        run(parser.parse_args(["--work", str(tmp_path), *flags]))


@pytest.mark.skipif(not ASSET.exists(), reason="the base is not trained yet")
def test_the_embedded_base_is_small_and_draws() -> None:
    sizes = [path.stat().st_size for path in ASSET.rglob("*") if path.is_file()]
    assert sum(sizes) <= 48 * MIB and max(sizes) <= 16 * MIB
    picture = load(ASSET)("a red robot on grass", num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 64, 64, 3) and 0.02 < picture.std() < 0.6
