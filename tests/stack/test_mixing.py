"""Regions and separate deltas: exactly the plain stacks that they are made of, and the base untouched by it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.ground import assert_close, base_of, difference, draw
from tests.contract.test_sides import control, trained
from tests.stack_makers import make_delta, make_word
from vgm_peft.beside import Beside
from vgm_peft.delta import Delta
from vgm_peft.deltas import method_named
from vgm_peft.errors import ConfigError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.family import Base
from vgm_peft.sides import TABLE as SIDES
from vgm_peft.stack import DeltaUse, Region, Stack
from vgm_peft.stack.mixing import turn_of
from vgm_peft.stack.recipe import Combine, Regional
from vgm_peft.stack.regions import Places
from vgm_peft.stack.sampling import scheduler_for
from vgm_peft.words import layers_of

LONG = "a <toy>, " + ", ".join(["red"] * 60)
"""More than the tokenizers of the tiny bases take in one window."""
LEFT = Region(name="left", prompt="a <toy>, red", box=(0.0, 0.0, 0.4, 1.0))
LOW = Region(name="low", prompt=LONG, box=(0.2, 0.3, 0.9, 1.0))


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def deltas(family: str) -> Mapping[str, Delta]:
    """Two with a word of the same name, of which one is layer-wise and leads; two without; and one that is but a word."""
    base = base_of(family, torch.float64)
    made = {"a": make_delta(base, "lora", 1, "cross-attention"), "b": make_delta(base, "ia3", 2, "conv")}
    method = method_named("norm")
    norms = [site for site in base.sites if site.op in method.ops and site.part == "unet" and "norm" in site.name]
    made |= {"c": Delta.fit(family, method, norms).train(False), "d": make_delta(base, "lora", 4, "samplers")}
    draw(made["c"])
    for delta in made.values():  # a third of their layers do
        delta.patches = dict(list(delta.patches.items())[::3])
    word = make_word(base)
    made["a"].words["<toy>"] = word
    made["b"].words["<toy>"] = replace(word, rows={part: 2 * rows for part, rows in word.rows.items()}, leads=True).for_layers(
        layers_of(base.pipe)
    )
    made["word"] = Delta(family, words={"<toy>": word})
    return made


def use(name: str, region: str = "", **settings: Any) -> DeltaUse:
    return DeltaUse(file=name, strength=0.7, region=region, **settings)


def plain(prompt: str, *names: str, **settings: Any) -> Stack:
    return Stack(prompt=prompt, negative="ugly", guidance=3.0, deltas=tuple(map(use, names)), **settings)


def drawn(base: Base, told: Mapping[str, Tensor], steps: int = 1, guidance: float = 3.0) -> Tensor:
    """The latents after each step of a drawing, as one batch; after one step of DDIM they are linear in what is predicted."""
    out: list[Tensor] = []

    def keep(pipe: object, step: int, t: object, now: dict[str, Tensor]) -> dict[str, Tensor]:
        out.append(now["latents"])
        return {}

    pipe: Any = base.pipe
    own, pipe.scheduler = pipe.scheduler, scheduler_for(base, "ddim")
    chance = torch.Generator().manual_seed(0)
    settings = {"width": 64, "height": 64, "output_type": "latent", "generator": chance, "callback_on_step_end": keep}
    try:
        pipe(**told, num_inference_steps=steps, guidance_scale=guidance, **settings)
    finally:
        pipe.scheduler = own
    return torch.cat(out)


@torch.no_grad()
def latents(family: str, stack: Stack, steps: int = 1, fuse: bool = False) -> Tensor:
    base = base_of(family, torch.float64)
    with stack.on(base, given=deltas(family), fuse=fuse) as applied:
        return drawn(base, applied.prompting(), steps, stack.guidance or 1.0)


@pytest.mark.parametrize("regional", ["noise", "attention"])
def test_a_region_that_covers_all_is_the_plain_stack_with_its_prompt_and_deltas(family: str, regional: Regional) -> None:
    if family == "sdxl" and regional == "attention":
        pytest.skip("one forward has one pooled summary: that of the stack's own prompt")
    whole = replace(plain("blue", "c"), regional=regional, regions=(replace(LEFT, box=(0, 0, 1, 1)),))
    whole = replace(whole, deltas=(*whole.deltas, use("b", "left")))
    assert_close(latents(family, whole, steps=2), latents(family, plain(LEFT.prompt, "b", "c"), steps=2))


@pytest.mark.parametrize(("regional", "guidance"), [("noise", 3.0), ("noise", 1.0), ("attention", 3.0)])
def test_regions_with_the_prompt_of_all_and_no_deltas_change_nothing(family: str, regional: Regional, guidance: float) -> None:
    one = replace(plain("a red toy"), guidance=guidance)
    regions = (replace(LEFT, prompt=""), replace(LOW, prompt="a red toy"))
    assert_close(latents(family, replace(one, regional=regional, regions=regions)), latents(family, one))


def test_a_picture_of_regions_is_blended_of_the_plain_stacks_of_each(family: str) -> None:
    """With deltas of all kinds of reach, one of them in two regions, words of one name, and a prompt of several windows."""
    uses = (use("a", "left"), use("b", "low"), use("a", "low"), use("c"))
    mixed = replace(plain("blue"), regions=(LEFT, LOW), deltas=uses)
    parts = [plain("blue", "c"), plain(LEFT.prompt, "a", "c"), replace(plain(LONG), deltas=(*map(use, "bac"),))]
    shares = Places(mixed).shares(8, 8)
    if family == "sd15":  # the others are filled up to the windows of the longest, with what an empty one holds
        long = latents(family, parts[2])
        found = latents(family, mixed)
        inside = (shares[2] == 1).expand_as(found)
        assert bool(inside.any())
        assert_close(found[inside], long[inside])
    short = replace(mixed, regions=(LEFT, replace(LOW, prompt="one <toy>")))
    parts[2] = replace(parts[2], prompt="one <toy>")
    expected = sum(share * latents(family, part) for share, part in zip(shares, parts, strict=True))
    assert isinstance(expected, Tensor)
    assert_close(latents(family, short), expected)
    assert_close(latents(family, short, fuse=True), expected)


@pytest.mark.parametrize("combine", ["switch", "composite"])
def test_one_delta_has_every_turn(combine: Combine) -> None:
    one = plain("a <toy>", "a", "word", combine=combine)
    assert_close(latents("sd15", one, steps=2), latents("sd15", replace(one, combine="sum"), steps=2))


def test_composite_is_the_mean_of_each_by_itself_also_within_a_region() -> None:
    each = [latents("sd15", plain("blue", name)) for name in "adc"]
    assert_close(latents("sd15", plain("blue", *"adc", combine="composite")), sum(each, torch.zeros(1)) / 3)
    within = replace(plain("blue", "c", combine="composite"), regions=(replace(LEFT, prompt="red"),))
    within = replace(within, deltas=(*within.deltas, use("a", "left")))
    share = Places(within).shares(8, 8)[1]
    both = [latents("sd15", plain("red", name)) for name in "ac"]
    assert_close(latents("sd15", within), (1 - share) * each[2] + share * sum(both, torch.zeros(1)) / 2)


def test_switched_deltas_take_turns_and_those_that_are_asleep_have_none() -> None:
    begun = latents("sd15", plain("blue", "a"), steps=2)
    taking_turns = latents("sd15", plain("blue", "a", "c", combine="switch"), steps=2)
    assert_close(taking_turns[:1], begun[:1])
    assert difference(taking_turns[1:], begun[1:]) > 1e-4
    late = Stack(prompt="blue", negative="ugly", guidance=3.0, combine="switch", deltas=(use("a", start=0.5), use("c")))
    assert_close(latents("sd15", late, steps=2)[:1], latents("sd15", plain("blue", "c"), steps=2)[:1])
    assert difference(latents("sd15", plain("blue", "c"), steps=2), begun) > 1e-4


def test_a_drawing_has_at_most_twenty_turns() -> None:
    def turns(steps: int, count: int) -> list[int]:
        return [turn_of(i / steps, (i + 1) / steps, count) for i in range(steps)]

    assert turns(7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert turns(25, 2) == [0, 1] * 12 + [0]
    assert turns(100, 3)[:20] == [0] * 5 + [1] * 5 + [2] * 5 + [0] * 5


@pytest.mark.parametrize(
    ("name", "regional"),
    [*((name, "noise") for name in sorted(SIDES)), ("ip-adapter", "attention"), ("uni-controlnet-global", "attention")],
)
def test_a_side_network_is_heard_in_every_region(name: str, regional: Regional) -> None:
    """Also one that was put there after the regions, and hooks in before all others."""
    base = base_of("sd15")
    network = trained(name, "sd15")

    @torch.no_grad()
    def predicted(stack: Stack) -> Tensor:
        with stack.on(base) as applied, Beside(base, SIDES[name], network, guess=SIDES[name].guesses) as beside:
            beside.tell(control(1))
            return drawn(base, applied.prompting())

    one = plain("a red toy")
    regions = (replace(LEFT, prompt=""), replace(LOW, prompt="a red toy"))
    assert_close(predicted(replace(one, regional=regional, regions=regions)), predicted(one))


def test_what_was_not_read_is_not_drawn_and_a_token_that_is_taken_is_said() -> None:
    base = base_of("sd15", torch.float64)
    mixed = replace(plain("blue", "a"), regions=(LEFT,), deltas=(use("a"), use("b", "left")))
    with mixed.on(base, given=deltas("sd15")) as applied:
        assert applied.notices == ['the word "<toy>" is there already: that of b is written "<toy-2>" in prompts']
        with pytest.raises(ConfigError, match=r"Applied.prompting\(\)"):
            drawn(base, base.family.prompting(base, "blue"))
