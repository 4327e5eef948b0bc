"""What many kernels apply to a vector before they store it."""

from __future__ import annotations

import math
from typing import Any

from shiftadd3d.kernels.cpu.vectors import Vectors
from shiftadd3d.kernels.reference.activations import Activation

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


def activate(vectors: Vectors, name: Activation, x: Any) -> Any:
    """The activation of a vector of float32, in TIR. NaN stays NaN."""
    if name == "relu":
        return vectors.relu(x)
    if name == "gelu":
        half = vectors.splat(0.5) * x
        return vectors.multiply_add(half, _erf(vectors, x * vectors.splat(math.sqrt(0.5))), half)
    return x


def _erf(vectors: Vectors, x: Any) -> Any:
    import tvm.script

    T: Any = tvm.script.tirx
    bounds = vectors.splat(-_ERF_RANGE), vectors.splat(_ERF_RANGE)
    square = T.bind(x * x)  # each value is used more than once, and an expression would be emitted each time

    def polynomial(coefficients: tuple[float, ...]) -> Any:
        total = vectors.splat(coefficients[0])
        for coefficient in coefficients[1:]:
            total = vectors.multiply_add(total, square, vectors.splat(coefficient))
        return total

    inside = T.bind(x * polynomial(_ERF_P) / polynomial(_ERF_Q))
    one = vectors.splat(1.0)
    return T.Select(x > bounds[1], one, T.Select(x < bounds[0], vectors.splat(-1.0), inside))
