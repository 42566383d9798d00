"""Training of the embedded base's image encoder, through which IP-Adapters see: a small CLIP vision model.

It learns on fresh renders what a picture shows (the labels of the attribute reader), which toy it is (two sights of one
toy among look-alikes), and of each patch how much toy is in it and of which class; never the held-out subjects. What is
said of every patch teaches a small transformer much faster than what is said of whole pictures. CLIP's own way, pictures
against captions, would need many more.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from vgm_peft.folders import read_json, replace_file, replace_folder
from vgm_peft.toybox.cast import SUBJECTS, subject_scenes
from vgm_peft.toybox.optim import muon_for
from vgm_peft.toybox.oracle_data import NEVER, lookalikes, mirrored, reader_labels, reader_scene, seen, worn
from vgm_peft.toybox.oracle_net import HEADS, to_input
from vgm_peft.toybox.render import render

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

CARD = "card.json"
SIZES = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 3}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, which readers without a configuration of its own take for granted."""
EMBEDDING, PATCH = 64, 8
PATCHES = "patches"
"""The head that is asked of every patch: how much of it is toy, and of which class."""


@dataclass(frozen=True, kw_only=True)
class EyeSettings:
    """How much to train."""

    pictures: int = 5000
    families: int = 240
    """Sets of four look-alike toys, each toy seen twice."""
    steps: int = 900
    batch: int = 24
    """Pictures with labels in a step; as many come of toys seen twice."""
    fitted: int = 2400
    """Fresh pictures that the card's linear probe is fitted to,"""
    asked: int = 800
    """and those of which it is asked."""
    sights: int = 16
    """Of each held-out subject, for the card."""
    seed: int = 0


@dataclass(frozen=True)
class _Data:
    """Pictures (B, 64, 64, 3) with labels (B, heads) and coverage, and two sights of toys (families, 4, 64, 64, 3)."""

    images: Tensor
    labels: Tensor
    covered: Tensor
    """Share of each patch that is toy, (B, 8, 8)."""
    sights: tuple[Tensor, Tensor]


def build(seed: int) -> CLIPVisionModelWithProjection:
    """Make a fresh one: 64 pixels, patches of 8, 0.3M values."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    config: Any = CLIPVisionConfig
    eye = CLIPVisionModelWithProjection(config(**SIZES, projection_dim=EMBEDDING, image_size=64, patch_size=PATCH))
    # As loud as the patches: at CLIP's own 0.02 they drown in them, and where a toy is is not learned in thousands of steps.
    nn.init.normal_(eye.vision_model.embeddings.position_embedding.weight, std=0.3)
    return eye


def to_eye(x: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in -1 .. 1, normalised as CLIP's are."""
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std


def train_eye(folder: Path, settings: EyeSettings | None = None, tell: Callable[[str], None] = print) -> None:
    """Train it, write it to `folder` with its card, in float16. Some five minutes on one CPU thread."""
    settings = settings or EyeSettings()
    tell("rendering")
    data, eye = _render(settings), build(settings.seed)
    heads = nn.ModuleDict({name: nn.Linear(EMBEDDING, len(values)) for name, values in HEADS.items()})
    heads[PATCHES] = nn.Linear(SIZES["hidden_size"], 1 + len(HEADS["class"]))
    both = nn.ModuleDict({"eye": eye, "heads": heads})
    optimiser = muon_for(both, 0.02, 2e-3, skip=("embedding", "heads"))
    draw = _losses(eye, heads, data, settings)
    for step in range(settings.steps):
        share = (step + 1) / settings.steps
        optimiser.factor = min(1.0, share / 0.05) * min(1.0, (1.0 - share) / 0.6 + 0.01)
        loss = next(draw)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            tell(f"step {step + 1}: loss {loss.item():.3f}")
    eye.eval().half()
    card = measure(eye.float(), settings)  # what float16 keeps of it
    with replace_folder(folder, owned=lambda place: (place / CARD).is_file()) as aside:
        eye.half().save_pretrained(aside)
        (aside / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    announce(folder)


def announce(folder: Path) -> None:
    """Name the encoder in the `model_index.json` of the base in whose folder it lies, so that stock diffusers loads it."""
    path = folder.parent / "model_index.json"
    if path.is_file():
        index = {**read_json(path), folder.name: ["transformers", "CLIPVisionModelWithProjection"]}
        with replace_file(path, owned=lambda _: True) as aside:
            aside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _render(settings: EyeSettings) -> _Data:
    rng = random.Random(f"image encoder {settings.seed}")
    scenes = [reader_scene(rng) for _ in range(settings.pictures)]
    toys = [toy for _ in range(settings.families) for toy in lookalikes(rng)]
    drawn = [render(scenes[start : start + 320]) for start in range(0, len(scenes), 320)]
    images, masks = torch.cat([part.image for part in drawn]), torch.cat([part.mask > 0 for part in drawn])
    covered = nf.avg_pool2d(masks.float()[:, None], PATCH)[:, 0]
    first, second = (_pictures([seen(toy, rng) for toy in toys]).unflatten(0, (-1, 4)) for _ in range(2))
    return _Data(images, torch.tensor([reader_labels(scene) for scene in scenes]), covered, (first, second))


def _pictures(scenes: list[Any]) -> Tensor:
    return torch.cat([render(scenes[start : start + 320]).image for start in range(0, len(scenes), 320)])


def _losses(eye: nn.Module, heads: nn.ModuleDict, data: _Data, settings: EyeSettings) -> Iterator[Tensor]:
    """Of a batch with labels, and of look-alikes: InfoNCE between two sights of each toy."""
    families = settings.batch // 8
    while True:
        index = torch.randint(len(data.images), (settings.batch,))
        group = torch.randint(settings.families, (families,))
        x, labels, covered = to_input(data.images[index]), data.labels[index], data.covered[index]
        if torch.rand(()) < 0.5:
            (x, labels), covered = mirrored(x, labels), covered.flip(-1)
        toys = to_input(torch.cat([sight[group].flatten(0, 1) for sight in data.sights]))
        seen_by = eye(to_eye(worn(torch.cat([x, toys]))))
        embeds, patches = seen_by.image_embeds, heads[PATCHES](seen_by.last_hidden_state[: len(x), 1:])
        read, known = embeds[: len(x)], nf.normalize(embeds[len(x) :], dim=1)
        named = [nf.cross_entropy(heads[name](read), labels[:, k], ignore_index=NEVER) for k, name in enumerate(HEADS)]
        likeness = known[: 4 * families] @ known[4 * families :].T / 0.1
        own = torch.arange(4 * families)
        same = nf.cross_entropy(likeness, own) + nf.cross_entropy(likeness.T, own)
        yield torch.stack(named).nan_to_num(0.0).sum() + same + _of_patches(patches, covered.flatten(1), labels[:, 0])


def _of_patches(said: Tensor, covered: Tensor, kind: Tensor) -> Tensor:
    """The loss of what is said of patches (B, 64, 1 + classes): the share that is toy, and its class where most of it is."""
    toy = covered >= 0.5
    share = nf.binary_cross_entropy_with_logits(said[..., 0], covered)
    return share + nf.cross_entropy(said[..., 1:][toy], kind[:, None].expand_as(toy)[toy])


@torch.no_grad()
def measure(eye: CLIPVisionModelWithProjection, settings: EyeSettings) -> dict[str, object]:
    """What a linear probe reads from fresh renders, of the embedding and of the mean of the last hidden states but one; and
    how often the nearest of the eight held-out subjects, by one picture each, is the right one."""
    rng, fitted = random.Random(f"image encoder card {settings.seed + 1}"), settings.fitted
    scenes = [reader_scene(rng) for _ in range(fitted + settings.asked)]
    labels = torch.tensor([reader_labels(scene) for scene in scenes])
    embeds, states = _features(eye, _pictures(scenes))
    sights = [_features(eye, _pictures(list(subject_scenes(s.name, 1 + settings.sights, seed=992))))[0] for s in SUBJECTS]
    embedded = nf.normalize(torch.stack(sights), dim=-1)
    nearest = torch.einsum("spe,te->spt", embedded[:, 1:], embedded[:, 0]).argmax(-1)
    right = (nearest == torch.arange(len(SUBJECTS))[:, None]).float().mean()
    return {
        "pictures": settings.asked,
        "embedding": _probe(embeds, labels, fitted),
        "hidden_states": _probe(states, labels, fitted),
        "subject": round(float(right), 4),
    }


def _features(eye: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    told = [eye(to_eye(to_input(part)), output_hidden_states=True) for part in images.split(160)]
    return torch.cat([t.image_embeds for t in told]), torch.cat([t.hidden_states[-2].mean(1) for t in told])


def _probe(features: Tensor, labels: Tensor, fitted: int) -> dict[str, float]:
    """Share of right labels by head, read by ridge regression onto them that was fitted to the first pictures."""
    x = (features - features[:fitted].mean(0)) / features[:fitted].std(0)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    found: dict[str, float] = {}
    for k, (name, values) in enumerate(HEADS.items()):
        known = labels[:, k] != NEVER
        learned, rest = x[:fitted][known[:fitted]], x[fitted:][known[fitted:]]
        wanted = nf.one_hot(labels[:fitted, k][known[:fitted]], len(values)).float()
        gram = learned.T @ learned + math.sqrt(len(learned)) * torch.eye(x.shape[1])
        guess = (rest @ torch.linalg.solve(gram, learned.T @ wanted)).argmax(1)
        found[name] = round(float((guess == labels[fitted:, k][known[fitted:]]).float().mean()), 4)
    return found
