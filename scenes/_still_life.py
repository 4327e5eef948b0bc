"""The still life: a glazed teapot, books, fruit, a vase, a doughnut and toy blocks on a gingham cloth.

Everything is made here: lathed and swept meshes (`_meshes`), procedural textures (`_textures`), one warm and one cool
area light and a faint sky over a round papered room. World axes: x right, y away from the middle camera, z up, table
top at z = 0; one unit is about 20 cm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _textures as textures
from ._meshes import box, ellipsoid, lathe, merge, sheet, smooth_curve, torus, tube
from ._thing import Thing

ROOM_RADIUS = 4.7
ROOM_HEIGHT = 3.6


def _teapot(rng: np.random.Generator) -> Iterator[Thing]:
    at, turn, scale = (0.2, 0.22, 0.012), -24.0, 1.12
    body = [(0.0, 0.02), (0.24, 0.0), (0.29, 0.02), (0.41, 0.14), (0.475, 0.31), (0.455, 0.47), (0.36, 0.6)]
    body += [(0.27, 0.66), (0.255, 0.685)]
    lid = [(0.262, 0.68), (0.25, 0.71), (0.19, 0.755), (0.09, 0.79), (0.05, 0.82), (0.075, 0.86), (0.085, 0.895)]
    lid += [(0.05, 0.935), (0.0, 0.945)]
    spout = smooth_curve([(0.38, 0, 0.22), (0.56, 0, 0.29), (0.66, 0, 0.46), (0.73, 0, 0.6), (0.82, 0, 0.665)])
    spout_radius = smooth_curve([(0.15,), (0.115,), (0.08,), (0.062,), (0.066,)])[:, 0]
    handle = smooth_curve(
        [(-0.36, 0, 0.56), (-0.56, 0, 0.66), (-0.76, 0, 0.6), (-0.79, 0, 0.4), (-0.65, 0, 0.23), (-0.43, 0, 0.17)]
    )
    glaze, cream, accent = (52, 148, 150), (240, 228, 200), (206, 84, 58)
    yield Thing(
        lathe(smooth_curve(body, 96)).placed(at, turn, scale=scale),
        textures.teapot_glaze(rng, glaze, cream, accent),
        0.12,
    )
    attachments = merge(lathe(smooth_curve(lid, 80)), tube(spout, spout_radius), tube(handle, np.full(64, 0.05)))
    yield Thing(attachments.placed(at, turn, scale=scale), textures.plain((45, 130, 132)), 0.12)
    knob = ellipsoid(0.07, 0.07, 0.05).placed((0, 0, 0.915))
    mouth = ellipsoid(0.046, 0.046, 0.006).placed((0.82, 0, 0.665), 90, 54)
    yield Thing(knob.placed(at, turn, scale=scale), textures.plain(accent), 0.12)
    yield Thing(mouth.placed(at, turn, scale=scale), textures.plain((24, 66, 68)))


def _vase(rng: np.random.Generator) -> Iterator[Thing]:
    outside = [(0.0, 0.01), (0.19, 0.0), (0.22, 0.04), (0.31, 0.28), (0.35, 0.5), (0.3, 0.76), (0.17, 0.98)]
    outside += [(0.135, 1.1), (0.2, 1.24)]
    inside = [(0.2, 1.24), (0.17, 1.22), (0.11, 1.1), (0.13, 0.95)]
    at = (-0.42, 0.78, 0.012)
    yield Thing(
        lathe(smooth_curve(outside, 120)).placed(at),
        textures.vase_pattern(rng, (176, 92, 58), (228, 206, 168), (104, 70, 62)),
        0.25,
    )
    yield Thing(lathe(smooth_curve(inside, 32)).placed(at), textures.plain((150, 78, 50)))


def _book(
    rng: np.random.Generator,
    size: tuple[float, float, float],
    at: tuple[float, float, float],
    turn: float,
    cloth: textures.Colour,
    gilt: textures.Colour,
) -> Iterator[Thing]:
    """A closed book lying down, its spine towards -y before turning."""
    width, depth, height = size
    board = 0.025
    cover = textures.book_cover(rng, cloth, gilt)
    boards = [box(width, depth, board).placed((0, 0, z)) for z in (0.0, height - board)]
    yield Thing(merge(*boards).placed(at, turn), cover, 0.3)
    spine = box(width, board, height).placed((0, -depth / 2 - 0.4 * board, 0))
    yield Thing(spine.placed(at, turn), textures.book_spine(rng, cloth, gilt), 0.3)
    block = box(width - 0.06, depth - 0.04, height - 2 * board).placed((0, 0, board))
    yield Thing(block.placed(at, turn), textures.pages(rng))


def _books(rng: np.random.Generator) -> Iterator[Thing]:
    x, y, z = -0.78, -0.08, 0.012
    yield from _book(rng, (0.92, 0.66, 0.15), (x, y, z), 24.0, (36, 58, 104), (222, 184, 96))
    yield from _book(rng, (0.82, 0.58, 0.12), (x + 0.02, y + 0.01, z + 0.15), 8.0, (206, 150, 44), (92, 44, 30))
    yield from _book(rng, (0.7, 0.5, 0.13), (x - 0.02, y + 0.03, z + 0.27), 33.0, (140, 42, 46), (236, 208, 150))


def _fruit(rng: np.random.Generator) -> Iterator[Thing]:
    apple = [(0.0, 0.03), (0.06, 0.01), (0.13, 0.03), (0.2, 0.12), (0.225, 0.23), (0.2, 0.33), (0.13, 0.385)]
    apple += [(0.06, 0.375), (0.0, 0.32)]
    stalk = tube(smooth_curve([(0.0, 0, 0.31), (0.005, 0, 0.38), (0.03, 0, 0.45)]), np.linspace(0.016, 0.022, 64))
    at = (-0.8, -0.04, 0.405)
    yield Thing(lathe(smooth_curve(apple, 80)).placed(at, 40), textures.apple_skin(rng), 0.16)
    yield Thing(stalk.placed(at, 40), textures.plain((84, 58, 36)))

    pear = [(0.0, 0.02), (0.08, 0.0), (0.17, 0.06), (0.215, 0.18), (0.19, 0.31), (0.12, 0.42), (0.09, 0.52)]
    pear += [(0.06, 0.575), (0.0, 0.58)]
    skin = textures.peel(rng, (186, 186, 72), (142, 132, 40), (150, 120, 60), 36, 0.22)
    at = (-0.2, -0.42, 0.012)
    stalk = tube(smooth_curve([(0.0, 0, 0.56), (0.01, 0, 0.62), (0.045, 0, 0.69)]), np.linspace(0.016, 0.02, 64))
    yield Thing(lathe(smooth_curve(pear, 80)).placed(at, 20), skin, 0.25)
    yield Thing(stalk.placed(at, 200), textures.plain((84, 58, 36)))

    orange = textures.peel(rng, (246, 152, 40), (228, 120, 24), (150, 140, 50), 44, 0.2)
    yield Thing(ellipsoid(0.215, 0.215, 0.2).placed((0.92, -0.2, 0.212), 30, 35), orange, 0.22)
    yield Thing(ellipsoid(0.205, 0.205, 0.195).placed((1.2, 0.12, 0.207), 160, -50), orange, 0.22)
    lemon = [(0.0, -0.25), (0.035, -0.235), (0.06, -0.205), (0.13, -0.12), (0.155, 0.0), (0.13, 0.12), (0.06, 0.2)]
    lemon += [(0.03, 0.24), (0.0, 0.25)]
    yellow = textures.peel(rng, (238, 206, 60), (222, 178, 36), (190, 180, 60), 40, 0.2)
    yield Thing(lathe(smooth_curve(lemon, 80)).placed((-0.5, -0.86, 0.165), 65, 88), yellow, 0.22)


def _doughnut_on_plate(rng: np.random.Generator) -> Iterator[Thing]:
    plate = [(0.0, 0.005), (0.2, 0.0), (0.25, 0.005), (0.34, 0.035), (0.46, 0.065), (0.475, 0.072), (0.46, 0.078)]
    plate += [(0.34, 0.052), (0.25, 0.022), (0.2, 0.02), (0.0, 0.02)]
    at = (0.4, -0.7, 0.012)
    yield Thing(
        lathe(smooth_curve(plate, 120)).placed(at), textures.plate_rim(rng, (238, 236, 228), (52, 86, 150)), 0.1
    )
    ring = torus(0.2, 0.11).placed((at[0], at[1], at[2] + 0.125), 10, 4)
    yield Thing(ring, textures.doughnut(rng), 0.18)


def _toy_blocks(rng: np.random.Generator) -> Iterator[Thing]:
    tone = (222, 184, 130)
    for at, turn, paint, figure in (
        ((0.8, 0.92, 0.012), 20.0, (190, 58, 50), "star"),
        ((1.2, 0.74, 0.012), -32.0, (48, 108, 168), "cross"),
        ((0.94, 0.86, 0.352), 52.0, (72, 140, 76), "disc"),
    ):
        yield Thing(box(0.34, 0.34, 0.34).placed(at, turn), textures.toy_block(rng, paint, tone, figure), 0.3)


def _table(rng: np.random.Generator) -> Iterator[Thing]:
    half = 1.01 * ROOM_RADIUS
    yield Thing(
        sheet(2 * half, 2 * half, np.zeros((2, 2))), textures.wood(rng, 14, (196, 146, 98), (142, 96, 62)), 0.35
    )
    grid = np.linspace(-1, 1, 97)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    rim = np.clip((np.maximum(np.abs(x), np.abs(y)) - 0.72) / 0.28, 0, 1) ** 2
    folds = 0.5 + 0.5 * np.sin(9 * x + 4 * np.sin(5 * y)) * np.cos(8 * y + 3 * x)
    cloth = sheet(3.1, 2.9, 0.012 + 0.06 * rim * folds)
    yield Thing(
        cloth.placed((0.08, 0.02, 0), 14), textures.gingham(rng, 7, (226, 216, 196), (132, 154, 182), (178, 84, 74))
    )


def _room(rng: np.random.Generator) -> Iterator[Thing]:
    wall = np.array([[ROOM_RADIUS, ROOM_HEIGHT], [ROOM_RADIUS, 0.0]])  # downwards, so that it faces inwards
    paper = textures.wallpaper(
        rng, 22, 2 * np.pi * ROOM_RADIUS / ROOM_HEIGHT, (222, 210, 182), (158, 174, 150), (196, 142, 108)
    )
    yield Thing(lathe(wall, 256), paper[::-1])


def things(seed: int) -> list[Thing]:
    """Every object of the scene; `seed` decides the noise in the textures, nothing else."""
    rng = np.random.default_rng(seed)
    parts = (_room, _table, _teapot, _vase, _books, _fruit, _doughnut_on_plate, _toy_blocks)
    return [thing for part in parts for thing in part(rng)]


def scene_dict(mi: Any, folder: Path, seed: int) -> dict[str, Any]:
    """The scene in Mitsuba's dictionary form, without sensor and integrator.

    Args:
        mi: the mitsuba module, its variant set.
        folder: where the meshes are written as PLY files; needed until the scene is loaded.
        seed: as in `things`.
    """

    def light(at: tuple[float, float, float], size: float, radiance: tuple[float, float, float]) -> dict[str, Any]:
        frame = mi.ScalarTransform4f().look_at(origin=list(at), target=[0, 0, 0.3], up=[0, 0, 1])
        return {
            "type": "rectangle",
            "to_world": frame @ mi.ScalarTransform4f().scale(size / 2),
            "bsdf": {"type": "diffuse", "reflectance": {"type": "rgb", "value": 0.0}},
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": list(radiance)}},
        }

    scene: dict[str, Any] = {
        "type": "scene",
        "key": light((-2.9, -2.2, 5.2), 2.4, (21.0, 18.6, 15.4)),
        "fill": light((3.4, -1.6, 4.9), 2.2, (5.6, 6.6, 8.0)),
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": [0.5, 0.53, 0.58]}},
    }
    for k, thing in enumerate(things(seed)):
        path = folder / f"{k:03d}.ply"
        thing.mesh.write_ply(path)
        scene[f"thing_{k:03d}"] = thing.to_dict(mi, path, wrap="repeat")
    return scene
