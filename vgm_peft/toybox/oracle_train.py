"""Training of the oracles: minutes on one CPU thread, from renders made on the spot, with a fixed seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as nf
from tqdm import tqdm

from vgm_peft.toybox.oracle import CARD, WEIGHTS, Oracles, likeness
from vgm_peft.toybox.oracle_card import write_card
from vgm_peft.toybox.oracle_data import NEVER, Labelled, lookalikes, mirrored, reader_scene, render_labelled, seen, worn
from vgm_peft.toybox.oracle_net import HEADS, Controls, Identity, Reader, to_input
from vgm_peft.toybox.render import render

Tick = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class OracleSettings:
    """How much to train; pictures are renders, steps are batches."""

    pictures: int = 12000
    reader_steps: int = 1100
    families: int = 900
    """Sets of four look-alike toys for the identity embedding, each toy seen twice."""
    identity_steps: int = 420
    controls_steps: int = 500
    seed: int = 0


def _descend(net: nn.Module, steps: int, rate: float, losses: Iterator[Tensor], tick: Tick) -> None:
    """AdamW with a short warm-up and a cosine to nothing."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    net.train()
    for step in range(steps):
        share = (step + 1) / steps
        now = rate * min(1.0, share / 0.08) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = now
        loss = next(losses)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        tick(1)
    net.eval()


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """Endless shuffled index batches."""
    while True:
        yield from torch.randperm(count).split(size)


def _reader_losses(net: Reader, data: Labelled, size: int = 48) -> Iterator[Tensor]:
    for index in _batches(len(data.images), size):
        x, labels = to_input(data.images[index]), data.labels[index]
        if torch.rand(()) < 0.5:
            x, labels = mirrored(x, labels)
        if torch.rand(()) < 0.85:
            x = worn(x)
        logits = net(x)
        losses = [
            nf.cross_entropy(logits[name], labels[:, k], ignore_index=NEVER, label_smoothing=0.05)
            for k, name in enumerate(HEADS)
        ]
        yield torch.stack(losses).nan_to_num(0.0).sum()


def _identity_losses(net: Identity, first: Tensor, second: Tensor, families: int = 14) -> Iterator[Tensor]:
    """InfoNCE between two sights of each toy (families, 4, P, Q, 3); the other toys of its family are hard negatives."""
    for index in _batches(len(first), families):
        toys = len(index) * first.shape[1]
        x = to_input(torch.cat((first[index].flatten(0, 1), second[index].flatten(0, 1))))
        embedded = net(worn(x))
        a, b = embedded[:toys], embedded[toys:]
        likeness = a @ b.T / 0.08
        own = torch.arange(toys)
        yield nf.cross_entropy(likeness, own) + nf.cross_entropy(likeness.T, own)


def _controls_losses(net: Controls, data: Labelled, size: int = 32) -> Iterator[Tensor]:
    plain = (data.labels[:, list(HEADS).index("style")] == 0).nonzero()[:, 0]
    for index in _batches(len(plain), size):
        x, wanted = to_input(data.images[plain[index]]), data.controls[plain[index]].float()
        # Wear without the shift: a shifted picture would no longer match its controls.
        x = (x + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1) * 0.1).clamp(-1, 1)
        soft = nf.avg_pool2d(nf.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1))
        logits = net(x)
        depth = nf.l1_loss(logits[:, 0].sigmoid(), wanted[:, 0])
        mask = nf.binary_cross_entropy_with_logits(logits[:, 1], wanted[:, 1])
        edge = nf.binary_cross_entropy_with_logits(logits[:, 2], wanted[:, 2], pos_weight=torch.tensor(3.0))
        yield 4 * depth + mask + edge


def _sights(settings: OracleSettings, tick: Tick) -> tuple[Tensor, Tensor]:
    """Two sights of every toy of every family: each (families, 4, 64, 64, 3)."""
    rng = random.Random(f"oracle identity {settings.seed}")
    toys = [toy for _ in range(settings.families) for toy in lookalikes(rng)]
    views: list[Tensor] = []
    for _ in range(2):
        scenes = [seen(toy, rng) for toy in toys]
        images: list[Tensor] = []
        for start in range(0, len(scenes), 320):
            images.append(render(scenes[start : start + 320]).image)
            tick(len(images[-1]))
        views.append(torch.cat(images).view(settings.families, 4, 64, 64, 3))
    return views[0], views[1]


def _span(net: Identity, seed: int, families: int = 40, sights: int = 6) -> tuple[float, float]:
    """Mean likeness on fresh toys: of look-alikes of one class, and of one toy across scenes."""
    rng = random.Random(f"oracle span {seed}")
    toys = [toy for _ in range(families) for toy in lookalikes(rng)]
    with torch.no_grad():
        views = [net(to_input(render([seen(toy, rng) for toy in toys]).image)) for _ in range(2 * sights)]
    each = torch.stack(views, 1).view(families, 4, 2 * sights, -1)
    asked, known = each[:, :, :sights], each[:, :, sights:]
    same = torch.cat([likeness(asked[f, k], known[f, k]) for f in range(families) for k in range(4)])
    alike = torch.cat([likeness(asked[f, k], known[f, 0]) for f in range(families) for k in (1, 2)])
    return float(alike.mean()), float(same.mean())


def _save(oracles: Oracles, folder: Path) -> None:
    state: dict[str, Tensor] = {"span": torch.tensor(oracles.span)}
    for name, net in (("reader", oracles.reader), ("embedder", oracles.embedder), ("controls", oracles.controls)):
        for key, value in net.state_dict().items():
            state[f"{name}.{key}"] = (value.half() if value.is_floating_point() else value).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / (WEIGHTS + ".part")
    save_file(state, aside)
    aside.replace(folder / WEIGHTS)


def train_oracles(folder: Path, settings: OracleSettings | None = None, quiet: bool = False) -> None:
    """Train all oracles, write them to `folder` and measure them on fresh renders."""
    settings = settings or OracleSettings()
    torch.manual_seed(settings.seed)
    rng = random.Random(f"oracle reader {settings.seed}")

    def bar(text: str, total: int, unit: str) -> tqdm[NoReturn]:
        return tqdm(total=total, desc=text, unit=unit, disable=quiet)

    with bar("rendering scenes", settings.pictures, "picture") as shown:
        data = render_labelled([reader_scene(rng) for _ in range(settings.pictures)], lambda n: _tick(shown, n))
    reader, embedder, controls = Reader(), Identity(), Controls()
    with bar("attribute reader", settings.reader_steps, "step") as shown:
        losses = _reader_losses(reader, data)
        _descend(reader, settings.reader_steps, 4e-3, losses, lambda n: _tick(shown, n))
    with bar("controls", settings.controls_steps, "step") as shown:
        losses = _controls_losses(controls, data)
        _descend(controls, settings.controls_steps, 4e-3, losses, lambda n: _tick(shown, n))
    with bar("rendering look-alikes", settings.families * 8, "picture") as shown:
        first, second = _sights(settings, lambda n: _tick(shown, n))
    embedder.trunk.load_state_dict(reader.trunk.state_dict())  # it knows shapes and colours already
    with bar("identity", settings.identity_steps, "step") as shown:
        losses = _identity_losses(embedder, first, second)
        _descend(embedder, settings.identity_steps, 2e-3, losses, lambda n: _tick(shown, n))
    _save(Oracles(reader, embedder, controls, _span(embedder, settings.seed)), folder)
    write_card(Oracles.load(folder), folder / CARD, settings.seed)


def _tick(shown: tqdm[NoReturn], count: int) -> None:
    shown.update(count)
