"""Random scenes: things, lights and cameras.

World axes are x right, y away from forward-facing cameras, z up. One unit is about half a metre. So things are 0.2 to 2
units large, and rooms 4 to 20 units wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import _random_things as make
from ._meshes import box, lathe, sheet
from ._random_textures import foliage, random_texture
from ._random_things import Rng, about_z
from ._textures import noise
from ._thing import Thing
from .make import look_at

PIXELS = 300_000
"""Of all pictures of a scene together, at most: large pictures come in small numbers."""

_UPRIGHT = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])  # turns a sheet that faces up towards -y


@dataclass
class Stage:
    """A scene as it is drawn, before anything is rendered.

    Attributes:
        kind: one of `KINDS`.
        things: everything that can be seen.
        lights: emitters in Mitsuba's dictionary form, without names.
        sky, ground: [3] light that reaches surfaces facing up and down from everywhere, without shadows.
        open: whether there is nothing behind the things, so that pictures have transparent pixels.
        poses: camera-to-world matrices [4, 4], OpenGL axes.
        fov: field of view along the longer side, in degrees.
        size: width and height of pictures.
        brightness: linear radiance that the middle of all pixels is exposed to.
    """

    kind: str
    things: list[Thing] = field(default_factory=list)
    lights: list[dict[str, Any]] = field(default_factory=list)
    sky: np.ndarray = field(default_factory=lambda: np.full(3, 0.5))
    ground: np.ndarray = field(default_factory=lambda: np.full(3, 0.2))
    open: bool = False
    poses: list[np.ndarray] = field(default_factory=list)
    fov: float = 50.0
    size: tuple[int, int] = (128, 96)
    brightness: float = 0.25

    def place(self, things: list[Thing], linear: np.ndarray, at: np.ndarray | tuple[float, float, float]) -> None:
        """Add things, moved."""
        self.things += [replace(thing, mesh=thing.mesh.transformed(linear, at)) for thing in things]


# Surroundings


def _ground(rng: Rng, width: float, texture: np.ndarray, relief: float) -> Thing:
    """A floor whose highest point is z = 0."""
    heights = relief * noise(rng, 48, 48, 5, 5)
    times = width / rng.uniform(1.2, 5.0)
    return Thing(sheet(width, width, heights - heights.max()).tiled(times, times), texture)


def _walls(rng: Rng, radius: float, height: float, textures: list[np.ndarray]) -> list[Thing]:
    """Round about the origin, or four of them."""
    if len(textures) == 1:
        wall = lathe(np.array([[radius, height], [radius, -0.5]]), 72)
        times = rng.uniform(0.7, 2.5)
        return [Thing(wall.tiled(max(1, round(2 * math.pi * radius / height * times)), times), textures[0])]
    things = []
    for k, texture in enumerate(textures):
        bumps = np.zeros((2, 2)) if rng.uniform() < 0.7 else 0.15 * noise(rng, 32, 32, 6, 6)
        wall = sheet(2.1 * radius, height + 0.5, bumps).transformed(_UPRIGHT, (0, radius, height / 2 - 0.25))
        times = rng.uniform(0.7, 3.0)
        things.append(
            Thing(wall.transformed(about_z(k * math.pi / 2)).tiled(times * 2 * radius / height, times), texture)
        )
    return things


def _room(rng: Rng, stage: Stage, radius: float, height: float, plain: float, relief: float = 0.0) -> None:
    stage.things.append(_ground(rng, 2.4 * radius, random_texture(rng, plain=plain, size=512), relief))
    count = 1 if rng.uniform() < 0.4 else 4
    stage.things += _walls(rng, radius, height, [random_texture(rng, plain=plain, size=512) for _ in range(count)])
    ceiling = sheet(2.4 * radius, 2.4 * radius, np.zeros((2, 2))).transformed(np.diag([1, -1, -1.0]), (0, 0, height))
    times = rng.uniform(1, 6)
    stage.things.append(Thing(ceiling.tiled(times, times), random_texture(rng, plain=0.5)))


def _backdrop(rng: Rng, stage: Stage, depth: float, texture: np.ndarray) -> None:
    """A wall behind forward-facing cameras' subject, flat or with relief."""
    bumps = rng.choice([0.0, 0.2, 0.8]) * noise(rng, 48, 48, 8, 8)
    wall = sheet(10 * depth, 8 * depth, bumps).transformed(_UPRIGHT, (0, depth, 0))
    times = rng.uniform(2, 7)
    stage.things.append(Thing(wall.tiled(1.25 * times, times), texture))


def _scatter(rng: Rng, stage: Stage, count: int, radius: float, scale: tuple[float, float], soft: float) -> None:
    """Things standing on z = 0 within a circle, rarely one within another; some float or lie upon others."""
    taken: list[tuple[np.ndarray, float]] = []
    for _ in range(count):
        size = rng.uniform(*scale)
        at = np.zeros(2)
        for _ in range(12):
            angle, distance = rng.uniform(0, 2 * math.pi), radius * math.sqrt(rng.uniform())
            at = distance * np.array([math.cos(angle), math.sin(angle)])
            if all(np.linalg.norm(at - other) > 0.7 * (size + reach) for other, reach in taken):
                break
        taken.append((at, size))
        lift = 0.0 if rng.uniform() < 0.85 else rng.uniform(0, 1.0)
        turned = size * about_z(rng.uniform(0, 2 * math.pi))
        stage.place(make.any_thing(rng, soft), turned, (at[0], at[1], lift))


# Light


def _rgb(value: np.ndarray) -> dict[str, Any]:
    return {"type": "rgb", "value": value.tolist()}


def _tint(rng: Rng, spread: float) -> np.ndarray:
    return 1 + spread * rng.uniform(-1, 1, 3)


def _ambient(rng: Rng, stage: Stage, least: float, most: float) -> None:
    level = rng.uniform(least, most)
    stage.sky = level * _tint(rng, 0.15)
    stage.ground = level * rng.uniform(0.3, 0.8) * _tint(rng, 0.15)


def _light_from_afar(rng: Rng, stage: Stage, forward: bool) -> None:
    """One light or three, as the sun or as a large bright window far away; from the cameras' side if `forward`."""
    _ambient(rng, stage, 0.25, 0.9)
    wide = rng.uniform() < 0.35
    for k in range(1 if wide else int(rng.choice([1, 3]))):
        towards = np.array([*rng.uniform(-1, 1, 2), rng.uniform(0.4, 1.3)])
        if forward:
            towards = np.array([rng.uniform(-0.9, 0.9), rng.uniform(-1.2, -0.5), rng.uniform(0, 1.1)])
        towards /= np.linalg.norm(towards)
        power = rng.uniform(1.0, 3.5) / (1 + k) * _tint(rng, 0.12)
        if wide:
            distance, radius = 14.0, rng.uniform(0.8, 3.0)
            radiance = power * distance**2 / (math.pi * radius**2)
            stage.lights.append(_lamp(distance * towards, radius, radiance))
        else:
            stage.lights.append({"type": "directional", "direction": (-towards).tolist(), "irradiance": _rgb(power)})


def _light_inside(rng: Rng, stage: Stage, radius: float, height: float) -> None:
    """One lamp or three below the ceiling, as points or as globes."""
    _ambient(rng, stage, 0.25, 0.8)
    wide = rng.uniform() < 0.35
    for k in range(1 if wide else int(rng.choice([1, 3]))):
        angle, away = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.1, 0.8)
        at = np.array([away * math.cos(angle), away * math.sin(angle), height * rng.uniform(0.75, 0.92)])
        intensity = rng.uniform(0.7, 2.0) / (1 + k) * _tint(rng, 0.12) * float(at @ at)
        if wide:
            globe = rng.uniform(0.1, 0.35)
            stage.lights.append(_lamp(at, globe, intensity / (math.pi * globe**2)))
        else:
            stage.lights.append({"type": "point", "position": at.tolist(), "intensity": _rgb(intensity)})


def _lamp(at: np.ndarray, radius: float, radiance: np.ndarray) -> dict[str, Any]:
    emitter = {"type": "area", "radiance": _rgb(radiance)}
    return {"type": "sphere", "center": at.tolist(), "radius": radius, "emitter": emitter}


# Cameras


def _rolled(rng: Rng, pose: np.ndarray, degrees: float) -> np.ndarray:
    angle = math.radians(degrees) * rng.standard_normal()
    turned = pose.copy()
    turned[:3, :3] = pose[:3, :3] @ about_z(angle)
    return turned


def _sphere(azimuth: float, elevation: float) -> np.ndarray:
    flat = math.cos(elevation)
    return np.array([math.sin(azimuth) * flat, -math.cos(azimuth) * flat, math.sin(elevation)])


def _inward(
    rng: Rng, stage: Stage, count: int, target: np.ndarray, radius: float, step: float, elevation: tuple[float, float]
) -> None:
    """Cameras around a target, about `step` degrees from their neighbours, on a ring, on rows or all over a zone."""
    low, high = (math.radians(x) for x in elevation)
    step = math.radians(step)
    pattern = rng.choice(["ring", "rows", "zone"]) if count >= 12 else "ring"
    middle, start = rng.uniform(low, high), rng.uniform(0, 2 * math.pi)
    aim, hand = rng.uniform(0.02, 0.2), rng.uniform(0.02, 0.15)
    rows = int(rng.integers(2, 4)) if pattern == "rows" else 1
    columns = math.ceil(count / rows)
    for k in range(count):
        if pattern == "zone":  # as many as cover it, a step apart
            sweep = min(2 * math.pi, count * step**2 / max(high - low, step))
            azimuth, height = sweep * (k + rng.uniform()) / count, rng.uniform(low, high)
        else:
            row, column = k % rows, k // rows
            sweep = min(2 * math.pi * (1 - 1 / columns), step * (columns - 1))
            azimuth = sweep * (column + 0.5 * (row % 2)) / max(columns - 1, 1) + 0.3 * step * rng.uniform(-1, 1)
            height = middle if rows == 1 else low + (high - low) * row / (rows - 1)
            height += 0.3 * min(step, high - low) * rng.uniform(-1, 1)
        origin = target + radius * (1 + hand * rng.uniform(-1, 1)) * _sphere(
            start + azimuth, float(np.clip(height, -1.4, 1.4))
        )
        pose = look_at(origin, target + aim * radius / 3 * rng.uniform(-1, 1, 3))
        stage.poses.append(_rolled(rng, pose, 2.5))


def _forward(rng: Rng, stage: Stage, count: int, distance: float, spread: float, height: float) -> None:
    """Cameras on a window of `spread` units to each side that look about the same way: a grid, a line, or a cloud."""
    aim = np.array([0, rng.uniform(0, 2.5), height])
    together = rng.uniform(0, 1)  # 0: parallel, 1: all at one point
    pattern = rng.choice(["grid", "cloud", "line"])
    columns = max(2, round(math.sqrt(1.4 * count)))
    tilt = rng.uniform(-0.4, 0.4)
    for k in range(count):
        if pattern == "grid":
            rows = max(math.ceil(count / columns) - 1, 1)
            x, z = 2 * (k % columns) / (columns - 1) - 1, 2 * (k // columns) / rows - 1
            x, z = np.array([x, z]) + 0.15 * rng.uniform(-1, 1, 2)
        elif pattern == "line":
            x = 2 * k / (count - 1) - 1
            z = tilt * x + 0.1 * rng.uniform(-1, 1)
        else:
            x, z = rng.uniform(-1, 1, 2)
        origin = np.array([spread * x, -distance + 0.25 * spread * rng.uniform(-1, 1), height + 0.7 * spread * z])
        target = aim + (1 - together) * np.array([origin[0], 0, origin[2] - height]) + 0.12 * rng.uniform(-1, 1, 3)
        stage.poses.append(_rolled(rng, look_at(origin, target), 2.0))


# Kinds of scenes


def _table(rng: Rng, stage: Stage, count: int) -> None:
    """Things on a floor or table in a room, photographed from around."""
    radius, height = rng.uniform(4.5, 9.0), rng.uniform(4.5, 8.0)
    _room(rng, stage, radius, height, plain=0.12, relief=float(rng.choice([0.0, 0.0, 0.1, 0.25])))
    _scatter(rng, stage, int(rng.integers(3, 15)), rng.uniform(1.0, 1.8), (0.25, 0.7), soft=0.15)
    if rng.uniform() < 0.5:  # clutter farther out
        for _ in range(int(rng.integers(2, 8))):
            angle, away = rng.uniform(0, 2 * math.pi), rng.uniform(0.75, 0.95) * radius
            at = (away * math.cos(angle), away * math.sin(angle), 0.0)
            stage.place(make.any_thing(rng), rng.uniform(0.6, 1.4) * about_z(rng.uniform(0, 6.3)), at)
    _light_inside(rng, stage, radius, height)
    target = np.array([0, 0, rng.uniform(0.25, 0.6)])
    _inward(rng, stage, count, target, rng.uniform(2.6, 3.8), rng.uniform(4, 16), (10, 50))


def _board(rng: Rng, stage: Stage, count: int) -> None:
    """A set of pieces on a board, on a plain table between plain walls, from few and distant viewpoints."""
    radius, height = rng.uniform(4.5, 8.0), rng.uniform(4.5, 7.0)
    _room(rng, stage, radius, height, plain=0.75)
    side, thick = rng.uniform(2.0, 3.2), rng.uniform(0.02, 0.15)
    stage.things.append(make.covered(rng, box(side, side, thick), gloss=0.4, size=512))
    squares = int(rng.integers(4, 9))
    cell = side / (squares + 0.6)
    colours = [random_texture(rng, plain=0.5, size=64) for _ in range(2)]
    gloss = [float(rng.uniform(0.1, 0.3)) if rng.uniform() < 0.6 else None for _ in range(2)]
    places = rng.permutation(squares**2)[: int(rng.integers(6, 20))]
    for k, cell_index in enumerate(places):
        x, y = (np.array(divmod(int(cell_index), squares)) - (squares - 1) / 2) * cell
        scale = cell * rng.uniform(1.0, 1.35)
        team = k % 2
        piece = make.chess_piece(rng, colours[team], gloss[team]) if rng.uniform() < 0.8 else make.solid(rng)
        scale *= 1.0 if len(piece[0].mesh.points) > 2000 else 0.4
        stage.place(piece, scale * about_z(rng.uniform(0, 6.3)), (x, y, thick))
    _light_inside(rng, stage, radius, height)
    _inward(rng, stage, count, np.array([0, 0, 0.3]), rng.uniform(2.6, 3.6), rng.uniform(8, 26), (20, 60))


def _object(rng: Rng, stage: Stage, count: int) -> None:
    """One thing or a group before nothing at all, now and then on a stand."""
    stage.open = True
    if rng.uniform() < 0.6:
        stage.place(make.any_thing(rng, soft=0.35), 1.1 * about_z(rng.uniform(0, 6.3)), (0, 0, 0))
        if rng.uniform() < 0.4:
            stage.place(make.any_thing(rng, soft=0.3), 0.5 * about_z(rng.uniform(0, 6.3)), (0.9, -0.4, 0))
    else:
        _scatter(rng, stage, int(rng.integers(3, 9)), 0.9, (0.25, 0.55), soft=0.25)
    if rng.uniform() < 0.4:
        radius = rng.uniform(1.2, 1.7)
        disc = lathe(np.array([[0.002, -0.06], [radius, -0.06], [radius, 0.0], [0.002, 0.0]]), 48)
        square = box(1.8 * radius, 1.8 * radius, 0.06).transformed(np.eye(3), (0, 0, -0.06))
        stage.things.append(make.covered(rng, disc if rng.uniform() < 0.5 else square, plain=0.4))
    points = np.concatenate([thing.mesh.points for thing in stage.things])
    low, high = np.percentile(points, [1, 99], axis=0)
    extent = float(np.linalg.norm(high - low)) / 2
    _light_from_afar(rng, stage, forward=False)
    distance = extent / math.sin(math.radians(stage.fov / 2)) * rng.uniform(0.85, 1.15)
    below = -10 if rng.uniform() < 0.2 else 5
    _inward(rng, stage, count, (low + high) / 2, distance, rng.uniform(8, 22), (below, rng.uniform(30, 75)))


def _shelf(rng: Rng, stage: Stage, count: int) -> None:
    """Things at all depths before a wall, from cameras that look one way."""
    depth = rng.uniform(2.0, 8.0)
    floor = rng.uniform(-2.2, -1.0)
    on_floor = rng.uniform() < 0.6
    for _ in range(int(rng.integers(8, 30))):
        y = rng.uniform(-2.0, 0.8 * depth)
        reach = 0.42 * (y + 4.5)
        at = np.array([rng.uniform(-1, 1) * reach, y, floor if on_floor else rng.uniform(-0.7, 0.7) * reach])
        turned = about_z(rng.uniform(0, 6.3)) if on_floor or rng.uniform() < 0.5 else make.random_rotation(rng)
        stage.place(make.any_thing(rng, soft=0.15), rng.uniform(0.3, 1.0) * turned, at)
    _backdrop(rng, stage, depth, random_texture(rng, plain=0.1, size=512))
    if on_floor or rng.uniform() < 0.4:
        ground = _ground(rng, 10 * depth, random_texture(rng, size=512), float(rng.choice([0.0, 0.1])))
        stage.place([ground], np.eye(3), (0, 0, floor))
    _light_from_afar(rng, stage, forward=True)
    _forward(rng, stage, count, rng.uniform(3.4, 5.0), rng.uniform(0.3, 1.3), 0.0)


def _garden(rng: Rng, stage: Stage, count: int) -> None:
    """Plants among plants, on grass, before a hedge or a wall."""
    depth = rng.uniform(2.5, 7.0)
    floor = -rng.uniform(0.7, 1.6)
    ground = foliage(rng, 512) if rng.uniform() < 0.5 else random_texture(rng, plain=0.05, size=512)
    stage.place([_ground(rng, 10 * depth, ground, rng.uniform(0, 0.2))], np.eye(3), (0, 0, floor))
    _backdrop(rng, stage, depth, foliage(rng, 512) if rng.uniform() < 0.5 else random_texture(rng, plain=0.1, size=512))
    around = rng.uniform() < 0.35
    kinds = (make.plant, make.fern, make.grass, make.tree)
    weights = rng.dirichlet([1.0, 1.2, 1.2, 0.6])
    for _ in range(int(rng.integers(8, 26))):
        y = rng.uniform(-1.6, 0.85 * depth)
        at = np.array([rng.uniform(-1, 1) * 0.5 * (y + 4.5), y, floor])
        if around and math.hypot(at[0], at[1]) > 0.85 * depth:
            continue
        maker = kinds[int(rng.choice(4, p=weights))] if rng.uniform() < 0.9 else make.solid
        stage.place(maker(rng), rng.uniform(0.6, 1.5) * about_z(rng.uniform(0, 6.3)), at)
    _light_from_afar(rng, stage, forward=True)
    _forward(rng, stage, count, rng.uniform(3.2, 4.6), rng.uniform(0.3, 1.2), rng.uniform(-0.3, 0.4))


def _indoors(rng: Rng, stage: Stage, count: int) -> None:
    """A room with furniture and pictures along its walls, photographed from within."""
    radius, height = rng.uniform(2.8, 5.0), rng.uniform(2.6, 3.6)
    _room(rng, stage, radius, height, plain=0.35)
    for _ in range(int(rng.integers(10, 26))):
        wall = about_z(math.pi / 2 * int(rng.integers(4)))
        along = rng.uniform(-0.85, 0.85) * radius
        if rng.uniform() < 0.4:
            width, tall = rng.uniform(0.4, 1.4, 2)
            picture = make.covered(rng, box(width, 0.05, tall), gloss=0.2)
            stage.place([picture], wall, wall @ [along, 0.95 * radius, rng.uniform(0.6, 0.9 * height - tall / 2)])
        else:
            maker = make.furniture if rng.uniform() < 0.6 else make.any_thing
            stage.place(maker(rng), rng.uniform(0.5, 1.1) * wall, wall @ [along, 0.78 * radius, 0])
    _scatter(rng, stage, int(rng.integers(2, 7)), 0.5 * radius, (0.2, 0.5), soft=0.15)
    _light_inside(rng, stage, radius, height)
    eye, start = rng.uniform(0.9, 1.7), rng.uniform(0, 2 * math.pi)
    back = rng.uniform(0.2, 0.6) * radius
    turn, walk = math.radians(rng.uniform(10, 90)), rng.uniform(0.6, 2.0)
    hand = rng.uniform(0.05, 0.25)
    forward = np.array([math.cos(start), math.sin(start), 0])
    side = np.array([-forward[1], forward[0], 0])
    for k in range(count):
        t = k / (count - 1) - 0.5
        looking = forward * math.cos(turn * t) + side * math.sin(turn * t) + [0, 0, -rng.uniform(0, 0.25)]
        origin = -back * forward + walk * t * side + hand * rng.uniform(-1, 1, 3) + np.array([0, 0, eye])
        stage.poses.append(_rolled(rng, look_at(origin, origin + looking), 2.0))


KINDS: dict[str, tuple[Callable[[Rng, Stage, int], None], float]] = {
    "table": (_table, 0.24),
    "board": (_board, 0.1),
    "object": (_object, 0.18),
    "shelf": (_shelf, 0.2),
    "garden": (_garden, 0.14),
    "indoors": (_indoors, 0.14),
}
"""What makes a scene of each kind, and how often it comes."""

_LONGER_SIDES = {96: 0.08, 112: 0.12, 128: 0.3, 160: 0.2, 192: 0.16, 252: 0.14}
_ASPECTS = {4 / 3: 0.55, 3 / 2: 0.12, 16 / 9: 0.08, 1.0: 0.1, 3 / 4: 0.12, 2 / 3: 0.03}


def _draw(rng: Rng, table: dict[Any, float]) -> Any:
    return list(table)[int(rng.choice(len(table), p=np.array(list(table.values())) / sum(table.values())))]


def draw_stage(rng: Rng, size: tuple[int, int] | None) -> Stage:
    """A random scene. `size` overrides the random size of pictures."""
    kind = _draw(rng, {name: share for name, (_, share) in KINDS.items()})
    longer, aspect = _draw(rng, _LONGER_SIDES), _draw(rng, _ASPECTS)
    shorter = 4 * round(longer * min(aspect, 1 / aspect) / 4)
    drawn = (longer, shorter) if aspect >= 1 else (shorter, longer)
    stage = Stage(kind, size=drawn if size is None else size)
    wanted = 8 + int(33 * rng.beta(1.1, 2.4))
    count = min(max(PIXELS // (stage.size[0] * stage.size[1]), 8), wanted, 40)
    stage.fov = float(rng.uniform(28, 50) if kind == "object" else rng.uniform(38, 72))
    stage.brightness = float(rng.uniform(0.11, 0.27))
    KINDS[kind][0](rng, stage, count)
    return stage
