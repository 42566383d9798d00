"""`vgm-delta count` against the published numbers (methods-weights: table D, each computed on the real layer shapes)."""

import json

import pytest

from vgm_peft.cli import main
from vgm_peft.families.shapes import dit, shape_of


def count(capsys: pytest.CaptureFixture[str], base: str, delta: str, *more: str) -> dict[str, object]:
    assert main("delta", ["count", "--base-config", base, "--delta", delta, "--json", *more]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("base", "denoiser"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684), ("dit-xl-2", 674_834_720)])
def test_the_bases_have_the_published_size(base: str, denoiser: int) -> None:
    assert shape_of(base).denoiser == denoiser


def test_a_dit_of_a_hundred_classes_has_the_published_size() -> None:
    assert sum(p.numel() for p in dit(classes=100).parameters()) == 673_797_920


TABLE_D = [
    ("sdxl", "lora", ("--set", "rank=4"), 5_806_080),
    ("sd15", "lora", ("--set", "rank=4", "--sites", "attention,text"), 1_092_096),
    ("sdxl", "krona", ("--set", "a1=16", "--set", "a2=16"), 3_874_560),
    ("sd15", "krona", ("--set", "a1=16", "--set", "a2=16", "--sites", "attention,text"), 520_928),
    ("sdxl", "krona", (), 2_152_320),
    ("sdxl", "krona", ("--set", "a1=16", "--set", "a2=64"), 1_506_240),
    ("sd15", "svdiff", (), 222_696),
    ("sdxl", "svdiff", (), 909_800),
    ("sd15", "diff", (), 19_169_280),
    ("sdxl", "diff", (), 340_787_200),
    ("dit-xl-2", "bitfit", (), 489_632),
    ("sd15", "bitfit", (), 343_684),
    ("sdxl", "bitfit", (), 1_289_284),
    ("sd15", "norm", (), 200_320),
    ("sdxl", "norm", (), 588_160),
    ("sd15", "lora", ("--set", "rank=4", "--sites", "attention+mlp,unet.*.proj_in,unet.*.proj_out"), 1_695_744),
    ("sdxl", "lora", ("--set", "rank=4", "--sites", "attention+mlp,unet.*.proj_in,unet.*.proj_out"), 10_639_360),
    ("sd15", "lora", ("--set", "rank=4", "--sites", "all"), 4_232_864),
    ("sd15", "diff", ("--sites", "unet.*.attn[12].to_*.weight"), 93_511_680),
    ("sdxl", "lora", ("--set", "rank=64", "--sites", "content,style"), 28_180_480),
    ("sd15", "lora", ("--set", "rank=16", "--sites", "samplers"), 870_400),
    ("sdxl", "lora", ("--set", "rank=16", "--sites", "samplers"), 460_800),
    ("sd15", "norm", ("--sites", "unet.*.resnets.*.norm?"), 99_840),
    ("sdxl", "norm", ("--sites", "unet.*.resnets.*.norm?"), 66_560),
    ("sd15", "lora", ("--set", "rank=4", "--sites", "self-attention"), 399_360),
    ("sdxl", "lora", ("--set", "rank=4", "--sites", "self-attention"), 2_662_400),
]


@pytest.mark.parametrize(("base", "values"), [("sd15", 99_840), ("sdxl", 665_600)])
def test_the_preset_of_ia3_scales_keys_values_and_the_hidden_layer(
    capsys: pytest.CaptureFixture[str], base: str, values: int
) -> None:
    outputs = count(capsys, base, "ia3", "--sites", "unet.*.attn[12].to_[kv]")
    inputs = count(capsys, base, "ia3", "--sites", "unet.*.ff.net.2", "--set", "on_input=true")
    assert int(str(outputs["values"])) + int(str(inputs["values"])) == values


def test_difffit_on_a_dit_is_about_an_eighth_of_a_percent(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper says 0.12 %; with or without the class table of its datasets, 0.10 .. 0.125 % (methods-weights A10)."""
    values = int(str(count(capsys, "dit-xl-2", "difffit")["values"]))
    assert 0.0010 < (values + 101 * 1152) / 673_797_920 < 0.00125


@pytest.mark.parametrize(("base", "delta", "more", "values"), TABLE_D)
def test_published_counts(
    capsys: pytest.CaptureFixture[str], base: str, delta: str, more: tuple[str, ...], values: int
) -> None:
    assert count(capsys, base, delta, *more)["values"] == values
