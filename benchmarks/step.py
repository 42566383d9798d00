"""What a training step costs: ours beside the same step written plainly, and the loop beside the bare step.

1. One LoRA step (noise, corrupt, U-Net forward, loss, backward, AdamW) through `vgm_peft`, and written as the diffusers
   scripts write it: `unet.add_adapter(LoraConfig(...))`, `DDPMScheduler`. Same U-Net values, same LoRA values, same data,
   same optimiser; their losses must agree in the first steps, or the comparison means nothing.
2. `train.loop` with everything it does at every step (accelerate, clipping, average, journal), and the bare loss, backward
   and optimiser of the same task.

The two of a pair take turns within one run, in alternating order, because other work on the machine makes times wander
several-fold; the number to look at is the median of the pairs' ratios. Beside the time on the wall stands the ratio of
processor time, which neighbours disturb far less.

    python benchmarks/step.py [--base toybox] [--batch 4] [--rank 8] [--pairs 60] [--device cpu]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import method_named
from vgm_peft.errors import VgmError
from vgm_peft.families import family_named, load
from vgm_peft.family import Base, Condition, Query
from vgm_peft.site import choose

Step = Callable[[], float]
CHUNK = 8
Pair = tuple["Span", "Span"]


class Span(NamedTuple):
    """Seconds on the wall, and of all processors together."""

    wall: float
    cpu: float


STAND_IN = "stand-in"


def stand_in() -> Base:
    """A Stable Diffusion of Toybox's size with random values, for when there is no Toybox; time does not know the values."""
    from diffusers import UNet2DConditionModel

    family = family_named("sd15")
    pipe: Any = family.tiny()
    torch.manual_seed(0)
    pipe.register_modules(
        unet=UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64, 128, 128),
            cross_attention_dim=pipe.text_encoder.config.hidden_size,
            attention_head_dim=8,
            norm_num_groups=32,
        )
    )
    return Base(pipe, family, STAND_IN)


def get_base(name: str, device: str) -> Base:
    base = stand_in() if name == STAND_IN else load(name, digest=False)
    base.pipe.to(device)
    return base.freeze()


# --- one step, twice ---------------------------------------------------------------------------------------------------


def examples(base: Base, batch: int, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Latents, prompt states, noise and timesteps of some batches: what a trainer would have cached or drawn."""
    size, device = base.resolution // base.latent_factor, base.device
    with torch.no_grad():
        hidden = base.family.encode_prompt(base, ["a red duck on the grass"] * batch).hidden
    torch.manual_seed(1)
    shape = (batch, int(cast(Any, base.denoiser.config).in_channels), size, size)
    draw = [(torch.randn(shape), torch.randn(shape), torch.randint(0, base.process.steps, (batch,))) for _ in range(count)]
    return [(x0.to(device), hidden, noise.to(device), t.to(device)) for x0, noise, t in draw]


def ours(base: Base, delta: Delta, batches: list[tuple[Tensor, ...]]) -> Step:
    """The step as our tasks take it."""
    Attachment(base.parts, delta)
    optimiser = torch.optim.AdamW([p for _, p in delta.parameters()], lr=1e-4, fused=True)
    turn = iter(range(10**9))

    def step() -> float:
        x0, hidden, noise, t = batches[next(turn) % len(batches)]
        query = Query(base.process.corrupt(x0, noise, t), t, Condition(hidden))
        loss = F.mse_loss(base.family.predict(base, query).float(), base.process.target(x0, noise, t).float())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def plain(base: Base, delta: Delta, batches: list[tuple[Tensor, ...]]) -> Step:
    """The same step with diffusers and peft alone, beginning from the delta's values."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    unet = cast(Any, base.denoiser)
    rank = next(iter(delta)).options.rank
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for patch in delta:
        layer, packed = unet.get_submodule(patch.site.module), patch.pack(torch.zeros(patch.site.shape))
        layer.lora_A["default"].weight.data.copy_(packed["lora_down.weight"])
        layer.lora_B["default"].weight.data.copy_(packed["lora_up.weight"])
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == delta.count()
    scheduler = DDPMScheduler.from_config(base.pipe.scheduler.config)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    velocity = scheduler.config.prediction_type == "v_prediction"
    turn = iter(range(10**9))

    def step() -> float:
        x0, hidden, noise, t = batches[next(turn) % len(batches)]
        noisy = scheduler.add_noise(x0, noise, t)
        prediction = unet(noisy, t, encoder_hidden_states=hidden, return_dict=False)[0]
        target = scheduler.get_velocity(x0, noise, t) if velocity else noise
        loss = F.mse_loss(prediction.float(), target.float())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def compare_steps(name: str, batch: int, rank: int, pairs: int, device: str) -> list[Pair]:
    """Return the seconds of (ours, plain), pair by pair."""
    mine, theirs = get_base(name, device), get_base(name, device)
    method = method_named("lora")
    sites = choose(mine.sites, ["attention"], mine.family.presets)
    delta = Delta.fit(mine.family.name, method, sites, method.Options(rank=rank)).to(device)
    batches = examples(mine, batch, 8)
    fast, slow = ours(mine, delta, batches), plain(theirs, delta, batches)
    for _ in range(4):
        a, b = fast(), slow()
        if abs(a - b) > 1e-4 * abs(b):
            raise SystemExit(f"the two steps do not do the same: losses {a} and {b}")
    return interleave(fast, slow, pairs, device)


# --- the loop ----------------------------------------------------------------------------------------------------------


def compare_loop(name: str, batch: int, rank: int, pairs: int) -> list[Pair]:
    """Time `CHUNK` steps in the loop (the opening of its journal included) and as many bare ones, pair by pair."""
    from vgm_peft.data import Cache
    from vgm_peft.train import loop
    from vgm_peft.train.config import RunConfig
    from vgm_peft.train.run import _accelerator
    from vgm_peft.train.task import Setup, Turn

    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        config = make_config(RunConfig, folder, batch, rank)
        setup = Setup(config, get_base(name, "cpu"), Cache(folder / "cache"), _accelerator(config), cleanup)
        task = config.task_class().prepare(setup)
        desk = loop.set_up(task, setup, folder)
        optimiser = torch.optim.AdamW([p for g in task.groups() for p in g.parameters.values()], lr=1e-4, fused=True)
        turns = iter(range(10**9))

        def bare() -> float:
            for _ in range(CHUNK):
                turn = Turn(0, next(turns))
                loss = task.loss(task.batch(turn), turn)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            return float(loss.detach())

        def looped() -> float:
            desk.config = replace(config, steps=desk.state.step + CHUNK)
            loop.run(desk)
            return 0.0

        looped(), bare()
        return interleave(looped, bare, pairs, "cpu")


def make_config(kind: Any, folder: Path, batch: int, rank: int) -> Any:
    """A run on rendered pictures, with nothing that happens once in a while."""
    from vgm_peft.config import build

    images = Path(__file__).parents[1] / "assets" / "subjects" / "robot"
    return build(
        kind,
        {
            "output": str(folder),
            "steps": 1,
            "task": {"name": "finetune"},
            "delta": {"kind": "lora", "options": {"rank": rank}},
            "data": {"images": str(images), "batch": batch},
            "preview": {"count": 0},
            "checkpoint": {"every": 0},
        },
    )


# --- measuring ---------------------------------------------------------------------------------------------------------


def interleave(first: Step, second: Step, pairs: int, device: str) -> list[Pair]:
    """Time two steps in turn, each first in half of the pairs."""

    def timed(step: Step) -> Span:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        return Span(time.perf_counter() - wall, time.process_time() - cpu)

    out: list[Pair] = []
    for number in range(pairs):
        if number % 2:
            b = timed(second)
            out.append((timed(first), b))
        else:
            a = timed(first)
            out.append((a, timed(second)))
    return out


def table_row(names: tuple[str, str], pairs: list[Pair], steps: int = 1) -> str:
    """One line of the table: medians in milliseconds a step, the median ratio, its quartiles, and that of processor time."""
    a, b = (1e3 * statistics.median(pair[i].wall for pair in pairs) / steps for i in (0, 1))
    low, middle, high = statistics.quantiles([x.wall / y.wall for x, y in pairs], n=4)
    cpu = statistics.median(x.cpu / y.cpu for x, y in pairs)
    cells = (" / ".join(names), f"{a:.1f}", f"{b:.1f}", f"**{middle:.3f}**", f"{low:.3f} .. {high:.3f}", f"**{cpu:.3f}**")
    return "| " + " | ".join(cells) + f" | {len(pairs)} |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--base", default="toybox", help=f"toybox, a folder, a hub id, or {STAND_IN}")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-loop", action="store_true")
    args = parser.parse_args()
    name = args.base
    try:
        get_base(name, "cpu")
    except VgmError as error:
        print(f"{error}\nmeasuring on the {STAND_IN} instead", file=sys.stderr)
        name = STAND_IN
    size = (args.batch, args.rank)
    rows = [table_row(("ours", "diffusers + peft"), compare_steps(name, *size, args.pairs, args.device))]
    if not args.no_loop:
        rows.append(table_row(("loop", "bare step"), compare_loop(name, *size, max(4, args.pairs // 4)), CHUNK))
    threads = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"base {name}, batch {args.batch}, rank {args.rank}, {args.device}, {threads}\n")
    print("| A / B | A, ms | B, ms | A/B | quartiles | A/B of processor time | pairs |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
