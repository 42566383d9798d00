"""Gradient fusion: what one concept answers to its inputs comes back, and two are kept where their sum would mix them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.formats.ground import make_delta, make_word
from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.site import locate
from vgm_peft.stack import DeltaUse, Stack, generate
from vgm_peft.tools import fusion
from vgm_peft.tools.fusion import Concept, Options, fuse

SITES = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "unet.mid_block.resnets.0.conv1")
FEW = Options(steps=2, ridge=1e-10)


def lora(base: Base, seed: int, sites: Sequence[str] = SITES) -> Delta:
    return make_delta(base, "lora", sites, seed, rank=2)


def fed(base: Base, delta: Delta, weight: float, prompt: str, name: str) -> Tensor:
    """The inputs (N, columns) of a layer while a delta draws a prompt, gathered without the code under test."""
    site, found = delta.patches[name].site, list[Tensor]()
    layer = locate(base.parts, site)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            x = nn.functional.unfold(x, module.kernel_size, padding=1, stride=module.stride).transpose(1, 2)
        found.append(x.reshape(-1, site.columns).double())

    hook = layer.register_forward_pre_hook(keep)
    stack = Stack(prompt=prompt, steps=2, deltas=(DeltaUse(file="one", strength=weight),))
    generate(base, stack, given={"one": delta})
    hook.remove()
    return torch.cat(found)


def dense(delta: Delta, name: str) -> Tensor:
    return delta.patches[name].change(torch.zeros(delta.patches[name].site.shape)).detach().double().flatten(1)


def test_one_delta_comes_back_where_its_inputs_lead(base: Base) -> None:
    delta = lora(base, 1)
    found, missed = fuse([Concept(delta, 0.7, ("a red duck",))], base, FEW)
    assert found.kinds == ("diff",) and list(found.patches) == list(delta.patches)
    for name in delta.patches:
        x = fed(base, delta, 0.7, "a red duck", name)
        wanted = 0.7 * dense(delta, name) @ x.T
        assert float((dense(found, name) @ x.T - wanted).norm() / wanted.norm()) <= 1e-4
        assert missed[name].fused <= 1e-4 and missed[name].added <= 1e-4
        away = torch.linalg.svd(x, full_matrices=True).Vh[int(torch.linalg.matrix_rank(x)) :]  # where no input leads
        assert float((dense(found, name) @ away.T).norm()) <= 1e-2 * float(dense(found, name).norm())


def test_two_deltas_answer_what_each_alone_answers_where_their_sum_does_not(base: Base) -> None:
    name = f"{SITES[0]}.weight"
    uses = [Concept(lora(base, 1, SITES[:1]), 1.0, ("a red duck",)), Concept(lora(base, 2, SITES[:1]), 0.8, ("blue cups",))]
    found, missed = fuse(uses, base, FEW)
    gathered = [fed(base, use.delta, use.weight, use.prompts[0], name) for use in uses]
    joint = torch.cat(gathered)
    fused = added = size = 0.0
    for use, x in zip(uses, gathered, strict=True):
        wanted = use.weight * dense(use.delta, name) @ x.T
        plain = torch.stack([other.weight * dense(other.delta, name) for other in uses]).sum(0) @ x.T
        fused += float((dense(found, name) @ x.T - wanted).square().sum())
        added += float((plain - wanted).square().sum())
        size += float(wanted.square().sum())
    # No W does better.
    target = torch.cat([use.weight * dense(use.delta, name) @ x.T for use, x in zip(uses, gathered, strict=True)], 1)
    best = torch.linalg.lstsq(joint, target.T).solution.T
    least = float((best @ joint.T - target).square().sum())
    assert fused <= 1.001 * least and fused < 0.5 * added  # the ridge costs a little
    assert missed[name].fused == pytest.approx((fused / size) ** 0.5, abs=1e-3)
    assert missed[name].added == pytest.approx((added / size) ** 0.5, rel=1e-4)


def problem(base: Base, columns: Sequence[Tensor], uses: Sequence[Concept]) -> "fusion._Problem":  # pyright: ignore[reportPrivateUsage]
    """A layer that was fed given inputs by each concept."""
    site = next(iter(uses[0].delta)).site
    layer = locate(base.parts, site)
    one = fusion._Problem(site, layer)  # pyright: ignore[reportPrivateUsage]
    for use, x in zip(uses, columns, strict=True):
        one.hear(layer, (x,))
        one.close(use)
    return one


@pytest.mark.parametrize("rank", [None, 4, 3])
def test_orthogonal_inputs_keep_both_exactly_and_a_rank_is_the_nearest_in_the_answers(base: Base, rank: int | None) -> None:
    uses = [Concept(lora(base, n, SITES[:1]), 1.0, ("x",)) for n in (1, 2)]
    width = next(iter(uses[0].delta)).site.columns
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0))).Q
    columns = [basis[: width // 2], basis[width // 2 :] * torch.linspace(0.1, 2, width - width // 2)[:, None]]
    patch, missed = problem(base, columns, uses).solved(Options(rank=rank, ridge=1e-12), torch.float32)
    change = patch.change(torch.zeros(patch.site.shape)).detach().flatten(1)
    wanted = torch.cat([dense(use.delta, patch.site.name) @ x.double().T for use, x in zip(uses, columns, strict=True)], 1)
    error = float((change.double() @ torch.cat(columns).double().T - wanted).norm() / wanted.norm())
    tail = torch.linalg.svdvals(wanted)[rank or 4 :].norm() / wanted.norm()
    assert error == pytest.approx(float(tail), abs=1e-5) and missed.fused == pytest.approx(error, abs=1e-5)
    assert (patch.kind == "diff") == (rank is None) and missed.added > 0.3


def test_layers_are_heard_in_groups_that_fit(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = [Concept(lora(base, 1), 1.0, ("a red duck", "two red ducks"))]
    whole, _ = fuse(uses, base, FEW)
    monkeypatch.setattr(fusion, "ROOM", 1)
    found, _ = fuse(uses, base, FEW)
    assert all(torch.equal(dense(found, name), dense(whole, name)) for name in whole.patches)


def test_norms_are_added_words_go_along_and_the_base_is_as_before(base: Base) -> None:
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    uses: list[Concept] = []
    for number, token in enumerate(("<a>", "<b>")):
        delta = lora(base, number, SITES[:1])
        delta.patches |= make_delta(base, "norm", ("unet.mid_block.attentions.0.norm",), number).patches
        delta.words[token] = make_word(base, token, seed=number)
        uses.append(Concept(delta, 0.5, (f"{token} on a table",)))
    found, missed = fuse(uses, base, Options(steps=1, rank=1))
    assert "lora" in found.kinds
    assert list(found.words) == ["<a>", "<b>"] and len(missed) == 1
    name = "unet.mid_block.attentions.0.norm.weight"
    expected = sum(0.5 * use.delta.patches[name].change(torch.zeros(0)) for use in uses)
    assert torch.allclose(found.patches[name].change(torch.zeros(0)), torch.as_tensor(expected), atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in base.denoiser.state_dict().items())


def test_as_a_command(base: Base, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{n}.safetensors") for n in range(2)]
    for number, file in enumerate(files):
        formats.write(lora(base, number, SITES[:1]), file, "kohya", base)
    out = tmp_path / "both.safetensors"
    flags = ["--method", "fusion", "--base", str(folder), "--steps", "1"]
    prompts = ["--prompts", "a red duck", "a blue cup"]
    assert main("delta", ["merge", *files, *flags, *prompts, "--rank", "2", "-o", str(out), "--for", "native"]) == 0
    assert "missed of what each answers to its prompt, mean of 1 layers: " in capsys.readouterr().out
    assert {patch.options.rank for patch in formats.read(out)} == {2}
    assert main("delta", ["merge", *files, *flags, "--prompts", "a duck", "-o", str(out)]) == 2
    assert "2 deltas with 1 prompts and a base; expected --base, and after --prompts a prompt" in capsys.readouterr().err
    assert main("delta", ["merge", *files, *prompts, "-o", str(out)]) == 2
    assert "leave --prompts out, or use --method fusion" in capsys.readouterr().err


def test_what_cannot_be_fused_is_refused(base: Base, tiny: Callable[[str], Base]) -> None:
    with pytest.raises(DeltaError, match="changes with the timestep"):
        fuse([Concept(make_delta(base, "tlora", SITES[:1], rank=4), 1.0, ("x",))], base)
    with pytest.raises(DeltaError, match="sdxl"):
        fuse([Concept(lora(tiny("sdxl"), 1), 1.0, ("x",))], base, FEW)
    with pytest.raises(ConfigError, match="a delta without a prompt"):
        fuse([Concept(lora(base, 1), 1.0, (" ",))], base)
    with pytest.raises(ConfigError, match="--ridge 0"):
        Options(ridge=0)
