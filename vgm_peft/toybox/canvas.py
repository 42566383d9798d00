"""The painting of a picture: rays of a group of scenes, their backgrounds, the toys' shadows, and the toys themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgm_peft.toybox import backdrop, surface, trace
from vgm_peft.toybox.toys import SHAPES
from vgm_peft.toybox.trace import pick
from vgm_peft.toybox.world import Scene, Toy

FAR = 12.0  # depth of the sky
_FOCAL = 3.0  # half the frame is 1 / 3 of the distance
_AIM = 0.5  # height of the point looked at
_SCALES = {"large": 0.94, "small": 0.68}
_OFFSETS = {"large": 0.39, "small": 0.5}
_SIDES = {"left": -1.0, "centre": 0.0, "right": 1.0}
_GROUP = 32


@dataclass(frozen=True)
class _View:
    """A scene's camera as numbers: position and the three axes."""

    eye: tuple[float, float, float]
    right: tuple[float, float, float]
    up: tuple[float, float, float]
    forward: tuple[float, float, float]


def _view(scene: Scene) -> _View:
    yaw, pitch, distance = scene.camera.yaw, scene.camera.pitch, scene.camera.distance
    sy, cy, sp, cp = math.sin(yaw), math.cos(yaw), math.sin(pitch), math.cos(pitch)
    forward = (-sy * cp, -sp, -cy * cp)
    eye = (-distance * forward[0], _AIM - distance * forward[1], -distance * forward[2])
    return _View(eye, (cy, 0.0, -sy), (-sy * sp, cp, -cy * sp), forward)


def _to_toy(toy: Toy, v: Sequence[float], point: bool) -> tuple[float, float, float]:
    """A world point (or direction) in the toy's own coordinates (directions keep their length)."""
    x, y, z = v
    if point:
        scale = _SCALES[toy.size]
        x = (x - _SIDES[toy.position] * _OFFSETS[toy.size] - toy.shift[0]) / scale
        y, z = y / scale, (z - toy.shift[1]) / scale
    s, c = math.sin(toy.turn), math.cos(toy.turn)
    return (c * x - s * z, y, s * x + c * z)


def _light(scene: Scene) -> tuple[float, float, float]:
    azimuth, elevation = scene.light.azimuth + scene.camera.yaw, scene.light.elevation
    return (math.cos(elevation) * math.sin(azimuth), math.sin(elevation), math.cos(elevation) * math.cos(azimuth))


def _grid(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Camera-plane coordinates u, v and focal length of unit rays (side * side,)."""
    line = (torch.arange(side) + 0.5) * (2 / side) - 1
    u = line[None].expand(side, side).reshape(-1)
    v = -line[:, None].expand(side, side).reshape(-1)
    inverse = 1 / (u * u + v * v + _FOCAL * _FOCAL).sqrt()
    return u * inverse, v * inverse, _FOCAL * inverse


def _rays(axes: Tensor, grid: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Directions from axes (n, 3 axes, 3 components): three of (n, N)."""
    u, v, w = grid
    x, y, z = (axes[:, 0, k, None] * u + axes[:, 1, k, None] * v + axes[:, 2, k, None] * w for k in range(3))
    return x, y, z


class Canvas:
    """The rays of some scenes while they are painted: (scenes, rays) with `supersample` rays a pixel each way."""

    def __init__(self, scenes: Sequence[Scene], size: int, supersample: int) -> None:
        self.scenes, self.size, self.supersample = scenes, size, supersample
        self.side = size * supersample
        self.views = [_view(scene) for scene in scenes]
        n = self.side * self.side
        self.colour = torch.zeros(3, len(scenes), n)
        self.depth = torch.full((len(scenes), n), FAR)
        self.normal = torch.zeros(3, len(scenes), n)
        self.normal[2] = 1.0
        self.mask = torch.zeros(len(scenes), n, dtype=torch.uint8)
        self.shade = torch.ones(len(scenes), size * size)


def _paint_background(canvas: Canvas) -> None:
    grid = _grid(canvas.side)
    for i, scene in enumerate(canvas.scenes):
        view = canvas.views[i]
        dx, dy, dz = _rays(torch.tensor([[view.right, view.up, view.forward]]), grid)
        colour, far = backdrop.paint(scene.background, view.eye, scene.camera.ground, (dx[0], dy[0], dz[0]))
        canvas.colour[:, i] = colour
        depth = far * grid[2]
        canvas.depth[i] = torch.where(depth > 0, depth.clamp_max(FAR), FAR)
        ground = far > 0
        for k, axis in enumerate((view.right, view.up, view.forward)):
            canvas.normal[k, i] = torch.where(ground, axis[1] if k < 2 else -axis[1], canvas.normal[k, i])


def _paint_shadows(canvas: Canvas, group: Sequence[tuple[int, int]], kind: str) -> None:
    """Darken the ground (at picture resolution) where these toys stand in the light."""
    shape, grid = SHAPES[kind], _grid(canvas.size)
    scenes, views = [canvas.scenes[i] for i, _ in group], [canvas.views[i] for i, _ in group]
    toys = [canvas.scenes[i].toys[j] for i, j in group]
    axes = [[_to_toy(t, a, False) for a in (v.right, v.up, v.forward)] for t, v in zip(toys, views, strict=True)]
    eye = torch.tensor([_to_toy(t, v.eye, True) for t, v in zip(toys, views, strict=True)])
    beams = torch.tensor([_to_toy(t, _light(s), False) for t, s in zip(toys, scenes, strict=True)])
    dx, dy, dz = _rays(torch.tensor(axes), grid)
    t = torch.where(dy < -1e-3, -eye[:, 1, None] / dy, 1e4)
    x, z = eye[:, 0, None] + t * dx, eye[:, 2, None] + t * dz
    reach = 0.5 * shape.middle / beams[:, 1, None]  # halfway to where the light through the toy's middle lands
    cx, cz = -beams[:, 0, None] * reach, -beams[:, 2, None] * reach
    wide = shape.radius + 0.12 + (cx * cx + cz * cz).sqrt()
    owner, pixel = ((x - cx) ** 2 + (z - cz) ** 2 < wide * wide).nonzero(as_tuple=True)
    flat = owner * grid[0].numel() + pixel
    x, z = pick(x, flat), pick(z, flat)
    floor = torch.zeros_like(x)
    lx, ly, lz = (pick(beams[:, k], owner) for k in range(3))
    lit = trace.shadow(shape, x, floor, z, (lx, ly, lz), 11)
    contact = 0.55 + 0.45 * (shape.distance(x, floor, z) * 3.2).clamp(0, 1)
    depth = pick(torch.tensor([backdrop.MOODS[s.background].shadow for s in scenes]), owner)
    where = pick(torch.tensor([i for i, _ in group]), owner) * grid[0].numel() + pixel
    shade = canvas.shade.view(-1)
    shade.index_copy_(0, where, pick(shade, where) * ((1 - depth * (1 - lit)) * contact))


def _paint_toys(canvas: Canvas, group: Sequence[tuple[int, int]], kind: str) -> None:
    shape = SHAPES[kind]
    toys = [canvas.scenes[i].toys[j] for i, j in group]
    views = [canvas.views[i] for i, _ in group]
    axes = torch.tensor([[_to_toy(t, a, False) for a in (v.right, v.up, v.forward)] for t, v in zip(toys, views, strict=True)])
    origin = torch.tensor([_to_toy(t, v.eye, True) for t, v in zip(toys, views, strict=True)])
    hits = trace.meet(shape, origin, _rays(axes, _grid(canvas.side)), canvas.side)
    nx, ny, nz = trace.normals(shape, hits)
    colour = _shade(canvas, group, hits, (nx, ny, nz), kind)
    owner, pixel = hits.owner, hits.pixel
    scale = pick(torch.tensor([_SCALES[t.size] for t in toys]), owner)
    depth = hits.t * scale * pick(_grid(canvas.side)[2], pixel)
    where = pick(torch.tensor([i for i, _ in group]), owner) * (canvas.side * canvas.side) + pixel
    front = (depth < pick(canvas.depth, where)).nonzero()[:, 0]
    there = pick(where, front)
    canvas.depth.view(-1).index_copy_(0, there, pick(depth, front))
    ids = torch.tensor([j + 1 for _, j in group], dtype=torch.uint8)
    canvas.mask.view(-1).index_copy_(0, there, pick(ids, pick(owner, front)))
    for k in range(3):
        canvas.colour[k].view(-1).index_copy_(0, there, pick(colour[k], front))
        ax, ay, az = (pick(axes[:, k, c], owner) for c in range(3))
        along = nx * ax + ny * ay + nz * az
        canvas.normal[k].view(-1).index_copy_(0, there, pick(along if k < 2 else -along, front))


def _shade(
    canvas: Canvas, group: Sequence[tuple[int, int]], hits: trace.Hits, normal: tuple[Tensor, Tensor, Tensor], kind: str
) -> list[Tensor]:
    """Linear light from the hits: key with soft shadow, ambient from above, and for glossy toys a mirror of the sky."""
    scenes = [canvas.scenes[i] for i, _ in group]
    toys = [canvas.scenes[i].toys[j] for i, j in group]
    shape, (nx, ny, nz) = SHAPES[kind], normal
    tint = shape.tint(hits.x, hits.y, hits.z)
    paint = surface.albedo(toys, hits.owner, tint, hits.x, hits.y, hits.z)
    beams = torch.tensor([_to_toy(t, _light(s), False) for t, s in zip(toys, scenes, strict=True)])
    lx, ly, lz = (pick(beams[:, k], hits.owner) for k in range(3))
    facing = nx * lx + ny * ly + nz * lz
    gap = shape.distance(hits.x + 0.16 * nx, hits.y + 0.16 * ny, hits.z + 0.16 * nz)
    open_ = (0.4 + 0.6 * (gap / 0.16).clamp(0, 1)) * (0.72 + 0.28 * (hits.y * 3).clamp(0, 1))
    lit = trace.shadow(shape, hits.x + 0.02 * nx, hits.y + 0.02 * ny, hits.z + 0.02 * nz, (lx, ly, lz), 6)
    along = hits.dx * nx + hits.dy * ny + hits.dz * nz
    mx, my, mz = hits.dx - 2 * along * nx, hits.dy - 2 * along * ny, hits.dz - 2 * along * nz
    glossy = pick(surface.gloss(toys), hits.owner) * ((tint == 0) | (tint == 5))
    glint = ((mx * lx + my * ly + mz * lz).clamp(0, 1) ** 40 * 1.5).clamp(0, 1) * (0.3 + 0.7 * lit)
    mirror = ((my - 0.15) * 5).clamp(0, 1) * (0.1 + 0.5 * (1 + along).clamp(0, 1) ** 2)
    moods = [backdrop.MOODS[s.background] for s in scenes]
    key = pick(torch.tensor([m.key * s.light.strength for m, s in zip(moods, scenes, strict=True)]), hits.owner)
    ambient = pick(torch.tensor([m.ambient for m in moods]), hits.owner) * (0.72 + 0.28 * ny) * open_
    soft = (facing * 0.85 + 0.15).clamp(0, 1) * (0.25 + 0.75 * lit)
    hard = facing.clamp(0, 1) * (0.15 + 0.85 * lit)
    light = key * torch.lerp(soft, hard * 0.9, glossy) + ambient
    result: list[Tensor] = []
    for k in range(3):
        warm = torch.tensor([m.tint[k] * (1 + 0.025 * s.light.warmth * (1 - k)) for m, s in zip(moods, scenes, strict=True)])
        result.append(paint[k] * light * pick(warm, hits.owner) + glossy * (0.85 * glint + 0.55 * mirror))
    return result


def _groups(scenes: Sequence[Scene], kind: str) -> list[list[tuple[int, int]]]:
    """(scene, toy) numbers of one class in small groups; a scene comes at most once in a group, so writes never clash."""
    groups: list[list[tuple[int, int]]] = []
    for j in range(max(len(scene.toys) for scene in scenes)):
        same = [(i, j) for i, scene in enumerate(scenes) if len(scene.toys) > j and scene.toys[j].kind == kind]
        groups += [same[start : start + _GROUP] for start in range(0, len(same), _GROUP)]
    return groups


def painted(scenes: Sequence[Scene], size: int, supersample: int) -> Canvas:
    """The canvas of `scenes`, with everything on it."""
    canvas = Canvas(scenes, size, supersample)
    _paint_background(canvas)
    for kind in SHAPES:
        for group in _groups(scenes, kind):
            _paint_shadows(canvas, group, kind)
    n, s, side = len(scenes), supersample, canvas.side
    shade = canvas.shade.view(n, size, 1, size, 1).expand(n, size, s, size, s).reshape(n, side * side)
    canvas.colour *= shade
    for kind in SHAPES:
        for group in _groups(scenes, kind):
            _paint_toys(canvas, group, kind)
    return canvas
