"""What kernels do to vectors of float32 between products: activations, softmaxes, layer norm, bilinear look-up."""

from __future__ import annotations

import math
from collections.abc import Callable

from shiftadd3d.kernels.cpu.decode import interleaved
from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.tir import Buffer, Expr, Index

LOWEST = -3.0e38
"""Below all scores that a softmax is taken of."""

# erf(x) = x P(x^2) / Q(x^2), as in Eigen: within 3 units in the last place of float32, up to where erf rounds to 1.
_ERF_RANGE = 3.832506856900711

_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)

_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)

# After the Cephes library's expf, sinf and cosf.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_HALF_PI = (1.57079637050628662109375, -4.37113900018624283e-8, -1.71512451000121e-15)

# 2**x between -1/2 and 1/2, of the smallest relative error.
_EXP2 = (0.009570101276, 0.05591785908, 0.2402474433, 0.6931217909, 0.9999992847)


# The distribution function of normal numbers is 1/2 + x P(x^2) within this range, and 0 or 1 beyond. Of all P of this
# degree that come to 1/2 at its end, this one leaves the smallest error of x times that.
_NORMAL_RANGE = 3.9
_NORMAL = (
    2.35042883e-08,
    -1.62573315e-06,
    4.83143158e-05,
    -8.15953594e-04,
    8.77551548e-03,
    -6.45690411e-02,
    3.97874653e-01,
)

COARSE_GELU_ERROR = 2e-4
"""What a coarse gelu may be off by, for magnitudes up to 100."""


def activate(isa: Isa, name: Activation, x: Expr, *, coarse: bool = False) -> Expr:
    """The activation of a vector; if `coarse`, gelu without the division that takes most of its time. NaN stays NaN."""
    if name == "relu":
        return isa.relu(x)
    if name == "gelu":
        if coarse:
            inside = isa.at_most(isa.at_least(x, isa.splat(-_NORMAL_RANGE)), isa.splat(_NORMAL_RANGE))
            inside = T.bind(inside)
            return x * isa.fma(inside, _polynomial(isa, _NORMAL, T.bind(inside * inside)), isa.splat(0.5))
        half = isa.splat(0.5) * x
        return isa.fma(half, _erf(isa, x * isa.splat(math.sqrt(0.5))), half)
    return x


def _erf(isa: Isa, x: Expr) -> Expr:
    square = T.bind(x * x)  # each value is used more than once, and an expression would be emitted each time
    inside = T.bind(x * _polynomial(isa, _ERF_P, square) / _polynomial(isa, _ERF_Q, square))
    low, high, one = isa.splat(-_ERF_RANGE), isa.splat(_ERF_RANGE), isa.splat(1.0)
    return T.select(x > high, one, T.select(x < low, isa.splat(-1.0), inside))


def _polynomial(isa: Isa, coefficients: tuple[float, ...], x: Expr) -> Expr:
    total = isa.splat(coefficients[0])
    for coefficient in coefficients[1:]:
        total = isa.fma(total, x, isa.splat(coefficient))
    return total


def exp(isa: Isa, x: Expr) -> Expr:
    """``e**x`` for x <= 0, to 2 units in the last place; 0 below -80. NaN stays.

    A masked view's share of a softmax is then 0, as in torch. Where it is the least number that there is, products with
    it are subnormal, and each of those takes a hundred cycles or more.
    """
    given = isa.keep(x)
    x = isa.keep(isa.at_least(given, isa.splat(-80.0)))
    # x = n ln 2 + r, with ln 2 in two pieces.
    n = isa.keep(T.nearbyint(x * isa.splat(1.44269504088896341)))
    r = isa.fma(n, isa.splat(-0.693359375), x)
    r = isa.keep(isa.fma(n, isa.splat(2.12194440e-4), r))
    p = isa.fma(_polynomial(isa, _EXP, r) * r, r, r) + isa.splat(1.0)
    # Times 2**n: n is added to the exponent's bits.
    power = isa.as_float(isa.as_integer(p) + (isa.to_integer(n) << isa.splat_int(23)))
    return T.select(given < isa.splat(-80.0), isa.splat(0.0), power)


def exp2(isa: Isa, x: Expr) -> Expr:
    """``2**x`` for x <= 0, to 3e-6 of itself; 0 below -115, for the reason that `exp` has. NaN stays."""
    x = isa.keep(x)
    n = isa.keep(T.nearbyint(x))
    power = isa.times_power_of_two(_polynomial(isa, _EXP2, isa.keep(x - n)), n)
    return T.select(x < isa.splat(-115.0), isa.splat(0.0), power)


def sine_and_cosine(isa: Isa, x: Expr) -> tuple[Expr, Expr]:
    r"""``sin x`` and ``cos x`` to 2e-7, for \|x\| up to a million; needs fused multiply-adds."""
    x = isa.keep(x)
    # x = n pi/2 + r, with pi/2 in three pieces.
    n = isa.keep(T.nearbyint(x * isa.splat(0.63661977236758134)))
    r = x
    for piece in _HALF_PI:
        r = isa.fma(n, isa.splat(-piece), r)
    r = isa.keep(r)
    square = isa.keep(r * r)
    sine = isa.keep(isa.fma(_polynomial(isa, _SINE, square) * square, r, r))
    cosine = isa.fma(square, isa.splat(-0.5), isa.splat(1.0))
    cosine = isa.keep(isa.fma(_polynomial(isa, _COSINE, square) * square, square, cosine))
    # A quarter turn swaps the two, and two quarter turns change both signs.
    quarter = isa.keep(isa.to_integer(n), integer=True)
    one, two = isa.splat_int(1), isa.splat_int(2)
    odd = (quarter & one) != isa.splat_int(0)
    sine, cosine = isa.keep(T.select(odd, cosine, sine)), isa.keep(T.select(odd, sine, cosine))

    def with_sign(value: Expr, turned: Expr) -> Expr:
        return isa.as_float(isa.as_integer(value) ^ ((turned & two) << isa.splat_int(30)))

    return with_sign(sine, quarter), with_sign(cosine, quarter + one)


def softmax_of_vectors(
    isa: Isa,
    shares: Buffer,
    count: Index,
    score: Callable[[Expr], Expr],
    use: Callable[[Expr, Expr], None],
    power: Callable[[Isa, Expr], Expr] = exp,
) -> Expr:
    """Lane by lane, the softmax of `count` vectors, but for the division by its sum, which is returned.

    Args:
        shares: [count * lanes]; holds the powers of ``score - largest score`` in the end.
        score: ``score(i)``, a vector.
        use: ``use(i, share)``, for each of them.
        power: `exp`, or `exp2` of scores that are in powers of two.
    """
    largest, total = isa.register(LOWEST), isa.register(0.0)
    with T.serial(count) as i:
        at = isa.at(i * isa.lanes)
        shares[at] = score(i)
        largest.value = isa.at_least(shares[at], largest.value)
    with T.serial(count) as i:
        at = isa.at(i * isa.lanes)
        shares[at] = power(isa, shares[at] - largest.value)
        total.value = total.value + shares[at]
        use(i, shares[at])
    return total.value


def softmax_of_row(isa: Isa, row: Buffer, count: Index) -> Expr:
    """The softmax of a row of `count` scores, in place, but for the division by its sum, a float, which is returned.

    Args:
        row: with room for whole vectors.
    """
    lanes = isa.lanes
    peaks, sums = isa.register(LOWEST), isa.register(0.0)
    vectors = T.bind(T.truncdiv(count + (lanes - 1), T.int64(lanes)))
    with T.serial(vectors * lanes - count) as i:
        row[count + i] = T.float32(LOWEST)
    with T.serial(vectors) as n:
        peaks.value = isa.at_least(row[isa.at(n * lanes)], peaks.value)
    peaks.value = isa.largest(peaks.value)
    with T.serial(vectors) as n:
        at = isa.at(n * lanes)
        row[at] = exp(isa, row[at] - peaks.value)
        sums.value = sums.value + row[at]
    return isa.total(sums.value)


def layer_norm(
    isa: Isa, rows: Index, width: int, source: Callable[[Index, Index], Expr], out: Buffer, eps: Expr
) -> None:
    """Rows of mean 0 and variance 1, without weight and bias: ``out[row, column]``.

    One row after the other. `normalize` takes the sums of many rows together, but then LLVM spills sums of register
    tiles in the same function: a ray block in float32 took 1.4 times as long on a Zen 5.

    Args:
        source: ``source(row, column)``: numbers or, for an index of vectors, vectors.
    """
    end = width // isa.lanes * isa.lanes
    whole, rest = range(0, end, isa.lanes), range(end, width)

    def total(value: Callable[[Index, bool], Expr]) -> Expr:
        """The sum over a row of ``value(column or columns, whether there are many)``."""
        vectors = isa.splat(0.0)
        for c in whole:
            vectors = vectors + value(isa.at(c), True)
        return sum((value(c, False) for c in rest), isa.total(vectors))

    with T.serial(rows) as r:
        mean, factor = T.alloc(1, align=4), T.alloc(1, align=4)
        mean[0] = total(lambda c, _: source(r, c)) / T.float32(width)

        def apart(c: Index, many: bool) -> Expr:
            return source(r, c) - (isa.splat(mean[0]) if many else mean[0])

        def square(c: Index, many: bool) -> Expr:
            x = isa.keep(apart(c, many)) if many else apart(c, many)
            return x * x

        factor[0] = T.float32(1.0) / T.sqrt(total(square) / T.float32(width) + eps)
        for c in whole:
            out[r, isa.at(c)] = apart(isa.at(c), True) * isa.splat(factor[0])
        for c in rest:
            out[r, c] = apart(c, False) * factor[0]


def normalize(
    isa: Isa,
    rows: Expr,
    width: int,
    source: Callable[[Expr, int], Expr],
    store: Callable[[Expr, int, Expr], None],
    eps: Expr,
) -> None:
    """`layer_norm` of rows of whole vectors, of no more rows than a vector has lanes: their sums are taken together.

    Args:
        source: ``source(row, column)``: the vector from a column on.
        store: ``store(row, column, x)``: what to do with such a vector of the outcome.
    """
    sums, means, factors = T.alloc(isa.lanes, isa.lanes), T.alloc(isa.lanes), T.alloc(isa.lanes)
    columns, share = range(0, width, isa.lanes), isa.splat(1.0 / width)

    def total(value: Callable[[Expr, int], Expr]) -> Expr:
        """The sums over all rows."""
        with T.serial(rows) as i:
            vectors = value(i, 0)
            for c in columns[1:]:
                vectors = vectors + value(i, c)
            sums[i, isa.at(0)] = vectors
        return folded_each(isa, sums, lambda a, b: a + b)

    def square(i: Expr, c: int) -> Expr:
        apart = isa.keep(source(i, c) - isa.splat(means[i]))
        return apart * apart

    means[isa.at(0)] = total(source) * share
    factors[isa.at(0)] = isa.splat(1.0) / isa.square_root(total(square) * share + isa.splat(eps))
    with T.serial(rows) as i:
        for c in columns:
            store(i, c, (source(i, c) - isa.splat(means[i])) * isa.splat(factors[i]))


def folded_each(isa: Isa, rows: Buffer, fold: Callable[[Expr, Expr], Expr], *, integer: bool = False) -> Expr:
    """The lanes of each of as many vectors as they have lanes, rows of a buffer, folded into one: a vector of these."""
    kept = [isa.keep(rows[i, isa.at(0)], integer=integer) for i in range(isa.lanes)]
    while len(kept) > 1:
        half = len(kept) // 2
        kept = [
            isa.keep(fold(*(T.shuffle([a, b], interleaved(part, isa.lanes)) for part in range(2))), integer=integer)
            for a, b in zip(kept[:half], kept[half:], strict=True)
        ]
    return kept[0]


def copy_row(isa: Isa, source: Buffer, out: Buffer, count: int) -> None:
    """`count` floats, by vectors as far as they go."""
    end = 0
    for vectors in (isa, Isa(isa.target, 4)):
        while end + vectors.lanes <= count:
            out[vectors.at(end)] = source[vectors.at(end)]
            end += vectors.lanes
    with T.serial(count - end) as c:
        out[end + c] = source[end + c]


def add_row(isa: Isa, source: Buffer, out: Buffer, count: int) -> None:
    """Add `count` floats to others, by vectors as far as they go."""
    end = count // isa.lanes * isa.lanes
    for start in range(0, end, isa.lanes):
        out[isa.at(start)] = out[isa.at(start)] + source[isa.at(start)]
    with T.serial(count - end) as c:
        out[end + c] = out[end + c] + source[end + c]


class Bilinear:
    """Places between the pixels of an image, for a vector of points: lanes are points.

    Emits, where it is made, the buffers it keeps offsets and shares of four pixels in.
    """

    def __init__(self, isa: Isa) -> None:
        self._isa = isa
        self._offsets = T.alloc(4 * isa.lanes, dtype="int32")
        self._shares = T.alloc(4 * isa.lanes)

    def place(self, pixel: list[Expr], size: tuple[Expr, Expr], pitch: Index) -> None:
        """Find the four pixels around a place; beyond the border nothing is mixed in.

        Args:
            pixel: x and y.
            size: height and width of the image.
            pitch: floats from a pixel to the next.
        """
        isa = self._isa
        columns, rows = (self._along(x, extent) for x, extent in zip(pixel, reversed(size), strict=True))
        width = isa.splat_int(T.cast(size[1], "int32"))
        floats = isa.splat_int(pitch if isinstance(pitch, int) else T.cast(pitch, "int32"))
        for tap, ((y, share_y), (x, share_x)) in enumerate((row, column) for row in rows for column in columns):
            at = isa.at(tap * isa.lanes)
            self._offsets[at] = (y * width + x) * floats
            self._shares[at] = share_y * share_x

    def _along(self, x: Expr, extent: Expr) -> list[tuple[Expr, Expr]]:
        """Index and share of the two pixels around a place on one axis."""
        isa = self._isa
        zero = isa.splat(0.0)
        last = isa.keep(isa.splat(T.cast(extent - 1, "float32")))
        low = isa.keep(isa.floor(x))
        high = isa.keep(low + isa.splat(1.0))
        fraction = isa.keep(x - low)

        def share(amount: Expr, at: Expr) -> Expr:
            # Written so that NaN, which is not beyond any border, stays.
            return isa.keep(T.select(at < zero, zero, T.select(at > last, zero, amount)))

        def index(at: Expr) -> Expr:
            # Not by comparing: of NaN and a number these give the number, so that every address can be read from.
            return isa.keep(isa.to_integer(isa.smaller(isa.larger(at, zero), last)), integer=True)

        return [(index(low), share(isa.splat(1.0) - fraction, low)), (index(high), share(fraction, high))]

    def value(self, lane: Expr, read: Callable[[Expr], Expr]) -> Expr:
        """A number at one of the points; ``read(offset)`` gives it for a pixel."""
        (share, offset), *others = self._around(lane)
        return sum((share * read(offset) for share, offset in others), share * read(offset))

    def vector(self, lane: Expr, read: Callable[[Expr], Expr], isa: Isa) -> Expr:
        """A vector of numbers of a pixel, of any width, at one of the points."""
        total = isa.splat(0.0)
        for share, offset in self._around(lane):
            total = isa.fma(isa.splat(share), read(offset), total)
        return total

    def _around(self, lane: Expr) -> list[tuple[Expr, Expr]]:
        places = [tap * self._isa.lanes + lane for tap in range(4)]
        return [(self._shares[place], T.cast(self._offsets[place], "int64")) for place in places]


def blend_colors(
    isa: Isa, scores: Buffer, count: Index, color: Callable[[Expr], Expr], weights: Buffer, rgb: Buffer
) -> None:
    """The softmax of `count` scores, and the mean of as many colours under it.

    Args:
        scores: with room for whole vectors; what they hold in the end means nothing.
        color: ``color(i)``: the vector of a colour and one more float.
    """
    four = Isa(isa.target, 4)
    blended = four.register(0.0)
    total = T.bind(softmax_of_row(isa, scores, count))
    with T.serial(count) as i:
        blended.value = four.fma(four.splat(scores[i]), color(i), blended.value)
    with T.serial(count) as i:
        weights[i] = scores[i] / total
    for channel in range(3):
        rgb[channel] = blended[channel] / total
