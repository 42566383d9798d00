"""Whatever the kind, rank, split, shape, dtype and scale: written and read it is the same change."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.formats.ground import difference, shake
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE, method_named
from vgm_peft.deltas.krona import KronaOptions
from vgm_peft.deltas.lora import LoraOptions
from vgm_peft.errors import DeltaError
from vgm_peft.formats.books import family_book
from vgm_peft.formats.compare import identical
from vgm_peft.site import Site

PLACES = {
    name: [places["weight"] for places in family_book(name).sites.values() if places.get("weight")] for name in ("sd15", "sdxl")
}
QUIET = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))


MUTE = ("loha", "lokr")
"""Kinds whose file does not tell a convolution's kernel: those of the family's base are all that it can hold without one."""
TOLD = tuple(kind for kind, method in TABLE.items() if method.base_free and not method.timed)
"""Kinds whose file tells dW by itself, but for options that make it depend on the base."""


@st.composite
def deltas(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(TABLE)) -> Delta:
    """A delta of either family at real places, of random shapes, kinds and options."""
    family, told = draw(st.sampled_from(sorted(PLACES))), kinds == TOLD
    kinds = tuple(kind for kind in kinds if {"linear", "conv"} <= TABLE[kind].ops)
    eligible = [site for site in PLACES[family] if site.op in ("linear", "conv")]
    chosen = draw(st.lists(st.sampled_from(eligible), min_size=1, max_size=6, unique=True))
    patches = {}
    for known in chosen:
        kind = draw(st.sampled_from(kinds))
        free = known.op == "conv" and not (told and kind in MUTE)
        kernel = draw(st.sampled_from(((1, 1), (3, 3), (3, 1)))) if free else known.shape[2:]
        o1, i1, o2, i2 = (draw(st.integers(1, 6)) for _ in range(4))
        if kind not in ("krona", "lora"):  # examples fit sides of 4 and more, in whole blocks of it
            o1, i1 = 4 * draw(st.sampled_from((1, 2, 4))), 4
        site = Site(known.part, known.module, known.op, (o1 * o2, i1 * i2, *kernel))
        if kind == "krona":
            options: object = KronaOptions(a1=o1, a2=i1)
        elif kind == "lora":
            rank = draw(st.integers(1, min(site.rows, site.columns)))
            alpha = draw(st.none() | st.floats(1 / 64, 64, width=32))
            options = LoraOptions(rank=rank, alpha=alpha, rslora=draw(st.booleans()))
        else:
            method = method_named(kind)
            options = draw(st.sampled_from([o for o in method.examples if not told or method(site, o).base_free]))
        patches[site.name] = method_named(kind)(site, options)
    return shake(Delta(family, patches), seed=draw(st.integers(0, 99)), size=draw(st.sampled_from((1e-3, 1.0, 30.0))))


def test_a_file_that_does_not_tell_a_kernel_of_its_own_says_so() -> None:
    site = Site("unet", "conv_in", "conv", (8, 4, 5, 5))
    method = method_named("lokr")
    options = next(o for o in method.examples if "lokr_w2_b" in method(site, o).pack(torch.zeros(site.shape)))
    delta = shake(Delta("sd15", {site.name: method(site, options)}), seed=0, size=1.0)
    with TemporaryDirectory() as folder, pytest.raises(DeltaError, match="does not tell the layer's shape.*--base"):
        formats.write(delta, Path(folder) / "a.safetensors", "kohya")


@QUIET
@given(deltas(), st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)))
def test_native_is_exact(delta: Delta, dtype: torch.dtype) -> None:
    with TemporaryDirectory() as folder:
        delta.to(dtype=dtype)
        assert identical(formats.read(formats.write(delta, Path(folder) / "a.safetensors")), delta)


def check(delta: Delta, format: str) -> None:
    with TemporaryDirectory() as folder:
        found = formats.read(formats.write(delta, Path(folder) / "a.safetensors", format))
    assert set(found.patches) == set(delta.patches)
    for name, patch in delta.patches.items():
        zero = torch.zeros(patch.site.shape)
        assert found.patches[name].site.shape == patch.site.shape
        assert difference(found.patches[name].change(zero), patch.change(zero)) <= 1e-6


@QUIET
@given(deltas(kinds=TOLD))
def test_kohya_keeps_the_change(delta: Delta) -> None:
    check(delta, "kohya")


@QUIET
@given(deltas(kinds=("lora",)))
def test_diffusers_keeps_the_change(delta: Delta) -> None:
    check(delta, "diffusers")
