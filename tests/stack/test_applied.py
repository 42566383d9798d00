"""A stack that is on a base: changed in place it is, bit for bit, what it would be put on afresh, and it leaves no trace."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import vgm_peft
from tests.contract.ground import TOLERANCE, State, assert_close, base_of, difference, predict
from tests.contract.test_sides import trained
from tests.stack_makers import make_delta, make_word, small
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.sides import side_named
from vgm_peft.site import locate
from vgm_peft.stack import DeltaUse, Stack, attach, generate
from vgm_peft.stack.batch import draw_together
from vgm_peft.stack.runtime import Applied
from vgm_peft.stack.sampling import draw, dressed, scheduler_for

KINDS = ("lora", "krona", "dora", "oft", "ia3", "tlora")


@cache
def base() -> Base:
    return base_of("sd15")


@cache
def deltas() -> dict[str, Delta]:
    """One of every kind, by the kind's name; two bring the same word."""
    made = {kind: make_delta(base(), kind, seed) for seed, kind in enumerate(KINDS)}
    for kind in ("dora", "lora"):
        made[kind].words["<toy>"] = make_word(base(), vectors=1 + len(kind) % 2)
    return made


def weights() -> dict[str, Tensor]:
    return {f"{part}.{name}": t.clone() for part, root in base().parts.items() for name, t in root.state_dict().items()}


def merged(stack: Stack) -> dict[str, Tensor]:
    """The weights by the definition: the base's, plus the strength times dW of all of them."""
    found = {name: t.double() for name, t in weights().items()}
    for use in stack.deltas:
        for patch in deltas()[use.file]:
            own = getattr(locate(base().parts, patch.site), patch.site.tensor).double()
            name = next(n for n in found if n.replace("text_model.", "") == patch.site.name)
            factor = next((f for p, f in use.blocks.items() if patch.site.name.startswith(p[:-1])), 1.0)
            with torch.no_grad():
                found[name] = found[name] + use.strength * factor * patch.double().change(own)
            patch.float()
    return found


blocks = st.sampled_from([{}, {"unet.down_blocks.*": 0.0}, {"unet.up_blocks.*": 0.5, "unet.*": 2.0}, {"text_encoder.*": 0.0}])
spans = st.sampled_from([{}, {}, {"start": 0.5}, {"end": 0.5}, {"schedule": (1.0, 0.0, 0.5)}])
uses = st.builds(
    lambda one, span: DeltaUse(**one, **span),  # pyright: ignore[reportUnknownLambdaType]
    st.fixed_dictionaries({"file": st.sampled_from(KINDS), "strength": st.sampled_from([0, 0.3, 0.6, -0.4]), "blocks": blocks}),
    spans,
)
stacks = st.lists(uses, max_size=4, unique_by=lambda use: use.file).map(
    lambda made: Stack(prompt="a <toy>", deltas=tuple(made))
)


@settings(max_examples=4)
@given(st.lists(stacks, min_size=2, max_size=3))
@torch.no_grad()
def test_however_it_came_about_a_stack_is_the_same(path: list[Stack]) -> None:
    before = State.of(base().parts)
    tokenizer = base().pipe.components["tokenizer"]
    with Applied(base(), path[0], given=deltas()) as applied:
        for stack in path[1:]:
            applied.change(stack, given=deltas())
        changed = weights(), predict(base()), applied.prompting()["prompt_embeds"], applied.notices
    State.check(before, base().parts)
    assert base().pipe.components["tokenizer"] is tokenizer
    last = path[-1].changed({"deltas": [d for d in reversed(path[-1].table().get("deltas", []))]})  # type: ignore[arg-type]
    for stack, exact in ((path[-1], True), (last, False)):
        with stack.on(base(), given=deltas()) as fresh:
            found, embedded = weights(), fresh.prompting()["prompt_embeds"]
            assert all(torch.equal(found[name], t) for name, t in changed[0].items())
            assert torch.equal(predict(base()), changed[1])
            assert not exact or torch.equal(embedded, changed[2]) and fresh.notices == changed[3]


@settings(max_examples=3)
@given(stacks)
@torch.no_grad()
def test_live_is_fused_is_merged(stack: Stack) -> None:
    steady = Stack(deltas=tuple(u for u in stack.deltas if u.constant and u.file != "tlora"))
    expected = merged(steady)
    with steady.on(base(), given=deltas()):
        found, fused = weights(), predict(base())
    assert all(difference(found[name], t) <= TOLERANCE[torch.float32] for name, t in expected.items())
    with steady.on(base(), given=deltas(), fuse=False):
        assert_close(predict(base()), fused)


def plain(**strengths: float) -> tuple[DeltaUse, ...]:
    return tuple(DeltaUse(file=kind, strength=s) for kind, s in strengths.items())


@torch.no_grad()
def test_a_change_touches_only_what_differs() -> None:
    presets = ("attention", "conv")
    given = {f"{preset} {seed}": make_delta(base(), "lora", seed, preset) for preset in presets for seed in range(5)}
    stack = Stack(deltas=tuple(DeltaUse(file=name, strength=0.2) for name in given))
    layers = {preset: {(p.site.part, p.site.module) for p in given[f"{preset} 0"]} for preset in presets}
    with stack.on(base(), given=given) as applied:
        assert applied.change(stack, given=given) == 0
        one = stack.deltas[7]
        other = Stack(deltas=(*stack.deltas[:7], DeltaUse(file=one.file, strength=0.9), *stack.deltas[8:]))
        assert applied.change(other, given=given) == len(layers["conv"]) < len(layers["conv"] | layers["attention"])
        half = DeltaUse(file=one.file, strength=0.9, blocks={"unet.down_blocks.*": 0.5})
        down = sum(module.startswith("down_blocks.") for part, module in layers["conv"] if part == "unet")
        assert applied.change(Stack(deltas=(*stack.deltas[:7], half, *stack.deltas[8:])), given=given) == down > 0
        assert applied.change(Stack(deltas=stack.deltas[5:]), given=given) == len(layers["conv"] | layers["attention"])


@torch.no_grad()
def test_what_is_live_is_switched_without_being_put_on_again() -> None:
    stack = Stack(prompt="a <toy>", deltas=(DeltaUse(file="lora", end=0.5), DeltaUse(file="oft", strength=0.5)))
    with stack.on(base(), given=deltas()) as applied:
        live, words, controls = applied.live[0].attachment, applied._words, applied.controls  # pyright: ignore[reportPrivateUsage]
        later = stack.changed({"deltas": [{"file": "lora", "start": 0.5}, {"file": "oft", "strength": 0.1}]})
        applied.change(later, given=deltas())
        assert applied.live[0].attachment is live and applied.controls is controls
        assert applied._words is words  # pyright: ignore[reportPrivateUsage]
        found = predict(base()), applied.prompting()["prompt_embeds"]
    with later.on(base(), given=deltas()) as fresh:
        assert torch.equal(found[0], predict(base())) and torch.equal(found[1], fresh.prompting()["prompt_embeds"])


def test_files_are_read_again_only_if_their_bytes_changed(tmp_path: Path) -> None:
    for kind in ("lora", "oft"):
        vgm_peft.write(deltas()[kind], tmp_path / f"{kind}.safetensors", "native", base())
    stack = Stack(deltas=(DeltaUse(file="lora.safetensors"), DeltaUse(file="oft.safetensors"))).beginning_at(tmp_path)
    with stack.on(base()) as applied:
        lora, oft = (applied.deltas[f"{kind}.safetensors"] for kind in ("lora", "oft"))
        vgm_peft.write(deltas()["krona"], tmp_path / "oft.safetensors", "native", base())
        off = stack.changed({"deltas": [{"file": "lora.safetensors", "strength": 0.0}, {"file": "oft.safetensors"}]})
        assert applied.change(off) > 0
        assert (
            list(applied.deltas) == ["oft.safetensors"] and applied.deltas["oft.safetensors"].kinds == ("krona",) != oft.kinds
        )
        applied.change(stack)
        assert applied.deltas["lora.safetensors"] is lora
        kept = weights()
        (tmp_path / "oft.safetensors").write_bytes(b"nothing")
        with pytest.raises(DeltaError, match=r"oft\.safetensors"):
            applied.change(stack)
        assert all(torch.equal(kept[name], t) for name, t in weights().items())


@torch.no_grad()
def test_blocks_are_factors_on_some_sites() -> None:
    delta = deltas()["lora"]
    down = {name: patch for name, patch in delta.patches.items() if name.startswith("unet.down_blocks.")}
    rest = {name: patch for name, patch in delta.patches.items() if name not in down}
    apart = {"down": Delta(delta.family, down), "rest": Delta(delta.family, rest)}
    stack = Stack(deltas=(DeltaUse(file="lora", strength=0.8, blocks={"unet.down_blocks.*": 0.5, "unet.*": 1.0}),))
    two = Stack(deltas=(DeltaUse(file="down", strength=0.4), DeltaUse(file="rest", strength=0.8)))
    found: list[dict[str, Tensor]] = []
    for each, known in ((stack, deltas()), (two, apart)):
        with each.on(base(), given=known):
            found.append(weights())
    assert all(torch.equal(found[0][name], t) for name, t in found[1].items())
    wrong = Stack(deltas=(DeltaUse(file="lora", blocks={"unet.down_block.*": 0.5}),))
    with pytest.raises(
        ConfigError, match=r'"unet.down_block.\*" matches none of its \d+ sites; did you mean "unet.down_blocks'
    ):
        wrong.on(base(), given=deltas())


def by_hand(strengths: list[float], text: float, stack: Stack) -> np.ndarray:
    """A picture by the stock pipeline, with a strength for every step set between the steps."""
    pipe: Any = base().pipe
    size = {"width": base().resolution, "height": base().resolution}

    def after(_: object, step: int, __: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        handle.scale = strengths[min(step + 1, len(strengths) - 1)]
        return {}

    with attach(pipe, deltas()["lora"], text) as handle, dressed(pipe, scheduler_for(base(), stack.scheduler)), torch.no_grad():
        told = base().family.prompting(base(), stack.prompt, stack.negative)
        handle.scale = strengths[0]
        drawn = pipe(
            **told, **size, num_inference_steps=stack.steps, guidance_scale=stack.guidance, callback_on_step_end=after,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).images[0]  # fmt: skip
    return (drawn * 255).round().astype("uint8")


@pytest.mark.parametrize(
    ("settings", "steps", "text"),
    [
        ({"end": 0.5}, [0.8, 0.8, 0.0, 0.0], 0.8),
        ({"start": 0.25}, [0.0, 0.8, 0.8, 0.8], 0.0),
        ({"start": 0.2, "end": 0.8}, [0.0, 0.8, 0.8, 0.0], 0.0),
        ({"schedule": (1.0, 0.0, -0.5)}, [0.8, 0.8 / 3, -0.4 / 3, -0.4], 0.8),
        ({"schedule": (0.0, 1.0), "end": 0.75}, [0.0, 0.4, 0.8, 0.0], 0.0),
    ],
)
def test_spans_and_schedules_are_strengths_step_by_step(settings: dict[str, Any], steps: list[float], text: float) -> None:
    stack = Stack(prompt="a toy", **small(steps=4), deltas=(DeltaUse(file="lora", strength=0.8, **settings),))
    drawn = np.asarray(generate(base(), stack, given=deltas())[0].image)
    assert np.abs(drawn.astype(int) - by_hand(steps, text, stack)).max() <= 1


# --- words and side networks


def test_words_come_and_go_with_their_deltas() -> None:
    both = Stack(prompt="a <toy>", deltas=plain(lora=0.5, dora=0.5))
    with both.on(base(), given=deltas()) as applied:
        assert applied.notices == ['the word "<toy>" is there already: that of dora is written "<toy-2>" in prompts']
        applied.change(Stack(prompt="a <toy>", deltas=plain(lora=0.0, dora=0.5)), given=deltas())
        assert applied.notices == []
        alone = applied.prompting()["prompt_embeds"]
    with Stack(prompt="a <toy>", deltas=plain(dora=0.5)).on(base(), given=deltas()) as fresh:
        assert torch.equal(fresh.prompting()["prompt_embeds"], alone)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Control-LoRA, which takes its weights from the base, and two pictures to look at."""
    folder, side = tmp_path_factory.mktemp("shown"), side_named("control-lora")
    side.save(trained("control-lora", "sd15"), folder / "edges")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), "uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_networks_are_opened_over_the_plain_base_and_once(shown: Path) -> None:
    def drawn(applied: Applied) -> bytes:
        return next(draw(applied, applied.stack)).image.tobytes()

    plain_stack = Stack(prompt="a toy", **small(), deltas=plain(lora=0.5)).beginning_at(shown)
    looking = [
        plain_stack.changed({"controls": [{"network": "edges.safetensors", "image": f"{n}.png", "strength": s}]})
        for n, s in ((0, 1.0), (1, 0.5))
    ]
    with plain_stack.on(base(), given=deltas()) as applied:
        first = drawn(applied)
        applied.change(looking[0], given=deltas())
        network = applied.controls.networks[0]
        applied.change(looking[1], given=deltas())
        assert applied.controls.networks[0] is network
        second = drawn(applied)
        applied.change(plain_stack, given=deltas())
        assert drawn(applied) == first != second
    with looking[1].on(base(), given=deltas()) as fresh:
        assert drawn(fresh) == second


# --- several in one pass


def test_stacks_are_drawn_together_as_they_are_drawn_alone() -> None:
    """In common and alone, in some steps, by the timestep, on prompts, by words of one name; every picture by its own seed."""
    common = DeltaUse(file="krona", strength=0.4)
    made = (
        Stack(prompt="a toy", **small(steps=4), deltas=(common,)),
        Stack(prompt="a <toy>", **small(steps=4), seed=1, deltas=(common, DeltaUse(file="lora", strength=0.7, end=0.5))),
        Stack(prompt="a <toy>", negative="red", **small(steps=4), seed=2, deltas=(DeltaUse(file="dora", strength=0.6), common)),
        Stack(prompt="a toy", **small(steps=4), seed=1, deltas=(common, DeltaUse(file="tlora", blocks={"unet.*": 0.5}))),
        Stack(prompt="a toy", **small(steps=4), deltas=(common, *plain(oft=1.0, ia3=-0.5))),
    )
    stacks = [stack.changed({"scheduler": "euler_a"}) for stack in made]
    for one, stack in zip(draw_together(base(), stacks, given=deltas()), stacks, strict=True):
        alone = generate(base(), stack, given=deltas(), tell=lambda _: None)[0]
        assert one.stack == alone.stack
        pixels = [np.asarray(p.image).astype(int) for p in (one, alone)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1 and pixels[0].std() > 1


def test_stacks_that_cannot_be_drawn_together_are_named() -> None:
    first = Stack(prompt="a", **small())
    for other, message in (
        (first.changed({"steps": 3}), "steps = 2 and 3 in one pass"),
        (first.changed({"regions": [{"name": "left"}]}), "regions = .* in one pass"),
        (first.changed({"count": 2}), "count = 2 in one pass"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw_together(base(), [first, other])
    with pytest.raises(ConfigError, match="no stack"):
        draw_together(base(), [])
