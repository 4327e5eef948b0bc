"""A camera path through views that a person likes to look at: no jerks, an even speed, the horizon level."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import CubicSpline

_FRAMES_A_KEY = 8
"""So many frames for the way from one view that the path passes to the next: a third of a second."""
_PACE = 0.75
"""How far a frame goes at most, where views next door are about 2 apart: faster, nobody sees anything."""
_SHARPEST_TURN = -0.5
"""Cosine of the angle between the steps to a view and from it: where it is lower, a turn of more than 120 degrees, the
path leaves the view out."""
_MOST_VIEWS = 120
"""The way is found through so many; of more, through those in the middle of their neighbours."""
_STARTS = 6
"""From so many views a way is looked for."""
_DENSE = 64
"""Places between two keys at which the length of the path is measured."""


def smooth_path(
    poses: Float[np.ndarray, "n 3 4"], frames: int
) -> tuple[Float[np.ndarray, "frames 3 4"], Int[np.ndarray, " keys"]]:
    """Past views, on a short way, at an even speed.

    The way leads from view to view, through all of them if the frames suffice, else through where views are densest,
    and is smoothed: it passes one view every eight frames, and close to those between. Where it ends close to where it
    began it becomes a loop. Cameras that look at something from around it go around it, instead of through its middle.
    The horizon stays level, unless the views do not agree on one.

    Args:
        poses: of the views, at least two, camera to world, OpenGL axes (x right, y up, z back).
        frames: how many, at least 2.

    Returns:
        The poses of the path, and which views it passes, in this order. It begins and ends at the centres of views.
    """
    poses = np.asarray(poses, dtype=np.float64)
    apart = _distances(poses)
    way = _shortest_way(_medoids(apart, _MOST_VIEWS), apart)
    if len(way) == 1:  # all views are the same
        return np.repeat(poses[way], frames, axis=0), way
    keys, loops = _keys(way, apart, poses[:, :, 3], frames)
    # By roots of distances: a spline over a short way between two long ones does not swing out.
    times = np.concatenate([[0.0], np.sqrt(np.maximum(apart[keys[:-1], keys[1:]], 1e-6)).cumsum()])
    path = _Spline(poses, keys, times, periodic=loops)
    dense = path.at(np.linspace(0.0, times[-1], _DENSE * (len(keys) - 1) + 1))
    moved = _steps(dense, *_units(poses))
    gone = np.concatenate([[0.0], moved.cumsum()])
    where = np.interp(np.linspace(0.0, gone[-1], frames), gone, np.linspace(0.0, times[-1], len(gone)))
    return path.at(where), keys


def _keys(
    way: Int[np.ndarray, " views"], apart: Float[np.ndarray, "n n"], centres: Float[np.ndarray, "n 3"], frames: int
) -> tuple[Int[np.ndarray, " keys"], bool]:
    """The views that a path passes, and whether it is a loop: then the last one is the first."""
    steps = apart[way[:-1], way[1:]]
    loops = len(way) >= 6 and apart[way[-1], way[0]] <= 2.5 * steps.mean()
    if loops:
        way = np.roll(way, -int(way.argmin()))
        way = np.append(way, way[0])
    gone = np.concatenate([[0.0], apart[way[:-1], way[1:]].cumsum()])
    longest = _PACE * frames
    if gone[-1] > longest:
        loops = False
        # The part with most views; the shortest of these.
        last = np.maximum(np.searchsorted(gone, gone + longest, side="right") - 1, 0)
        last = np.minimum(np.maximum(last, np.arange(len(gone)) + 1), len(gone) - 1)
        counts = last - np.arange(len(gone))
        lengths = gone[last] - gone
        start = int(np.lexsort((lengths, -counts))[0])
        way, gone = way[start : last[start] + 1], gone[start : last[start] + 1] - gone[start]
    wanted = np.linspace(0.0, gone[-1], max(4, frames // _FRAMES_A_KEY) + 1)
    chosen = np.unique(np.abs(gone[None] - wanted[:, None]).argmin(axis=1))
    keys = way[chosen]
    # A way that turns back, close to where it was, would make a curve with a cusp.
    near = 0.6 * np.median(apart[keys[:-1], keys[1:]])
    kept = [keys[0]]
    for key in keys[1:-1]:
        if apart[kept[-1], key] >= near and apart[key, keys[-1]] >= near:
            kept.append(key)
    keys = _without_turns_back(np.array([*kept, keys[-1]]), centres, loops)
    return (keys if loops or keys[0] <= keys[-1] else keys[::-1].copy()), bool(loops)


def _without_turns_back(
    keys: Int[np.ndarray, " keys"], centres: Float[np.ndarray, "n 3"], loops: bool
) -> Int[np.ndarray, " keys"]:
    """Leaves out, one after the other, the keys at which a path would turn the most, until no turn is sharp."""
    while len(keys) > (5 if loops else 3):
        way = np.append(keys, keys[1]) if loops else keys  # of a loop, the turn where it closes, too
        steps = _unit(np.diff(centres[way], axis=0))
        turns = (steps[1:] * steps[:-1]).sum(axis=1)  # cosines, at way[1:-1]
        sharpest = int(turns.argmin())
        if turns[sharpest] >= _SHARPEST_TURN:
            break
        if sharpest + 1 < len(keys) - 1:
            keys = np.delete(keys, sharpest + 1)
        else:
            keys = np.append(keys[1:-1], keys[1])
    return keys


class _Spline:
    """Cameras at times between those of the keys."""

    def __init__(
        self, poses: Float[np.ndarray, "n 3 4"], keys: Int[np.ndarray, " keys"], times: np.ndarray, periodic: bool
    ) -> None:
        self._focus = _focus(poses)
        self._level = _level(poses)
        chosen = poses[keys]
        centres, up, back = chosen[:, :, 3], chosen[:, :, 1], chosen[:, :, 2]
        if self._focus is not None:
            # Around the point that all look at: straight ways would lead through it, or close by.
            offset = centres - self._focus
            radius = np.linalg.norm(offset, axis=1, keepdims=True)
            centres = np.concatenate([offset / radius, np.log(radius)], axis=1)
        values = np.concatenate([up, back, centres], axis=1)
        self._curve = CubicSpline(times, values, bc_type="periodic" if periodic else "natural")

    def at(self, times: np.ndarray) -> Float[np.ndarray, "t 3 4"]:
        up, back, centres = np.split(self._curve(times), [3, 6], axis=1)
        if self._focus is not None:
            centres = self._focus + _unit(centres[:, :3]) * np.exp(centres[:, 3:])
        up, back = _unit(up), _unit(back)
        if self._level is not None:
            # Looking almost straight up or down, there is no horizon to keep: there up is what it is at the views.
            aside = np.linalg.norm(np.cross(back, self._level), axis=1, keepdims=True)
            share = np.clip(aside / 0.35, 0.0, 1.0)
            share = share * share * (3.0 - 2.0 * share)
            up = share * self._level + (1.0 - share) * up
        right = _unit(np.cross(up, back))
        return np.stack([right, np.cross(back, right), back, centres], axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 2.0 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=-1) / 2.0, 0.0, 1.0))


def _units(poses: np.ndarray) -> tuple[float, float]:
    """What a step to the view next door is, in distance and in angle (radians, a degree at least)."""
    far = np.linalg.norm(poses[:, None, :, 3] - poses[None, :, :, 3], axis=-1)
    turned = _angle(poses[:, None, :, 2], poses[None, :, :, 2])
    np.fill_diagonal(far, np.inf)
    next_door = far.argmin(axis=1)
    rows = np.arange(len(poses))
    distances = far[rows, next_door]
    distance = float(np.median(distances)) or float(distances.max())
    return max(distance, 1e-9), max(float(np.median(turned[rows, next_door])), np.deg2rad(1.0))


def _steps(path: np.ndarray, distance: float, angle: float) -> np.ndarray:
    moved = np.linalg.norm(np.diff(path[:, :, 3], axis=0), axis=1)
    return moved / distance + _angle(path[1:, :, 2], path[:-1, :, 2]) / angle


def _distances(poses: np.ndarray) -> Float[np.ndarray, "n n"]:
    """How far apart views are, in place and direction: about 2 for two next door."""
    distance, angle = _units(poses)
    far = np.linalg.norm(poses[:, None, :, 3] - poses[None, :, :, 3], axis=-1)
    return far / distance + _angle(poses[:, None, :, 2], poses[None, :, :, 2]) / angle


def _medoids(apart: Float[np.ndarray, "n n"], count: int) -> Int[np.ndarray, " keys"]:
    """Views in the middle of groups of neighbours."""
    count = min(len(apart), count)
    chosen = [int(apart.sum(axis=1).argmin())]
    while len(chosen) < count:  # to begin with, as far from each other as can be
        nearest = apart[chosen].min(axis=0)
        if nearest.max() < 1e-6:
            break  # the others are copies of these
        chosen.append(int(nearest.argmax()))
    medoids, count = np.array(chosen), len(chosen)
    for _ in range(20):
        group = apart[medoids].argmin(axis=0)
        members = [np.flatnonzero(group == index) for index in range(count)]
        better = np.array([own[apart[np.ix_(own, own)].sum(axis=1).argmin()] for own in members])
        if np.array_equal(better, medoids):
            break
        medoids = better
    return np.sort(medoids)


def _shortest_way(views: Int[np.ndarray, " keys"], apart: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " keys"]:
    """An order in which one step follows from the other; found by nearest neighbours, then 2-opt."""
    count = len(views)
    # A stop of no cost between end and start makes a way a round trip.
    cost = np.zeros((count + 1, count + 1))
    cost[:count, :count] = apart[np.ix_(views, views)]
    best, shortest = np.arange(count), np.inf
    for start in range(0, count, -(-count // _STARTS)):
        order, left = [count, start], set(range(count)) - {start}
        while left:
            order.append(min(left, key=lambda view: (cost[order[-1], view], view)))
            left.remove(order[-1])
        tour = _two_opt(np.array(order), cost)
        length = cost[tour, np.roll(tour, -1)].sum()
        if length < shortest - 1e-9:
            best, shortest = tour, length
    best = np.roll(best, -int((best == count).argmax()))
    return views[best[best < count]]


def _two_opt(tour: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Turns parts of a round trip around as long as that makes it shorter."""
    count = len(tour)
    first, last = np.triu_indices(count, k=1)
    for _ in range(10 * count):
        following = np.roll(tour, -1)
        old = cost[tour, following]
        gain = old[first] + old[last] - cost[tour[first], tour[last]] - cost[following[first], following[last]]
        best = int(gain.argmax())
        if gain[best] <= 1e-9:
            break
        a, b = int(first[best]) + 1, int(last[best]) + 1
        tour[a:b] = tour[a:b][::-1].copy()
    return tour


def _focus(poses: np.ndarray) -> Float[np.ndarray, " 3"] | None:
    """The point that cameras look at from different sides; None where there is none."""
    centres, back = poses[:, :, 3], poses[:, :, 2]
    aside = np.eye(3) - back[:, :, None] * back[:, None, :]
    total = aside.mean(axis=0)
    if np.linalg.eigvalsh(total)[0] < 0.02:  # they look the same way, within ten degrees
        return None
    focus = np.linalg.solve(total, (aside @ centres[:, :, None]).mean(axis=0))[:, 0]
    depth = ((centres - focus) * back).sum(axis=1)
    off = np.linalg.norm(centres - focus - depth[:, None] * back, axis=1)
    return focus if (depth > 0).mean() > 0.9 and np.median(off / np.maximum(np.abs(depth), 1e-12)) < 0.5 else None


def _level(poses: np.ndarray) -> Float[np.ndarray, " 3"] | None:
    """What is up, so that the views' horizons are as level as can be; None where they are tilted every which way."""
    right, up = poses[:, :, 0], _unit(poses[:, :, 1].mean(axis=0))
    # The mean of the views' own up counts where all look the same way, and their horizons do not tell.
    tilt = (right[:, :, None] * right[:, None, :]).mean(axis=0) - 0.05 * np.outer(up, up)
    level = np.linalg.eigh(tilt)[1][:, 0]
    level = level * (1.0 if level @ up >= 0 else -1.0)
    return level if np.median(np.abs(right @ level)) < 0.3 and level @ up > 0.2 else None
