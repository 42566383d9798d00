"""Training the embedded Toybox base from nothing, in stages that each leave their result in a work folder.

render -> vae -> text -> latents -> unet -> decoder -> write. A stage whose result exists is not done again; one that
was interrupted goes on from its last saved state. The same stages serve a CPU of two cores and a large GPU; only
minutes, widths and batch differ.
"""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as nf
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.captions import LABEL_SIZES, captions_of, chunk_scenes, draw_caption
from vgm_peft.toybox.pipeline import assemble, write_pipeline
from vgm_peft.toybox.pixels import to_float
from vgm_peft.toybox.render import render
from vgm_peft.toybox.state import load_state, restore_module, say
from vgm_peft.toybox.text import (
    COMMON_WORDS,
    RARE_WORDS,
    TextSettings,
    make_text_model,
    make_tokenizer,
    tokenize,
    train_text,
)
from vgm_peft.toybox.unet import Latents, UnetRun, UnetSettings, make_scheduler, make_unet
from vgm_peft.toybox.vae import VaeSettings, fold_statistics, make_vae, train_vae

CHUNK = 2000
STAGES = ("render", "vae", "text", "latents", "unet", "decoder", "write")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """One training of the base."""

    output: Path
    work: Path
    """Renders, states and the results of the stages; can be deleted afterwards."""
    minutes: float = 150.0
    """Training time of all stages together, rendering not counted."""
    device: str = "cpu"
    chunks: int = 24
    """Renders to train on, in chunks of 2000."""
    processes: int = 2
    captions: int = 3
    """Different captions a picture."""
    snapshot_seconds: float = 600.0
    seed: int = 0
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    unet: UnetSettings = field(default_factory=UnetSettings)

    def seconds(self, stage: str) -> float:
        """The training time of one stage."""
        return 60 * self.minutes * {"vae": 0.18, "text": 0.02, "unet": 0.7, "decoder": 0.1}[stage]


def render_chunk(folder: Path, chunk: int) -> None:
    """Render one chunk's scenes; pictures (B, 64, 64, 3) and toy masks (B, 64, 64), uint8."""
    torch.set_num_threads(1)
    done = render(chunk_scenes(chunk, CHUNK))
    np.save(folder / f"mask{chunk:03d}.npy", done.mask.numpy())
    np.save(folder / f"part{chunk:03d}.npy", done.image.numpy())
    (folder / f"part{chunk:03d}.npy").replace(folder / f"image{chunk:03d}.npy")


def render_all(settings: BaseSettings) -> None:
    """Render the chunks that are missing, in parallel."""
    folder = settings.work / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in range(settings.chunks) if not (folder / f"image{c:03d}.npy").exists()]
    with ProcessPoolExecutor(settings.processes) as pool:
        for chunk, _ in zip(missing, pool.map(render_chunk, [folder] * len(missing), missing), strict=True):
            say(f"rendered chunk {chunk} of {settings.chunks}")


def load_renders(settings: BaseSettings, chunks: range | None = None, what: str = "image") -> Tensor:
    """The rendered pictures (or masks) of these chunks, uint8."""
    folder = settings.work / "renders"
    chosen = range(settings.chunks) if chunks is None else chunks
    return torch.cat([torch.from_numpy(np.load(folder / f"{what}{c:03d}.npy")) for c in chosen])


def vae_stage(settings: BaseSettings) -> None:
    """Train encoder and decoder, then fold the latents' statistics in."""
    torch.manual_seed(settings.seed)
    vae = make_vae(settings.vae.widths).to(settings.device, memory_format=torch.channels_last)
    pictures = load_renders(settings, range(min(8, settings.chunks)))
    train_vae(vae, lambda: pictures, settings.vae, settings.work / "vae.safetensors", settings.seconds("vae"))
    fold_vae(settings, vae, pictures)


def fold_vae(settings: BaseSettings, vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold the latents' mean and deviation over renders into the VAE and write it to the work folder."""
    centre, spread = fold_statistics(vae, to_float(pictures[:1024]).to(settings.device))
    say(f"vae folded: means {centre.tolist()} deviations {spread.tolist()}")
    vae.save_pretrained(settings.work / "vae")


def text_stage(settings: BaseSettings) -> None:
    """Build the tokenizer and train the text model on the labels of captions."""
    tokenizer = make_tokenizer([*COMMON_WORDS, *RARE_WORDS])
    torch.manual_seed(settings.seed)
    model = make_text_model(tokenizer, settings.text).to(settings.device)
    train_text(tokenizer, model, draw_caption, LABEL_SIZES, settings.text, settings.seconds("text"), seed=settings.seed)
    tokenizer.save_pretrained(settings.work / "tokenizer")
    model.save_pretrained(settings.work / "text_encoder")


def load_text(settings: BaseSettings) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the frozen text model that the text stage left."""
    tokenizer = CLIPTokenizer.from_pretrained(settings.work / "tokenizer")
    model = CLIPTextModel.from_pretrained(settings.work / "text_encoder", dtype=torch.float32)
    return tokenizer, model.to(settings.device).requires_grad_(False).eval()


@torch.no_grad()
def latents_stage(settings: BaseSettings) -> None:
    """Encode every render once and tokenize several captions of each."""
    vae = AutoencoderKL.from_pretrained(settings.work / "vae").to(settings.device).eval()
    tokenizer, _ = load_text(settings)
    folder = settings.work / "latents"
    folder.mkdir(exist_ok=True)
    for chunk in range(settings.chunks):
        place = folder / f"{chunk:03d}.safetensors"
        if place.exists():
            continue
        rng = random.Random(f"captions {settings.seed} {chunk}")
        parts = to_float(load_renders(settings, range(chunk, chunk + 1))).split(100)
        posteriors = [vae.encode(part.to(settings.device)).latent_dist for part in parts]
        toy = (load_renders(settings, range(chunk, chunk + 1), "mask") > 0).float()
        texts = [text for scene in chunk_scenes(chunk, CHUNK) for text in captions_of(scene, settings.captions, rng)]
        save_file(
            {
                "mean": torch.cat([p.mean for p in posteriors]).half().cpu(),
                "deviation": torch.cat([p.std for p in posteriors]).half().cpu(),
                "toy": (nf.avg_pool2d(toy[:, None], 4)[:, 0] * 255).round().to(torch.uint8),
                "tokens": tokenize(tokenizer, texts).reshape(CHUNK, settings.captions, -1).to(torch.int16),
            },
            place,
        )
        say(f"encoded chunk {chunk} of {settings.chunks}")


def load_latents(settings: BaseSettings) -> Latents:
    """Everything the latents stage left."""
    files = [load_file(path) for path in sorted((settings.work / "latents").glob("*.safetensors"))]
    joined = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    return Latents(joined["mean"], joined["deviation"], joined["toy"], joined["tokens"])


def unet_stage(settings: BaseSettings) -> None:
    """Train the U-Net to the end of its budget, saving its state and, now and then, a whole pipeline."""
    tokenizer, text = load_text(settings)
    data, empty = load_latents(settings), tokenize(tokenizer, [""])
    state = settings.work / "unet.safetensors"
    run = UnetRun.start(settings.unet, settings.seconds("unet"), settings.device, state, settings.seed)
    alphas = make_scheduler().alphas_cumprod.to(settings.device)
    saved = shown = run.clock.elapsed()
    losses: list[Tensor] = []
    while (progress := run.clock.progress()) < 1:
        losses.append(run.advance(data, text, empty, alphas, progress))
        if run.step % 50 == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            say(f"unet step {run.step} {run.clock.elapsed():.0f} s loss {mean:.4f} rates x{run.factor(progress):.3f}")
        if run.clock.elapsed() - saved > settings.unet.save_seconds:
            run.save(state)
            saved = run.clock.elapsed()
        if run.clock.elapsed() - shown > settings.snapshot_seconds:
            write_base(settings, settings.work / "snapshot", run)
            shown = run.clock.elapsed()
    run.save(state)
    write_base(settings, settings.work / "snapshot", run)


def decoder_stage(settings: BaseSettings) -> None:
    """Train only the VAE's decoder on, so that latents made before stay valid."""
    vae = AutoencoderKL.from_pretrained(settings.work / "vae").to(settings.device, memory_format=torch.channels_last)
    pictures = load_renders(settings, range(min(8, settings.chunks)))
    state = settings.work / "decoder.safetensors"
    train_vae(vae, lambda: pictures, settings.vae, state, settings.seconds("decoder"), decoder_only=True)


def best_vae(settings: BaseSettings) -> AutoencoderKL:
    """The folded VAE, with the decoder stage's weights where that stage has saved any."""
    vae = AutoencoderKL.from_pretrained(settings.work / "vae")
    state = settings.work / "decoder.safetensors"
    if state.exists():
        restore_module("vae", vae, load_state(state)[0])
    return vae


def write_base(settings: BaseSettings, folder: Path, run: UnetRun | None = None) -> None:
    """Write the pipeline folder from the running mean of a U-Net run, or of the saved one."""
    unet = make_unet(settings.unet)
    if run is None:
        restore_module("averaged", unet, load_state(settings.work / "unet.safetensors")[0])
    else:
        unet.load_state_dict(run.averaged.model.state_dict())
    tokenizer, text = load_text(settings)
    write_pipeline(assemble(best_vae(settings), text.cpu(), tokenizer, unet), folder)
    say(f"wrote {folder.name}")


def train_base(settings: BaseSettings, stages: tuple[str, ...] = STAGES) -> None:
    """Run the stages in order, leaving out those that are done."""
    settings.work.mkdir(parents=True, exist_ok=True)
    steps = {
        "render": render_all,
        "vae": vae_stage,
        "text": text_stage,
        "latents": latents_stage,
        "unet": unet_stage,
        "decoder": decoder_stage,
    }
    for stage in stages:
        say(f"stage {stage}")
        if stage == "write":
            write_base(settings, settings.output)
        else:
            steps[stage](settings)
