"""Attaching, stacking and drawing on real tiny pipelines: exact in both directions, and equal to plain diffusers."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vgm_peft
from tests.stack_makers import SMALL, make_delta, make_word
from vgm_peft.attachment import attachments
from vgm_peft.delta import Delta
from vgm_peft.errors import BaseModelError, ConfigError, DataError, DeltaError, VgmError
from vgm_peft.families import TABLE as FAMILIES
from vgm_peft.families import family_named
from vgm_peft.family import Base
from vgm_peft.stack import ControlUse, DeltaUse, Region, Stack, attach, detach, generate
from vgm_peft.stack.recipe import SCHEDULERS

TASKS = ("text2img", "img2img", "inpaint", "controlnet")


@pytest.fixture(scope="module", params=list(FAMILIES))
def base(request: pytest.FixtureRequest) -> Base:
    family = family_named(request.param)
    return Base(family.tiny(), family, "tiny").freeze()


def pipeline(base: Base, task: str) -> Any:
    """A stock pipeline of one task that shares the base's components."""
    from diffusers import (
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
        ControlNetModel,
    )

    if task == "controlnet":
        torch.manual_seed(0)
        network = ControlNetModel.from_unet(base.pipe.unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
        for p in network.controlnet_mid_block.parameters():
            nn.init.normal_(p, std=0.5)
        return AutoPipelineForText2Image.from_pipe(base.pipe, controlnet=network)
    if task == "text2img":
        return base.pipe
    return {"img2img": AutoPipelineForImage2Image, "inpaint": AutoPipelineForInpainting}[task].from_pipe(base.pipe)


def picture(pipe: Any, task: str, prompt: str = "a red toy", side: int = 64) -> np.ndarray:
    image = Image.fromarray((np.arange(side * side * 3) % 251).astype("uint8").reshape(side, side, 3))
    extra: dict[str, Any] = {"width": side, "height": side} if task in ("text2img", "controlnet") else {}
    if task != "text2img":
        extra["image"] = image
    if task == "inpaint":
        extra |= {"mask_image": Image.new("L", (side, side), 255), "width": side, "height": side}
    if task in ("img2img", "inpaint"):
        extra["strength"] = 1.0
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np", **extra).images[0]


def fingerprint(pipe: Any) -> dict[str, Any]:
    """Everything that must be the same after detaching."""
    print_: dict[str, Any] = {}
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            print_[name] = id(part)
            continue
        print_[name] = {
            "keys": list(part.state_dict()),
            "bytes": {k: v.detach().clone() for k, v in part.state_dict().items()},
            "places": [t.data_ptr() for t in itertools.chain(part.parameters(), part.buffers())],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in part.modules()],
            "classes": [type(m) for m in part.modules()],
            "attributes": [sorted(m.__dict__) for m in part.modules()],
        }
    return print_


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    for name, left in a.items():
        if not isinstance(left, dict):
            assert left == b[name], name
            continue
        for key in ("keys", "places", "hooks", "classes", "attributes"):
            assert left[key] == b[name][key], f"{name}: {key}"
        assert all(torch.equal(t, b[name]["bytes"][k]) for k, t in left["bytes"].items()), name
    return True


# --- attach and detach


@pytest.mark.parametrize("task", TASKS)
def test_attach_changes_the_picture_and_detach_gives_everything_back(base: Base, task: str) -> None:
    pipe = pipeline(base, task)
    delta = make_delta(base)
    delta.words["<toy>"] = make_word(base)
    plain = picture(pipe, task)  # first: transformers hooks an encoder at its first call that asks for hidden states
    before = fingerprint(pipe)
    handle = attach(pipe, delta, scale=0.8)
    changed = picture(pipe, task)
    with_word = picture(pipe, task, "a red <toy>")
    handle.scale = 0.0
    assert np.array_equal(picture(pipe, task), plain)
    handle.scale = 0.8
    assert np.array_equal(picture(pipe, task), changed)
    detach(pipe, handle)
    assert np.abs(changed - plain).max() > 1e-3
    assert not np.array_equal(with_word, changed)
    assert same(before, fingerprint(pipe))
    assert np.array_equal(picture(pipe, task), plain)


def test_detach_holds_after_an_error_in_the_forward(base: Base) -> None:
    before = fingerprint(base.pipe)

    def stumble(*_: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), attach(base.pipe, make_delta(base)):
        hook = base.denoiser.register_forward_pre_hook(stumble)
        try:
            picture(base.pipe, "text2img")
        finally:
            hook.remove()
    assert same(before, fingerprint(base.pipe))
    assert attachments(base.parts) == []


def test_two_attached_deltas_add_in_any_order_of_coming_and_going(base: Base) -> None:
    before, a, b = fingerprint(base.pipe), make_delta(base), make_delta(base, "krona", 1)
    first, second = attach(base.pipe, a, 0.5), attach(base.pipe, b, 0.5)
    both = picture(base.pipe, "text2img")
    detach(base.pipe, first)
    alone = picture(base.pipe, "text2img")
    first = attach(base.pipe, a, 0.5)
    assert np.abs(picture(base.pipe, "text2img") - both).max() < 1e-4
    assert np.abs(alone - both).max() > 1e-3
    second.scale = 0.25
    detach(base.pipe)
    assert not first.attached and not second.attached
    assert same(before, fingerprint(base.pipe))


def test_attach_leaves_the_delta_given_as_it_was(base: Base) -> None:
    half = Base(base.family.tiny(), base.family, "tiny").freeze()
    delta = make_delta(half).train()
    values = {name: p.detach().clone() for name, p in delta.parameters()}
    half.denoiser.to(torch.bfloat16)
    with attach(half.pipe, delta) as handle:
        assert handle.delta is delta
        live = [p for owner in attachments(half.parts) for p in owner.delta]  # type: ignore[union-attr]
        unet = [p for p in live if p.site.part == half.family.denoiser]
        assert unet and all(t.dtype == torch.bfloat16 and not t.requires_grad for p in unet for t in p.parameters())
    assert all(torch.equal(p, values[name]) and p.requires_grad for name, p in delta.parameters())
    assert all(p.training for p in delta)


def test_attach_refuses_what_does_not_fit(base: Base, tmp_path: Path) -> None:
    delta = make_delta(base)
    before = fingerprint(base.pipe)
    with attach(base.pipe, delta), pytest.raises(DeltaError, match="on this pipeline already"):
        attach(base.pipe, delta)
    other = make_delta(base)
    other.family = "dit"
    with pytest.raises(DeltaError, match=f"for dit.*{base.family.name}.*base of the family dit"):
        attach(base.pipe, other)
    with pytest.raises(DeltaError, match="no such file"):
        attach(base.pipe, tmp_path / "none.safetensors")
    broken = make_delta(base)
    next(iter(broken.parameters()))[1].data[0] = float("nan")
    with pytest.raises(DeltaError, match="not finite"):
        attach(base.pipe, broken)
    with pytest.raises(DeltaError, match="neither a patch nor a word"):
        attach(base.pipe, Delta(base.family.name))
    with pytest.raises(ConfigError, match="scale = nan"):
        attach(base.pipe, delta, float("nan"))
    gone = attach(base.pipe, delta)
    detach(base.pipe, gone)
    with pytest.raises(DeltaError, match="not on this pipeline"):
        detach(base.pipe, gone)
    with pytest.raises(DeltaError, match="already detached"):
        gone.scale = 0.5
    assert same(before, fingerprint(base.pipe))


def test_a_pipeline_of_no_known_family_is_named() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(BaseModelError, match="DDPMPipeline"):
        attach(DDPMPipeline(unet, DDPMScheduler()), Delta("sd15"))


# --- stacks


def drawn(base: Base, given: dict[str, Delta] | None = None, **changes: Any) -> np.ndarray:
    stack = Stack(prompt="a red toy", **{**SMALL, **changes})
    return np.asarray(generate(base, stack, given=given)[0].image)


def uses(**strengths: float) -> tuple[DeltaUse, ...]:
    return tuple(DeltaUse(file=file, strength=s) for file, s in strengths.items())


def test_a_stack_is_order_free_and_leaves_no_trace(base: Base) -> None:
    given = {"a": make_delta(base), "b": make_delta(base, "krona", 1), "c": make_delta(base, seed=2, preset="conv")}
    before = fingerprint(base.pipe)
    orders = [uses(a=0.5, b=0.7, c=-0.3), uses(c=-0.3, a=0.5, b=0.7), uses(b=0.7, c=-0.3, a=0.5)]
    pictures = [drawn(base, given, deltas=order) for order in orders]
    assert same(before, fingerprint(base.pipe))
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], drawn(base))
    assert same(before, fingerprint(base.pipe))


def test_live_and_fused_stacks_agree(base: Base) -> None:
    given = {"a": make_delta(base), "b": make_delta(base, "krona", 1)}
    stack = Stack(deltas=uses(a=0.5, b=0.7))
    results: list[np.ndarray] = []
    for fuse in (True, False):
        with stack.on(base, given=given, fuse=fuse) as applied:
            results.append(picture(applied.base.pipe, "text2img"))
    assert np.abs(results[0] - results[1]).max() < 1e-4


def test_strength_zero_equals_absent_bit_for_bit(base: Base) -> None:
    delta = make_delta(base)
    delta.words["<toy>"] = make_word(base)
    prompt = "a <toy> here"
    absent = np.asarray(generate(base, Stack(prompt=prompt, **SMALL))[0].image)
    zero = Stack(prompt=prompt, **SMALL, deltas=uses(a=0.0))
    assert np.array_equal(np.asarray(generate(base, zero, given={"a": delta})[0].image), absent)
    one = Stack(prompt=prompt, **SMALL, deltas=uses(a=1.0))
    assert not np.array_equal(np.asarray(generate(base, one, given={"a": delta})[0].image), absent)


def test_stack_conflicts_are_errors_and_touch_nothing(base: Base) -> None:
    before = fingerprint(base.pipe)
    with pytest.raises(ConfigError, match="twice"):
        Stack(deltas=(DeltaUse(file="a"), DeltaUse(file="a")))
    with pytest.raises(ConfigError, match='twice in the region "left"'):
        Stack(deltas=(DeltaUse(file="a", region="left"), DeltaUse(file="a", region="left")), regions=(Region(name="left"),))
    foreign = make_delta(base)
    foreign.family = "dit"
    with pytest.raises(DeltaError, match="for dit"):
        drawn(base, {"a": make_delta(base), "b": foreign}, deltas=uses(a=1, b=1))
    with pytest.raises(DeltaError, match="no such file"):
        with Stack(deltas=uses(nowhere=1)).on(base):
            pass
    with pytest.raises(BaseModelError, match="not those the stack was made with"):
        base.digest = "0" * 64
        try:
            drawn(base, base_digest="1" * 64)
        finally:
            base.digest = ""
    assert same(before, fingerprint(base.pipe))


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_every_scheduler_draws_finite_pictures_with_the_bases_own_process(base: Base, scheduler: str) -> None:
    from vgm_peft.stack.sampling import scheduler_for

    made, own = scheduler_for(base, scheduler).config, base.pipe.scheduler.config
    for key in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "timestep_spacing"):
        assert key not in own or made[key] == own[key], key
    assert not made.get("clip_sample")
    assert drawn(base, scheduler=scheduler, steps=3).std() > 1


def test_count_does_not_change_a_picture_and_seeds_follow_one_another(base: Base) -> None:
    stack = Stack(prompt="a toy", **SMALL, seed=5, count=3)
    three = generate(base, stack)
    assert [p.stack.seed for p in three] == [5, 6, 7]
    for p in three:
        again = generate(base, stack.changed({"seed": p.stack.seed, "count": 1}))[0]
        assert np.array_equal(np.asarray(p.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(three[0].image), np.asarray(three[1].image))


def test_steps_are_reported_previews_decode_and_false_stops(base: Base) -> None:
    seen: list[tuple[int, int, float]] = []
    stack = Stack(prompt="a toy", **SMALL, count=2)

    def watch(progress: Any) -> bool:
        seen.append((progress.picture, progress.step, progress.fraction))
        assert progress.preview().size == (base.resolution, base.resolution)
        return len(seen) < 3

    scheduler = base.pipe.scheduler
    assert len(generate(base, stack, watch)) == 1
    assert seen == [(1, 1, 0.25), (1, 2, 0.5), (2, 1, 0.75)]
    assert base.pipe.scheduler is scheduler


# --- with side networks and files


@pytest.fixture
def control(base: Base, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A saved control network and a control picture."""
    network = pipeline(base, "controlnet").controlnet
    network.save_pretrained(tmp_path / "edges")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")).save(tmp_path / "edges.png")
    yield tmp_path / "edges", tmp_path / "edges.png"


def test_several_deltas_and_control_networks_in_one_call(base: Base, control: tuple[Path, Path]) -> None:
    folder, image = map(str, control)
    given = {"a": make_delta(base), "b": make_delta(base, "krona", 1)}
    before = fingerprint(base.pipe)
    deltas = uses(a=0.5, b=0.5)
    one = drawn(base, given, deltas=deltas, controls=(ControlUse(network=folder, image=image),))
    two = drawn(base, given, deltas=deltas, controls=(ControlUse(network=folder, image=image),) * 2)
    none = drawn(base, given, deltas=deltas, controls=(ControlUse(network=folder, image=image, strength=0.0),))
    assert np.array_equal(none, drawn(base, given, deltas=deltas))
    assert not np.array_equal(one, none) and not np.array_equal(two, one)
    assert same(before, fingerprint(base.pipe))


def test_control_equals_the_stock_pipeline(base: Base, control: tuple[Path, Path]) -> None:
    folder, image = control
    stock = pipeline(base, "controlnet")
    plain = base.pipe.scheduler
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        "a red toy", image=Image.open(image).convert("RGB"), num_inference_steps=2, guidance_scale=3.0, width=64, height=64,
        generator=torch.Generator().manual_seed(0), output_type="np", controlnet_conditioning_scale=0.7,
    ).images[0]  # fmt: skip
    ours = drawn(base, controls=(ControlUse(network=str(folder), image=str(image), strength=0.7),))
    assert base.pipe.scheduler is plain
    assert np.abs(ours / 255 - theirs).max() <= 0.5 / 255 + 1e-4


def test_a_bad_control_picture_is_named(base: Base, control: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"bad\.png: not a readable picture"):
        drawn(base, controls=(ControlUse(network=str(control[0]), image=str(bad)),))
    with pytest.raises(VgmError, match="nowhere"):
        drawn(base, controls=(ControlUse(network=str(tmp_path / "nowhere"), image=str(control[1])),))


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_what_is_exported_draws_the_same_in_plain_diffusers(base: Base, tmp_path: Path, spelling: str) -> None:
    delta = make_delta(base)
    file = vgm_peft.write(delta, tmp_path / "me.safetensors", spelling, base)
    plain = picture(base.pipe, "text2img")
    with attach(base.pipe, file, 0.8):
        ours = picture(base.pipe, "text2img")
    stock = base.family.tiny()
    stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="me")
    assert stock.get_list_adapters()
    stock.set_adapters(["me"], [0.8])
    theirs = picture(stock, "text2img")
    assert np.abs(ours - theirs).max() < 1e-4 < np.abs(ours - plain).max()


@pytest.mark.parametrize("kind", ["lora", "krona"])
def test_a_native_file_is_the_delta_it_was_written_from(base: Base, tmp_path: Path, kind: str) -> None:
    delta = make_delta(base, kind)
    delta.words["<toy>"] = make_word(base)
    file = vgm_peft.write(delta, tmp_path / "me.safetensors", "native", base)
    stack = Stack(prompt="a <toy>", **SMALL, deltas=(DeltaUse(file="me.safetensors", strength=0.9),)).beginning_at(tmp_path)
    from_file = generate(base, stack)[0]
    in_memory = generate(base, stack, given={"me.safetensors": delta})[0]
    assert np.array_equal(np.asarray(from_file.image), np.asarray(in_memory.image))
    assert from_file.stack.deltas[0].digest and not in_memory.stack.deltas[0].digest
    with pytest.raises(DeltaError, match="already"):
        with attach(base.pipe, file):
            attach(base.pipe, file)


# --- the description


def test_a_stack_goes_through_toml_unchanged(tmp_path: Path) -> None:
    stack = Stack(
        base="toybox", prompt='a "red" robot\non grass', negative="blurry", steps=7, guidance=1.5, seed=3, count=2, width=64,
        height=128, scheduler="euler_a",
        image="begin.png", change=0.5, paint="where.png", paint_digest="b" * 64, combine="composite", regional="attention",
        deltas=(
            DeltaUse(file="a.safetensors", strength=-0.5, digest="a" * 64, start=0.25, schedule=(1.0, 0.5)),
            DeltaUse(file="b", blocks={"unet.up_blocks.*": 0.5, "*": 2.0}, region="left"),
        ),
        controls=(ControlUse(network="edges", image="edges.png", strength=0.25),),
        regions=(Region(name="left", prompt="a car", box=(0.0, 0.0, 0.5, 1.0)), Region(name="right", mask="right.png")),
    )  # fmt: skip
    file = tmp_path / "x.toml"
    file.write_text(stack.toml(), encoding="utf-8")
    again = Stack.read(file)
    assert again == stack and again.toml() == stack.toml()
    assert again.path("a.safetensors") == tmp_path / "a.safetensors"
    assert list(again.deltas[1].blocks) == ["unet.up_blocks.*", "*"]  # the first that matches counts
    assert Stack.read(_written(tmp_path, Stack().toml())) == Stack()
    assert Stack(deltas=(DeltaUse(file="a"),)).table()["deltas"] == [{"file": "a", "strength": 1.0}]


def _written(folder: Path, text: str) -> Path:
    path = folder / "bad.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt = 'x'", r'unknown setting "bad.toml: promt"; did you mean "prompt"'),
        ("steps = 0", "steps = 0; expected 1 .. 1000"),
        ("steps = 1000000000", "expected 1 .. 1000"),
        ("steps = '5'", "expected a whole number"),
        ("guidance = nan", "guidance = nan"),
        ("seed = -1", "seed = -1"),
        ("width = 100", "expected a multiple of 8; try 96"),
        ("scheduler = 'ddimm'", 'did you mean "ddim"'),
        ("[[deltas]]\nfile = 'a'\nstrength = inf", "strength = inf; expected a finite number"),
        ("[[deltas]]\nstrength = 1.0", "is missing"),
        ("[[deltas]]\nfile = 'a'\ndigest = '../..'", "SHA-256"),
        ("folder = '/etc'", 'unknown setting "bad.toml: folder"'),
        ("prompt = '" + "x" * 9000 + "'", "9000 characters"),
        ("prompt = ", "not valid TOML"),
        ("change = 0.0", "change = 0.0; expected above 0"),
        ("paint = 'a.png'", 'paint = "a.png" without an image'),
        ("combine = 'mix'", "combine = 'mix'; expected one of 'sum'"),
        ("[[deltas]]\nfile = 'a'\nstart = 0.5\nend = 0.5", "a acts from 0.5 to 0.5; expected a start before the end"),
        ("[[deltas]]\nfile = 'a'\nstart = 0.5\nend = 0.2", r"end of a = 0.2; expected 0.5 .. 1"),
        ("[[deltas]]\nfile = 'a'\nschedule = [1.0, nan]", "schedule"),
        ("[[deltas]]\nfile = 'a'\nblocks = {'unet.*' = 1e9}", "blocks of a"),
        ("[[deltas]]\nfile = 'a'\nregion = 'lef'\n[[regions]]\nname = 'left'", 'region "lef".*did you mean "left"'),
        ("[[deltas]]\nfile = 'a'\nregion = 'lef'", 'region "lef", which the stack does not have; add the region'),
        ("[[regions]]\nname = 'left'\n[[regions]]\nname = 'left'", '2 regions are called "left"'),
        ("[[regions]]\nname = 'left'\nbox = [0.5, 0.0, 0.2, 1.0]", "box .* of the region left"),
    ],
)
def test_bad_stack_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stack.read(_written(tmp_path, text))


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    pinned = Stack(deltas=(DeltaUse(file="a"),)).beginning_at(tmp_path).pinned()
    assert pinned.pinned() == pinned
    (tmp_path / "a").write_bytes(b"two")
    with pytest.raises(DeltaError, match="its bytes changed"):
        pinned.pinned()


def test_shipped_stacks_read() -> None:
    for file in sorted((Path(__file__).parent.parent / "pipelines").glob("*.toml")):
        assert Stack.read(file).prompt
