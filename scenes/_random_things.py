"""Random things for the factory's scenes: solids, vessels, furniture, plants and fur, with materials.

A thing stands on z = 0 or lies around the origin, with a radius of about one unit. The caller scales it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._meshes import Mesh, box, ellipsoid, extrude, lathe, merge, ribbons, sheet, smooth_curve, torus, tube
from ._random_textures import leaf_colour, random_colour, random_texture
from ._textures import mix, noise, to_bytes
from ._thing import Thing

Rng = np.random.Generator


def random_rotation(rng: Rng) -> np.ndarray:
    """A [3, 3] rotation, all equally likely."""
    w, x, y, z = (q := rng.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def about_z(angle: float) -> np.ndarray:
    """The [3, 3] rotation about z, in radians, anticlockwise seen from above."""
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])


def covered(rng: Rng, mesh: Mesh, *, plain: float = 0.12, gloss: float = 0.3, size: int = 256) -> Thing:
    """A mesh under any texture, glossy with probability `gloss`."""
    roughness = float(rng.uniform(0.1, 0.35)) if rng.uniform() < gloss else None
    times = float(rng.uniform(0.6, 2.0))
    return Thing(mesh.tiled(times, times), random_texture(rng, plain=plain, size=size), roughness)


def _on_ground(mesh: Mesh) -> Mesh:
    return mesh.transformed(np.eye(3), (0, 0, -mesh.points[:, 2].min()))


# Solids, about the origin


def _ball(rng: Rng) -> Mesh:
    return ellipsoid(*rng.uniform(0.4, 1.0, 3), segments=40)


def _block(rng: Rng) -> Mesh:
    width, depth, height = rng.uniform(0.3, 1.7, 3)
    return box(width, depth, height).transformed(np.eye(3), (0, 0, -height / 2))


def _ring(rng: Rng) -> Mesh:
    radius = rng.uniform(0.08, 0.4)
    return torus(1 - radius, radius, 48)


def _prism(rng: Rng) -> Mesh:
    corners = int(rng.integers(3, 9))
    inner = rng.uniform(0.4, 1.0) if corners > 3 else 1.0
    angle = np.linspace(0, 2 * np.pi, 2 * corners, endpoint=False)
    radius = np.where(np.arange(2 * corners) % 2, inner * np.cos(np.pi / corners), 1.0)
    height = rng.uniform(0.2, 1.6)
    prism = extrude(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), height)
    return prism.transformed(np.eye(3), (0, 0, -height / 2))


def _bump(rng: Rng) -> Mesh:
    """A ball pushed in and out by waves, with normals of the surface that results."""
    waves, phase = 3 * rng.standard_normal((3, 4)), rng.uniform(0, 2 * np.pi, 4)
    ball = ellipsoid(0.8, 0.8, 0.8, 56)
    swell = 1 + 0.09 * np.sin(ball.points @ waves + phase).sum(axis=1)
    slope = 0.09 * np.cos(ball.points @ waves + phase) @ waves.T  # gradient of the swelling
    outward = ball.normals
    tangential = slope - (slope * outward).sum(axis=1, keepdims=True) * outward
    normals = swell[:, None] * outward - 0.8 * tangential
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return Mesh(ball.points * swell[:, None], normals, ball.uv, ball.faces)


def _knot(rng: Rng) -> Mesh:
    path = smooth_curve([(rng.uniform(-1, 1), 0.0, rng.uniform(-1, 1)) for _ in range(int(rng.integers(4, 8)))], 60)
    return tube(path, np.full(60, rng.uniform(0.05, 0.18)), 14)


def _rod(rng: Rng) -> Mesh:
    radius = rng.uniform(0.03, 0.12)
    return lathe(np.array([[0.001, -1], [radius, -1], [radius, 1], [0.001, 1]]), 20)


_SOLIDS: dict[Callable[[Rng], Mesh], float] = {
    _ball: 0.16,
    _block: 0.26,
    _ring: 0.1,
    _prism: 0.16,
    _bump: 0.12,
    _knot: 0.1,
    _rod: 0.1,
}


def _choose(rng: Rng, table: dict) -> Callable[..., object]:
    weights = np.array(list(table.values()))
    return list(table)[int(rng.choice(len(table), p=weights / weights.sum()))]


def solid(rng: Rng) -> list[Thing]:
    """A simple body in any position, resting on z = 0."""
    mesh = _choose(rng, _SOLIDS)(rng)
    assert isinstance(mesh, Mesh)
    turned = random_rotation(rng) if rng.uniform() < 0.4 else about_z(rng.uniform(0, 2 * np.pi))
    return [covered(rng, _on_ground(mesh.transformed(turned)))]


# Things that stand on z = 0


def vessel(rng: Rng) -> list[Thing]:
    """A turned body: bottle, vase, bowl, lamp, pawn; now and then with a handle or a ball on top."""
    height, corners = rng.uniform(0.5, 2.0), int(rng.integers(4, 9))
    radii, heights = rng.uniform(0.12, 0.7, corners), np.linspace(0, height, corners)
    is_open = rng.uniform() < 0.4
    outside = smooth_curve([(0.002, 0.0), *zip(radii.tolist(), heights.tolist(), strict=True)], 56)
    if not is_open:
        outside = np.concatenate([outside, [[0.002, height]]])
    profile = np.stack([np.maximum(outside[:, 0], 0.002), outside[:, 1]], axis=1)
    things = [covered(rng, lathe(profile, 44), gloss=0.45)]
    if rng.uniform() < 0.3:
        reach, low, high = radii.max(), 0.25 * height, 0.75 * height
        grip = smooth_curve(
            [(radii.min(), 0, low), (reach + 0.4, 0, low), (reach + 0.4, 0, high), (radii.min(), 0, high)]
        )
        things.append(covered(rng, tube(grip, np.full(64, 0.06), 12), plain=0.6))
    elif not is_open and rng.uniform() < 0.4:
        radius = rng.uniform(0.15, 0.4)
        ball = ellipsoid(radius, radius, radius, 32).transformed(np.eye(3), (0, 0, height + 0.9 * radius))
        things.append(covered(rng, ball, plain=0.4))
    return things


def _slab(width: float, depth: float, height: float, at: tuple[float, float, float]) -> Mesh:
    return box(width, depth, height).transformed(np.eye(3), at)


def furniture(rng: Rng) -> list[Thing]:
    """A table, a chair, a shelf with boxes in it, or stairs."""
    w, d, h, t = rng.uniform(0.7, 1.6), rng.uniform(0.5, 1.2), rng.uniform(0.6, 1.3), rng.uniform(0.05, 0.12)
    kind = rng.choice(["table", "chair", "shelf", "stairs"])
    if kind in ("table", "chair"):
        legs = [_slab(t, t, h, (x * (w - t) / 2, y * (d - t) / 2, 0)) for x in (-1, 1) for y in (-1, 1)]
        seat = _slab(w, d, t, (0, 0, h))
        if kind == "table":
            return [covered(rng, merge(*legs), plain=0.5), covered(rng, seat)]
        back = [_slab(t, t, 0.9 * h, (x * (w - t) / 2, (d - t) / 2, h + t)) for x in (-1, 1)]
        bars = int(rng.integers(1, 5))
        back += [_slab(w, t, 0.5 * h / bars, (0, (d - t) / 2, h + t + 0.9 * h * (k + 0.3) / bars)) for k in range(bars)]
        return [covered(rng, merge(*legs, *back), plain=0.3), covered(rng, seat)]
    if kind == "stairs":
        steps = int(rng.integers(3, 7))
        parts = [_slab(w, d, 1.2 * h * (k + 1) / steps, (0, (k - steps / 2) * d, 0)) for k in range(steps)]
        return [covered(rng, merge(*parts).transformed(np.diag([1, 2 / steps, 1.0])))]
    floors, height = int(rng.integers(2, 5)), 1.5 * h
    sides = [_slab(t, d, height, (x * (w - t) / 2, 0, 0)) for x in (-1, 1)]
    boards = [_slab(w, d, t, (0, 0, height * k / floors)) for k in range(floors + 1)]
    back = _slab(w, t / 2, height, (0, d / 2, 0))
    things = [covered(rng, merge(*sides, *boards, back), plain=0.3)]
    for k in range(floors):
        x = -0.45 * w
        while x < 0.35 * w:
            wide, tall = rng.uniform(0.06, 0.25), rng.uniform(0.3, 0.85) * height / floors
            thing = _slab(wide, 0.7 * d, tall, (x + wide / 2, -0.1 * d, height * k / floors + t))
            if rng.uniform() < 0.8:
                things.append(Thing(thing, random_texture(rng, size=64), None))
            x += wide + 0.01
    return things


def _leaf_texture(rng: Rng) -> np.ndarray:
    """Strips of different greens along u, shaded along v: each blade shows one part of it."""
    tones = np.array([leaf_colour(rng) for _ in range(int(rng.integers(1, 5)))], dtype=float)
    strip = tones[rng.integers(len(tones), size=16)] * rng.uniform(0.7, 1.2, (16, 1))
    colour = np.repeat(strip, 8, axis=0)[None] * np.linspace(1.15, 0.6, 128)[:, None, None]
    return to_bytes(colour * (1 + 0.08 * noise(rng, 128, 128, 10, 4))[..., None])


def _hair_texture(rng: Rng) -> np.ndarray:
    low, high = random_colour(rng), random_colour(rng)
    return to_bytes(mix(low, high, 0.5 + 0.5 * noise(rng, 128, 128, 16, 2)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def _taper(count: int, width: np.ndarray, shape: list[float]) -> np.ndarray:
    return np.broadcast_to(width.reshape(-1, 1), (count, 1)) * np.array(shape)


def grass(rng: Rng, radius: float = 0.8, count: int | None = None) -> list[Thing]:
    """A tuft of curved blades on a disc."""
    count = int(rng.integers(40, 200)) if count is None else count
    at = radius * np.sqrt(rng.uniform(0, 1, (count, 1)))
    angle = rng.uniform(0, 2 * np.pi, (count, 1))
    roots = np.concatenate([at * np.cos(angle), at * np.sin(angle), np.zeros((count, 1))], axis=1)
    length = rng.uniform(0.5, 1.0, (count, 1)) * rng.uniform(0.6, 1.8)
    lean = np.concatenate([0.35 * rng.standard_normal((count, 2)), np.ones((count, 1))], axis=1)
    tips = roots + length * _unit(lean)
    droop = length * np.concatenate([0.5 * rng.standard_normal((count, 2)), rng.uniform(-0.5, 0, (count, 1))], axis=1)
    width = rng.uniform(0.03, 0.1) * rng.uniform(0.7, 1.3, count)
    blades = ribbons(roots, tips, droop, _taper(count, width, [1.0, 0.95, 0.75, 0.45, 0.05]), rng, 4)
    return [Thing(blades, _leaf_texture(rng))]


def plant(rng: Rng) -> list[Thing]:
    """Stems with leaves, often in a pot."""
    stems, things, foot = int(rng.integers(3, 10)), [], 0.0
    if rng.uniform() < 0.6:
        foot = rng.uniform(0.3, 0.6)
        pot = np.array([[0.002, 0], [0.25, 0], [0.36, foot], [0.3, foot], [0.28, 0.85 * foot], [0.002, 0.85 * foot]])
        things.append(covered(rng, lathe(pot, 32)))
    leaf_roots, leaf_tips, parts = [], [], []
    for _ in range(stems):
        lean = rng.uniform(0, 0.7)
        height = rng.uniform(0.8, 2.0)
        curve = smooth_curve([(0, 0, 0.5 * foot), (0.3 * lean, 0, foot + 0.5 * height), (lean, 0, foot + height)], 24)
        turn = about_z(rng.uniform(0, 2 * np.pi))
        parts.append(tube(curve, np.full(24, 0.018), 6).transformed(turn))
        leaves = int(rng.integers(5, 22))
        at = curve[rng.integers(8, 24, leaves)] @ turn.T
        away = rng.standard_normal((leaves, 3)) + np.array([0, 0, 0.4])
        leaf_roots.append(at)
        leaf_tips.append(at + rng.uniform(0.2, 0.55, (leaves, 1)) * _unit(away))
    roots, tips = np.concatenate(leaf_roots), np.concatenate(leaf_tips)
    droop = np.array([0, 0, -1.0]) * rng.uniform(0, 0.3, (len(roots), 1))
    breadth = rng.uniform(0.08, 0.32) * np.ones(1)
    blades = ribbons(roots, tips, droop, _taper(len(roots), breadth, [0.15, 0.8, 1.0, 0.85, 0.5, 0.04]), rng, 5)
    return [*things, Thing(merge(*parts), _leaf_texture(rng)), Thing(blades, _leaf_texture(rng))]


def fern(rng: Rng) -> list[Thing]:
    """Fronds out of one root, each with two rows of leaflets."""
    fronds, roots, tips, widths = int(rng.integers(6, 16)), [], [], []
    breadth = rng.uniform(0.05, 0.1)
    for k in range(fronds):
        angle = 2 * np.pi * (k + rng.uniform(-0.3, 0.3)) / fronds
        reach, rise = rng.uniform(0.7, 1.5), rng.uniform(0.4, 1.5)
        t = np.linspace(0.12, 1, 26)[:, None]
        spine = t * [reach * np.cos(angle), reach * np.sin(angle), 0] + (1.6 * t - t**2) * [0, 0, rise]
        side = np.array([-np.sin(angle), np.cos(angle), 0])
        length = 0.42 * np.sin(np.pi * np.clip(1.02 * (1 - t), 0, 1) ** 0.7) + 0.02
        forward = np.gradient(spine, axis=0)
        for sign in (-1, 1):
            roots.append(spine)
            tips.append(spine + length * _unit(sign * side + 8 * forward + 0.08 * rng.standard_normal(spine.shape)))
            widths.append(np.full(len(spine), breadth))
        roots.append(spine[:-1])
        tips.append(spine[1:])
        widths.append(np.full(len(spine) - 1, 0.025))
    a, b, width = (np.concatenate(x) for x in (roots, tips, widths))
    droop = np.array([0, 0, -0.12]) * rng.uniform(0, 1, (len(a), 1))
    return [Thing(ribbons(a, b, droop, _taper(len(a), width, [0.5, 1.0, 0.7, 0.1]), rng, 3), _leaf_texture(rng))]


def tree(rng: Rng) -> list[Thing]:
    """A trunk with a few limbs and a crown of leaves."""
    height, limbs = rng.uniform(1.2, 2.2), int(rng.integers(3, 8))
    trunk = smooth_curve([(0, 0, 0), (rng.uniform(-0.1, 0.1), 0, 0.5 * height), (0, 0, height)], 24)
    parts, crowns = [tube(trunk, np.linspace(0.13, 0.05, 24), 10)], [(0.0, 0.0, height)]
    for _ in range(limbs):
        reach, rise = rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.7)
        turn = about_z(rng.uniform(0, 2 * np.pi))
        x, _, z = trunk[int(rng.integers(10, 22))]
        limb = smooth_curve([(x, 0, z), (x + 0.5 * reach, 0, z + 0.7 * rise), (x + reach, 0, z + rise)], 16)
        parts.append(tube(limb, np.linspace(0.05, 0.02, 16), 6).transformed(turn))
        crowns.append(tuple(turn @ limb[-1]))
    count = int(rng.integers(200, 700))
    centre = np.array(crowns)[rng.integers(len(crowns), size=count)]
    roots = centre + rng.uniform(0.2, 0.45) * rng.standard_normal((count, 3))
    size = rng.uniform(0.12, 0.35)
    tips = roots + size * _unit(rng.standard_normal((count, 3)))
    widths = _taper(count, np.array([rng.uniform(0.4, 0.8) * size]), [0.3, 1.0, 0.8, 0.1])
    bark = covered(rng, merge(*parts), gloss=0)
    return [bark, Thing(ribbons(roots, tips, np.zeros((count, 3)), widths, rng, 3), _leaf_texture(rng))]


def furry(rng: Rng) -> list[Thing]:
    """A body of one to three balls, covered with hair."""
    hairs, parts, things, z = int(rng.integers(900, 2500)), int(rng.integers(1, 4)), [], 0.0
    texture, long = _hair_texture(rng), rng.uniform(0.12, 0.4)
    gravity, radius = rng.uniform(0, 0.8), rng.uniform(0.5, 0.8)
    for _ in range(parts):
        z += radius
        centre, outward = np.array([0, 0, z]), _unit(rng.standard_normal((hairs // parts, 3)))
        things.append(Thing(ellipsoid(radius, radius, radius, 32).transformed(np.eye(3), centre), texture))
        roots = centre + radius * outward
        length = long * rng.uniform(0.5, 1.0, (len(roots), 1))
        tips = roots + length * _unit(outward + 0.25 * rng.standard_normal(roots.shape))
        droop = length * gravity * np.array([0, 0, -1.0])
        width = np.array([rng.uniform(0.025, 0.06)])
        things.append(
            Thing(ribbons(roots, tips, droop, _taper(len(roots), width, [1.0, 0.9, 0.6, 0.08]), rng, 3), texture)
        )
        z += 0.75 * radius
        radius *= rng.uniform(0.55, 0.8)
    return things


def lattice(rng: Rng) -> list[Thing]:
    """A fence, cage or rack: thin bars with air between them."""
    bars, width, height, thick = (
        int(rng.integers(4, 12)),
        rng.uniform(1, 2),
        rng.uniform(0.6, 1.6),
        rng.uniform(0.03, 0.07),
    )
    parts = [_slab(thick, thick, height, ((k / (bars - 1) - 0.5) * width, 0, 0)) for k in range(bars)]
    rails = int(rng.integers(2, 5))
    parts += [_slab(width, thick, thick, (0, 0, height * (k + 0.5) / rails)) for k in range(rails)]
    fence = merge(*parts)
    if rng.uniform() < 0.4:
        fence = fence.transformed(np.eye(3), (0, -width / 2, 0))
        fence = merge(*(fence.transformed(about_z(k * np.pi / 2)) for k in range(4)))
    return [covered(rng, fence, plain=0.4)]


def drapery(rng: Rng) -> list[Thing]:
    """A hanging cloth with folds."""
    x = np.linspace(0, 1, 80)
    folds = 0.09 * np.sin(2 * np.pi * rng.uniform(2, 7) * x + rng.uniform(0.5, 1.5) * np.sin(6 * x))
    cloth = sheet(rng.uniform(1, 2), rng.uniform(1, 2), np.broadcast_to(folds, (24, 80)))
    upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    return [covered(rng, _on_ground(cloth.transformed(upright)), gloss=0.1)]


def chess_piece(rng: Rng, texture: np.ndarray, roughness: float | None) -> list[Thing]:
    """A slender turned figure of a set that shares one texture."""
    height = rng.uniform(0.8, 1.5)
    waist, collar, head = rng.uniform(0.1, 0.16), rng.uniform(0.18, 0.26), rng.uniform(0.12, 0.24)
    profile = [(0.002, 0), (0.36, 0), (0.38, 0.08), (0.24, 0.18), (waist, 0.55 * height), (collar, 0.7 * height)]
    profile += [(0.8 * waist, 0.74 * height), (head, 0.87 * height), (0.6 * head, 0.98 * height), (0.002, height)]
    curve = smooth_curve(profile, 64)
    return [Thing(lathe(np.maximum(curve, [[0.002, -1]]), 36), texture, roughness)]


_SOLID_KINDS: dict[Callable[[Rng], list[Thing]], float] = {solid: 0.46, vessel: 0.22, furniture: 0.08, lattice: 0.05}
_SOFT_KINDS: dict[Callable[[Rng], list[Thing]], float] = {grass: 0.2, plant: 0.3, fern: 0.2, tree: 0.15, furry: 0.15}


def any_thing(rng: Rng, soft: float = 0.2) -> list[Thing]:
    """A thing standing on z = 0, about one unit in radius; a plant or a furry one with probability `soft`."""
    made = _choose(rng, _SOFT_KINDS if rng.uniform() < soft else _SOLID_KINDS | {drapery: 0.04})(rng)
    assert isinstance(made, list)
    return made
