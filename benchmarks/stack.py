"""What a stack costs: drawing with deltas beside drawing without, and changing one strength beside putting all of them on.

1. One picture drawn through `stack.sampling` with ten deltas fused into the weights, and with none.
2. The same with three deltas live on the layers (`fuse=False`, what deltas of some steps or regions are), and with none.
3. A stack of ten whose one strength changes in place (`Applied.change`), and the same stack put on afresh.

Each delta is a LoRA on the U-Net's attention and has values in it. Every side has a base of its own, loaded from the same
files; the two of a pair take turns within one run, in alternating order, and the number to look at is the median of the pairs'
ratios, of processor time where the machine has other work.

On Toybox, whose layers are 32 to 128 wide, it is operations that count; `--base wide` is a U-Net of two levels as wide as those
of Stable Diffusion 1.5 (320 and 640, random values), where it is arithmetic.

    python benchmarks/stack.py [--base toybox] [--kind lora] [--rank 8] [--steps 8] [--pairs 20] [--device cpu]
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

sys.path.insert(0, str(Path(__file__).parent))
from step import Pair, Step, get_base, interleave, table_row  # noqa: E402

from vgm_peft.config import build  # noqa: E402
from vgm_peft.delta import Delta  # noqa: E402
from vgm_peft.deltas import method_named  # noqa: E402
from vgm_peft.families import family_named  # noqa: E402
from vgm_peft.family import Base  # noqa: E402
from vgm_peft.site import choose  # noqa: E402
from vgm_peft.stack import Applied, DeltaUse, Stack  # noqa: E402
from vgm_peft.stack.sampling import draw  # noqa: E402

FUSED, LIVE = 10, 3
WIDE = "wide"


def loaded(name: str, device: str) -> Base:
    """A base of one's own."""
    if name != WIDE:
        return get_base(name, device)
    from diffusers import UNet2DConditionModel

    family = family_named("sd15")
    pipe = family.tiny()
    torch.manual_seed(0)
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(320, 640),
        down_block_types=(down, down),
        up_block_types=(up, up),
        layers_per_block=1,
        cross_attention_dim=cast(Any, pipe).text_encoder.config.hidden_size,
    )
    pipe.register_modules(unet=unet)
    pipe.to(device)
    return Base(pipe, family, WIDE).freeze()


def trained(base: Base, kind: str, rank: int, seed: int) -> Delta:
    """A delta of a method on the attention, with small values that are not zero."""
    method = method_named(kind)
    options = build(method.Options, {"rank": rank})
    sites = [site for site in choose(base.sites, ["attention"], base.family.presets) if site.op in method.ops]
    delta = Delta.fit(base.family.name, method, sites, options, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return delta.train(False)


def stack_of(names: Mapping[str, Delta], steps: int) -> Stack:
    """A picture with all of these, each at another strength."""
    uses = tuple(DeltaUse(file=name, strength=0.1 + 0.05 * number) for number, name in enumerate(names))
    return Stack(prompt="a red duck on the grass", steps=steps, deltas=uses)


def drawing(applied: Applied) -> Step:
    """One picture of a stack that is on its base."""

    def step() -> float:
        (picture,) = draw(applied, applied.stack)
        return float(picture.stack.seed)

    return step


class Bench:
    """What the comparisons share: the flags, and what is to be closed in the end."""

    def __init__(self, args: argparse.Namespace, cleanup: ExitStack) -> None:
        self._args, self._cleanup = args, cleanup
        self.plain = self.applied(0)
        self.plain()

    def deltas(self, base: Base, count: int) -> dict[str, Delta]:
        """So many deltas by their names."""
        return {f"delta {i}": trained(base, self._args.kind, self._args.rank, i) for i in range(count)}

    def applied(self, count: int, fuse: bool = True) -> Step:
        """Drawing with so many deltas on a base of its own."""
        base = loaded(self._args.base, self._args.device)
        given = self.deltas(base, count)
        return drawing(self._cleanup.enter_context(stack_of(given, self._args.steps).on(base, given=given, fuse=fuse)))

    def beside_none(self, count: int, fuse: bool) -> list[Pair]:
        """Time drawing with so many deltas beside drawing with none."""
        step = self.applied(count, fuse)
        step()
        return interleave(step, self.plain, self._args.pairs, self._args.device)

    def changing(self) -> list[Pair]:
        """Time changing the strength of one of ten beside putting ten on."""
        base, other = (loaded(self._args.base, self._args.device) for _ in range(2))
        given = self.deltas(base, FUSED)
        stack = stack_of(given, self._args.steps)
        applied = self._cleanup.enter_context(stack.on(base, given=given))
        turn = iter(range(10**9))

        def change() -> float:
            first, *rest = stack.deltas
            strength = 0.5 + 0.25 * (next(turn) % 2)
            applied.change(replace(stack, deltas=(replace(first, strength=strength), *rest)), given=given)
            return strength

        def put_on() -> float:
            with stack.on(other, given=given):
                return 0.0

        change()
        put_on()
        return interleave(change, put_on, self._args.pairs, self._args.device)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=cast(str, __doc__).splitlines()[0])
    parser.add_argument("--base", default="toybox", help=f"toybox, a folder, a hub id, stand-in, or {WIDE}")
    parser.add_argument("--kind", default="lora", help="a method whose size is its rank")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with ExitStack() as cleanup:
        bench = Bench(args, cleanup)
        rows = [
            table_row((f"{FUSED} fused", "none"), bench.beside_none(FUSED, True), args.steps),
            table_row((f"{LIVE} live", "none"), bench.beside_none(LIVE, False), args.steps),
            table_row((f"one of {FUSED} changed", f"{FUSED} put on"), bench.changing()),
        ]
    threads = f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    print(f"base {args.base}, {args.kind} of rank {args.rank}, {args.steps} steps a picture, {args.device}, {threads}\n")
    print("| A / B | A, ms | B, ms | A/B | quartiles | A/B of processor time | pairs |\n|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
