"""Rendering is a pure function of the scene, and depth, masks, edges and styles belong to the picture."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vgm_peft.errors import ConfigError, DataError
from vgm_peft.toybox.render import Rendered, open_dataset, render, render_dataset
from vgm_peft.toybox.world import CLASSES, STYLES, Scene, caption, draw_scene, style_scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(11)
    singles = [draw_scene(rng, kind=kind, toys=1) for kind in CLASSES for _ in range(2)]
    pairs = [draw_scene(rng, toys=2) for _ in range(4)]
    same = replace(pairs[0], toys=(pairs[0].toys[0], replace(pairs[0].toys[1], kind=pairs[0].toys[0].kind)))
    return [*singles, *pairs, same]


@pytest.fixture(scope="module")
def drawn(scenes: list[Scene]) -> Rendered:
    return render(scenes)


def test_rendering_again_gives_the_same_bytes(scenes: list[Scene], drawn: Rendered) -> None:
    again = render(scenes)
    assert torch.equal(again.image, drawn.image)
    assert torch.equal(again.depth, drawn.depth)


def test_company_changes_no_pixel(scenes: list[Scene], drawn: Rendered) -> None:
    order = list(range(len(scenes)))
    random.Random(0).shuffle(order)
    mixed = render([scenes[i] for i in order])
    assert torch.equal(mixed.image, drawn.image[order])
    assert torch.equal(mixed.depth, drawn.depth[order])
    assert torch.equal(mixed.normal, drawn.normal[order])
    alone = [0, 7, 13, 20, 24]
    for i in alone:
        single = render([scenes[i]])
        assert torch.equal(single.image[0], drawn.image[i])
        assert torch.equal(single.mask[0], drawn.mask[i])


def test_shapes_and_ranges(scenes: list[Scene], drawn: Rendered) -> None:
    count = len(scenes)
    assert drawn.image.shape == (count, 64, 64, 3) and drawn.image.dtype == torch.uint8
    assert drawn.depth.shape == drawn.mask.shape == drawn.edges.shape == (count, 64, 64)
    assert torch.allclose(drawn.normal.norm(dim=-1), torch.ones(count, 64, 64), atol=1e-3)
    assert float(drawn.depth.min()) > 1 and float(drawn.depth.max()) <= 12
    for scene, mask in zip(scenes, drawn.mask, strict=True):
        assert set(mask.unique().tolist()) == set(range(len(scene.toys) + 1))
    toy = drawn.mask > 0
    assert 0.04 < float(toy.float().mean()) < 0.4
    assert float(drawn.depth[toy].mean()) < float(drawn.depth[~toy].mean())
    facing = drawn.normal[..., 2][toy] > -0.05  # all but a few pixels on silhouettes
    assert float(facing.float().mean()) > 0.99


def test_places_are_unmistakable() -> None:
    rng = random.Random(5)
    places = ("left", "centre", "right")
    drawn = render([draw_scene(rng, position=place, toys=1) for place in places for _ in range(12)])
    columns = torch.arange(64.0)
    middle = ((drawn.mask > 0).float().sum(1) * columns).sum(1) / (drawn.mask > 0).float().sum((1, 2))
    left, centre, right = middle.split(12)
    assert float(left.max()) < float(centre.min()) - 3
    assert float(centre.max()) < float(right.min()) - 3


def test_edges_lie_on_outlines(drawn: Rendered) -> None:
    outline = torch.zeros_like(drawn.edges)
    outline[:, :, :-1] = drawn.mask[:, :, :-1] != drawn.mask[:, :, 1:]
    assert bool(drawn.edges[outline].all())
    assert 0.01 < float(drawn.edges.float().mean()) < 0.2


def test_larger_pictures_show_the_same(scenes: list[Scene], drawn: Rendered) -> None:
    large = render(scenes[:3], size=128, supersample=1)
    assert large.image.shape == (3, 128, 128, 3)
    small = large.image.float().view(3, 64, 2, 64, 2, 3).mean((2, 4))
    assert float((small - drawn.image[:3].float()).abs().mean()) < 2.5


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_pictures_and_nothing_else(style: str) -> None:
    scenes = style_scenes(style, 3)
    styled, plain = render(scenes), render([replace(s, style=None) for s in scenes])
    assert float((styled.image.float() - plain.image.float()).abs().mean()) > 6
    assert torch.equal(styled.depth, plain.depth) and torch.equal(styled.mask, plain.mask)


def test_a_dataset_is_read_back(tmp_path: Path) -> None:
    data = render_dataset(tmp_path, 6, seed=2, processes=1, quiet=True)
    assert data.pictures.shape == (6, 64, 64, 3) and data.labels.shape == (6, 6)
    assert np.array_equal(data.pictures[4], render([data.scene(4)]).image[0].numpy())
    assert open_dataset(tmp_path).captions == data.captions
    assert data.scene(0).toys[0].kind in caption(data.scene(0))


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        render([draw_scene(random.Random(0))], size=33, supersample=1)
    with pytest.raises(ConfigError, match="no scene"):
        render([])
    with pytest.raises(DataError, match="no finished Toybox dataset"):
        open_dataset(tmp_path)
