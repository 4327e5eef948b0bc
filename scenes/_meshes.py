"""Triangle meshes of made-up scenes: surfaces of revolution, swept tubes, boxes, sheets and ribbons, in plain NumPy.

World axes are x right, y away from the middle camera, z up; the table top is z = 0 and one unit is about 20 cm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Mesh:
    """An indexed triangle mesh.

    Attributes:
        points: [V, 3] positions.
        normals: [V, 3] unit shading normals, pointing out of the solid.
        uv: [V, 2] texture coordinates; outside [0, 1] the texture repeats.
        faces: [F, 3] vertex indices, counter-clockwise seen from outside.
    """

    points: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    faces: np.ndarray

    def placed(self, at: tuple[float, float, float], turn: float = 0.0, tilt: float = 0.0, scale: float = 1.0) -> Mesh:
        """Scale, tilt about x, turn about z (both in degrees, anticlockwise) and move to `at`, in this order."""
        a, b = np.radians(turn), np.radians(tilt)
        about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
        rotation = about_z @ about_x
        return replace(
            self, points=scale * self.points @ rotation.T + np.asarray(at), normals=self.normals @ rotation.T
        )

    def transformed(self, linear: np.ndarray, at: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0)) -> Mesh:
        """Map every point p to `linear` @ p + `at`; `linear` is [3, 3], invertible, and does not mirror."""
        normals = self.normals @ np.linalg.inv(linear)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        return replace(self, points=self.points @ linear.T + np.asarray(at), normals=normals)

    def tiled(self, along_u: float, along_v: float) -> Mesh:
        """The same surface with its texture repeated so many times."""
        return replace(self, uv=self.uv * [along_u, along_v])

    def write_ply(self, path: Path) -> None:
        """Write a binary little-endian PLY file with normals and texture coordinates."""
        vertices = np.concatenate([self.points, self.normals, self.uv], axis=1).astype("<f4")
        faces = np.empty(len(self.faces), dtype=[("count", "u1"), ("index", "<i4", 3)])
        faces["count"], faces["index"] = 3, self.faces
        properties = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz", "u", "v"))
        header = (
            f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\n{properties}"
            f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
        )
        path.write_bytes(header.encode("ascii") + vertices.tobytes() + faces.tobytes())


def merge(*meshes: Mesh) -> Mesh:
    """One mesh made of several, which then share one material."""
    offsets = np.cumsum([0] + [len(mesh.points) for mesh in meshes[:-1]])
    return Mesh(
        points=np.concatenate([mesh.points for mesh in meshes]),
        normals=np.concatenate([mesh.normals for mesh in meshes]),
        uv=np.concatenate([mesh.uv for mesh in meshes]),
        faces=np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=True)]),
    )


def smooth_curve(points: list[tuple[float, ...]], samples: int = 64) -> np.ndarray:
    """A Catmull-Rom curve through `points` (each of D numbers), sampled evenly in its parameter: [samples, D]."""
    p = np.asarray(points, dtype=float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(points) - 1, samples)
    i = np.minimum(t.astype(int), len(points) - 2)
    t = (t - i)[:, None]
    a, b, c, d = p[i], p[i + 1], p[i + 2], p[i + 3]
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def _grid_faces(rows: int, columns: int) -> np.ndarray:
    """Faces of a [rows, columns] vertex grid, counter-clockwise for (row, column) right-handed towards the viewer."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)[None]).ravel()
    lower = np.stack([corner, corner + 1, corner + columns + 1], axis=1)
    upper = np.stack([corner, corner + columns + 1, corner + columns], axis=1)
    return np.concatenate([lower, upper])


def _arc_length(curve: np.ndarray) -> np.ndarray:
    """Arc length along a [N, D] polyline, normalised to [0, 1]."""
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    return length / length[-1]


def lathe(profile: np.ndarray, segments: int = 96) -> Mesh:
    """Turn a profile about the z axis.

    Args:
        profile: [P, 2] radius and height; from the bottom up along the outside, so that normals point outwards.
        segments: corners of the turned circle.

    Returns:
        A mesh with u around (anticlockwise from +x) and v along the profile by arc length.
    """
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    radial = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # [S, 2]
    slope = np.gradient(profile, axis=0)
    slope /= np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)
    points = np.concatenate(
        [profile[:, None, :1] * radial, np.broadcast_to(profile[:, None, 1:], (len(profile), segments + 1, 1))], axis=2
    )
    normals = np.concatenate(
        [slope[:, None, 1:] * radial, np.broadcast_to(-slope[:, None, :1], (len(profile), segments + 1, 1))], axis=2
    )
    v, u = np.meshgrid(_arc_length(profile), angle / (2 * np.pi), indexing="ij")
    return Mesh(
        points.reshape(-1, 3),
        normals.reshape(-1, 3),
        np.stack([u, v], axis=2).reshape(-1, 2),
        _grid_faces(len(profile), segments + 1),
    )


def tube(path: np.ndarray, radius: np.ndarray, segments: int = 32, flatten: float = 1.0) -> Mesh:
    """Sweep a circle along a path that lies in the plane y = 0.

    Args:
        path: [P, 3] centres, y = 0.
        radius: [P] radius at each centre.
        segments: corners of the circle.
        flatten: width across the plane over width within it (1: round).

    Returns:
        An open tube with u around and v along it.
    """
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.array([0.0, 1.0, 0.0])
    within = np.cross(across, tangent)  # [P, 3]
    angle = np.linspace(0, 2 * np.pi, segments + 1)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    points = path[:, None] + radius[:, None, None] * (cos * within[:, None] + flatten * sin * across)
    normals = cos * flatten * within[:, None] + sin * across
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    v, u = np.meshgrid(_arc_length(path), angle / (2 * np.pi), indexing="ij")
    return Mesh(
        points.reshape(-1, 3),
        normals.reshape(-1, 3),
        np.stack([u, v], axis=2).reshape(-1, 2),
        _grid_faces(len(path), segments + 1),
    )


def ellipsoid(rx: float, ry: float, rz: float, segments: int = 64) -> Mesh:
    """An ellipsoid about the origin with half axes `rx`, `ry`, `rz`; u around z, v from the south to the north pole."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, segments // 2 + 1)
    ball = lathe(np.stack([np.cos(angle), np.sin(angle)], axis=1), segments)
    axes = np.array([rx, ry, rz])
    normals = ball.points / axes
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return replace(ball, points=ball.points * axes, normals=normals)


def torus(ring: float, tube_radius: float, segments: int = 96) -> Mesh:
    """A torus about the z axis; v runs outside first: bottom (0), outer rim (0.25), top (0.5), hole (0.75)."""
    angle = np.linspace(-np.pi / 2, 1.5 * np.pi, segments // 2 + 1)
    return lathe(np.stack([ring + tube_radius * np.cos(angle), tube_radius * np.sin(angle)], axis=1), segments)


def box(width: float, depth: float, height: float) -> Mesh:
    """A box standing on z = 0, centred on the z axis; every face carries the whole texture, upright on the sides."""
    half = np.array([width / 2, depth / 2, height / 2])
    points, normals, uv, faces = [], [], [], []
    sides = [  # outward normal, the direction of u; v = normal x u
        ((1, 0, 0), (0, 1, 0)),
        ((-1, 0, 0), (0, -1, 0)),
        ((0, 1, 0), (-1, 0, 0)),
        ((0, -1, 0), (1, 0, 0)),
        ((0, 0, 1), (1, 0, 0)),
        ((0, 0, -1), (-1, 0, 0)),
    ]
    for k, (normal, along_u) in enumerate(sides):
        n, u = np.array(normal, dtype=float), np.array(along_u, dtype=float)
        v = np.cross(n, u)
        for su, sv in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
            points.append((n + su * u + sv * v) * half + [0, 0, half[2]])
            normals.append(n)
            uv.append(((su + 1) / 2, (sv + 1) / 2))
        faces += [(4 * k, 4 * k + 1, 4 * k + 2), (4 * k, 4 * k + 2, 4 * k + 3)]
    return Mesh(np.array(points), np.array(normals), np.array(uv), np.array(faces))


def sheet(width: float, depth: float, heights: np.ndarray) -> Mesh:
    """A height field over a rectangle centred on the origin, facing up.

    Args:
        width, depth: extent along x and y.
        heights: [R, C] height at each grid point, rows along y.
    """
    rows, columns = heights.shape
    y, x = np.meshgrid(
        np.linspace(-depth / 2, depth / 2, rows), np.linspace(-width / 2, width / 2, columns), indexing="ij"
    )
    dy, dx = np.gradient(heights, depth / (rows - 1), width / (columns - 1))
    normals = np.stack([-dx, -dy, np.ones_like(dx)], axis=2)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    return Mesh(
        np.stack([x, y, heights], axis=2).reshape(-1, 3),
        normals.reshape(-1, 3),
        np.stack([x / width + 0.5, y / depth + 0.5], axis=2).reshape(-1, 2),
        _grid_faces(rows, columns),
    )


def ribbons(
    roots: np.ndarray, tips: np.ndarray, droop: np.ndarray, width: np.ndarray, rng: np.random.Generator, segments: int
) -> Mesh:
    """Flat curved blades: grass, leaves, hair.

    Args:
        roots, tips: [N, 3] where blades begin, and where they would end if they were straight.
        droop: [N, 3] how far the tip is bent away; the bend grows with the square of the way along.
        width: [N, segments + 1] width along each blade.
        rng: turns each blade about its own axis, and chooses which part of the texture it shows.
        segments: quads along a blade.
    """
    count = len(roots)
    t = np.linspace(0, 1, segments + 1)[None, :, None]
    spine = roots[:, None] + t * (tips - roots)[:, None] + t**2 * droop[:, None]  # [N, S + 1, 3]
    along = np.gradient(spine, axis=1)
    along /= np.maximum(np.linalg.norm(along, axis=2, keepdims=True), 1e-12)
    side = np.cross(along, rng.standard_normal((count, 1, 3)))
    side /= np.maximum(np.linalg.norm(side, axis=2, keepdims=True), 1e-12)
    half = 0.5 * width[..., None] * side
    points = np.stack([spine - half, spine + half], axis=2)  # [N, S + 1, 2, 3]
    normals = np.repeat(np.cross(side, along)[:, :, None], 2, axis=2)
    u = rng.uniform(0, 1, (count, 1, 1)) + np.array([0.0, 0.08])
    v = rng.uniform(0, 0.5, (count, 1, 1)) + 0.5 * t[..., 0, None]
    uv = np.stack(np.broadcast_arrays(u, v + np.zeros(2)), axis=3)
    blade = _grid_faces(segments + 1, 2)
    first = 2 * (segments + 1) * np.arange(count)[:, None, None]
    return Mesh(points.reshape(-1, 3), normals.reshape(-1, 3), uv.reshape(-1, 2), (blade + first).reshape(-1, 3))


def extrude(outline: np.ndarray, height: float) -> Mesh:
    """A prism on z = 0 whose sides and top carry the texture; `outline` is [N, 2], anticlockwise, seen from its middle.

    Every corner of the outline must be visible from the outline's mean, from which the top is fanned out.
    """
    count = len(outline)
    following = np.roll(outline, -1, axis=0)
    edge = following - outline
    normal = np.stack([edge[:, 1], -edge[:, 0], np.zeros(count)], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    low, high = np.zeros((count, 1)), np.full((count, 1), height)
    corners = [(outline, low), (following, low), (following, high), (outline, high)]
    points = np.stack([np.concatenate(corner, axis=1) for corner in corners], axis=1).reshape(-1, 3)
    way = np.concatenate([[0.0], np.cumsum(np.linalg.norm(edge, axis=1))])
    way /= way[-1]
    u = np.stack([way[:-1], way[1:], way[1:], way[:-1]], axis=1)
    v = np.broadcast_to([0.0, 0.0, 1.0, 1.0], (count, 4))
    quads = 4 * np.arange(count)[:, None]
    faces = np.concatenate([quads + np.array(corners) for corners in ((0, 1, 2), (0, 2, 3))])
    sides = Mesh(points, np.repeat(normal, 4, axis=0), np.stack([u, v], axis=2).reshape(-1, 2), faces)
    rim = np.concatenate([outline, [outline.mean(axis=0)]])
    extent = max(float(np.ptp(outline)), 1e-9)
    k = np.arange(count)
    lids = [
        Mesh(
            np.concatenate([rim, np.full((count + 1, 1), z)], axis=1),
            np.broadcast_to([0.0, 0.0, up], (count + 1, 3)),
            rim / extent + 0.5,
            np.stack([np.full(count, count), k, (k + 1) % count], axis=1)[:, ::order],
        )
        for z, up, order in ((height, 1.0, 1), (0.0, -1.0, -1))
    ]
    return merge(sides, *lids)
