"""Training the embedded Toybox base from nothing, in stages that each leave their result in a work folder.

render -> vae -> text -> latents -> unet -> decoder -> write. A stage that was interrupted goes on from its last saved
state. The same stages serve a CPU of two cores and a large GPU; only minutes, widths and batch differ.
"""

import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as nf
from transformers import CLIPTextModel, CLIPTokenizer

from vgm_peft.toybox.captions import LABEL_SIZES, captions_of, chunk_scenes, draw_caption
from vgm_peft.toybox.nets import (
    encode,
    load_pipeline,
    load_text_model,
    load_tokenizer,
    load_vae,
    make_scheduler,
    make_vae,
    place,
)
from vgm_peft.toybox.pipeline import write_pipeline
from vgm_peft.toybox.pixels import to_float
from vgm_peft.toybox.render import render
from vgm_peft.toybox.state import load_state, replace_folder, restore_module, say
from vgm_peft.toybox.text import COMMON_WORDS, RARE_WORDS, TextSettings, make_tokenizer, new_text_model, tokenize
from vgm_peft.toybox.text_training import train_text
from vgm_peft.toybox.unet import Latents, UnetRun, UnetSettings, new_unet
from vgm_peft.toybox.vae import VaeSettings, deepened, fold_statistics, train_vae

CHUNK = 2000
SHARES = {"vae": 0.2, "text": 0.02, "unet": 0.68, "decoder": 0.1, "sharpen": 0.2}
"""Of the training minutes; `sharpen`, which is no part of a training from nothing, comes on top."""


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """One training of the base."""

    output: Path
    work: Path
    """Renders, states and the results of the stages; can be deleted afterwards."""
    minutes: float = 150.0
    """Training time of all stages together; rendering and encoding come on top."""
    device: str = "cpu"
    chunks: int = 20
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
        return 60 * self.minutes * SHARES[stage]


def render_chunk(folder: Path, chunk: int) -> None:
    """Render one chunk's scenes; pictures (B, 64, 64, 3) and toy masks (B, 64, 64), uint8."""
    torch.set_num_threads(1)
    done = render(chunk_scenes(chunk, CHUNK))
    np.save(folder / f"mask{chunk:03d}.npy", done.mask.numpy())
    np.save(folder / f"part{chunk:03d}.npy", done.image.numpy())
    (folder / f"part{chunk:03d}.npy").replace(folder / f"image{chunk:03d}.npy")


def render_stage(settings: BaseSettings) -> None:
    """Render the chunks that are missing, in parallel."""
    folder = settings.work / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in range(settings.chunks) if not (folder / f"image{c:03d}.npy").exists()]
    with ProcessPoolExecutor(settings.processes) as pool:
        for chunk, _ in zip(missing, pool.map(render_chunk, [folder] * len(missing), missing), strict=True):
            say(f"rendered chunk {chunk} of {settings.chunks}")


def load_renders(settings: BaseSettings, chunks: range, what: str = "image") -> Tensor:
    """The rendered pictures (or masks) of these chunks, uint8."""
    folder = settings.work / "renders"
    return torch.cat([torch.from_numpy(np.load(folder / f"{what}{c:03d}.npy")) for c in chunks])


def vae_stage(settings: BaseSettings) -> None:
    """Train encoder and decoder, then fold the latents' mean and deviation over renders in; a folded VAE stays."""
    if (settings.work / "vae").exists():
        return
    torch.manual_seed(settings.seed)
    vae = place(make_vae(settings.vae.widths, settings.vae.layers), settings.device)
    pictures = load_renders(settings, range(min(8, settings.chunks)))
    train_vae(vae, pictures, settings.vae, settings.work / "vae.safetensors", settings.seconds("vae"))
    centre, spread = fold_statistics(vae, to_float(pictures[:1000]).to(settings.device))
    say(f"vae folded: means {centre.tolist()} deviations {spread.tolist()}")
    _save(vae, settings.work / "vae")


def sharpen_stage(settings: BaseSettings) -> None:
    """Train the whole folded VAE on, one block a level deeper; latents made before are deleted, for they are stale."""
    torch.manual_seed(settings.seed + 2)
    state = settings.work / "sharpen.safetensors"
    vae = load_vae(settings.work / "vae")
    vae = place(deepened(vae, settings.vae.widths, settings.vae.layers), settings.device)
    pictures = load_renders(settings, range(min(8, settings.chunks)))
    train_vae(vae, pictures, settings.vae.sharpening(), state, settings.seconds("sharpen"))
    centre, spread = fold_statistics(vae, to_float(pictures[:1000]).to(settings.device))
    say(f"vae folded: means {centre.tolist()} deviations {spread.tolist()}")
    _save(vae, settings.work / "vae")
    shutil.rmtree(settings.work / "latents", ignore_errors=True)


def text_stage(settings: BaseSettings) -> None:
    """Build the tokenizer and train the text model on the labels of captions."""
    if (settings.work / "text_encoder").exists():
        return
    tokenizer = make_tokenizer([*COMMON_WORDS, *RARE_WORDS])
    torch.manual_seed(settings.seed)
    model = place(new_text_model(tokenizer, settings.text), settings.device)
    train_text(tokenizer, model, draw_caption, LABEL_SIZES, settings.text, settings.seconds("text"), seed=settings.seed)
    tokenizer.save_pretrained(settings.work / "tokenizer")
    _save(model, settings.work / "text_encoder")


def begin_from(settings: BaseSettings, folder: Path) -> None:
    """Fill an empty work folder with the parts of a finished base, so that its U-Net and decoder are trained on."""
    pipe = load_pipeline(folder)
    _save(pipe.vae, settings.work / "vae")
    _save(pipe.text_encoder, settings.work / "text_encoder")
    pipe.tokenizer.save_pretrained(settings.work / "tokenizer")
    state = settings.work / "unet.safetensors"
    run = UnetRun.start(settings.unet, settings.seconds("unet"), settings.device, state, settings.seed)
    for model in (run.unet, run.averaged.model):
        model.load_state_dict(pipe.unet.state_dict())
    run.save(state)


def _save(net: AutoencoderKL | CLIPTextModel, folder: Path) -> None:
    aside = folder.with_name(folder.name + ".part")
    net.save_pretrained(aside)
    replace_folder(aside, folder)


def load_text(settings: BaseSettings) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the frozen text model that the text stage left."""
    model = place(load_text_model(settings.work / "text_encoder"), settings.device)
    return load_tokenizer(settings.work / "tokenizer"), model.requires_grad_(False).eval()


def latents_stage(settings: BaseSettings) -> None:
    """Encode every render once and tokenize several captions of each; chunks that are done stay."""
    vae = place(load_vae(settings.work / "vae"), settings.device).eval()
    tokenizer, _ = load_text(settings)
    folder = settings.work / "latents"
    folder.mkdir(exist_ok=True)
    for chunk in range(settings.chunks):
        if not (folder / f"{chunk:03d}.safetensors").exists():
            save_file(encode_chunk(settings, vae, tokenizer, chunk), folder / f"{chunk:03d}.safetensors")
            say(f"encoded chunk {chunk} of {settings.chunks}")


@torch.no_grad()
def encode_chunk(settings: BaseSettings, vae: AutoencoderKL, tokenizer: CLIPTokenizer, chunk: int) -> dict[str, Tensor]:
    """The fields of `Latents` for one chunk."""
    rng = random.Random(f"captions {settings.seed} {chunk}")
    here = range(chunk, chunk + 1)
    posteriors = [encode(vae, p.to(settings.device)) for p in to_float(load_renders(settings, here)).split(100)]
    toy = (load_renders(settings, here, "mask") > 0).float()
    texts = [text for scene in chunk_scenes(chunk, CHUNK) for text in captions_of(scene, settings.captions, rng)]
    return {
        "mean": torch.cat([p.mean for p in posteriors]).half().cpu(),
        "deviation": torch.cat([p.deviation for p in posteriors]).half().cpu(),
        "toy": (nf.avg_pool2d(toy[:, None], 4)[:, 0] * 255).round().to(torch.uint8),
        "tokens": tokenize(tokenizer, texts).reshape(CHUNK, settings.captions, -1).to(torch.int16),
    }


def load_latents(settings: BaseSettings) -> Latents:
    """Everything the latents stage left."""
    paths, favour = sorted((settings.work / "latents").glob("*.safetensors")), settings.unet.favour
    files = [load_file(path) for path in paths]
    joined = {name: torch.cat([file[name] for file in files]) for name in files[0]}
    scenes = [scene for path in paths for scene in chunk_scenes(int(path.stem), CHUNK)]
    draw = torch.tensor([max(favour.get(toy.kind, 1.0) for toy in scene.toys) for scene in scenes])
    return Latents(joined["mean"], joined["deviation"], joined["toy"], joined["tokens"], draw)


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
            say(f"unet step {run.step} {run.clock.elapsed():.0f} s loss {mean:.4f} rates x{run.optimiser.factor:.3f}")
        if run.clock.elapsed() - saved > settings.unet.save_seconds:
            run.save(state)
            saved = run.clock.elapsed()
        if run.clock.elapsed() - shown > settings.snapshot_seconds:
            write_base(settings, settings.work / "toybox-snapshot", run.averaged.model)
            shown = run.clock.elapsed()
    run.save(state)


def decoder_stage(settings: BaseSettings) -> None:
    """Train only the VAE's decoder on, so that latents made before stay valid."""
    torch.manual_seed(settings.seed + 1)
    vae = place(load_vae(settings.work / "vae"), settings.device)
    pictures = load_renders(settings, range(min(8, settings.chunks)))
    state = settings.work / "decoder.safetensors"
    train_vae(vae, pictures, settings.vae.sharpening(), state, settings.seconds("decoder"), decoder_only=True)


def best_vae(settings: BaseSettings) -> AutoencoderKL:
    """The folded VAE, with the decoder stage's weights where that stage has saved any."""
    vae = load_vae(settings.work / "vae")
    state = settings.work / "decoder.safetensors"
    if state.exists():
        restore_module("vae", vae, load_state(state)[0])
    return vae


def best_unet(settings: BaseSettings) -> UNet2DConditionModel:
    """The running mean of the U-Net's saved state."""
    unet = new_unet(settings.unet)
    restore_module("averaged", unet, load_state(settings.work / "unet.safetensors")[0])
    return unet


def write_base(settings: BaseSettings, folder: Path, unet: UNet2DConditionModel | None = None, card: str | None = None) -> None:
    """Write the pipeline folder from this U-Net, or from the saved running mean."""
    tokenizer, text = load_text(settings)
    write_pipeline(folder, best_vae(settings), place(text, "cpu"), tokenizer, unet or best_unet(settings), card)
    say(f"wrote {folder.name}")
