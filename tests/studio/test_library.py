"""The library: what its files are, without reading them; export, merge and resize under new names; nothing outside of it."""

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from tests.stack_makers import make_delta, make_word
from vgm_peft import formats
from vgm_peft.delta import Delta
from vgm_peft.errors import ConfigError, DeltaError
from vgm_peft.formats.export import export
from vgm_peft.formats.fitting import family_of, misfit
from vgm_peft.header import open_header
from vgm_peft.studio.catalogue import Catalogue
from vgm_peft.studio.engine import Engine
from vgm_peft.studio.settings import Settings
from vgm_peft.studio.workbench import KEPT, Workbench

if TYPE_CHECKING:
    from vgm_peft.family import Base


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny: "Callable[[str], Base]") -> Path:
    """A folder with files of many kinds, and a base."""
    home = tmp_path_factory.mktemp("library")
    base, other = tiny("sd15"), tiny("sdxl")
    base.pipe.save_pretrained(home / "base")
    delta = make_delta(base, "lora", 1)
    delta.words["<duck>"] = make_word(base, "<duck>", 2)
    delta.metadata["token"] = "sks"
    formats.write(delta, home / "runs" / "me" / "delta.safetensors")
    (home / "runs" / "me" / "samples").mkdir()
    Image.new("RGB", (64, 64), "#00ff00").save(home / "runs" / "me" / "samples" / "step-000020-0.png")
    files = home / "files"
    export(make_delta(base, "lora", 2), files / "kohya.safetensors", "kohya", base)
    export(make_delta(base, "loha", 3), files / "loha.safetensors", "lycoris", base)
    export(Delta("sd15", {}, dict(delta.words)), files / "duck.safetensors", "embedding", base)
    formats.write(make_delta(other, "lora", 4), files / "large.safetensors")
    Image.new("RGB", (64, 64), "#ff0000").save(files / "kohya.png")
    (files / "cut.safetensors").write_bytes((files / "kohya.safetensors").read_bytes()[:-10])
    (files / "evil.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")
    for name in ("old.ckpt", "old.pt", "old.bin", "old.pkl"):
        (files / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")
    shutil.copy(files / "kohya.safetensors", home / "outside.safetensors")
    (files / "link.safetensors").symlink_to(home / "outside.safetensors")
    return home


@pytest.fixture(scope="module")
def engine(shelf: Path) -> Engine:
    engine = Engine(Settings(base=str(shelf / "base"), runs=shelf / "runs", library=(shelf / "files",)))
    engine.base()
    return engine


def test_every_file_says_what_it_is_and_whether_it_fits(engine: Engine) -> None:
    catalogue = Catalogue(engine)
    found = {entry.name: entry for entry in catalogue.entries(patience=60)}
    assert set(found) == {
        "me",
        "kohya",
        "loha",
        "loha.text_encoder",
        "duck",
        "large",
        "cut",
        "evil",
    }  # no pickle, no link that leads out
    me = found["me"]
    assert (me.what, me.kinds, me.tool, me.family, me.rank, me.fits) == ("delta", "lora", "vgm_peft", "sd15", "8", "yes")
    assert me.words == ("<duck>", "sks") and me.size == me.path.stat().st_size
    assert me.thumbnail.startswith("data:image/") and found["kohya"].thumbnail and not found["loha"].thumbnail
    assert (found["kohya"].kinds, found["kohya"].tool, found["kohya"].fits) == ("LoRA", "kohya or LyCORIS", "yes")
    assert (found["loha"].kinds, found["loha"].fits, found["duck"].what, found["duck"].fits) == ("LoHa", "yes", "words", "yes")
    assert (found["large"].family, found["large"].fits, found["large"].why) == ("sdxl", "no", "it is for sdxl")
    assert "cut short" in found["cut"].why and found["cut"].what == "damaged" and "pickle" in found["evil"].why
    assert [entry.name for entry in catalogue.entries("LOHA sd15")] == ["loha", "loha.text_encoder"]
    assert catalogue.entries("nothing of the kind") == []


def test_a_file_is_looked_at_once_and_again_when_it_changes(engine: Engine, shelf: Path) -> None:
    catalogue = Catalogue(engine)
    assert {entry.what for entry in catalogue.entries(patience=-1)} == {"unread"}  # no time for any: names alone
    first = {entry.name: entry for entry in catalogue.entries(patience=60)}
    path = shelf / "files" / "kohya.safetensors"
    data, facts = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(data)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    try:
        assert catalogue.entry("kohya") == first["kohya"]  # same size and time: not opened again
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
        changed = catalogue.entry("kohya")
        assert changed is not None and changed.what == "damaged"
    finally:
        path.write_bytes(data)


def test_results_are_new_entries_and_mean_what_they_should(engine: Engine, shelf: Path) -> None:
    bench, base = Workbench(engine), engine.base()
    told = bench.merge({"me": 0.5, "kohya": -1.0}, "both of them").told
    assert "0.5 x me + -1 x kohya" in told
    merged, me, other = (
        formats.read(path, base) for path in (bench.place("both-of-them"), bench.place("me"), bench.place("kohya"))
    )
    for name, patch in merged.patches.items():
        zero = torch.zeros(patch.site.shape)
        parts = [(d.patches[name].change(zero), w) for d, w in ((me, 0.5), (other, -1.0)) if name in d.patches]
        assert torch.allclose(patch.change(zero), sum(change * w for change, w in parts), atol=1e-5)
    assert "<duck>" in merged.words
    assert "rank 1;" in bench.resize("me", "small", rank=1).told
    small = Catalogue(engine).entry("small")
    assert small is not None and small.rank == "1" and small.fits == "yes"
    before = sorted(shelf.joinpath("runs").iterdir())
    for wrong, message in (
        (lambda: bench.merge({"me": 1.0}, "small"), 'a run named "small" exists'),
        (lambda: bench.merge({"me": 1.0}, "../x"), "the name"),
        (lambda: bench.merge({}, "none"), "expected 2 .. 32"),
        (lambda: bench.merge({"me": float("nan")}, "nan"), "the strength of me"),
        (lambda: bench.merge({"me": 1.0, "large": 1.0}, "mixed"), "deltas of sd15 and sdxl"),
        (lambda: bench.resize("me", "y", rank=0), "expected 1 or more"),
        (lambda: bench.resize("../outside", "y", rank=1), 'no delta "../outside"'),
        (lambda: bench.export("link", "comfyui"), 'no delta "link"'),
        (lambda: bench.export("me", "photoshop"), "no tool is known"),
        (lambda: bench.export("cut", "comfyui"), "cut short"),
        (lambda: bench.export("evil", "native"), "pickle"),
    ):
        with pytest.raises((ConfigError, DeltaError), match=message):
            wrong()
    assert [path for path in sorted(shelf.joinpath("runs").iterdir()) if path.name != ".exports"] == before


def test_exports_are_what_was_asked_for_and_do_not_pile_up(engine: Engine) -> None:
    bench, base = Workbench(engine), engine.base()
    made = bench.export("me", "diffusers")  # the word goes to a file beside it
    with zipfile.ZipFile(made.path) as packed:
        assert sorted(packed.namelist()) == ["me-diffusers.<duck>.safetensors", "me-diffusers.safetensors"] or packed.namelist()
    made = bench.export("kohya", "comfyui")
    assert made.path.name == "kohya-comfyui.safetensors" and "ComfyUI" in made.told
    assert formats.read(made.path, base).patches.keys() == formats.read(bench.place("kohya"), base).patches.keys()
    assert bench.export("large", "kohya").path.is_file()  # of another family than the base
    for _ in range(KEPT):
        last = bench.export("kohya", "native").path
    assert last.is_file() and len(list(bench.outbox.iterdir())) == KEPT and not made.path.exists()


def test_names_and_shapes_tell_whether_a_file_fits(tiny: "Callable[[str], Base]", tmp_path: Path) -> None:
    from vgm_peft.families import load

    base, other, toybox = tiny("sd15"), tiny("sdxl"), load("toybox", digest=False)
    for tool in ("native", "kohya", "diffusers", "lycoris"):
        header = open_header(export(make_delta(base), tmp_path / "x.safetensors", tool, base).files[0])
        assert family_of(header) == "sd15" and misfit(header, base) == "" and misfit(header, other) == "it is for sd15"
        assert misfit(header, toybox)  # of its family, and yet of another size


def test_programs_reach_every_action(address: str, home: Path) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(address, verbose=False)
    listed: list[dict[str, Any]] = client.predict("robot", api_name="/library")
    assert [(entry["name"], entry["kinds"], entry["fits"]) for entry in listed] == [("robot", "lora", "yes")]
    assert client.predict("robot", api_name="/inspect")["tool"] == "vgm_peft"
    file, _ = client.predict("robot", "comfyui", False, api_name="/export")
    assert formats.sniff(file["value"] if isinstance(file, dict) else file) == "kohya"
    assert "2 layers" not in client.predict({"robot": 0.5, "style": 0.5}, "api merged", api_name="/merge")
    assert "rank 2" in client.predict("robot", "api small", 2, api_name="/resize")
    assert {"api-merged", "api-small"} <= set(client.predict(api_name="/deltas"))
    for name in ("../base/unet", "/etc/passwd", str(home / "outside")):
        for call in (("/inspect", name), ("/export", name, "comfyui", False), ("/resize", name, "x", 2)):
            with pytest.raises(AppError, match="no delta"):
                client.predict(*call[1:], api_name=call[0])
