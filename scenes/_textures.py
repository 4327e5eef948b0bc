"""Procedural textures of made-up scenes: [H, W, 3] uint8 sRGB, row 0 at the top (v = 1), column 0 at u = 0.

Details stay a few pixels wide at 160 x 120, so that the pictures carry texture and not aliasing.
"""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]


def coordinates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Texel-centre coordinates u and v, each [H, W], v upwards."""
    v, u = np.meshgrid(1 - (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    return u, v


def noise(rng: np.random.Generator, height: int, width: int, blobs_u: float, blobs_v: float) -> np.ndarray:
    """Smooth noise [H, W] that repeats at the borders; mean 0, deviation 1, about `blobs_*` blobs along each axis."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    fv, fu = np.meshgrid(np.fft.fftfreq(height, 1 / height), np.fft.rfftfreq(width, 1 / width), indexing="ij")
    smooth = np.fft.irfft2(spectrum * np.exp(-0.5 * ((fu / blobs_u) ** 2 + (fv / blobs_v) ** 2)), s=(height, width))
    return (smooth - smooth.mean()) / smooth.std()


def mix(low: np.ndarray | Colour, high: np.ndarray | Colour, weight: np.ndarray) -> np.ndarray:
    """Blend two colours (0 to 255) by a [H, W] weight, clipped to [0, 1]."""
    weight = np.clip(weight, 0, 1)[..., None]
    return np.asarray(low, dtype=float) * (1 - weight) + np.asarray(high, dtype=float) * weight


def edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 where a signed distance is positive, 0 where negative, with a ramp of width `softness`."""
    return np.clip(distance / softness + 0.5, 0, 1)


def to_bytes(colour: np.ndarray) -> np.ndarray:
    """Colours from 0 to 255, rounded to uint8."""
    return np.clip(np.rint(colour), 0, 255).astype(np.uint8)


def plain(colour: Colour) -> np.ndarray:
    """One colour."""
    return to_bytes(np.broadcast_to(np.asarray(colour, dtype=float), (2, 2, 3)))


def wood(rng: np.random.Generator, planks: int, light: Colour, dark: Colour, size: int = 1024) -> np.ndarray:
    """Boards running along u, each with a grain and a tone of its own."""
    _, v = coordinates(size, size)
    board = np.minimum((v * planks).astype(int), planks - 1)
    tone = rng.uniform(-0.3, 0.3, planks)[board]
    warp = 0.012 * noise(rng, size, size, 4, 12)
    rings = np.sin(2 * np.pi * (v + warp) * planks * 3.5 + 6 * rng.uniform(0, 1, planks)[board])
    streaks = noise(rng, size, size, 6, 90)
    colour = mix(light, dark, 0.45 + tone + 0.14 * rings + 0.1 * streaks)
    seam = np.abs(v * planks - np.rint(v * planks))
    return to_bytes(colour * (0.55 + 0.45 * edge(seam - 0.03, 0.04))[..., None])


def gingham(rng: np.random.Generator, checks: int, base: Colour, stripe: Colour, border: Colour) -> np.ndarray:
    """A woven check with a border stripe: overlapping half-tone bands along both axes."""
    size = 1024
    u, v = coordinates(size, size)
    bands = [edge(0.25 - np.abs((x * checks) % 1 - 0.5), 0.04) for x in (u, v)]
    colour = mix(base, stripe, 0.5 * (bands[0] + bands[1]))
    thread = 0.5 + 0.035 * noise(rng, size, size, 60, 60)
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    colour = mix(colour, border, edge(0.012 - np.abs(rim - 0.045), 0.004))
    return to_bytes(colour * (0.5 + thread)[..., None])


def wallpaper(
    rng: np.random.Generator, stripes: int, aspect: float, light: Colour, dark: Colour, motif: Colour
) -> np.ndarray:
    """Broad stripes with rows of four-petalled flowers, panelling below v = 0.18; `aspect` is width over height."""
    height, width = 384, 3072
    u, v = coordinates(height, width)
    phase = (u * stripes) % 1
    colour = mix(light, dark, edge(0.25 - np.abs(phase - 0.5), 0.03))
    for shift, rise in ((0.0, 0.0), (0.5, 0.5)):
        x = (((u * stripes + shift) % 1) - 0.5) * aspect / stripes
        y = ((v * 5 + rise) % 1 - 0.5) / 5
        angle, radius = np.arctan2(y, x), np.hypot(x, y)
        petals = 0.04 + 0.018 * np.cos(4 * angle)
        colour = mix(colour, motif, 0.8 * edge(petals - radius, 0.006))
        colour = mix(colour, light, 0.8 * edge(0.012 - radius, 0.006))
    colour = colour * (1 + 0.035 * noise(rng, height, width, 40, 6))[..., None]
    panel = np.asarray(dark, dtype=float) * 0.62
    groove = np.abs((u * stripes * 2) % 1 - 0.5)
    panelling = panel * (0.8 + 0.2 * edge(groove - 0.04, 0.04))[..., None]
    colour = mix(colour, panelling, edge(0.17 - v, 0.004))
    return to_bytes(mix(colour, (236, 226, 206), edge(0.012 - np.abs(v - 0.18), 0.004)))


def teapot_glaze(rng: np.random.Generator, glaze: Colour, cream: Colour, accent: Colour) -> np.ndarray:
    """A glaze with a cream belt, on it a row of dots and leaves, and two thin rings."""
    height, width = 512, 1024
    u, v = coordinates(height, width)
    colour = mix(glaze, np.asarray(glaze) * 0.72, 0.5 + 0.35 * noise(rng, height, width, 8, 4))
    belt = np.abs(v - 0.58)
    colour = mix(colour, cream, edge(0.105 - belt, 0.008))
    x = ((u * 10) % 1 - 0.5) * 0.28
    y = v - 0.58
    colour = mix(colour, accent, edge(0.05 - np.hypot(x, y), 0.008))
    colour = mix(colour, (244, 196, 80), edge(0.018 - np.hypot(x, y), 0.008))
    x = ((u * 10 + 0.5) % 1 - 0.5) * 0.28
    leaf = np.abs(x) / 0.03 + np.abs(y) / 0.075
    colour = mix(colour, np.asarray(glaze) * 0.8, edge(1 - leaf, 0.15))
    return to_bytes(mix(colour, accent, edge(0.009 - np.abs(belt - 0.125), 0.005)))


def vase_pattern(rng: np.random.Generator, clay: Colour, slip: Colour, dark: Colour) -> np.ndarray:
    """Fired clay with chequered, zigzag and plain bands of slip."""
    height, width = 1024, 1024
    u, v = coordinates(height, width)
    colour = mix(clay, np.asarray(clay) * 0.8, 0.5 + 0.3 * noise(rng, height, width, 10, 30))
    checks = np.sin(2 * np.pi * 8 * u) * np.sin(2 * np.pi * (v - 0.35) / 0.125)
    colour = mix(colour, mix(slip, dark, edge(checks, 0.15)), edge(0.125 - np.abs(v - 0.475), 0.005))
    zigzag = v - 0.25 - 0.035 * (4 * np.abs((u * 12) % 1 - 0.5) - 1)
    colour = mix(colour, slip, edge(0.018 - np.abs(zigzag), 0.006))
    for ring in (0.335, 0.615, 0.155, 0.72):
        colour = mix(colour, dark, edge(0.008 - np.abs(v - ring), 0.005))
    return to_bytes(mix(colour, slip, edge(0.035 - np.abs(v - 0.668), 0.005)))


def book_cover(rng: np.random.Generator, cloth: Colour, gilt: Colour) -> np.ndarray:
    """A cloth cover with a gilt frame, a lozenge and a title of two bars."""
    size = 512
    u, v = coordinates(size, size)
    colour = np.asarray(cloth, dtype=float) * (1 + 0.06 * noise(rng, size, size, 40, 40))[..., None]
    rim = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v))
    colour = mix(colour, gilt, edge(0.014 - np.abs(rim - 0.09), 0.008))
    lozenge = np.abs(u - 0.5) / 0.16 + np.abs(v - 0.42) / 0.22
    colour = mix(colour, gilt, edge(0.12 - np.abs(lozenge - 0.88), 0.06))
    for centre, half in ((0.8, 0.25), (0.73, 0.17)):
        colour = mix(colour, gilt, edge(0.016 - np.abs(v - centre), 0.008) * edge(half - np.abs(u - 0.5), 0.01))
    return to_bytes(colour)


def book_spine(rng: np.random.Generator, cloth: Colour, gilt: Colour) -> np.ndarray:
    """A spine with gilt bands and a title label, upright along u."""
    size = 512
    u, _ = coordinates(size, size)
    colour = np.asarray(cloth, dtype=float) * (0.95 + 0.05 * noise(rng, size, size, 40, 10))[..., None]
    for centre in (0.08, 0.14, 0.86, 0.92):
        colour = mix(colour, gilt, edge(0.015 - np.abs(u - centre), 0.008))
    return to_bytes(mix(colour, gilt, 0.9 * edge(0.13 - np.abs(u - 0.5), 0.01)))


def pages(rng: np.random.Generator) -> np.ndarray:
    """The edge of a block of paper."""
    size = 256
    return to_bytes(np.asarray((232, 220, 190)) * (0.93 + 0.05 * noise(rng, size, size, 3, 40))[..., None])


def peel(
    rng: np.random.Generator, skin: Colour, spot: Colour, pole: Colour, blobs: float, strength: float
) -> np.ndarray:
    """A fruit skin: mottled, darker or greener towards the stalk (v = 1)."""
    height, width = 512, 1024
    _, v = coordinates(height, width)
    mottle = noise(rng, height, width, blobs, blobs / 2) + 0.7 * noise(rng, height, width, 3, 2)
    colour = mix(skin, spot, 0.3 + strength * mottle)
    return to_bytes(mix(colour, pole, 0.9 * edge(v - 0.9, 0.12)))


def apple_skin(rng: np.random.Generator) -> np.ndarray:
    """Red streaks running from the stalk over yellow."""
    height, width = 512, 1024
    _, v = coordinates(height, width)
    streaks = noise(rng, height, width, 24, 1.5) + 0.9 * noise(rng, height, width, 2, 1.5)
    colour = mix((224, 178, 70), (176, 32, 34), 0.72 + 0.4 * streaks)
    colour = mix(colour, (158, 150, 60), edge(v - 0.88, 0.1))
    freckles = noise(rng, height, width, 70, 35)
    return to_bytes(mix(colour, (240, 214, 150), 0.6 * edge(freckles - 2.1, 0.4)))


def doughnut(rng: np.random.Generator) -> np.ndarray:
    """Dough below, icing with a wavy edge above, sprinkles on it (v as in `torus`: 0.5 is the top)."""
    height, width = 384, 768
    u, v = coordinates(height, width)
    colour = mix((206, 142, 72), (150, 88, 40), 0.4 + 0.25 * noise(rng, height, width, 12, 6))
    wave = 0.02 * np.sin(2 * np.pi * 9 * u) + 0.014 * np.sin(2 * np.pi * 14 * u + 1)
    icing = 0.5 + 0.27 * np.sign(v - 0.5) + wave * np.sign(0.5 - v)
    inside = np.where(v < 0.5, v - icing, icing - v)
    colour = mix(colour, (228, 120, 150), edge(inside, 0.012))
    palette = np.array([(250, 240, 220), (84, 60, 160), (250, 206, 70), (60, 150, 130), (120, 40, 50)])
    for k in range(90):
        cu, cv, angle = rng.uniform(0, 1), rng.uniform(0.3, 0.68), rng.uniform(0, np.pi)
        x, y = ((u - cu + 0.5) % 1 - 0.5) * 2.2, v - cv
        along, across = (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))
        rod = 0.013 - np.hypot(np.maximum(np.abs(along) - 0.032, 0), across)
        inked = rod > -0.003
        weight = edge(rod[inked], 0.006)[:, None]
        colour[inked] = (1 - weight) * colour[inked] + weight * palette[k % len(palette)]
    return to_bytes(colour)


def plate_rim(rng: np.random.Generator, china: Colour, ink: Colour) -> np.ndarray:
    """China with an ink band and a ring of dashes, for a lathe whose upper side is v > 0.5 (rim to centre)."""
    height, width = 512, 1024
    u, v = coordinates(height, width)
    colour = np.asarray(china, dtype=float) * (1 + 0.02 * noise(rng, height, width, 6, 6))[..., None]
    colour = mix(colour, ink, edge(0.012 - np.abs(v - 0.545), 0.006))
    dash = edge(0.25 - np.abs((u * 16) % 1 - 0.5), 0.06) * edge(0.026 - np.abs(v - 0.605), 0.008)
    return to_bytes(mix(colour, ink, dash))


def toy_block(rng: np.random.Generator, paint: Colour, wood_tone: Colour, figure: str) -> np.ndarray:
    """The face of a wooden toy block: a painted frame around a `"disc"`, a `"cross"` or a `"star"`."""
    size = 512
    u, v = coordinates(size, size)
    x, y = 2 * u - 1, 2 * v - 1
    colour = np.asarray(wood_tone, dtype=float) * (1 + 0.06 * noise(rng, size, size, 3, 24))[..., None]
    colour = mix(colour, paint, edge(np.maximum(np.abs(x), np.abs(y)) - 0.76, 0.03))
    if figure == "disc":
        shape = 0.46 - np.hypot(x, y)
    elif figure == "cross":
        shape = 0.17 - np.minimum(np.maximum(np.abs(x), np.abs(y) - 0.36), np.maximum(np.abs(y), np.abs(x) - 0.36))
    elif figure == "star":
        shape = 0.4 + 0.16 * np.cos(5 * (np.arctan2(y, x) - np.pi / 2)) - np.hypot(x, y)
    else:
        raise ValueError(f"no figure {figure!r}: expected 'disc', 'cross' or 'star'")
    return to_bytes(mix(colour, paint, edge(shape, 0.03)))
