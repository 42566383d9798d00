"""A delta trained on a side network, and a side network that goes on from a saved one."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.train.ground import tiny_base
from vgm_peft.beside import Beside
from vgm_peft.config import Table
from vgm_peft.data import Cache
from vgm_peft.errors import ConfigError
from vgm_peft.family import Query
from vgm_peft.side import Side
from vgm_peft.sides import TABLE
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind
from vgm_peft.train.origin import origin
from vgm_peft.train.pupil import Pupil
from vgm_peft.train.recipes import portable, resolve
from vgm_peft.train.task import Setup

Make = Callable[..., RunConfig]
ALL: Table = {"delta": {"kind": "lora", "rank": 2, "sites": ["all"], "mix": [{"kind": "diff", "sites": ["biases"]}]}}


def saved(side: Side, folder: Path) -> Path:
    """A network that says something, as a run would leave it."""
    base = tiny_base("sd15")
    network, generator = side.create(base, side.Options()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return side.save(network, folder / side.name)


@torch.no_grad()
def predicted(side: Side, network: nn.Module) -> Tensor:
    base, generator = tiny_base("sd15"), torch.Generator().manual_seed(2)
    words = base.family.encode_prompt(base, ["a duck", "a robot"])
    with Beside(base, side, network) as beside:
        beside.tell(torch.rand(2, 3 * side.conditions(network), 64, 64, generator=generator))
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        return base.family.predict(base, Query(noisy, torch.tensor([400, 3]), words))


@pytest.mark.parametrize("name", sorted(TABLE))
def test_what_is_saved_is_the_network_with_its_delta(name: str, config: Make, tmp_path: Path) -> None:
    """Of every kind, biases and norms included; the network's own values stay as they are."""
    side, base = TABLE[name], tiny_base("sd15")
    start = saved(side, tmp_path)
    with ExitStack() as cleanup:
        asked = config(name, "run", {"task": {"start": str(start)}}, ALL)
        pupil = Pupil.of(side, Setup(asked, base, Cache(), Accelerator(), cleanup), side.Options)
        cleanup.enter_context(pupil.evaluating())
        before = {key: value.clone() for key, value in pupil.network.state_dict().items()}
        plain = predicted(side, side.load(start, base))
        assert torch.equal(predicted(side, pupil.network), plain)
        generator = torch.Generator().manual_seed(3)
        for group in pupil.groups():
            for p in group.parameters.values():
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
        live = predicted(side, pupil.network)
        merged = predicted(side, side.load(pupil.save(tmp_path / "out"), base))
        assert (live - plain).abs().max() > 1e-3
        torch.testing.assert_close(merged, live, rtol=0, atol=1e-5)
        assert torch.equal(predicted(side, pupil.network), live)
        assert all(torch.equal(value, before[key]) for key, value in pupil.network.state_dict().items())


def test_of_a_fresh_controlnet_what_is_new_learns_whole(config: Make) -> None:
    """The delta's layers change by its rank, zero convolutions and the picture's encoder as they like, the rest not at all."""
    base = tiny_base("sd15")
    result = train(config("controlnet", "run", {"delta": {"kind": "lora", "rank": 2}}), base=base).delta
    assert result is not None
    found = load_file(result / "diffusion_pytorch_model.safetensors")
    own = base.denoiser.state_dict()
    change = {name: value - own[name] for name, value in found.items() if name in own}
    moved = {name for name, value in change.items() if value.any()}
    assert moved == {name for name in change if any(f".to_{part}" in name for part in "qkvo") and name.endswith("weight")}
    sizes = [torch.linalg.svdvals(change[name]) for name in moved]
    assert max(s[1] for s in sizes) > 1e-2 and max(s[2] for s in sizes) < 1e-6
    assert all(value.any() for name, value in found.items() if name.startswith("controlnet_"))


def test_a_run_goes_on_from_a_saved_network(config: Make, tmp_path: Path) -> None:
    side, base = TABLE["t2i-adapter"], tiny_base("sd15")
    start = saved(side, tmp_path)
    task: Table = {"start": str(start), "channels": 1}
    asked = config(side.name, "run", {"task": task, "steps": 1, "optimiser": {"lr": 1e-4, "weight_decay": 0.0}})
    result = train(asked, base=base)
    assert result.delta is not None
    was, now = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (start, result.delta))
    assert max(float((now[name] - was[name]).abs().max()) for name in was) == pytest.approx(1e-4, rel=0.1)  # Adam's first step
    assert any("settings of [task] that shape a fresh one say nothing" in notice for notice in result.notices)
    assert f'start = "../{side.name}"' in portable(asked, tmp_path / "run")


def test_a_resumed_run_knows_what_it_began_from_by_content(config: Make, tmp_path: Path) -> None:
    side = TABLE["t2i-adapter"]
    start, moved = saved(side, tmp_path), tmp_path / "elsewhere" / side.name
    shutil.copytree(start, moved)

    def known(place: Path) -> tuple[dict[str, object], dict[str, str]]:
        asked = config(side.name, "run", {"task": {"start": str(place)}})
        return origin(asked, "base", None), Pupil(side, nn.Identity(), asked).origin()

    assert known(start) == known(moved)
    (moved / "config.json").write_text("{}")
    assert known(start)[1] != known(moved)[1]


def test_what_cannot_be_is_refused_before_a_base_is_loaded(config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task.start is set, but dreambooth begins from nothing saved"):
        bind({"task": {"name": "dreambooth", "start": "there"}})
    start = str(saved(TABLE["t2i-adapter"], tmp_path))
    wrong: list[tuple[str, Table, str]] = [
        ("t2i-adapter", {"delta": {}}, "a fresh t2i-adapter holds nothing yet that a delta could change"),
        ("controlnet", {"task": {"start": start}}, "is no saved controlnet"),
        ("controlnet", {"delta": {"text": True}}, "the text encoders are no part of a controlnet"),
        ("controlnet", {"delta": {"kind": "tlora"}}, "expected a kind that does not change with the timestep"),
    ]
    for task, more, message in wrong:
        with pytest.raises(ConfigError, match=message):
            train(config(task, "run", more), base=None)


def test_a_delta_on_a_network_takes_the_recipe_of_the_network_where_it_has_none(tmp_path: Path) -> None:
    found = resolve({"task": {"name": "controlnet"}, "data": {"images": "me"}, "delta": {"kind": "lokr"}})
    assert found.recipe is not None and found.recipe.name == "controlnet-toybox.toml"
    assert found.config.delta is not None and found.config.delta.kind == "lokr" and found.config.steps == 1400
    assert any("no recipe is shipped for lokr here" in notice for notice in found.notices)
