"""Textures drawn at random for the factory's scenes: [H, W, 3] uint8 sRGB, all procedural.

Details are seldom narrower than four texels, so that pictures carry texture and not aliasing. Many surfaces of the
world look like shapes of all sizes that cover one another, with fine grain on them; `_leaves` makes such pictures.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from . import _textures as fixed
from ._textures import Colour, coordinates, edge, mix, noise, to_bytes


def random_colour(rng: np.random.Generator) -> Colour:
    """Any hue, more often pale than strong, seldom near black."""
    hue, saturation, value = rng.uniform(), rng.beta(1.1, 2.5), 0.1 + 0.9 * rng.beta(1.6, 1.2)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def leaf_colour(rng: np.random.Generator) -> Colour:
    """Green, yellowish or bluish; now and then autumn."""
    hue = rng.uniform(0.02, 0.14) if rng.uniform() < 0.15 else rng.uniform(0.17, 0.4)
    red, green, blue = colorsys.hsv_to_rgb(hue, rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.75))
    return round(255 * red), round(255 * green), round(255 * blue)


def _near(rng: np.random.Generator, colour: Colour, spread: float) -> Colour:
    red, green, blue = np.clip(np.array(colour) * rng.uniform(1 - spread, 1 + spread, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def clouds(rng: np.random.Generator, size: int, blobs: float, octaves: int) -> np.ndarray:
    """Noise [size, size] with detail at several scales; mean 0, deviation 1."""
    total = sum(
        0.65**k * noise(rng, size, size, min(blobs * 2**k, size / 6), min(blobs * 2**k, size / 6))
        for k in range(octaves)
    )
    return np.asarray(total / np.std(total))


def _plain(rng: np.random.Generator, size: int) -> np.ndarray:
    tone = 1 + rng.uniform(0, 0.08) * clouds(rng, size, 3, 2)
    return to_bytes(np.asarray(random_colour(rng)) * tone[..., None])


def _mottled(rng: np.random.Generator, size: int) -> np.ndarray:
    blobs = 2 ** rng.uniform(1, 4.5)
    pattern = clouds(rng, size, blobs, int(rng.integers(1, 5)))
    colour = mix(random_colour(rng), random_colour(rng), 0.5 + 0.4 * pattern)
    return to_bytes(mix(colour, random_colour(rng), edge(clouds(rng, size, blobs, 2) - 1.0, 0.3)))


def _grain(rng: np.random.Generator, size: int) -> np.ndarray:
    """Gravel, carpet, fur from afar: blobs a few texels wide, longer one way."""
    fine, long = size / rng.uniform(6, 14), 2 ** rng.uniform(0, 3)
    pattern = noise(rng, size, size, fine, fine / long) + 0.5 * clouds(rng, size, 3, 2)
    base = random_colour(rng)
    return to_bytes(mix(_near(rng, base, 0.5), base, 0.5 + rng.uniform(0.2, 0.5) * pattern))


def _marble(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    phase = rng.integers(1, 6) * u + rng.integers(0, 6) * v + rng.uniform(0.1, 0.6) * clouds(rng, size, 4, 3)
    return to_bytes(mix(random_colour(rng), random_colour(rng), 0.5 + 0.5 * np.sin(2 * np.pi * phase)))


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    count = int(rng.integers(1, 9))
    wave = np.sin(2 * np.pi * count * u) * np.sin(2 * np.pi * count * v)
    colour = mix(random_colour(rng), random_colour(rng), edge(wave, 0.1))
    return to_bytes(colour * (1 + 0.08 * clouds(rng, size, 8, 3))[..., None])


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    phase = (rng.integers(1, 12) * u + rng.integers(-4, 5) * v) % 1
    colour = mix(random_colour(rng), random_colour(rng), edge(rng.uniform(0.1, 0.3) - np.abs(phase - 0.5), 0.06))
    colour = mix(colour, random_colour(rng), edge(0.06 - np.abs(phase - 0.5), 0.05))
    return to_bytes(colour * (1 + rng.uniform(0, 0.15) * clouds(rng, size, 6, 2))[..., None])


def _bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    rows, columns = int(rng.integers(3, 10)) * 2, int(rng.integers(2, 7))
    row = np.minimum((v * rows).astype(int), rows - 1)
    x = u * columns + rng.choice([0.0, 0.5]) * (row % 2)
    column = x.astype(int) % columns
    tone = rng.uniform(0.7, 1.25, (rows, columns))[row, column]
    gap = np.minimum(0.5 - np.abs((v * rows) % 1 - 0.5), (0.5 - np.abs(x % 1 - 0.5)) * rows / columns)
    brick = np.asarray(random_colour(rng)) * (tone * (1 + 0.12 * clouds(rng, size, 10, 3)))[..., None]
    return to_bytes(mix(random_colour(rng), brick, edge(gap - rng.uniform(0.03, 0.1), 0.06)))


def _weave(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    count = int(rng.integers(6, 20))
    over = np.abs(np.sin(np.pi * count * u)) * (0.5 + 0.5 * np.sign(np.sin(np.pi * count * (u + v))))
    under = np.abs(np.sin(np.pi * count * v))
    colour = mix(random_colour(rng), random_colour(rng), over / (over + under + 1e-3))
    return to_bytes(colour * (0.75 + 0.25 * np.maximum(over, under))[..., None])


def _dots(rng: np.random.Generator, size: int) -> np.ndarray:
    image = Image.new("RGB", (2 * size, 2 * size), random_colour(rng))
    draw = ImageDraw.Draw(image)
    square = rng.uniform() < 0.3
    for _ in range(int(rng.integers(15, 80))):
        x, y, radius = 2 * size * rng.uniform((0.0, 0.0, 0.015), (1.0, 1.0, 0.1))
        shape = draw.rectangle if square else draw.ellipse
        shape((x - radius, y - radius, x + radius, y + radius), fill=random_colour(rng))
    return _shaded(rng, image, size, 0.1)


def _patches(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = coordinates(size, size)
    cells = int(rng.integers(6, 50))
    at = rng.uniform(0, 1, (cells, 2))
    distance = np.stack([((u - x + 0.5) % 1 - 0.5) ** 2 + ((v - y + 0.5) % 1 - 0.5) ** 2 for x, y in at])
    colours = np.array([random_colour(rng) for _ in range(cells)], dtype=float)
    return to_bytes(colours[distance.argmin(axis=0)] * (1 + 0.1 * clouds(rng, size, 12, 2))[..., None])


def _shaded(rng: np.random.Generator, image: Image.Image, size: int, most: float) -> np.ndarray:
    colour = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=float)
    return to_bytes(colour * (1 + rng.uniform(0.02, most) * clouds(rng, size, 4, 5))[..., None])


def _leaves(rng: np.random.Generator, size: int, palette: Callable[[np.random.Generator], Colour]) -> np.ndarray:
    """Shapes of all sizes over one another, as in most photographs: areas fall off with the fourth power or so."""
    scale = 2
    image = Image.new("RGB", (scale * size, scale * size), palette(rng))
    draw = ImageDraw.Draw(image)
    colours = [palette(rng) for _ in range(int(rng.integers(4, 14)))]
    count = int(rng.integers(200, 700))
    smallest, largest = 0.025, rng.uniform(0.2, 0.4)
    # Radii by a power law with density r^-3, drawn from its inverse distribution function; large ones first.
    share = rng.uniform(0, 1, count)
    radii = np.sort((smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5)[::-1] * scale * size
    corners = int(rng.choice([0, 3, 4, 5, 7]))
    for radius in radii:
        x, y = rng.uniform(0, scale * size, 2)
        fill = _near(rng, colours[int(rng.integers(len(colours)))], 0.25)
        stretch = rng.uniform(0.4, 1.0)
        if corners:
            turn = rng.uniform(0, 2 * np.pi)
            turn += 2 * np.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners
            outline = [(x + radius * np.cos(a), y + stretch * radius * np.sin(a)) for a in turn]
            draw.polygon(outline, fill=fill)
        else:
            draw.ellipse((x - radius, y - stretch * radius, x + radius, y + stretch * radius), fill=fill)
    return _shaded(rng, image, size, 0.2)


def _writing(rng: np.random.Generator, size: int) -> np.ndarray:
    """Lines of strokes with gaps between words: print, labels, notices."""
    image = Image.new("RGB", (2 * size, 2 * size), random_colour(rng))
    draw = ImageDraw.Draw(image)
    y = 0.05
    while y < 0.93:
        height, ink, x = float(rng.choice([0.03, 0.045, 0.1], p=[0.5, 0.3, 0.2])), random_colour(rng), 0.06
        while x < 0.92:
            if rng.uniform() < 0.18:
                x += 0.6 * height
            a, b, c, d = (2 * size * z for z in (x, y, x + 0.45 * height, y + height))
            thick = max(2, int(0.3 * height * size))
            kind = int(rng.integers(5))
            if kind == 0:
                draw.ellipse((a, b, c, d), outline=ink, width=thick)
            elif kind == 1:
                draw.line((a, d, (a + c) / 2, b, c, d), fill=ink, width=thick)
            elif kind == 2:
                draw.rectangle((a, b, a + thick, d), fill=ink)
            elif kind == 3:
                draw.line((a, b, a, d, c, d), fill=ink, width=thick)
            else:
                draw.line((a, (b + d) / 2, c, (b + d) / 2, c, d), fill=ink, width=thick)
            x += 0.65 * height
        y += height * rng.uniform(1.4, 2.2)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _collage(rng: np.random.Generator, size: int) -> np.ndarray:
    """One texture in the blobs of another."""
    textures = [Image.fromarray(_one(rng, size, _SIMPLE)).resize((size, size)) for _ in range(2)]
    low, high = (np.asarray(texture, dtype=float) for texture in textures)
    return to_bytes(mix(low, high, edge(clouds(rng, size, rng.uniform(2, 6), 2), 0.08)))


def _still_life(rng: np.random.Generator, size: int) -> np.ndarray:
    """A texture of the embedded still life, in other colours."""
    a, b, c = (random_colour(rng) for _ in range(3))
    kind = int(rng.integers(8))
    if kind == 0:
        return fixed.wood(rng, int(rng.integers(2, 10)), a, _near(rng, a, 0.5), size)
    if kind == 1:
        return fixed.gingham(rng, int(rng.integers(3, 10)), a, b, c)
    if kind == 2:
        return fixed.book_cover(rng, a, b)
    if kind == 3:
        return fixed.vase_pattern(rng, a, b, c)
    if kind == 4:
        return fixed.teapot_glaze(rng, a, b, c)
    if kind == 5:
        return fixed.peel(rng, a, b, c, rng.uniform(6, 40), rng.uniform(0.1, 0.4))
    if kind == 6:
        return fixed.toy_block(rng, a, b, str(rng.choice(["disc", "cross", "star"])))
    return fixed.doughnut(rng)


def _pictures(rng: np.random.Generator, size: int) -> np.ndarray:
    return _leaves(rng, size, random_colour)


def foliage(rng: np.random.Generator, size: int) -> np.ndarray:
    """Leaves over leaves, for hedges and meadows."""
    return _leaves(rng, size, leaf_colour)


_Maker = Callable[[np.random.Generator, int], np.ndarray]
_SIMPLE: dict[_Maker, float] = {
    _mottled: 0.14,
    _grain: 0.1,
    _marble: 0.06,
    _checks: 0.06,
    _stripes: 0.07,
    _bricks: 0.07,
    _weave: 0.03,
    _dots: 0.06,
    _patches: 0.06,
    _pictures: 0.16,
    _writing: 0.05,
    _still_life: 0.08,
}


def _one(rng: np.random.Generator, size: int, makers: dict[_Maker, float]) -> np.ndarray:
    weights = np.array(list(makers.values()))
    return list(makers)[int(rng.choice(len(makers), p=weights / weights.sum()))](rng, size)


def random_texture(rng: np.random.Generator, *, plain: float = 0.12, size: int = 256) -> np.ndarray:
    """Any texture.

    Args:
        rng: decides everything.
        plain: how often it is one colour with hardly any pattern.
        size: texels on a side; a few kinds have a size of their own.
    """
    if rng.uniform() < plain:
        return _plain(rng, size)
    return _one(rng, size, _SIMPLE | {_collage: 0.12})
