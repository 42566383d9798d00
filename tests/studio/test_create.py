"""What *Create* stands on, without a browser: names and places, stacks that come and go, grids, kept pictures, endpoints."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vgm_peft.errors import ConfigError, DataError, VgmError
from vgm_peft.stack.recipe import Stack
from vgm_peft.stack.uses import DeltaUse, Region
from vgm_peft.studio.plots import STRENGTH, Axis, Plot
from vgm_peft.studio.rows import read_rows
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.shelf import Shelf, trained_words
from vgm_peft.studio.sketch import PREFIX, painted, read_shape
from vgm_peft.studio.stack_files import open_stack, stack_text
from vgm_peft.studio.stack_panel import DeltaRow

if TYPE_CHECKING:
    from vgm_peft.studio.app import Studio


def test_a_changed_strength_reads_and_puts_on_nothing_anew(studio: "Studio") -> None:
    def drawn(strength: float) -> bytes:
        uses = (DeltaUse(file="robot", strength=strength), DeltaUse(file="style", start=0.5))
        return studio.engine.render(Stack(prompt="a toy", steps=2, deltas=uses))[0].image.tobytes()

    first = drawn(1.0)
    applied, deltas = studio.engine.applied, dict(studio.engine.applied.deltas if studio.engine.applied else {})
    assert applied is not None and len(deltas) == 2
    assert drawn(0.5) != first and drawn(1.0) == first
    assert studio.engine.applied is applied
    assert all(applied.deltas[name] is delta for name, delta in deltas.items())
    base = {name: p.clone() for name, p in studio.engine.base().denoiser.named_parameters()}
    assert studio.engine.applied is None
    drawn(1.0)
    assert all(torch.equal(base[name], p) for name, p in studio.engine.base().denoiser.named_parameters())


def test_side_networks_in_single_files_are_no_deltas(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    tensors = {"image_proj.proj.weight": torch.zeros(1), "ip_adapter.1.to_k_ip.weight": torch.zeros(1)}
    save_file(tensors, tmp_path / "runs" / "look.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1, 1)}, tmp_path / "runs" / "mine.safetensors")
    (tmp_path / "runs" / "broken.safetensors").write_bytes(b"nothing")
    shelf = Shelf(Settings(base="other", runs=tmp_path / "runs", pictures=tmp_path / "pictures"))
    assert [found.name for found in shelf.deltas()] == ["broken", "mine"]
    assert [(found.name, found.kind) for found in shelf.networks()] == [("look", "ip-adapter")]


def test_trained_words_are_those_that_a_file_tells(tmp_path: Path) -> None:
    tags = '{"5_me": {"sks robot": 5, "on grass": 2}, "x": 3}'
    said = {"modelspec.trigger_phrase": "sks, sks", "ss_tag_frequency": tags}
    tensors = {"lora_unet_x.lora_up.weight": torch.zeros(1, 1), "lora_unet_x.lora_down.weight": torch.zeros(1, 1)}
    save_file(tensors, tmp_path / "a.safetensors", said)
    assert trained_words(tmp_path / "a.safetensors") == ("sks", "sks robot", "on grass")
    for wrong in ("{", "[]", '{"a": {"b": "c"}}', "[" * 10_000):
        save_file({"x": torch.zeros(1, 1, 1)}, tmp_path / "b.safetensors", {"ss_tag_frequency": wrong})
        assert len(trained_words(tmp_path / "b.safetensors")) <= 1
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    assert trained_words(tmp_path / "c.safetensors") == ()


def test_a_stack_goes_out_and_comes_back_by_plain_names_alone(studio: "Studio", home: Path, tmp_path: Path) -> None:
    shelf = studio.engine.shelf
    mask = shelf.keep(Image.new("L", (64, 64), 255))
    region = Region(name="left", prompt="a duck", mask=mask)
    uses = (DeltaUse(file="robot", strength=0.5, start=0.25, region="left"), DeltaUse(file="style", blocks={"unet.*": 0.5}))
    stack = Stack(prompt="a toy", image=shelf.keep(Image.new("RGB", (64, 64))), paint=mask, deltas=uses, regions=(region,))
    text = stack_text(shelf, stack)
    assert str(home) not in text and "robot/delta.safetensors" in text
    (tmp_path / "x.toml").write_text(text)
    back = open_stack(shelf, tmp_path / "x.toml")
    assert (back.deltas, back.regions, back.image, back.paint) == (stack.deltas, stack.regions, stack.image, stack.paint)


@pytest.mark.parametrize(
    "text",
    [
        "[[deltas]]\nfile = '../base/unet/diffusion_pytorch_model.safetensors'",
        "[[deltas]]\nfile = '/etc/passwd'",
        "image = '/etc/passwd'",
        "image = '../../../etc/passwd.png'",
        "image = '*.png'",
        "[[controls]]\nnetwork = '../base/unet'\nimage = 'x.png'",
        "[[regions]]\nname = 'a'\nmask = '..'",
        "nonsense",
        "prompt = '" + "x" * 300_000 + "'",
    ],
)
def test_a_stack_file_opens_nothing_outside_the_library(studio: "Studio", tmp_path: Path, text: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(VgmError):
        open_stack(studio.engine.shelf, tmp_path / "x.toml")


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/b.png", "", "none.png", ".png", "x.svg", "x\n.png", "link.png"])
def test_pictures_are_found_in_their_two_folders_alone(studio: "Studio", home: Path, name: str) -> None:
    if not (link := home / "pictures" / "link.png").is_symlink():
        link.symlink_to(home / "base" / "model_index.json")
    with pytest.raises(DataError, match="no picture"):
        studio.engine.shelf.picture(name)


def test_what_the_page_sends_is_checked_like_any_table() -> None:
    assert read_rows(DeltaRow, [{"name": "a", "strength": 1}])[0].strength == 1.0
    assert read_rows(DeltaRow, None) == []
    for wrong in ([{}], ["a"], [{"name": "a", "strength": "1"}], [{"name": "a", "colour": 1}], [{"name": "a"}] * 65):
        with pytest.raises(ConfigError):
            read_rows(DeltaRow, wrong)
    mask = Image.new("L", (32, 32), 255)
    shape = read_shape(painted(mask)).mask
    assert shape is not None and shape.tobytes() == mask.tobytes()
    assert read_shape({"box": [0, 0, 0.5, 1], "mask": ""}).box == (0.0, 0.0, 0.5, 1.0)
    large = painted(Image.new("L", (1100, 8)))["mask"]
    hostile: list[Any] = ["data:text/html;base64,x", PREFIX + "!", PREFIX + base64.b64encode(b"GIF89a").decode(), large]
    hostile += [PREFIX + "A" * 2_000_001]
    for url in hostile:
        with pytest.raises(DataError):
            read_shape({"mask": url})
    with pytest.raises(ConfigError):
        read_shape({"box": [0, 0, "x", 1]})


def test_a_grid_takes_every_pair_of_values_and_refuses_what_cannot_be_varied() -> None:
    stack = Stack(count=4, deltas=(DeltaUse(file="robot"),))
    plot = Plot(Axis.parse(f"{STRENGTH}robot", "0, 0.5"), Axis.parse("sampler", "Euler a, ddim, DPM++ 2M"))
    cells = plot.cells(stack)
    assert [[(c.deltas[0].strength, c.scheduler, c.count) for c in row] for row in cells] == [
        [(0.0, name, 1), (0.5, name, 1)] for name in ("euler_a", "ddim", "dpmpp")
    ]
    assert Axis.parse("sampler", "dpmpp").label("dpmpp") == "sampler DPM++ 2M"
    for setting, values in (
        ("colour", "1"),
        ("steps", ""),
        ("steps", "1," * 9),
        ("seed", "1.5"),
        ("guidance", "much"),
        ("steps", "0"),
    ):
        with pytest.raises(ConfigError):
            Plot(Axis.parse(setting, values), Axis()).cells(stack)
    with pytest.raises(ConfigError, match="nothing to vary"):
        Plot(Axis(), Axis())
    with pytest.raises(ConfigError, match="varied twice"):
        Plot(Axis.parse("steps", "1"), Axis.parse("steps", "2"))


def test_endpoints_draw_whole_stacks_and_grids(studio: "Studio", address: str, home: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    assert client.predict(api_name="/networks") == {"edges": "controlnet"}
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    name = client.predict(handle_file(tmp_path / "red.png"), api_name="/keep")
    whole = {
        "steps": 2,
        "seed": 3,
        "deltas": [{"file": "robot", "strength": 0.5, "region": "left"}],
        "regions": [{"name": "left", "prompt": "a duck", "box": [0.0, 0.0, 0.5, 1.0]}],
        "controls": [{"network": "edges", "image": name, "strength": 0.5}],
    }
    drawn = client.predict("a toy", {"style": 0.25}, whole, api_name="/draw")
    picture = Path(drawn["files"][0])
    assert picture.name in client.predict(api_name="/history")
    told = client.predict(picture.name, api_name="/stack")
    assert [use["file"] for use in told["deltas"]] == ["robot", "style"] and told["controls"][0]["image"] == name
    again = client.predict("a toy", {}, {key: told[key] for key in told if key not in ("base", "prompt")}, api_name="/draw")
    assert Image.open(again["files"][0]).tobytes() == Image.open(picture).tobytes()
    sheet = client.predict("a toy", {"steps": 2}, ["guidance", "2, 4"], [], api_name="/grid")
    assert Image.open(sheet).width > 2 * 192
    foreign = {"network": "/etc", "image": name}
    for ask, message in (
        (lambda: client.predict("a", {}, {"image": "../x.png"}, api_name="/draw"), "no picture"),
        (
            lambda: client.predict("a", {}, {"controls": [foreign]}, api_name="/draw"),
            "no side network",
        ),
        (lambda: client.predict("a", {}, {"deltas": "robot"}, api_name="/draw"), "a list of tables"),
        (lambda: client.predict("../x.png", api_name="/stack"), "no picture"),
        (lambda: client.predict("a", {}, ["colour", "1"], [], api_name="/grid"), 'no setting "colour"'),
    ):
        with pytest.raises(AppError, match=message):
            ask()
