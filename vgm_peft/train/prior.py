"""Class pictures for prior preservation: drawn by the untouched base, once, and kept in the cache as latents."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft import __version__
from vgm_peft.data import Order
from vgm_peft.data.cache import key_of
from vgm_peft.errors import BaseModelError
from vgm_peft.train.sampler import SCHEDULER, sampler
from vgm_peft.train.task import Setup, Turn

TOGETHER = 8
"""Pictures drawn in one call. Part of the key: in another batch the same picture may differ in its last bits."""


@dataclass(frozen=True)
class ClassPlan:
    """Which class pictures: the prompts in turn, how many, how many per micro-batch, and how they are sampled."""

    prompts: tuple[str, ...]
    count: int
    batch: int
    steps: int
    guidance: float | None
    """`None`: the base's own."""


class ClassPictures:
    """Latents of class pictures (N, C, H, W), drawn from by turn."""

    def __init__(self, latents: Tensor, plan: ClassPlan, setup: Setup, resolution: int) -> None:
        self.latents, self.plan, self.device, self.resolution = latents, plan, setup.device, resolution
        self.order = Order((0,) * len(latents), plan.batch, setup.config.seed + 1)

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def drawn(cls, setup: Setup, plan: ClassPlan) -> "ClassPictures":
        """Draw the pictures, or find them in the cache. Their chance is their own, so every run of a base shares them."""
        resolution = setup.config.data.resolution or setup.base.resolution
        sets: list[Tensor] = []
        count = -(-plan.count // TOGETHER)
        with setup.progress("drawing the class", count) as tell:
            for number in range(count):
                key = _key(setup, plan, resolution, number)
                found = setup.cache.get(key, _is_set) if key else None
                if found is None:
                    found = {"latents": _draw(setup, plan, resolution, number)}
                    if key:
                        setup.cache.put(key, found)
                sets.append(found["latents"])
                tell(number + 1, count)
        return cls(torch.cat(sets)[: plan.count], plan, setup, resolution)

    def draw(self, turn: Turn) -> tuple[Tensor, list[str]]:
        """Return the latents of a turn, on the device, and the prompts that drew them."""
        chosen = self.order.batch(turn.number)
        return self.latents[chosen].to(self.device), [self.plan.prompts[i % len(self.plan.prompts)] for i in chosen]

    def sizes(self, count: int) -> Tensor:
        """What families like SDXL are told of `count` of them, (count, 6): whole squares."""
        side = self.resolution
        return torch.tensor([[side, side, 0, 0, side, side]] * count, device=self.device)


def _is_set(entry: Mapping[str, Tensor]) -> bool:
    latents = entry.get("latents")
    if latents is None or len(entry) != 1 or latents.dim() != 4 or len(latents) != TOGETHER:
        return False
    return latents.dtype == torch.float32 and bool(torch.isfinite(latents).all())


def _key(setup: Setup, plan: ClassPlan, resolution: int, number: int) -> str:
    base = setup.base
    if not base.digest:
        return ""
    sampler = f"{SCHEDULER} {dict(base.pipe.scheduler.config)}"
    drawn = (*_prompts(plan, number), plan.steps, str(base.guidance(plan.guidance)), resolution, number, TOGETHER)
    kind = f"{setup.config.compute.precision} {setup.device.type} {torch.__version__} {__version__}"
    return key_of("class", base.digest, sampler, *drawn, kind)


def _prompts(plan: ClassPlan, number: int) -> list[str]:
    return [plan.prompts[i % len(plan.prompts)] for i in range(number * TOGETHER, (number + 1) * TOGETHER)]


@torch.no_grad()
def _draw(setup: Setup, plan: ClassPlan, resolution: int, number: int) -> Tensor:
    """Sample one set, (TOGETHER, C, H, W) float32 on the CPU."""
    seed = int.from_bytes(hashlib.blake2b(f"class/{number}".encode(), digest_size=7).digest(), "big")
    with sampler(setup.base.pipe, setup.base) as pipe:
        latents: Tensor = pipe(
            prompt=_prompts(plan, number),
            num_inference_steps=plan.steps,
            guidance_scale=setup.base.guidance(plan.guidance),
            width=resolution,
            height=resolution,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
    if not bool(torch.isfinite(latents).all()):
        raise BaseModelError("the base draws class pictures that are not finite", fix="compute in bf16 or float32")
    return latents.float().cpu()
