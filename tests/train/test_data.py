"""What a run learns from: told before the base is loaded, kept with the run, and drawn as the settings say."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from tests.train.ground import SMALL, files, picture, tiny_base
from vgm_peft.cli import main
from vgm_peft.cli.train import add_flags
from vgm_peft.config import Table, merge
from vgm_peft.data import KINDS, Cache, load_mask
from vgm_peft.errors import BaseModelError, ConfigError, DataError, TrainError
from vgm_peft.families import outline, size_of
from vgm_peft.formats import read
from vgm_peft.train import train
from vgm_peft.train.config import RunConfig, bind, table
from vgm_peft.train.pictures import Pictures
from vgm_peft.train.recipes import portable, resolve
from vgm_peft.train.task import Setup, Turn

Make = Callable[..., RunConfig]


def drawn(config: RunConfig) -> Pictures:
    with ExitStack() as cleanup:
        setup = Setup(config, tiny_base("sd15"), Cache(), Accelerator(), cleanup)
        return Pictures(setup.report.examples, setup)


def two_concepts(tmp_path: Path) -> Table:
    """A folder of two robots and one of a duck, the duck's picture coming up as often as both robots'."""
    for i in range(2):
        picture(tmp_path / "robot" / f"{i}.png", i)
    picture(tmp_path / "duck" / "0.png", 7)
    robot: Table = {"images": str(tmp_path / "robot"), "token": "rbt", "class_prompt": "a robot"}
    duck: Table = {"images": str(tmp_path / "duck"), "token": "dck", "class_prompt": "a duck", "repeats": 2}
    return merge(SMALL, {"concept": [robot, duck], "output": str(tmp_path / "run"), "delta": {"rank": 2}})


def test_a_run_learns_several_concepts_each_by_its_word(tmp_path: Path) -> None:
    more: Table = {"task": {"name": "dreambooth", "class_images": 4, "class_steps": 2}, "data": {"batch": 1}, "steps": 2}
    config = bind(merge(two_concepts(tmp_path), more))
    result = train(config, base=tiny_base("sd15"))
    assert result.delta is not None and read(result.delta).metadata["token"] == "rbt, dck"
    assert result.prompts == ("a rbt robot", "a robot", "a dck duck", "a duck")
    pictures = drawn(config)
    assert [(e.caption, e.concept, e.repeats) for e in pictures.examples] == [
        ("a rbt robot", 0, 1),
        ("a rbt robot", 0, 1),
        ("a dck duck", 1, 2),
    ]
    seen = Counter(cut.example for number in range(8) for cut in pictures.draw(Turn(0, number)).cuts)
    assert seen == {0: 2, 1: 2, 2: 4}
    # The run repeats from its own folder, and tells the two folders apart by name alone.
    again = resolve({"output": str(tmp_path / "again")}, result.folder / "run.toml").config
    second = train(again, base=tiny_base("sd15"))
    assert second.delta is not None and second.delta.read_bytes() == result.delta.read_bytes()
    kept = json.loads((result.folder / "data.json").read_text())
    assert kept["folders"] == ["robot", "duck"] and set(kept["files"]) == {"robot/0.png", "robot/1.png", "duck/0.png"}
    assert str(tmp_path) not in "".join((result.folder / name).read_text() for name in ("data.json", "data.md", "run.toml"))


def test_a_run_of_several_concepts_is_resumed_where_its_pictures_are_the_same(tmp_path: Path) -> None:
    more: Table = {"task": {"name": "finetune"}, "checkpoint": {"every": 1}, "steps": 2}
    for name in ("robot", "duck"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.txt").write_text(f"a {name}")
    (tmp_path / "duck" / "1.txt").unlink()
    config = bind(merge(two_concepts(tmp_path), more))
    folder = train(config, base=tiny_base("sd15")).folder
    pictures = drawn(config)
    assert [e.caption for e in pictures.examples] == ["rbt, a robot", "rbt, a robot", "dck, a duck"]
    (tmp_path / "duck").rename(tmp_path / "bird")
    moved = merge(table(config), {"steps": 3})
    moved["concept"][1]["images"] = str(tmp_path / "bird")  # type: ignore[index,call-overload]
    assert train(bind(moved), resume=folder, base=tiny_base("sd15")).steps == 3
    moved["concept"][1]["repeats"] = 3  # type: ignore[index,call-overload]
    with pytest.raises(TrainError, match="concept"):
        train(bind(merge(moved, {"steps": 4})), resume=folder, base=tiny_base("sd15"))


def test_textual_inversion_learns_a_word_for_each(tmp_path: Path) -> None:
    more: Table = {"task": {"name": "textual-inversion", "vectors": 1}, "steps": 3, "data": {"batch": 1}}
    config = merge(two_concepts(tmp_path), more)
    del config["delta"]
    result = train(bind(config), base=tiny_base("sd15"))
    assert result.delta is not None and set(read(result.delta).words) == {"rbt", "dck"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"concept": [{"images": "a", "tokn": "x"}]}, 'unknown setting "concept[0].tokn"; did you mean "token"'),
        ({"concept": [{"token": "x"}]}, 'setting "concept[0].images" is missing'),
        ({"concept": [{"images": "a"}], "data": {"images": "b"}}, "both data.images"),
        ({"concept": [{"images": "a", "token": "x"}, {"images": "./a", "token": "y"}]}, "two concepts have the same images"),
        ({"concept": [{"images": "a", "repeats": 0}]}, "repeats = 0"),
        ({"data": {"images": "a", "caption_shuffle": 3}}, 'unknown setting "data.caption_shuffle"'),
        ({"data": {"images": "a", "mask": "files"}}, 'did you mean "masks"'),
        ({"data": {"images": "a", "masks": "file"}}, "expected one of 'off', 'files', 'alpha'"),
        ({"data": {"images": "a", "allow": ["duplicates"]}}, 'did you mean "duplicate"'),
        ({"data": {"images": "a", "zoom": 2}}, "zoom = 2.0 without further crops"),
        ({"data": {"images": "a", "keep_tokens": 2}}, "keep_tokens = 2, but captions keep their order"),
        ({"data": {"images": "a", "cache_gib": 0}}, "cache_gib = 0"),
    ],
)
def test_mistakes_in_data_settings_are_named(change: Table, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        bind(merge({"task": {"name": "finetune"}}, change))
    assert says in str(error.value)


def test_subjects_that_would_share_a_word_are_refused(tmp_path: Path) -> None:
    config = two_concepts(tmp_path)
    del config["concept"][1]["token"]  # type: ignore[index,arg-type,union-attr]
    with pytest.raises(ConfigError, match=r"concept\[1\] .* has no token"):
        train(bind(merge(config, {"task": {"name": "dreambooth"}})), base=tiny_base("sd15"))


def test_the_pictures_are_judged_before_the_base_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the base must be looked at to choose a recipe: its weights here are no weights at all."""
    base = tmp_path / "bases" / "mine"
    tiny_base("sd15").pipe.save_pretrained(base)
    for weights in base.rglob("*.safetensors"):
        weights.write_bytes(b"not yet downloaded")
    monkeypatch.chdir(tmp_path)
    (pictures / "2.png").write_bytes(b"")
    command = ["finetune", "--images", str(pictures), "--base", str(base), "--set", "data.resolution=64"]
    assert main("train", command) == 2
    assert "2.png is empty" in capsys.readouterr().err
    assert main("train", [*command, "--allow", "unreadable,stray,orphan"]) == 2
    told = capsys.readouterr()
    assert "2 pictures in" in told.out and "64 x 64" in told.out and "2.png" not in told.err


def test_a_picture_much_too_small_is_refused_before_loading(config: Make) -> None:
    large = config("finetune", "run", {"data": {"resolution": 192}})
    with pytest.raises(
        DataError, match=r"much smaller than what they are trained at: 0\.png \(64 x 64 for 192 x 192\).*--allow tiny"
    ):
        train(large, base=tiny_base("sd15"))
    allowed = config("finetune", "run", {"data": {"resolution": 192, "allow": ["tiny"]}, "steps": 1})
    assert train(allowed, base=tiny_base("sd15")).finished


def test_the_report_is_kept_with_the_run(config: Make, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "notes | <b>.docx").write_text("x")
    result = train(config("finetune", "run", {"data": {"allow": ["stray"]}, "steps": 1}), base=tiny_base("sd15"))
    kept = json.loads((result.folder / "data.json").read_text())
    assert set(kept["files"]) == {*files(pictures)} and sum(kept["counts"].values()) == len(files(pictures))
    assert kept["counts"]["picture"] == len(kept["pictures"]) == 3
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["data"]["pictures"] == 3  # counts in = counts trained
    assert sum(row["seen_per_pass"] for row in kept["buckets"]) == 3
    text = (result.folder / "data.md").read_text()
    assert "notes \\| &lt;b>.docx" in text and "| 64 x 64 | 3 | 3 | 3 |" in text
    assert "left out" in text and "allowed (stray)" in text and "allowed (stray)" in capsys.readouterr().out


def test_what_is_wrong_is_kept_where_the_run_would_be_and_gives_way_to_it(config: Make, pictures: Path) -> None:
    (pictures / "1.png").write_bytes(b"")
    (pictures / "notes.docx").write_text("x")
    bad = config("finetune", "run", {"steps": 1})
    for _ in range(2):  # what is left of the first does not stand in the way of the second
        with pytest.raises(DataError, match=r"(?s)2 things are wrong.*run.data\.md has it line by line") as refused:
            train(bad, base=tiny_base("sd15"))
        assert set(files(Path(bad.output))) == {"data.md"}
    lines = Path(bad.output, "data.md").read_text().splitlines()
    assert [line for line in lines if "1.png is empty" in line and line.endswith("[unreadable]")]
    assert [line for line in lines if line.startswith("* notes.docx")] and "--allow stray,unreadable" in str(refused.value)
    allowed = config("finetune", "run", {"steps": 1, "data": {"allow": ["unreadable", "stray", "orphan"]}})
    assert train(allowed, base=tiny_base("sd15")).finished
    kept = Path(bad.output, "data.md").read_bytes()
    assert b"What this run learned from" in kept
    with pytest.raises(DataError):
        train(bad, resume=Path(bad.output), base=tiny_base("sd15"))
    assert Path(bad.output, "data.md").read_bytes() == kept, "a run's own report is not overwritten"


def test_every_picture_comes_up_as_often_as_it_should(config: Make, pictures: Path) -> None:
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[0]["repeats"] = 3
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = drawn(config("finetune", "run", {"data": {"batch": 1}}))
    seen = Counter(cut.example for number in range(20) for cut in found.draw(Turn(0, number)).cuts)
    assert seen == {0: 12, 1: 4, 2: 4}


def test_several_resolutions_are_seen_equally_often(config: Make, tmp_path: Path) -> None:
    for i, side in enumerate((64, 128, 200)):
        picture(tmp_path / "sides" / f"{i}.png", i, side, side)
    data: Table = {"images": str(tmp_path / "sides"), "more_resolutions": [128, 192], "batch": 1}
    found = drawn(config("dreambooth", "run", {"data": data}))
    seen = Counter((cut.example, cut.crop.target[0]) for number in range(9) for cut in found.draw(Turn(0, number)).cuts)
    assert seen == {(0, 64): 3, (1, 64): 1, (1, 128): 2, (2, 64): 1, (2, 128): 1, (2, 192): 1}
    batches = drawn(config("dreambooth", "run", {"data": {**data, "batch": 3}}))
    for number in range(6):
        shown = batches.draw(Turn(0, number))
        assert len({cut.crop.target for cut in shown.cuts}) == 1 and len(shown) == 3


def test_crops_and_mirrors_are_drawn_from_what_is_cached(config: Make, tmp_path: Path) -> None:
    picture(tmp_path / "one" / "0.png", 1, 140, 100)
    data: Table = {"images": str(tmp_path / "one"), "crops": 4, "zoom": 1.3, "flip": True, "batch": 1}
    settings = config("dreambooth", "run", {"data": data})
    found = drawn(settings)
    (view,) = found.views
    assert len(view.crops) == 4 and len(found.encoded) == 8
    for crop in view.crops:
        assert crop.scaled[0] <= crop.original[0] and crop.target == view.target
        assert 0 <= crop.left <= crop.scaled[0] - crop.target[0] and 0 <= crop.top <= crop.scaled[1] - crop.target[1]
    turns = [found.draw(Turn(0, number)) for number in range(60)]
    assert {turn.cuts[0] for turn in turns} == set(found.encoded)
    again = drawn(settings)
    assert all(torch.equal(again.draw(Turn(0, n)).x0, turns[n].x0) for n in (0, 31, 59))  # no state: any order, any process
    assert drawn(config("dreambooth", "run", {"data": data, "seed": 5})).views == found.views  # so other runs hit the cache


def test_tags_are_shown_in_other_orders(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "tags"
    picture(folder / "0.png", 1)
    (folder / "0.txt").write_text("toon, red robot, hill, evening, snow")
    data: Table = {"images": str(folder), "caption_orders": 6, "keep_tokens": 1, "trigger": "mine", "batch": 1}
    data |= {"caption_dropout": 0.2}
    found = drawn(config("finetune", "run", {"data": data}))
    shown = [found.draw(Turn(0, number)).captions[0] for number in range(120)]
    assert set(shown) == set(found.captions()) and "" in shown and 5 <= len(set(shown)) <= 7
    for caption in set(shown) - {""}:
        assert caption.startswith("mine, ") and sorted(caption.split(", ")) == sorted(found.examples[0].caption.split(", "))
    assert 10 <= shown.count("") <= 40
    kept = drawn(config("finetune", "run", {"data": {**data, "keep_tokens": 2}}))
    assert all(c.startswith("mine, toon, ") for c in kept.captions() if c)


def mask_of(folder: Path, name: str, width: int, height: int) -> None:
    """White in the right half."""
    image = Image.new("L", (width, height))
    image.paste(255, (width // 2, 0, width, height))
    (folder / "masks").mkdir(exist_ok=True)
    image.save(folder / "masks" / name)


def test_masks_come_with_the_batch_cut_and_mirrored_like_their_pictures(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    for i in range(2):
        picture(folder / f"{i}.png", i, 128, 128)
    mask_of(folder, "0.png", 128, 128)
    data: Table = {"images": str(folder), "masks": "files", "flip": True, "batch": 2, "allow": ["mask"], "resolution": 128}
    found = drawn(config("dreambooth", "run", {"data": data}))
    seen: set[bool] = set()
    for number in range(12):
        shown = found.draw(Turn(0, number))
        assert shown.mask is not None and shown.mask.shape == (2, 1, *shown.x0.shape[2:])
        for cut, mask in zip(shown.cuts, shown.mask, strict=True):
            half = mask.shape[-1] // 2
            if cut.example == 1:
                assert bool((mask == 1).all())
            else:
                white, black = (mask[..., :half], mask[..., half:]) if cut.flip else (mask[..., half:], mask[..., :half])
                assert white.mean() > 0.9 and black.mean() < 0.1
                seen.add(cut.flip)
    assert seen == {True, False}
    assert drawn(config("dreambooth", "off", {"data": {"images": str(tmp_path / "me")}})).draw(Turn(0, 0)).mask is None


def test_transparency_is_a_mask_and_the_picture_keeps_its_colours(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    colours = np.full((64, 64, 4), 200, np.uint8)
    colours[:, :32, 3] = 0
    colours[:, 32:, 3] = 255
    Image.fromarray(colours, "RGBA").save(folder / "0.png")
    found = drawn(config("dreambooth", "run", {"data": {"images": str(folder), "masks": "alpha", "batch": 1}}))
    mask = found.draw(Turn(0, 0)).mask
    assert (
        mask is not None and mask[0, 0, 0].tolist() == [0.0] * 4 + [1.0] * 4 or mask is not None and float(mask.mean()) == 0.5
    )


def test_a_recipe_bounds_the_cache(config: Make, caplog: pytest.LogCaptureFixture) -> None:
    drawn(config("finetune", "run"))
    assert "larger than its bound" not in caplog.text
    small = config("finetune", "run", {"data": {"cache_gib": 1e-6}, "steps": 1})
    train(bind(merge(table(small), {"data": {"resolution": 128, "allow": ["tiny"]}})), base=tiny_base("sd15"))
    assert "larger than its bound, since runs that are alive use what is in it" in caplog.text


def test_a_mask_that_leaves_nothing_is_refused(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    picture(folder / "0.png", 0)
    (folder / "masks").mkdir()
    Image.new("L", (64, 64)).save(folder / "masks" / "0.png")
    with pytest.raises(DataError, match=r"the mask of 0\.png is black wherever it is trained"):
        train(config("dreambooth", "run", {"data": {"images": str(folder), "masks": "files"}}), base=tiny_base("sd15"))


def test_crops_that_show_nothing_of_the_mask_are_not_drawn(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    picture(folder / "0.png", 0, 256, 64)
    image = Image.new("L", (256, 64))
    image.paste(255, (100, 0, 156, 64))
    (folder / "masks").mkdir()
    image.save(folder / "masks" / "0.png")
    data: Table = {"images": str(folder), "masks": "files", "crops": 12, "buckets": False, "batch": 1}
    found = drawn(config("dreambooth", "run", {"data": data}))
    (view,) = found.views
    assert 1 <= len(view.crops) < 12
    assert all(bool(load_mask(found.examples[0], crop, False, 8).any()) for crop in view.crops)


def test_masks_are_part_of_the_data_that_a_run_is_resumed_with(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    picture(folder / "0.png", 0)
    mask_of(folder, "0.png", 64, 64)
    settings: Table = {"data": {"images": str(folder), "masks": "files", "batch": 1}, "steps": 1, "checkpoint": {"every": 1}}
    done = train(config("dreambooth", "run", settings), base=tiny_base("sd15")).folder
    Image.new("L", (64, 64), 200).save(folder / "masks" / "0.png")
    with pytest.raises(TrainError, match="the data"):
        train(config("dreambooth", "run", merge(settings, {"steps": 2})), resume=done, base=tiny_base("sd15"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_what_is_known_of_a_base_before_loading_is_what_it_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder, a single file and a hub model alike, none of which has weights that could be read."""
    base, commit = tiny_base(family), "0" * 40
    repo = tmp_path / "hub" / "models--me--mine"
    folder = repo / "snapshots" / commit
    base.pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"none")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "one").symlink_to(folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    for source in (folder, tmp_path / "one.safetensors", "me/mine"):
        found = outline(source)
        assert (found.family, found.size) == (family, size_of(base))


@pytest.mark.parametrize(
    ("source", "says"),
    [("model.ckpt", "pickled weights are never read"), ("x.safetensors", "no such file"), ("x", "no such file")],
)
def test_a_base_that_is_none_is_named_before_pictures_are_read(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    with pytest.raises(BaseModelError, match=says):
        outline(tmp_path / source)


def test_every_kind_of_fault_is_in_the_help_and_reaches_the_run() -> None:
    from vgm_peft.cli import Parser
    from vgm_peft.cli.train import _table

    parser = Parser()
    add_flags(parser)
    (action,) = [a for a in parser._actions if a.dest == "allow"]
    assert str(action.help).endswith(", ".join(KINDS))
    args = parser.parse_args(["dreambooth", "--images", "me", "--allow", "tiny,stray", "--allow", "mask"])
    assert _table(args)["data"] == {"images": "me", "allow": ["tiny", "stray", "mask"]}


def test_a_recipe_of_concepts_is_moved_with_its_paths(tmp_path: Path) -> None:
    config = bind(merge(two_concepts(tmp_path), {"task": {"name": "dreambooth"}}))
    text = portable(config, tmp_path / "runs" / "one")
    assert '"../../robot"' in text and str(tmp_path) not in text
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "run.toml").write_text(text)
    again = resolve({}, tmp_path / "runs" / "one" / "run.toml").config
    assert [Path(c.images).resolve() for c in again.concepts] == [tmp_path / "robot", tmp_path / "duck"]
