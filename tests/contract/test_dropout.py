"""What training hides: nothing on the average, nothing at all in evaluation and in files, and the same again for one seed.

Parametrised over every option of every method that is called a dropout.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.contract.ground import assert_close, difference, draw
from vgm_peft.attachment import Attachment
from vgm_peft.delta import Delta
from vgm_peft.deltas import TABLE
from vgm_peft.errors import ConfigError
from vgm_peft.site import find_sites

SHARE = 0.25
NAMES = {kind: [f.name for f in fields(method.Options) if f.name.endswith("dropout")] for kind, method in TABLE.items()}
CASES = [(kind, index, name) for kind, method in TABLE.items() for index in range(len(method.examples)) for name in NAMES[kind]]
FIRST = [case for case in CASES if case[1] == 0]


class Ground:
    """A linear layer with a trained patch live on it in training mode, and an input."""

    def __init__(self, kind: str, index: int, name: str, share: float = SHARE) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(24, 16).double().requires_grad_(False)
        self.x = torch.randn(2, 5, 24, dtype=torch.float64)
        options: Any = replace(TABLE[kind].examples[index], **{name: share})
        site = find_sites("part", nn.ModuleDict({"layer": self.layer}))[0]
        self.patch = TABLE[kind](site, options).double()
        draw(self.patch)
        self.delta = Delta("any", {site.name: self.patch}).train()
        self.attachment = Attachment({"part": nn.ModuleDict({"layer": self.layer})}, self.delta, 0.7)

    def added(self, seed: int) -> Tensor:
        """What the patch adds to the layer's output."""
        torch.manual_seed(seed)
        return (self.layer(self.x) - nn.functional.linear(self.x, self.layer.weight, self.layer.bias)).detach()

    def whole(self) -> Tensor:
        """The same with nothing hidden, from the dense dW."""
        return 0.7 * nn.functional.linear(self.x, self.patch.change(self.layer.weight)).detach()


def test_those_of_the_literature_are_there() -> None:
    both, rows = {"rank_dropout", "module_dropout"}, ["lokr", "loha", "krona"]
    assert all(set(NAMES[kind]) == both for kind in rows)
    assert all(set(NAMES[kind]) == both | {"dropout"} for kind in ("lora", "dora", "pissa", "dylora", "tlora", "glora"))
    assert set(NAMES["oft"]) == set(NAMES["boft"]) == {"block_dropout", "module_dropout"}
    assert NAMES["ia3"] == ["module_dropout"] and NAMES["vera"] == ["dropout"] and not NAMES["diff"]


@pytest.mark.parametrize(("kind", "index", "name"), CASES)
def test_a_share_is_hidden_in_training_and_nothing_otherwise(kind: str, index: int, name: str) -> None:
    ground = Ground(kind, index, name)
    whole = ground.whole()
    seen = [ground.added(seed) for seed in range(8)]
    assert any(difference(one, whole) > 1e-3 for one in seen)
    assert torch.equal(ground.added(3), seen[3]) and any(not torch.equal(one, seen[0]) for one in seen)
    packed = ground.patch.pack(ground.layer.weight)
    ground.delta.train(False)
    assert all(torch.equal(tensor, packed[key]) for key, tensor in ground.patch.pack(ground.layer.weight).items())
    assert torch.equal(ground.whole(), whole)
    assert_close(ground.added(0), whole)


@pytest.mark.parametrize(("kind", "index", "name"), [c for c in FIRST if c[0] not in ("dylora", "boft")])
def test_the_mean_is_the_whole(kind: str, index: int, name: str) -> None:
    """Or the share of it that is left, where nothing is made up for. (A product of several rotations has no such mean, and
    DyLoRA trains with another number of ranks in every forward.)
    """
    ground = Ground(kind, index, name)
    left = 1 - SHARE if name in ("module_dropout", "block_dropout") else 1.0
    if name == "block_dropout" and ground.patch.options.rescale:
        pytest.skip("the factor of every output acts on blocks that rotate nothing too")
    mean = torch.stack([ground.added(seed) for seed in range(400)]).mean(0)
    assert float((mean - left * ground.whole()).norm() / ground.whole().norm()) < 0.1


@pytest.mark.parametrize(("kind", "index", "name"), FIRST)
def test_checkpointing_hides_the_same_again(kind: str, index: int, name: str) -> None:
    ground = Ground(kind, index, name, 0.5)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(5)
        x = ground.x.requires_grad_()
        output = checkpoint(ground.layer, x, use_reentrant=False) if recompute else ground.layer(x)
        torch.rand(3)  # what comes between the two forwards draws too
        return list(torch.autograd.grad(output.square().sum(), [p for p in ground.patch.parameters() if p.requires_grad]))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "index", "name"), [c for c in CASES if c[2] == "module_dropout"])
def test_a_patch_left_out_has_gradients_of_zero_and_not_none(kind: str, index: int, name: str) -> None:
    """Those who spread a step over processes wait for every parameter's gradient."""
    ground = Ground(kind, index, name, 1 - 1e-9)
    assert not bool(ground.added(0).any())
    ground.layer(ground.x).square().sum().backward()
    trained = [p for p in ground.patch.parameters() if p.requires_grad]
    assert all(p.grad is not None and not bool(p.grad.any()) for p in trained)


def test_what_is_hidden() -> None:
    """Ranks picture by picture, rows and blocks for all pictures alike, and a hidden block is not rotated."""
    ranks, rows = Ground("lora", 0, "rank_dropout"), Ground("lokr", 0, "rank_dropout")
    blocks = Ground("oft", 0, "block_dropout", 0.5)
    ranks.x[1] = ranks.x[0]
    assert any(not torch.equal(*ranks.added(seed)) for seed in range(4))
    hidden = (rows.added(2) == 0).all((0, 1))
    assert 0 < int(hidden.sum()) < 16
    assert_close(rows.added(2)[..., ~hidden], rows.whole()[..., ~hidden] / (1 - SHARE))
    still = (blocks.added(2) == 0).all((0, 1))
    assert 0 < int(still.sum()) < 16 and torch.equal(still, still.view(-1, 4)[:, :1].expand(-1, 4).reshape(-1))
    assert_close(blocks.added(2)[..., ~still], blocks.whole()[..., ~still])


@pytest.mark.parametrize(("kind", "index", "name"), FIRST)
def test_the_whole_is_no_share(kind: str, index: int, name: str) -> None:
    for wrong in (1.0, -0.1):
        with pytest.raises(ConfigError, match=f"{name} = {wrong}; expected 0 or more and below 1"):
            replace(TABLE[kind].examples[index], **{name: wrong})
