"""Depths of samples along rays, drawn from the weights of a plane sweep.

`shiftadd3d.kernels.reference.gnt.sampling` is the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.gnt.sampling import (
    EVEN_SHARE,
    LEAST_MASS,
    LEAST_WEIGHT,
    between_fields,
    samples_around,
)
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.parts import control_argument, held, rows_of
from shiftadd3d.kernels.whole.program import Program, fixed

# Rays of a task.
_RAYS = 64
# Larger than any cumulative share.
_BEYOND = 3.0e38


class SamplesSpec(NamedTuple):
    """What is compiled in.

    Attributes:
        on_board: whether planes and weights are those of every other ray of a picture, as on a chessboard. Then one
            more argument [rows, columns] comes before `control`, of which only the shape is read, and depths are
            [rows, columns, S].
    """

    on_board: bool


def _build(target: CpuTarget, spec: SamplesSpec) -> T.PrimFunc:
    """The function ``(planes, weights, quantiles, control, depths)``; quantiles [S] are evenly spaced from 0 to 1."""
    isa, (on_board,) = Isa(target), spec
    with T.function("between" if on_board else "around") as function:
        N, P, S, rows, columns = T.sizes(5)
        planes, weights = T.argument("planes", (N, P)), T.argument("weights", (N, P))
        quantiles = T.argument("quantiles", (S,))
        if on_board:
            T.argument("board", (rows, columns), "uint8")
        control_argument()
        depths = rows_of(T.argument("depths", (rows, columns, S) if on_board else (N, S)))
        R = held(rows * columns) if on_board else N
        with T.parallel((R + (_RAYS - 1)) // _RAYS) as task:
            # For each bin the share of all mass up to its end, and its own share.
            ends, mass, total = T.alloc(P + isa.lanes), T.alloc(P), T.alloc(1)
            mixed = T.alloc(2 if on_board else 1, P)
            with T.serial(T.min(T.int64(_RAYS), R - task * _RAYS)) as i:
                ray = T.bind(task * _RAYS + i)
                if on_board:
                    _mix(ray, rows, columns, planes, mixed.part(0))
                    _mix(ray, rows, columns, weights, mixed.part(1))
                own = (mixed.part(0), mixed.part(1)) if on_board else (planes.part(ray), weights.part(ray))
                _add_up(isa, own[1], P, ends, mass, total)
                with T.serial(S) as s:
                    depths[ray, s] = _quantile(isa, own[0], P, ends, mass, quantiles[s])
    return function.get()


def _mix(ray: Expr, rows: Expr, columns: Expr, fields: Buffer, out: Buffer) -> None:
    """Write the values of a ray. A ray that has none gets the mean of its neighbours, which all have some."""
    count, factor = out.shape[0], T.alloc(1, align=4)
    row, column = T.bind(T.truncdiv(ray, columns)), T.bind(T.truncmod(ray, columns))
    is_on = T.truncmod(row + column, T.int64(2)) == 0
    with T.If(is_on):
        with T.Then(), T.serial(count) as p:
            out[p] = fields[T.truncdiv(ray, T.int64(2)), p]
        with T.Else():
            factor[0] = T.float32(0.0)
            with T.serial(count) as p:
                out[p] = T.float32(0.0)
            there = (row > 0, row < rows - 1, column > 0, column < columns - 1)
            for is_there, neighbour in zip(there, (ray - columns, ray + columns, ray - 1, ray + 1), strict=True):
                with T.when(is_there):
                    factor[0] = factor[0] + T.float32(1.0)
                    with T.serial(count) as p:
                        out[p] = out[p] + fields[T.truncdiv(neighbour, T.int64(2)), p]
            factor[0] = T.float32(1.0) / factor[0]
            with T.serial(count) as p:
                out[p] = out[p] * factor[0]


def _add_up(isa: Isa, weights: Buffer, P: Expr, ends: Buffer, mass: Buffer, total: Buffer) -> None:
    even = T.bind(T.float32(EVEN_SHARE) / T.cast(P, "float32"))
    total[0] = T.float32(0.0)
    with T.serial(P) as p:
        mass[p] = T.float32(1.0 - EVEN_SHARE) * weights[p] + even + T.float32(LEAST_WEIGHT)
        total[0] = total[0] + mass[p]
    factor = T.bind(T.float32(1.0) / total[0])
    total[0] = T.float32(0.0)
    with T.serial(P) as p:
        mass[p] = mass[p] * factor
        total[0] = total[0] + mass[p]
        ends[p] = total[0]
    # The last bin has no end. Neither have the lanes after it in its vector.
    with T.serial(isa.lanes + 1) as i:
        ends[P - 1 + i] = T.float32(_BEYOND)


def _quantile(isa: Isa, planes: Buffer, P: Expr, ends: Buffer, mass: Buffer, u: Expr) -> Expr:
    """The depth before which a share u of the ray's mass lies."""
    before = isa.register(0.0)
    one, zero = isa.splat(1.0), isa.splat(0.0)
    with T.serial((P + (isa.lanes - 1)) // isa.lanes) as n:
        before.value = before.value + T.select(ends[isa.at(n * isa.lanes)] <= isa.splat(u), one, zero)
    bin_of = T.bind(T.cast(isa.total(before.value), "int64"))  # as many bins end before
    left = T.bind(T.if_then_else(bin_of > 0, ends[T.max(bin_of - 1, T.int64(0))], T.float32(0.0)))
    low, high = T.max(bin_of - 1, T.int64(0)), T.min(bin_of + 1, P - 1)
    # Bins end midway between planes. The first bin begins at the first plane, and the last one ends at the last plane.
    start = T.bind(T.float32(0.5) * (planes[low] + planes[bin_of]))
    end = T.bind(T.float32(0.5) * (planes[bin_of] + planes[high]))
    share = T.bind(mass[bin_of])
    share = T.select(share < T.float32(LEAST_MASS), T.float32(1.0), share)
    return start + (u - left) / share * (end - start)


def _try(function: Compiled, spec: SamplesSpec) -> None:
    (on_board,) = spec
    generator = torch.Generator().manual_seed(0)
    board = 7, _RAYS // 3
    rays, fields = board[0] * board[1], -(-board[0] * board[1] // 2)
    planes = torch.rand(fields if on_board else rays, 21, generator=generator).sort(dim=-1).values + 1.0
    weights = torch.rand(planes.shape, generator=generator) ** 8
    weights[0] = 0.0
    weights[1, 1:], weights[2, :-1] = 0.0, 0.0
    quantiles, depths = torch.linspace(0, 1, 7), torch.empty(rays, 7)
    control, of_all = torch.tensor([0, 2], dtype=torch.int32), (planes, weights)
    if on_board:
        function(planes, weights, quantiles, torch.empty(board, dtype=torch.uint8), control, depths.view(*board, 7))
        of_all = between_fields(planes, rays, board[1]), between_fields(weights, rays, board[1])
    else:
        function(planes, weights, quantiles, control, depths)
    expected = samples_around(*of_all, quantiles.expand(rays, -1))
    torch.testing.assert_close(depths, expected, rtol=1e-4, atol=1e-4)


AROUND = fixed("around", _build, _try)


def around() -> Program:
    """A program from planes [R, P], weights [R, P] and quantiles [S], evenly spaced from 0 to 1, to depths [R, S].

    Depths increase.
    """
    program = Program()
    inputs = [program.input("rays", "planes"), program.input("rays", "planes"), program.input("samples")]
    program.output(program.call(AROUND, inputs, ("rays", "samples"), SamplesSpec(on_board=False)))
    return program


def between() -> Program:
    """`around` for a picture in which only every other ray has planes and weights, as on a chessboard.

    R is the number of these rays. The fourth input is [rows, columns] uint8; only its shape is read. Depths are [rows,
    columns, S]. See `shiftadd3d.kernels.reference.gnt.sampling.between_fields`.
    """
    program = Program()
    inputs = [program.input("fields", "planes"), program.input("fields", "planes"), program.input("samples")]
    inputs.append(program.input("rows", "columns", dtype="uint8"))
    program.output(program.call(AROUND, inputs, ("rows", "columns", "samples"), SamplesSpec(on_board=True)))
    return program
