"""What TVM makes of an ordinary float32 linear layer: the yardstick that shift layers are measured by.

A plain product of two matrices of known sizes, scheduled the way textbooks do, or as MetaSchedule found best (see
`shiftadd3d.kernels.tune`). No layer uses it: torch's own product is as fast or faster.
"""

# TVMScript's annotations are calls:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from shiftadd3d.kernels import records, targets
from shiftadd3d.kernels.kernel import Kernel
from shiftadd3d.kernels.targets import CpuTarget

__all__ = ["DENSE", "dense", "module", "outcome"]

# A tile of the outcome that stays in registers: rows, and vectors across.
_TILE = 4, 2


def dense(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` of [M, K] and [K, N], float32 on a CPU, both contiguous."""
    (rows, inputs), outputs = x.shape, weight.shape[1]
    spec = specification(targets.current(), rows, inputs, outputs)
    function = DENSE.function(**spec)
    return x @ weight if function is None else outcome(function, x, weight)


def outcome(function: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Call the compiled function."""
    y = torch.empty(x.shape[0], weight.shape[1])
    function(x, weight, y)
    return y


def specification(target: CpuTarget, rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """What `DENSE` is compiled for: the sizes, and the schedule on record for them, or "" for our own."""
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs}
    found = records.choice(target.name, "dense", **sizes)
    return {**sizes, "trace": json.dumps(found["trace"]) if found else ""}


def module(rows: int, inputs: int, outputs: int) -> Any:
    """The product as an unscheduled `tvm.IRModule`."""
    import tvm
    from tvm.script import tirx as T

    @T.prim_func(s_tir=True)
    def dense(x: T.handle, weight: T.handle, y: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        X = T.match_buffer(x, (rows, inputs), "float32")
        W = T.match_buffer(weight, (inputs, outputs), "float32")
        Y = T.match_buffer(y, (rows, outputs), "float32")
        for i, j, k in T.grid(rows, outputs, inputs):
            with T.sblock("product"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                with T.init():
                    Y[vi, vj] = T.float32(0)
                Y[vi, vj] = Y[vi, vj] + X[vi, vk] * W[vk, vj]

    return tvm.IRModule({"main": dense})


def build(target: CpuTarget, rows: int, inputs: int, outputs: int, trace: str) -> Any:
    """The function ``(x, weight, y)`` for these sizes, scheduled by `trace` or, if that is empty, by hand."""
    from tvm import s_tir

    schedule = s_tir.Schedule(module(rows, inputs, outputs))
    if trace:
        s_tir.schedule.Trace.apply_json_to_schedule(json.loads(trace), schedule)
    else:
        _schedule_by_hand(schedule, target)
    return schedule.mod["main"]


def _schedule_by_hand(schedule: Any, target: CpuTarget) -> None:
    down, across = _TILE
    product = schedule.get_sblock("product")
    tile = schedule.cache_write(product, 0, "local")
    i, j, k = schedule.get_loops(product)
    outer_i, inner_i = schedule.split(i, [None, down])
    outer_j, middle_j, inner_j = schedule.split(j, [None, across, target.lanes])
    schedule.reorder(outer_j, outer_i, k, inner_i, middle_j, inner_j)
    schedule.reverse_compute_at(tile, outer_i)
    task = schedule.fuse(outer_j, outer_i)
    schedule.parallel(task)
    schedule.vectorize(inner_j)
    schedule.unroll(inner_i)
    schedule.unroll(middle_j)
    schedule.vectorize(schedule.get_loops(tile)[-1])
    schedule.decompose_reduction(product, k)


def trial(function: Any, rows: int, inputs: int, outputs: int, trace: str) -> None:
    """The very sizes it is for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(inputs, outputs, generator=generator)
    torch.testing.assert_close(outcome(function, x, weight), x @ weight, rtol=1e-4, atol=1e-3)


DENSE = Kernel("dense", build, trial, lambda target: [])
