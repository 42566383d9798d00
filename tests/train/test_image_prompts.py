"""What a network that is taught by the picture itself is kept from, and how often."""

from collections.abc import Callable

import pytest
import torch

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.errors import ConfigError
from vgm_peft.sides import TABLE
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig
from vgm_peft.train.config_data import DataConfig
from vgm_peft.train.task import Turn
from vgm_peft.train.tasks.control import unseen

Make = Callable[..., RunConfig]


@pytest.mark.parametrize(("both", "expected"), [(0.05, 0.05), (None, 0.01)])
def test_captions_and_pictures_are_dropped_as_often_as_published(both: float | None, expected: float) -> None:
    """Text 5 %, picture 5 %, both 5 %; left out, the two know nothing of each other."""
    data = DataConfig(caption_dropout=0.1, control_dropout=0.1, both_dropout=both)
    words = torch.rand(40_000, generator=torch.Generator().manual_seed(0)) < data.caption_dropout
    drawn = unseen(data, ["" if lost else "a robot" for lost in words.tolist()], Turn(0, 0))
    assert drawn is not None
    assert float(drawn.float().mean()) == pytest.approx(0.1, abs=0.005)
    assert float((drawn & words).float().mean()) == pytest.approx(expected, abs=0.004)


def test_of_dropped_pictures_nothing_is_learned_but_silence(config: Make) -> None:
    """Of an embedding of zeros the projection's bias learns, and its weight has no gradient; not so where pictures are seen."""
    base = tiny_base("sd15")
    side = TABLE["ip-adapter"]
    for share in (1.0, 0.0):
        more: Table = {"steps": 2, "data": {"control_dropout": share}, "optimiser": {"weight_decay": 0.0}}
        asked = config("ip-adapter", f"run{share:g}", more)
        result = train(asked, base=base).delta
        assert result is not None
        start, found = side.create(base, side.Options(), asked.seed).state_dict(), side.load(result, base).state_dict()
        moved = {n: not torch.equal(start[n], found[n]) for n in ("image_proj.proj.weight", "image_proj.proj.bias")}
        assert moved == {"image_proj.proj.weight": share < 1.0, "image_proj.proj.bias": True}


def test_what_must_be_steered_is_never_left_without(config: Make) -> None:
    with pytest.raises(ConfigError, match="nothing that steers controlnet can be left out"):
        config("controlnet", "run", {"data": {"control_dropout": 0.1}})
    with pytest.raises(ConfigError, match="both_dropout"):
        config("ip-adapter", "run", {"data": {"control_dropout": 0.1, "caption_dropout": 0.1, "both_dropout": 0.2}})
