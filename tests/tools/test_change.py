"""`merge`, `resize` and `diff`: sums are exact, what is lost is what was cut off, and equal deltas are equal."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.formats.ground import make_delta, make_word
from vgm_peft import formats
from vgm_peft.cli import main
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.family import Base
from vgm_peft.site import locate
from vgm_peft.tools.checkpoint import Checkpoint
from vgm_peft.tools.compare import compare, overall
from vgm_peft.tools.merge import Options, merge
from vgm_peft.tools.resize import Target, resize

SITES = ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.*", "unet.mid_block.resnets.0.conv1"]


def weight(base: Base, delta: Delta, name: str) -> Tensor:
    site = delta.patches[name].site
    return getattr(locate(base.parts, site), site.tensor).detach()


def summed(base: Base, uses: Sequence[tuple[Delta, float]], name: str) -> Tensor:
    parts = [w * d.patches[name].change(weight(base, d, name)).detach().double() for d, w in uses if name in d.patches]
    return torch.stack(parts).sum(0)


def assert_sum(merged: Delta, uses: Sequence[tuple[Delta, float]], base: Base, bound: float) -> None:
    assert set(merged.patches) == {name for delta, _ in uses for name in delta.patches}
    for name, patch in merged.patches.items():
        expected, found = summed(base, uses, name), patch.change(weight(base, merged, name)).detach().double()
        assert float((found - expected).abs().max()) <= bound * float(expected.abs().max()), name


def lora(base: Base, seed: int, rank: int = 3, alpha: float = 2.0, sites: Sequence[str] = SITES) -> Delta:
    return make_delta(base, "lora", sites, seed, rank=rank, alpha=alpha).to(dtype=torch.float64)


def test_pairs_side_by_side_are_their_sum(base: Base) -> None:
    uses = [(lora(base, 1), 0.8), (lora(base, 2, rank=2), -0.5), (lora(base, 3, sites=SITES[:1]), 1.5)]
    merged = merge(uses, Options())
    assert_sum(merged, uses, base, 1e-10)
    assert {patch.options.rank for patch in merged} == {5, 8} and merged.kinds == ("lora",)


def test_a_sum_of_more_ranks_than_the_layer_has_is_as_exact(base: Base) -> None:
    uses = [(lora(base, n, rank=6), 0.5) for n in range(4)]
    merged = merge(uses, Options())
    assert_sum(merged, uses, base, 1e-10)
    assert max(p.options.rank for p in merged) == 16 == max(min(p.site.rows, p.site.columns) for p in merged)


@pytest.mark.parametrize("kind", ("krona", "lokr", "loha", "hra", "difffit", "c3a", "dora", "svdiff", "glora", "ia3", "oft"))
def test_every_kind_adds_up(kind: str, base: Base, folder: Path) -> None:
    """Two of a kind, and one alone beside a LoRA on other layers; kinds that depend on the base with it at hand."""
    examples = make_delta(base, kind, SITES[:1] if kind != "difffit" else ["unet.mid_block.*"])
    uses = [(examples, 0.7), (make_delta(base, kind, SITES[:1] if kind != "difffit" else ["unet.mid_block.*"], 9), 0.4)]
    assert_sum(merge(uses, Options(), Checkpoint(folder)), uses, base, 1e-5)
    alone = [(examples, 0.7), (lora(base, 1, sites=SITES[1:]), 1.0)]
    merged = merge(alone, Options(), Checkpoint(folder))
    assert_sum(merged, alone, base, 1e-5)
    if kind in ("krona", "lokr"):  # the weight goes into a factor: the file stays as small as it was
        assert sum(p.numel() for patch in merged for p in patch.parameters() if patch.kind != "lora") <= examples.count()


def test_words_go_along_and_must_not_clash(base: Base) -> None:
    one, two = lora(base, 1), lora(base, 2)
    one.words["<a>"], two.words["<b>"] = make_word(base, "<a>"), make_word(base, "<b>", seed=6)
    assert list(merge([(one, 1.0), (two, 1.0)], Options()).words) == ["<a>", "<b>"]
    two.words["<a>"] = make_word(base, "<a>", seed=7)
    with pytest.raises(DeltaError, match="<a>"):
        merge([(one, 1.0), (two, 1.0)], Options())


def test_svd_is_the_nearest_of_its_rank(base: Base) -> None:
    uses = [(lora(base, 1), 0.8), (lora(base, 2), 0.5)]
    merged = merge(uses, Options("svd", rank=2))
    for name, patch in merged.patches.items():
        whole = summed(base, uses, name).flatten(1)
        values = torch.linalg.svdvals(whole)
        error = float((patch.change(weight(base, merged, name)).detach().flatten(1) - whole).norm())
        assert error == pytest.approx(float(values[2:].norm()), rel=1e-9)


def dense(change: Tensor, base: Base) -> Delta:
    delta = make_delta(base, "diff", ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"])
    (patch,) = delta
    with torch.no_grad():
        patch.diff.zero_().flatten()[: change.numel()] = change
    return delta


def test_ties_is_that_of_the_paper(base: Base) -> None:
    """Its figure 1, by hand: trim to the largest, elect the heavier sign, mean of those that agree."""
    one = dense(torch.tensor([4.0, -3.0, 2.0, 0.1]), base)
    two = dense(torch.tensor([2.0, 4.0, 3.0, -0.2]), base)
    (patch,) = merge([(one, 1.0), (two, 1.0)], Options("ties", density=3 / 256))
    assert patch.change(torch.zeros(16, 16)).flatten()[:5].tolist() == [3.0, 4.0, 2.5, 0.0, 0.0]


def test_dare_drops_by_the_seed_and_keeps_the_mean(base: Base) -> None:
    one = dense(torch.ones(256), base)
    found = [merge([(one, 0.5)], Options("dare", density=0.25, seed=seed)) for seed in (0, 0, 1)]
    a, b, c = (next(iter(d)).change(torch.zeros(16, 16)).detach() for d in found)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert set(a.flatten().tolist()) == {0.0, 2.0} and 0.15 < float((a != 0).float().mean()) < 0.35


@pytest.mark.parametrize("method", ("ties", "dare"))
def test_what_is_thinned_out_can_be_of_a_rank(method: str, base: Base) -> None:
    merged = merge([(lora(base, 1), 1.0), (lora(base, 2), 1.0)], Options(method, rank=2))
    assert merged.kinds == ("lora",) and {p.options.rank for p in merged} == {2}


@pytest.mark.parametrize("kind", ("lora", "krona", "pissa"))
def test_resize_loses_exactly_the_discarded_spectrum(kind: str, base: Base) -> None:
    options = {"a1": 4, "a2": 2} if kind == "krona" else {"rank": 3}
    delta = make_delta(base, kind, SITES, **options).to(dtype=torch.float64)
    smaller, steps = resize(delta, Target(rank=2))
    for name, step in steps.items():
        wide = delta.patches[name].change(weight(base, delta, name)).detach().flatten(1)
        values = torch.linalg.svdvals(wide)
        error = float((smaller.patches[name].change(weight(base, delta, name)).detach().flatten(1) - wide).norm() / wide.norm())
        assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-6, abs=1e-9)
        assert step.error == pytest.approx(error, rel=1e-6) and step.after == 2


def test_resize_to_a_share_keeps_it_in_every_layer(base: Base) -> None:
    delta = lora(base, 1, rank=6)
    smaller, steps = resize(delta, Target(keep=0.8))
    assert len({step.after for step in steps.values()}) > 1 or all(0 < step.after < 6 for step in steps.values())
    for name, step in steps.items():
        values = torch.linalg.svdvals(delta.patches[name].change(weight(base, delta, name)).detach().flatten(1)).square()
        shares = values.cumsum(0) / values.sum()
        assert float(shares[step.after - 1]) >= 0.8 and (step.after == 1 or float(shares[step.after - 2]) < 0.8)
        assert smaller.patches[name].options.rank == step.after
    again, steps = resize(delta, Target(rank=32))
    assert all(a is b for a, b in zip(again, delta, strict=True)) and {s.error for s in steps.values()} == {0.0}


def test_resize_leaves_words_norms_and_biases_alone(base: Base) -> None:
    delta = lora(base, 1)
    delta.patches |= make_delta(base, "norm", ["unet.mid_block.*norm*"]).patches
    delta.words["<a>"], delta.metadata["ss_network_dim"] = make_word(base, "<a>"), "3"
    smaller, steps = resize(delta, Target(rank=1))
    assert set(smaller.patches) == set(delta.patches) and set(smaller.words) == {"<a>"} and not smaller.metadata
    assert all(smaller.patches[name] is delta.patches[name] for name in delta.patches if name not in steps)


def test_deltas_are_compared_by_what_they_change(base: Base) -> None:
    one, two = lora(base, 1), lora(base, 2)
    same = merge([(one, 1.0)], Options())
    assert overall(compare(one, same)).distance < 1e-14 and overall(compare(one, same)).cosine == pytest.approx(1.0)
    away = compare(one, two)
    for name, apart in away.items():
        a, b = (d.patches[name].change(weight(base, d, name)).detach().flatten() for d in (one, two))
        assert apart.distance == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())))
        assert apart.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm()))) and apart.ours == pytest.approx(
            float(a.norm())
        )
    whole = [torch.cat([d.patches[n].change(weight(base, d, n)).detach().flatten() for n in away]) for d in (one, two)]
    assert overall(away).distance == pytest.approx(float((whole[0] - whole[1]).norm() / max(w.norm() for w in whole)))
    opposite = overall(compare(one, merge([(one, -1.0)], Options())))
    assert opposite.distance == pytest.approx(2.0) and opposite.cosine == pytest.approx(-1.0)
    alone = compare(one, lora(base, 1, sites=SITES[:1]))
    assert {round(a.distance, 6) for a in alone.values()} == {0.0, 1.0}


def test_the_commands(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    formats.write(lora(base, 0, sites=["cross-attention"]), files[0], "kohya", base, dtype=torch.float16)
    formats.write(lora(base, 1, sites=["cross-attention"]), files[1])
    out = tmp_path / "o.safetensors"
    assert main("delta", ["merge", f"{files[0]}:0.8", f"{files[1]}:0.5", "-o", str(out)]) == 0
    assert "0.8 x 0.safetensors + 0.5 x 1.safetensors, concat" in capsys.readouterr().out
    assert formats.sniff(out) == "kohya" and {p.options.rank for p in formats.read(out)} == {6}
    assert main("delta", ["resize", str(out), "--keep", "0.9", "-o", str(tmp_path / "s.safetensors")]) == 0
    assert "is lost on average" in capsys.readouterr().out
    assert main("delta", ["diff", str(out), str(tmp_path / "s.safetensors"), "--json", "-o", str(tmp_path / "d.png")]) == 0
    assert 0.1 < json.loads(capsys.readouterr().out)["overall"]["distance"] < 0.32 and (tmp_path / "d.png").is_file()
    assert main("delta", ["diff", *map(str, files)]) == 0 and "all layers together" in capsys.readouterr().out
    assert main("delta", ["convert", *map(str, files), "--to", "diffusers", "-o", str(tmp_path / "d")]) == 0
    assert {formats.sniff(tmp_path / "d" / f"{n}.safetensors") for n in range(2)} == {"diffusers"}
    assert main("delta", ["convert", str(out), "-o", str(tmp_path / "n.safetensors")]) == 0  # hashes of the old file and all
    assert overall(compare(formats.read(tmp_path / "n.safetensors"), formats.read(out))).distance < 1e-14


@pytest.mark.parametrize(
    "arguments,message",
    (
        (["merge", "A:x", "-o", "o.safetensors"], "a number"),
        (["merge", "A", "-o", "A"], "a file that is read"),
        (["merge", "A", "-o", "o.safetensors", "--method", "tie"], 'did you mean "ties"?'),
        (["merge", "A", "-o", "o.safetensors", "--method", "svd"], "--rank R"),
        (["merge", "A", "-o", "o.safetensors", "--rank", "2"], "keeps every rank"),
        (["merge", "A", "-o", "o.pt"], "ends in .safetensors"),
        (["resize", "A", "-o", "o.safetensors"], "either --rank R or --keep SHARE"),
        (["resize", "A", "-o", "o.safetensors", "--keep", "95"], "at most 1"),
        (["convert", "A", "--to", "koya", "-o", "x"], 'did you mean "kohya"?'),
    ),
)
def test_slips_are_one_line(
    arguments: list[str], message: str, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = formats.write(lora(base, 1), tmp_path / "a.safetensors")
    before = file.read_bytes()
    words = [a.replace("A", str(file)) if a[0] == "A" else str(tmp_path / a) if a[:2] == "o." else a for a in arguments]
    assert main("delta", words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and file.read_bytes() == before


def test_what_does_not_go_together_is_refused(base: Base) -> None:
    with pytest.raises(DeltaError, match="one family"):
        merge([(lora(base, 1), 1.0), (Delta("sdxl"), 1.0)], Options())
    with pytest.raises(DeltaError, match="--base"):
        merge([(make_delta(base, "dora", SITES[:1]), 1.0)], Options())
    with pytest.raises(DeltaError, match="timestep"):
        merge([(make_delta(base, "tlora", SITES[:1], rank=4), 1.0)], Options())
    with pytest.raises(ConfigError, match="density"):
        Options("ties", density=0.0)
