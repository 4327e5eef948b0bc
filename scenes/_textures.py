"""Procedural textures of the embedded scenes: [H, W, 3] uint8 sRGB, row 0 at the top (v = 1), column 0 at u = 0.

Details stay a few pixels wide at 160 x 120, so that the pictures carry texture and not aliasing.
"""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]


def _coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Texel-centre coordinates u and v, each [H, W], v upwards."""
    v, u = np.meshgrid(1 - (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return u, v


def _noise(rng: np.random.Generator, height: int, width: int, blobs_u: float, blobs_v: float) -> np.ndarray:
    """Smooth noise [H, W] that repeats at the borders; mean 0, deviation 1, about `blobs_*` blobs along each axis."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    fv, fu = np.meshgrid(np.fft.fftfreq(height, 1 / height), np.fft.rfftfreq(width, 1 / width), indexing="ij")
    smooth = np.fft.irfft2(spectrum * np.exp(-0.5 * ((fu / blobs_u) ** 2 + (fv / blobs_v) ** 2)), s=(height, width))
    return (smooth - smooth.mean()) / smooth.std()


def _mix(low: np.ndarray | Colour, high: np.ndarray | Colour, weight: np.ndarray) -> np.ndarray:
    """Blend two colours (0 to 255) by a [H, W] weight, clipped to [0, 1]."""
    weight = np.clip(weight, 0, 1)[..., None]
    return np.asarray(low, dtype=float) * (1 - weight) + np.asarray(high, dtype=float) * weight


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 where a signed distance is positive, 0 where negative, with a ramp of width `softness`."""
    return np.clip(distance / softness + 0.5, 0, 1)


def _bytes(colour: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def plain(colour: Colour) -> np.ndarray:
    """One colour."""
    return _bytes(np.broadcast_to(np.asarray(colour, dtype=float), (2, 2, 3)))


def wood(rng: np.random.Generator, planks: int, light: Colour, dark: Colour, size: int = 1024) -> np.ndarray:
    """Boards running along u, each with a grain and a tone of its own."""
    _, v = _coordinates(size, size)
    board = np.minimum((v * planks).astype(int), planks - 1)
    tone = rng.uniform(-0.3, 0.3, planks)[board]
    warp = 0.012 * _noise(rng, size, size, 4, 12)
    rings = np.sin(2 * np.pi * (v + warp) * planks * 3.5 + 6 * rng.uniform(0, 1, planks)[board])
    streaks = _noise(rng, size, size, 6, 90)
    colour = _mix(light, dark, 0.45 + tone + 0.14 * rings + 0.1 * streaks)
    seam = np.abs(v * planks - np.rint(v * planks))
    return _bytes(colour * (0.55 + 0.45 * _edge(seam - 0.03, 0.04))[..., None])


def gingham(rng: np.random.Generator, checks: int, base: Colour, stripe: Colour, border: Colour) -> np.ndarray:
    """A woven check with a border stripe: overlapping half-tone bands along both axes."""
    size = 1024
    u, v = _coordinates(size, size)
    bands = [_edge(0.25 - np.abs((x * checks) % 1 - 0.5), 0.04) for x in (u, v)]
    colour = _mix(base, stripe, 0.5 * (bands[0] + bands[1]))
    thread = 0.5 + 0.035 * _noise(rng, size, size, 60, 60)
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    colour = _mix(colour, border, _edge(0.012 - np.abs(rim - 0.045), 0.004))
    return _bytes(colour * (0.5 + thread)[..., None])


def wallpaper(
    rng: np.random.Generator, stripes: int, aspect: float, light: Colour, dark: Colour, motif: Colour
) -> np.ndarray:
    """Broad stripes with rows of four-petalled flowers, panelling below v = 0.18; `aspect` is width over height."""
    height, width = 384, 3072
    u, v = _coordinates(height, width)
    phase = (u * stripes) % 1
    colour = _mix(light, dark, _edge(0.25 - np.abs(phase - 0.5), 0.03))
    for shift, rise in ((0.0, 0.0), (0.5, 0.5)):
        x = (((u * stripes + shift) % 1) - 0.5) * aspect / stripes
        y = ((v * 5 + rise) % 1 - 0.5) / 5
        angle, radius = np.arctan2(y, x), np.hypot(x, y)
        petals = 0.04 + 0.018 * np.cos(4 * angle)
        colour = _mix(colour, motif, 0.8 * _edge(petals - radius, 0.006))
        colour = _mix(colour, light, 0.8 * _edge(0.012 - radius, 0.006))
    colour = colour * (1 + 0.035 * _noise(rng, height, width, 40, 6))[..., None]
    panel = np.asarray(dark, dtype=float) * 0.62
    groove = np.abs((u * stripes * 2) % 1 - 0.5)
    panelling = panel * (0.8 + 0.2 * _edge(groove - 0.04, 0.04))[..., None]
    colour = _mix(colour, panelling, _edge(0.17 - v, 0.004))
    return _bytes(_mix(colour, (236, 226, 206), _edge(0.012 - np.abs(v - 0.18), 0.004)))


def teapot_glaze(rng: np.random.Generator, glaze: Colour, cream: Colour, accent: Colour) -> np.ndarray:
    """A glaze with a cream belt, on it a row of dots and leaves, and two thin rings."""
    height, width = 512, 1024
    u, v = _coordinates(height, width)
    colour = _mix(glaze, np.asarray(glaze) * 0.72, 0.5 + 0.35 * _noise(rng, height, width, 8, 4))
    belt = np.abs(v - 0.58)
    colour = _mix(colour, cream, _edge(0.105 - belt, 0.008))
    x = ((u * 10) % 1 - 0.5) * 0.28
    y = v - 0.58
    colour = _mix(colour, accent, _edge(0.05 - np.hypot(x, y), 0.008))
    colour = _mix(colour, (244, 196, 80), _edge(0.018 - np.hypot(x, y), 0.008))
    x = ((u * 10 + 0.5) % 1 - 0.5) * 0.28
    leaf = np.abs(x) / 0.03 + np.abs(y) / 0.075
    colour = _mix(colour, np.asarray(glaze) * 0.8, _edge(1 - leaf, 0.15))
    return _bytes(_mix(colour, accent, _edge(0.009 - np.abs(belt - 0.125), 0.005)))


def vase_pattern(rng: np.random.Generator, clay: Colour, slip: Colour, dark: Colour) -> np.ndarray:
    """Fired clay with chequered, zigzag and plain bands of slip."""
    height, width = 1024, 1024
    u, v = _coordinates(height, width)
    colour = _mix(clay, np.asarray(clay) * 0.8, 0.5 + 0.3 * _noise(rng, height, width, 10, 30))
    checks = np.sin(2 * np.pi * 8 * u) * np.sin(2 * np.pi * (v - 0.35) / 0.125)
    colour = _mix(colour, _mix(slip, dark, _edge(checks, 0.15)), _edge(0.125 - np.abs(v - 0.475), 0.005))
    zigzag = v - 0.25 - 0.035 * (4 * np.abs((u * 12) % 1 - 0.5) - 1)
    colour = _mix(colour, slip, _edge(0.018 - np.abs(zigzag), 0.006))
    for ring in (0.335, 0.615, 0.155, 0.72):
        colour = _mix(colour, dark, _edge(0.008 - np.abs(v - ring), 0.005))
    return _bytes(_mix(colour, slip, _edge(0.035 - np.abs(v - 0.668), 0.005)))


def book_cover(rng: np.random.Generator, cloth: Colour, gilt: Colour) -> np.ndarray:
    """A cloth cover with a gilt frame, a lozenge and a title of two bars."""
    size = 512
    u, v = _coordinates(size, size)
    colour = np.asarray(cloth, dtype=float) * (1 + 0.06 * _noise(rng, size, size, 40, 40))[..., None]
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    colour = _mix(colour, gilt, _edge(0.014 - np.abs(rim - 0.09), 0.008))
    lozenge = np.abs(u - 0.5) / 0.16 + np.abs(v - 0.42) / 0.22
    colour = _mix(colour, gilt, _edge(0.12 - np.abs(lozenge - 0.88), 0.06))
    for centre, half in ((0.8, 0.25), (0.73, 0.17)):
        colour = _mix(colour, gilt, _edge(0.016 - np.abs(v - centre), 0.008) * _edge(half - np.abs(u - 0.5), 0.01))
    return _bytes(colour)


def book_spine(rng: np.random.Generator, cloth: Colour, gilt: Colour) -> np.ndarray:
    """A spine with gilt bands and a title label, upright along u."""
    size = 512
    u, _ = _coordinates(size, size)
    colour = np.asarray(cloth, dtype=float) * (0.95 + 0.05 * _noise(rng, size, size, 40, 10))[..., None]
    for centre in (0.08, 0.14, 0.86, 0.92):
        colour = _mix(colour, gilt, _edge(0.015 - np.abs(u - centre), 0.008))
    return _bytes(_mix(colour, gilt, 0.9 * _edge(0.13 - np.abs(u - 0.5), 0.01)))


def pages(rng: np.random.Generator) -> np.ndarray:
    """The edge of a block of paper."""
    size = 256
    return _bytes(np.asarray((232, 220, 190)) * (0.93 + 0.05 * _noise(rng, size, size, 3, 40))[..., None])


def peel(
    rng: np.random.Generator, skin: Colour, spot: Colour, pole: Colour, blobs: float, strength: float
) -> np.ndarray:
    """A fruit skin: mottled, darker or greener towards the stalk (v = 1)."""
    height, width = 512, 1024
    _, v = _coordinates(height, width)
    mottle = _noise(rng, height, width, blobs, blobs / 2) + 0.7 * _noise(rng, height, width, 3, 2)
    colour = _mix(skin, spot, 0.3 + strength * mottle)
    return _bytes(_mix(colour, pole, 0.9 * _edge(v - 0.9, 0.12)))


def apple_skin(rng: np.random.Generator) -> np.ndarray:
    """Red streaks running from the stalk over yellow."""
    height, width = 512, 1024
    _, v = _coordinates(height, width)
    streaks = _noise(rng, height, width, 24, 1.5) + 0.9 * _noise(rng, height, width, 2, 1.5)
    colour = _mix((224, 178, 70), (176, 32, 34), 0.72 + 0.4 * streaks)
    colour = _mix(colour, (158, 150, 60), _edge(v - 0.88, 0.1))
    freckles = _noise(rng, height, width, 70, 35)
    return _bytes(_mix(colour, (240, 214, 150), 0.6 * _edge(freckles - 2.1, 0.4)))


def doughnut(rng: np.random.Generator) -> np.ndarray:
    """Dough below, icing with a wavy edge above, sprinkles on it (v as in `torus`: 0.5 is the top)."""
    height, width = 384, 768
    u, v = _coordinates(height, width)
    colour = _mix((206, 142, 72), (150, 88, 40), 0.4 + 0.25 * _noise(rng, height, width, 12, 6))
    wave = 0.02 * np.sin(2 * np.pi * 9 * u) + 0.014 * np.sin(2 * np.pi * 14 * u + 1)
    icing = 0.5 + 0.27 * np.sign(v - 0.5) + wave * np.sign(0.5 - v)
    inside = np.where(v < 0.5, v - icing, icing - v)
    colour = _mix(colour, (228, 120, 150), _edge(inside, 0.012))
    palette = np.array([(250, 240, 220), (84, 60, 160), (250, 206, 70), (60, 150, 130), (120, 40, 50)])
    for k in range(90):
        cu, cv, angle = rng.uniform(0, 1), rng.uniform(0.3, 0.68), rng.uniform(0, np.pi)
        x, y = ((u - cu + 0.5) % 1 - 0.5) * 2.2, v - cv
        along, across = (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))
        rod = 0.013 - np.hypot(np.maximum(np.abs(along) - 0.032, 0), across)
        inked = rod > -0.003
        weight = _edge(rod[inked], 0.006)[:, None]
        colour[inked] = (1 - weight) * colour[inked] + weight * palette[k % len(palette)]
    return _bytes(colour)


def plate_rim(rng: np.random.Generator, china: Colour, ink: Colour) -> np.ndarray:
    """China with an ink band and a ring of dashes, for a lathe whose upper side is v > 0.5 (rim to centre)."""
    height, width = 512, 1024
    u, v = _coordinates(height, width)
    colour = np.asarray(china, dtype=float) * (1 + 0.02 * _noise(rng, height, width, 6, 6))[..., None]
    colour = _mix(colour, ink, _edge(0.012 - np.abs(v - 0.545), 0.006))
    dash = _edge(0.25 - np.abs((u * 16) % 1 - 0.5), 0.06) * _edge(0.026 - np.abs(v - 0.605), 0.008)
    return _bytes(_mix(colour, ink, dash))


def toy_block(rng: np.random.Generator, paint: Colour, wood_tone: Colour, figure: str) -> np.ndarray:
    """The face of a wooden toy block: a painted frame around a `"disc"`, a `"cross"` or a `"star"`."""
    size = 512
    u, v = _coordinates(size, size)
    x, y = 2 * u - 1, 2 * v - 1
    colour = np.asarray(wood_tone, dtype=float) * (1 + 0.06 * _noise(rng, size, size, 3, 24))[..., None]
    colour = _mix(colour, paint, _edge(np.maximum(np.abs(x), np.abs(y)) - 0.76, 0.03))
    if figure == "disc":
        shape = 0.46 - np.hypot(x, y)
    elif figure == "cross":
        shape = 0.17 - np.minimum(np.maximum(np.abs(x), np.abs(y) - 0.36), np.maximum(np.abs(y), np.abs(x) - 0.36))
    elif figure == "star":
        shape = 0.4 + 0.16 * np.cos(5 * (np.arctan2(y, x) - np.pi / 2)) - np.hypot(x, y)
    else:
        raise ValueError(f"no figure {figure!r}: expected 'disc', 'cross' or 'star'")
    return _bytes(_mix(colour, paint, _edge(shape, 0.03)))
