"""Energy by the accounting of ShiftAddViT's authors, to look for the 42.9 % that the paper saves.

This re-implements the accounting of `pvt/hw_utils.py` and `pvt/cal_energy.py` in their repository
(GATECH-EIC/ShiftAddViT, commit 5f0edd5d) from what it computes. No code is copied. For each layer, a search over
tilings of a row-stationary array of 192 elements and a buffer of 65,536 words finds the smallest sum of normalised
energy and latency. Its assumptions:

- DRAM takes 200 pJ for 16 bits. Buffer, network and registers take 6, 2 and 1 times 3.7 pJ for 16 bits, weights in
registers twice that. Everything is 32 bits wide.
- All data of *shift* layers, including activations and sums, is 10 bits wide.
- *Add* layers pay nothing for DRAM, buffer and network.
- A product is one operation: a multiplication, a shift or an addition. No addition follows the first two.
- The second operand of an attention's product counts as one matrix for all heads and pictures.
- Every row of a linear layer is a picture of one pixel.
- Norms, softmax and activation functions cost nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from shiftadd3d.nn.counting import Product

ASSUMPTIONS = (
    "32 bits everywhere, but 10 for all data of shift layers; add layers pay for registers and partial sums only; no "
    "accumulation after a multiplication or shift; DRAM 200 pJ for 16 bits, buffer, network and registers 6, 2 and 1 "
    "times 3.7 pJ"
)

_OPERATION = {"mult": 3.7, "shift": 0.13, "add": 0.9}  # pJ
_DRAM, _BUFFER, _NETWORK, _REGISTER = 200.0, 6 * 3.7, 2 * 3.7, 3.7  # pJ for 16 bits
_BITS, _SHIFT_BITS = 32, 10
_ELEMENTS, _BUFFER_WORDS = 192, 65536
_REGISTERS = {"sums": 16, "inputs": 12, "weights": 960}  # words


@lru_cache(maxsize=4096)
def authors_energy(product: Product) -> dict[str, float]:
    """Picojoules of a product: for its arithmetic, and at each level (dram, buffer, noc, register)."""
    size = _Size.of(product)
    tile = size.tilings()
    accesses = size.accesses(tile)
    scale = (_SHIFT_BITS if product.primitive == "shift" else _BITS) / 16
    if product.primitive == "add":
        levels = {"noc": accesses["noc_sums"] * _REGISTER}
    else:
        levels = {
            "dram": accesses["dram"] * _DRAM,
            "buffer": accesses["buffer"] * _BUFFER,
            "noc": accesses["noc"] * _NETWORK + accesses["noc_sums"] * _REGISTER,
        }
    levels["register"] = accesses["register"] * _REGISTER + accesses["register_weights"] * 2 * _REGISTER
    levels = {level: value * scale for level, value in levels.items()}
    total = np.sum(list(levels.values()), axis=0) + size.products * _OPERATION[product.primitive]
    latency = accesses["steps"]
    chosen = int(np.argmin((total - total.min()) / total.max() + (latency - latency.min()) / latency.max()))
    energy = {level: float(values[chosen]) for level, values in levels.items()}
    return {**energy, "arithmetic": size.products * _OPERATION[product.primitive]}


class _Size:
    """A layer in the script's terms: N pictures, M outputs and C inputs, E x F pixels out of H x W, R x R taps."""

    def __init__(
        self, n: int, m: int, c: int, out: tuple[int, int], into: tuple[int, int], r: int, stride: int
    ) -> None:
        self.n, self.m, self.c, (self.e, self.f), (self.h, self.w) = n, m, c, out, into
        self.r, self.stride = r, stride
        self.products = n * m * c * self.e * self.f * r * r

    @classmethod
    def of(cls, product: Product) -> _Size:
        if product.kernel == (1, 1) and product.stride == (1, 1):  # a matrix product: rows as pictures of one pixel
            rows = product.groups * product.batch * math.prod(product.size)
            return cls(rows, product.outputs, product.inputs, (1, 1), (1, 1), 1, 1)
        side = max(1, round(math.sqrt(math.prod(product.kernel))))
        into = product.input_size or product.size
        pictures = product.batch * product.groups
        return cls(pictures, product.outputs, product.inputs, product.size, into, side, product.stride[0])

    def tilings(self) -> dict[str, np.ndarray]:
        """All factorisations that fit, or the finest ones where none does (their script fails there)."""
        # What does not fit whatever the others are is left out beforehand, but for what cannot be finer.
        array = max(1, (_ELEMENTS - 1) // self.r)
        most = max(1, (_REGISTERS["inputs"] - 1) // self.r)
        lists = (
            _factors(self.n, 2),
            [m for m in _factors(self.m, 4) if m[0] <= _REGISTERS["sums"] and m[1] <= array],
            [c for c in _factors(self.c, 3) if c[0] <= most and c[1] <= array],
            [e for e in _factors(self.e, 2) if e[0] <= array],
        )
        places = np.indices([len(each) for each in lists]).reshape(len(lists), -1)
        grid = np.concatenate([np.array(each)[place] for each, place in zip(lists, places, strict=True)], axis=1)
        names = ("N0", "N3", "M0", "M1", "M2", "M3", "C0", "C1", "C2", "E1", "E3")
        tile = dict(zip(names, grid.T, strict=True))
        height, width = (tile["E1"] - 1) * self.stride + self.r, (self.f - 1) * self.stride + self.r
        inputs = tile["N0"] * tile["C0"] * tile["C1"] * height * width
        sums = tile["N0"] * tile["M0"] * tile["M1"] * tile["M2"] * tile["E1"] * self.f
        fits = inputs + sums < _BUFFER_WORDS
        fits &= tile["M1"] * tile["C1"] * tile["E1"] * self.r < _ELEMENTS
        fits &= tile["C0"] * self.r < _REGISTERS["inputs"]
        fits &= tile["M0"] * tile["C0"] * self.r < _REGISTERS["weights"]
        if (fits & (tile["E1"] > 1)).any():  # their rule for all but linear layers
            fits &= tile["E1"] > 1
        if not fits.any():
            fits = inputs + sums == (inputs + sums).min()
        return {name: values[fits] for name, values in tile.items()}

    def accesses(self, tile: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Words at each level, and steps of the array, for each tiling."""
        t = {name: values.astype(float) for name, values in tile.items()}
        r = self.r
        inputs, weights = self.n * self.h * self.w * self.c, r * r * self.c * self.m
        outputs = self.n * self.e * self.f * self.m
        outer, inner = t["M3"] * t["M2"], t["N3"] * t["E3"]
        again = np.maximum
        rows, columns = r * self.e / self.h, r * self.f / self.w
        return {
            "dram": t["M3"] * inputs + inner * weights + outputs,
            "buffer": outer * inputs + again(2 * (t["C2"] - 1), 1) * outputs,
            "noc": outer * t["M1"] * rows * inputs + inner * t["E1"] * weights,
            "noc_sums": again(t["C2"] * (t["C1"] * r - 1), 1) * outputs,
            "register": outer * t["M1"] * rows * t["M0"] * columns * inputs
            + again(2 * t["C2"] * t["C1"] * r * (t["C0"] * r - 1), 1) * outputs,
            "register_weights": inner * t["E1"] * self.f * t["N0"] * weights,
            "steps": t["N3"] * t["N0"] * t["M3"] * t["M2"] * t["M0"] * t["C2"] * t["C0"] * t["E3"] * self.f * r,
        }


@lru_cache(maxsize=1024)
def _factors(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if parts == 1:
        return [(number,)]
    divisors = sorted(
        {d for small in range(1, math.isqrt(number) + 1) if number % small == 0 for d in (small, number // small)}
    )
    return [(first, *rest) for first in divisors for rest in _factors(number // first, parts - 1)]
