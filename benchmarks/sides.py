"""What a training step of a side network costs: ours beside the logic of diffusers' example scripts.

1. The bare step: noise, network, U-Net, loss, backward, clipping, AdamW, on the same latents and prompt states. Same values,
   same optimiser; the losses must agree in the first steps, or the comparison means nothing.
2. The whole step: `train.loop` with all that it does at every step, and what `train_controlnet.py` and
   `train_t2i_adapter_sdxl.py` do at every step of theirs from pictures that are tensors already: the VAE, for a ControlNet the
   text encoder too, and then the bare step with accelerate, AdamW and gradients that are zeroed in place.

Both take turns within one run; see `step.py`, whose table this is.

    python benchmarks/sides.py [--base toybox] [--batch 4] [--pairs 60] [--sides controlnet,t2i-adapter]
"""

import argparse
import copy
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from step import CHUNK, Pair, Step, get_base, interleave, table_row
from torch import Tensor, nn
from torch.nn import functional as F

from vgm_peft.beside import Beside
from vgm_peft.family import Base, Condition, Query
from vgm_peft.sides import TABLE

CAPTION = "a red duck on the grass"
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Pictures in -1 .. 1, control pictures in 0 .. 1, latents, noise, timesteps."""


def batches(base: Base, batch: int, count: int) -> list[Batch]:
    """What a trainer would have read or drawn for some steps."""
    generator, out = torch.Generator().manual_seed(1), list[Batch]()
    for _ in range(count):
        pictures = torch.rand(batch, 3, base.resolution, base.resolution, generator=generator) * 2 - 1
        with torch.no_grad():
            x0 = base.family.encode_image(base, pictures).mean
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, base.process.steps, (batch,), generator=generator)
        out.append((pictures, torch.rand(pictures.shape, generator=generator), x0, noise, t))
    return out


class Script:
    """A network as the scripts teach it."""

    def __init__(self, name: str, base: Base, network: nn.Module) -> None:
        from diffusers import DDPMScheduler

        self.name, self.base, self.network = name, base, network
        self.scheduler: Any = DDPMScheduler.from_config(base.pipe.scheduler.config)

    def loss(self, batch: Batch, states: Tensor) -> Tensor:
        """The loss, of latents and prompt states."""
        _, control, x0, noise, t = batch
        noisy = self.scheduler.add_noise(x0, noise, t)
        extra = self.base.family.extra(self.base, Query(noisy, t, Condition(states)))
        told: dict[str, Any] = {"encoder_hidden_states": states, **({"added_cond_kwargs": extra} if extra else {})}
        heard = self.says(control, noisy, t, told)
        prediction = cast(Any, self.base.denoiser)(noisy, t, return_dict=False, **told, **heard)[0]
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x0, noise, t) if velocity else noise
        return F.mse_loss(prediction.float(), target.float())

    def says(self, control: Tensor, noisy: Tensor, t: Tensor, told: dict[str, Any]) -> dict[str, Any]:
        """What the U-Net is given of what the network makes of a control picture."""
        if self.name == "controlnet":
            down, mid = self.network(noisy, t, controlnet_cond=control, return_dict=False, **told)
            return {"down_block_additional_residuals": list(down), "mid_block_additional_residual": mid}
        return {"down_intrablock_additional_residuals": list(self.network(control))}


def compare_bare(name: str, base: Base, size: int, pairs: int) -> list[Pair]:
    """Time the bare steps."""
    side, data, turns = TABLE[name], batches(base, size, 4), {"ours": iter(range(10**9)), "theirs": iter(range(10**9))}
    network = side.create(base, side.Options())
    other = copy.deepcopy(network)
    plain = Script(name, base, other)
    optimisers = {id(n): torch.optim.AdamW(n.parameters(), lr=1e-4, fused=True) for n in (network, other)}
    with torch.no_grad():
        states = base.family.encode_prompt(base, [CAPTION] * size)

    def learn(network: nn.Module, loss: Tensor) -> float:
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimisers[id(network)].step()
        optimisers[id(network)].zero_grad()
        return float(loss.detach())

    def ours() -> float:
        _, control, x0, noise, t = data[next(turns["ours"]) % len(data)]
        with Beside(base, side, network) as beside:
            beside.tell(control)
            prediction = base.family.predict(base, Query(base.process.corrupt(x0, noise, t), t, states))
            return learn(network, F.mse_loss(prediction.float(), base.process.target(x0, noise, t).float()))

    def theirs() -> float:
        return learn(other, plain.loss(data[next(turns["theirs"]) % len(data)], states.hidden))

    for _ in range(4):
        a, b = ours(), theirs()
        if abs(a - b) > 1e-4 * abs(b):
            raise SystemExit(f"the two steps do not do the same: losses {a} and {b}")
    return interleave(ours, theirs, pairs, "cpu")


def script(name: str, base: Base, size: int) -> Step:
    """`CHUNK` steps of a script, pictures to optimiser."""
    from accelerate import Accelerator

    accelerator, side = Accelerator(), TABLE[name]
    network = side.create(base, side.Options())
    optimiser, data = torch.optim.AdamW(network.parameters(), lr=1e-4), batches(base, size, 4)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
    network, optimiser, rate = accelerator.prepare(network, optimiser, rate)
    pipe: Any = base.pipe
    plain = Script(name, base, network)
    ids = pipe.tokenizer([CAPTION] * size, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        known = base.family.encode_prompt(base, [CAPTION] * size).hidden

    def step(batch: Batch) -> float:
        with accelerator.accumulate(network):
            with torch.no_grad():
                x0 = pipe.vae.encode(batch[0]).latent_dist.sample() * pipe.vae.config.scaling_factor
                states = pipe.text_encoder(ids)[0] if name == "controlnet" else known
            loss = plain.loss((batch[0], batch[1], x0, torch.randn_like(x0), batch[4]), states)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            rate.step()
            optimiser.zero_grad(set_to_none=False)
        return loss.detach().item()

    return lambda: sum(step(batch) for batch in (data * CHUNK)[:CHUNK])


def compare_whole(name: str, base: Base, size: int, pairs: int) -> list[Pair]:
    """Time `CHUNK` steps of the loop (the opening of its journal included) and as many of the script, pair by pair."""
    from vgm_peft.config import Table
    from vgm_peft.data import Cache
    from vgm_peft.train import loop
    from vgm_peft.train.config import bind
    from vgm_peft.train.run import _accelerator
    from vgm_peft.train.task import Setup

    theirs = script(name, base, size)
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        images = str(Path(__file__).parents[1] / "assets" / "subjects" / "robot")
        data: Table = {"images": images, "batch": size, "annotator": "canny"}
        rest: Table = {"output": str(folder), "steps": 1, "preview": {"count": 0}, "checkpoint": {"every": 0}}
        config = bind({"task": {"name": name}, "data": data, **rest})
        setup = Setup(config, base, Cache(folder / "cache"), _accelerator(config), cleanup)
        task = config.task_class().prepare(setup)
        desk = loop.set_up(task, setup, folder)
        beside: Beside = cast(Any, task).beside

        def ours() -> float:
            desk.config = replace(config, steps=desk.state.step + CHUNK)
            loop.run(desk)
            beside.hush()  # the script's turn is on the same base
            return 0.0

        ours(), theirs()
        return interleave(ours, theirs, pairs, "cpu")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--base", default="toybox", help="toybox, or a folder of a base like Stable Diffusion 1.5")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--sides", default="controlnet,t2i-adapter")
    args = parser.parse_args()
    base, rows = get_base(args.base, "cpu"), list[str]()
    for name in args.sides.split(","):
        bare = compare_bare(name, base, args.batch, args.pairs)
        rows.append(table_row((f"{name}, bare step", "the script's"), bare))
        whole = compare_whole(name, base, args.batch, max(4, args.pairs // 4))
        rows.append(table_row((f"{name}, whole step", "the script's"), whole, CHUNK))
    print(f"base {args.base}, batch {args.batch}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print("| A / B | A, ms | B, ms | A/B | quartiles | A/B of processor time | pairs |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
