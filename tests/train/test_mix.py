"""A recipe may give different methods to different layers: one delta, one file, one run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.ground import tiny_base
from vgm_peft.config import Table
from vgm_peft.errors import ConfigError
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind, table
from vgm_peft.train.recipes import read_recipe

Make = Callable[..., RunConfig]
RESOLUTION: Table = {
    "kind": "lora",
    "sites": ["samplers"],
    "rank": 2,
    "mix": [{"kind": "norm", "sites": ["unet.*.resnets.*.norm*"]}, {"kind": "krona", "sites": ["attention"], "a1": 2, "a2": 2}],
}


def test_a_mix_trains_all_its_methods_and_is_one_file(config: Make) -> None:
    asked = config("finetune", "run", {"delta": RESOLUTION})
    assert bind(table(asked)) == asked
    result = train(asked, base=tiny_base("sd15"))
    assert result.delta is not None
    delta = read(result.delta)
    assert delta.kinds == ("krona", "lora", "norm")
    places = {kind: {p.site.module.rsplit(".", 1)[-1] for p in delta if p.kind == kind} for kind in delta.kinds}
    assert places == {"lora": {"conv"}, "norm": {"norm1", "norm2"}, "krona": {"to_q", "to_k", "to_v", "0"}}
    fresh = [name for name, p in delta.parameters() if not bool(p.any())]
    assert not fresh, "every piece has learned"


def test_a_mix_comes_from_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text(
        '[delta]\nkind = "lora"\nsites = ["attention"]\nrank = 2\n[[delta.mix]]\nkind = "krona"\nsites = ["conv"]\na1 = 4\n'
    )
    found = bind(read_recipe(tmp_path / "mix.toml")).delta
    assert found is not None
    first, second = found.pieces()
    assert (first.kind, first.options["rank"]) == ("lora", 2)
    assert (second.kind, second.sites, second.options["a1"]) == ("krona", ("conv",), 4)


@pytest.mark.parametrize(
    ("piece", "says"),
    [
        ({"kind": "krona", "sites": ["cross-attention"], "a1": 2, "a2": 2}, "krona is to change .*attn2.*, which lora changes"),
        ({"kind": "kronna", "sites": ["conv"]}, 'did you mean "krona"'),
        ({"kind": "krona", "sites": ["conv"], "rank": 2}, r"delta\.mix\[0\]\.rank"),
        ({"kind": "krona", "sites": ["conv"], "text": True}, r"delta\.mix\[0\]\.text"),
        ({"kind": "krona", "sites": ["conf"]}, "conf"),
    ],
)
def test_a_mistake_in_a_mix_is_named(config: Make, piece: Table, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(config("finetune", "run", {"delta": {"sites": ["attention"], "mix": [piece]}}), base=tiny_base("sd15"))
