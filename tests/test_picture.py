"""Pictures that remake themselves, what other programs read in them, hostile metadata, grids, and finding files again."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import vgm_peft
from tests.stack_makers import SMALL, make_delta
from vgm_peft.errors import ConfigError, DataError, DeltaError, SaveError
from vgm_peft.families import family_named
from vgm_peft.family import Base
from vgm_peft.picture import Picture, grid, parameters, portable, read_stack
from vgm_peft.stack import ControlUse, DeltaUse, Region, Stack, generate
from vgm_peft.stack.library import find, locate


@pytest.fixture(scope="module")
def base() -> Base:
    family = family_named("sd15")
    return Base(family.tiny(), family, "toybox", digest="d" * 64).freeze()


def blank(side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), "#4477aa")


def test_a_picture_remakes_its_own_bytes(base: Base, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, kind in (("robot", "lora"), ("style", "krona")):
        (runs / name).mkdir(parents=True)
        vgm_peft.write(make_delta(base, kind), runs / name / "delta.safetensors", "native", base)
    uses = tuple(DeltaUse(file=f"runs/{n}/delta.safetensors", strength=s) for n, s in (("robot", 0.8), ("style", -0.5)))
    stack = Stack(prompt="a robot, red\non grass", negative="fog", **SMALL, seed=3, count=2, deltas=uses).beginning_at(tmp_path)
    first, second = (p.save(tmp_path / "out" / f"{i}.png") for i, p in enumerate(generate(base, stack)))
    found = locate(read_stack(second), [runs])
    assert found.seed == 4 and found.count == 1 and found.base_digest == base.digest
    assert [d.strength for d in found.deltas] == [0.8, -0.5]
    again = generate(base, found)[0].save(tmp_path / "again.png")
    assert again.read_bytes() == second.read_bytes() != first.read_bytes()
    assert str(tmp_path).encode() not in second.read_bytes()
    (runs / "robot" / "delta.safetensors").rename(runs / "style" / "renamed.safetensors")
    assert locate(read_stack(second), [runs]).deltas[0].file.endswith("renamed.safetensors")
    (runs / "style" / "renamed.safetensors").unlink()
    with pytest.raises(DeltaError, match=r'"robot/delta.safetensors" \([0-9a-f]{12}\) is in none of the folders'):
        locate(read_stack(second), [runs])


def test_guidance_left_out_is_the_bases_own_and_is_written_down(base: Base) -> None:
    named = replace(base, own_guidance=2.25)
    drawn, asked = (generate(named, Stack(prompt="a toy", steps=2, guidance=g, width=16, height=16))[0] for g in (None, 2.25))
    assert drawn.image.tobytes() == asked.image.tobytes() and drawn.stack.guidance == 2.25
    assert generate(base, Stack(prompt="a toy", steps=2, width=16, height=16))[0].stack.guidance == base.family.guidance


def test_parameters_are_spelled_as_other_programs_expect(tmp_path: Path) -> None:
    (tmp_path / "me.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      " + b"values")
    stack = Stack(
        base="toybox", base_digest="abcdef0123" + "0" * 54, prompt="a toy", negative="fog", steps=7, guidance=4.5, seed=9,
        width=64, height=48, scheduler="dpmpp", deltas=(DeltaUse(file="me.safetensors", strength=0.8),),
    ).beginning_at(tmp_path)  # fmt: skip
    path = Picture(blank(), stack).save(tmp_path / "p.png")
    with Image.open(path) as image:
        text = image.text["parameters"]  # type: ignore[attr-defined]
    lines = text.split("\n")
    assert lines[:2] == ["a toy <lora:me:0.8>", "Negative prompt: fog"]
    facts = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines[2]))  # A1111's own pattern
    assert facts["Steps"] == "7" and facts["Sampler"] == "DPM++ 2M" and facts["CFG scale"] == "4.5"
    assert facts["Seed"] == "9" and facts["Size"] == "64x48" and facts["Model"] == "toybox"
    assert facts["Model hash"] == "abcdef0123" and facts["Version"].startswith("vgm_peft ")
    # Their hash of a LoRA is the SHA-256 of what follows the header.
    assert facts["Lora hashes"] == f'"me: {hashlib.sha256(b"values").hexdigest()[:12]}"'


def test_only_plain_names_leave_this_machine() -> None:
    stack = Stack(
        base="/home/me/models/sd15", prompt="x",
        deltas=(
            DeltaUse(file="/home/me/a/toy.safetensors", digest="1" * 64),
            DeltaUse(file="C:\\b\\toy.safetensors", digest="2" * 64),
            DeltaUse(file="../runs/robot/delta.safetensors"),
        ),
        controls=(ControlUse(network="/nets/edges", image="/home/me/a.png"),),
        regions=(Region(name="left", mask="/home/me/left.png"), Region(name="right")),
        image="/home/me/begin.png", paint="/home/me/where.png",
    )  # fmt: skip
    stack = replace(stack, deltas=(*stack.deltas, replace(stack.deltas[1], region="left")))
    plain = portable(stack)
    assert (plain.regions[0].mask, plain.image, plain.paint) == ("left.png", "begin.png", "where.png")
    assert plain.deltas[3].file == plain.deltas[1].file and plain.deltas[3].region == "left"
    plain = replace(plain, deltas=plain.deltas[:3])
    assert [d.file for d in plain.deltas] == ["toy.safetensors", "toy-22222222.safetensors", "robot/delta.safetensors"]
    assert (plain.base, plain.controls[0].network, plain.controls[0].image) == ("sd15", "edges", "a.png")
    assert "/home" not in parameters(stack) and portable(plain) == plain
    assert portable(Stack(base="a/b")).base == "a/b"


def png(folder: Path, text: str, key: str = "vgm_peft") -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, text)
    blank().save(folder / "x.png", pnginfo=info)
    return folder / "x.png"


def record(**table: Any) -> str:
    return json.dumps({"version": "0", "stack": table})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no stack"),
        (json.dumps({"stack": 5}), "no stack"),
        ("x" * 200_001, "200,001 characters"),
        (record(prompt="x", url="http://evil"), 'unknown setting "x.png: url"'),
        (record(steps=10**9), "steps = 1000000000"),
        (record(steps=True), "expected a whole number"),
        (record(seed=-1), "seed = -1"),
        ('{"stack": {"guidance": NaN}}', "guidance = nan"),
        ('{"stack": {"guidance": 1e999}}', "guidance = inf"),
        (record(width=10**6), "width = 1000000"),
        (record(count=10**6), "count"),
        (record(folder="/etc"), "unknown setting"),
        *[
            (record(deltas=[{"file": name}]), "plain file name")
            for name in ("/etc/passwd", "../x", "a/../x", "a/b/c", "~/x", "C:\\x", "..", "a\\b", "a\nb", "\u202ex", "http://x/y")
        ],
        (record(controls=[{"network": "../x", "image": "a.png"}]), "plain file name"),
        (record(controls=[{"network": "x", "image": "*.png"}]), "plain file name"),
        (record(image="/etc/passwd"), "plain file name"),
        (record(image="a.png", paint="../x"), "plain file name"),
        (record(regions=[{"name": "left", "mask": "~/x"}]), "plain file name"),
        (record(regions=[{"name": str(n)} for n in range(17)]), "regions: 17 entries"),
        (record(deltas=[{"file": "a", "strength": 1e9}]), "strength of a"),
        (record(deltas=[{"file": "a", "digest": "zz"}]), "SHA-256"),
    ],
)  # fmt: skip
def test_hostile_metadata_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_stack(png(tmp_path, text))


def test_files_that_are_no_pictures_of_ours_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="carries no stack"):
        read_stack(png(tmp_path, "a toy", "parameters"))
    with pytest.raises(DataError, match="no such file"):
        read_stack(tmp_path / "none.png")
    (tmp_path / "y.png").write_bytes(png(tmp_path, record(prompt="x")).read_bytes()[:20])
    with pytest.raises(DataError, match="not a readable PNG"):
        read_stack(tmp_path / "y.png")
    blank().save(tmp_path / "z.png", format="JPEG")
    with pytest.raises(DataError, match="not a readable PNG"):
        read_stack(tmp_path / "z.png")


def test_a_failed_save_leaves_the_older_picture_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Picture(blank(), Stack(prompt="x")).save(tmp_path / "p.png")
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        Picture(blank(32), Stack(prompt="y")).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_the_library_lists_runs_by_name_and_never_leaves_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"x")
    library = tmp_path / "library"
    for name in ("robot/delta", "robot/checkpoints/step-10/delta", "b/style", "c/style", "model/unet/diffusion", ".hidden"):
        file = library / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (library / "model" / "model_index.json").write_text("{}")
    (library / "link.safetensors").symlink_to(outside)
    assert [f.name for f in find([library])] == ["robot", "style", "style (2)"]
    assert find([tmp_path / "missing"]) == []


def test_a_grid_shows_every_picture_where_its_labels_say() -> None:
    colours = ["#aa0000", "#00aa00", "#0000aa"]
    pictures = [Image.new("RGB", (64, 64), c) for c in colours]
    sheet = grid([pictures, [None, *pictures[:2]]], ["one", "two words", "a long label that has to be wrapped over lines"],
                 ["first", "second"], caption="A caption.")  # fmt: skip
    pixels = np.asarray(sheet)
    shares = [(pixels == np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)])).all(-1).sum() / 192**2 for c in colours]
    assert [round(s) for s in shares] == [2, 2, 1]
    assert (pixels[0, 0] == 255).all() and sheet.width > 3 * 192
    with pytest.raises(ConfigError, match="one label a column"):
        grid([pictures], ["one"])
