"""bfloat16 in TIR: kernels see such tensors as int16, and compute in float32.

TVM's own casts to bfloat16 do not compile for every target. These are integer arithmetic and do.
"""

from __future__ import annotations

from typing import Any

_QUIET_NAN, _INFINITY, _MAGNITUDE = 0x400000, 0x7F800000, 0x7FFFFFFF


def widen(bits: Any, lanes: int = 1) -> Any:
    """float32 numbers of the bits (int16) of bfloat16 ones; `lanes` of them, or a scalar."""
    T = _tirx()
    wide = T.cast(bits, _type("int32", lanes)) << _splat(16, lanes)
    return T.reinterpret(_type("float32", lanes), wide)


def narrow(x: Any, lanes: int = 1) -> Any:
    """The bits (int16) of the bfloat16 numbers nearest to float32 ones, ties to even."""
    T = _tirx()
    return T.cast(_rounded(x, lanes) >> _splat(16, lanes), _type("int16", lanes))


def round_to(x: Any, lanes: int = 1) -> Any:
    """float32 numbers rounded to what bfloat16 can hold."""
    T = _tirx()
    return T.reinterpret(_type("float32", lanes), _rounded(x, lanes) & _splat(-65536, lanes))


def _rounded(x: Any, lanes: int) -> Any:
    """Bits of float32 whose upper half is the nearest bfloat16. NaN stays NaN, whatever its payload."""
    T = _tirx()
    bits = T.bind(T.reinterpret(_type("int32", lanes), x))
    rounded = bits + _splat(0x7FFF, lanes) + ((bits >> _splat(16, lanes)) & _splat(1, lanes))
    is_nan = (bits & _splat(_MAGNITUDE, lanes)) > _splat(_INFINITY, lanes)
    return T.bind(T.Select(is_nan, bits | _splat(_QUIET_NAN, lanes), rounded))


def _tirx() -> Any:
    import tvm.script

    return tvm.script.tirx


def _type(name: str, lanes: int) -> str:
    return name if lanes == 1 else f"{name}x{lanes}"


def _splat(x: int, lanes: int) -> Any:
    T = _tirx()
    return T.int32(x) if lanes == 1 else T.broadcast(T.int32(x), lanes)
