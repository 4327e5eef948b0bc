"""Kernels that make shifts and adds fast. Each is a torch op with a plain-torch twin of the same signature.

TVM compiles them on first use for the CPU of this machine, and keeps them in a cache. Without TVM, without a compiler,
or in cases without a kernel, the twin runs. This package is the only one that imports TVM, and it does so lazily.

`set_numerics` and the context manager `numerics` choose between ``"exact"`` (the default), ``"fast"``, ``"int8"`` and
``"twin"``.
"""

from __future__ import annotations

from shiftadd3d.kernels.ops.matshift import matshift
from shiftadd3d.kernels.ops.mlp import shift_mlp
from shiftadd3d.kernels.ops.moe import moe_mlp
from shiftadd3d.kernels.reference.matshift import matshift_twin
from shiftadd3d.kernels.reference.mlp import shift_mlp_twin
from shiftadd3d.kernels.reference.moe import moe_mlp_twin
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics, get_numerics, numerics, set_numerics

__all__ = [
    "COMPILED",
    "Numerics",
    "get_numerics",
    "matshift",
    "matshift_twin",
    "moe_mlp",
    "moe_mlp_twin",
    "numerics",
    "set_numerics",
    "shift_mlp",
    "shift_mlp_twin",
]
