"""Where along rays samples are drawn, by what a plane sweep has seen."""

from __future__ import annotations

import torch

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.reference.gnt.sampling import EVEN_SHARE, LEAST_MASS, LEAST_WEIGHT, samples_around
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Compiled
from shiftadd3d.kernels.runtime.targets import CpuTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr
from shiftadd3d.kernels.whole.parts import control_argument
from shiftadd3d.kernels.whole.program import Function, Program

# Rays of a task.
_RAYS = 64
# Above all shares of a density.
_BEYOND = 3.0e38


def _build(target: CpuTarget) -> T.PrimFunc:
    """The function ``(planes, weights, quantiles, control, depths)``; quantiles [S] are evenly spaced from 0 to 1."""
    isa = Isa(target)
    with T.function("around") as function:
        R, P, S = T.sizes(3)
        planes, weights = T.argument("planes", (R, P)), T.argument("weights", (R, P))
        quantiles = T.argument("quantiles", (S,))
        control_argument()
        depths = T.argument("depths", (R, S))
        with T.parallel((R + (_RAYS - 1)) // _RAYS) as task:
            # Of each bin the share of all mass up to its end, and what its own is.
            ends, mass, total = T.alloc(P + isa.lanes), T.alloc(P), T.alloc(1)
            with T.serial(T.min(T.int64(_RAYS), R - task * _RAYS)) as i:
                ray = T.bind(task * _RAYS + i)
                _add_up(isa, weights.part(ray), P, ends, mass, total)
                with T.serial(S) as s:
                    depths[ray, s] = _quantile(isa, planes.part(ray), P, ends, mass, quantiles[s])
    return function.get()


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
    # The last bin goes on for ever, and so does what lies behind it in its vector.
    with T.serial(isa.lanes + 1) as i:
        ends[P - 1 + i] = T.float32(_BEYOND)


def _quantile(isa: Isa, planes: Buffer, P: Expr, ends: Buffer, mass: Buffer, u: Expr) -> Expr:
    """The depth that a share u of a ray's mass lies before."""
    before = isa.register(0.0)
    one, zero = isa.splat(1.0), isa.splat(0.0)
    with T.serial((P + (isa.lanes - 1)) // isa.lanes) as n:
        before.value = before.value + T.select(ends[isa.at(n * isa.lanes)] <= isa.splat(u), one, zero)
    bin_of = T.bind(T.cast(isa.total(before.value), "int64"))  # as many bins end before
    left = T.bind(T.if_then_else(bin_of > 0, ends[T.max(bin_of - 1, T.int64(0))], T.float32(0.0)))
    low, high = T.max(bin_of - 1, T.int64(0)), T.min(bin_of + 1, P - 1)
    # Middles between planes, and at either end the plane itself.
    start = T.bind(T.float32(0.5) * (planes[low] + planes[bin_of]))
    end = T.bind(T.float32(0.5) * (planes[bin_of] + planes[high]))
    share = T.bind(mass[bin_of])
    share = T.select(share < T.float32(LEAST_MASS), T.float32(1.0), share)
    return start + (u - left) / share * (end - start)


def _try(function: Compiled) -> None:
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(_RAYS + 3, 21, generator=generator).sort(dim=-1).values + 1.0
    weights = torch.rand(planes.shape, generator=generator) ** 8
    weights[0] = 0.0
    weights[1, 1:], weights[2, :-1] = 0.0, 0.0
    quantiles, depths = torch.linspace(0, 1, 7), torch.empty(len(planes), 7)
    function(planes, weights, quantiles, torch.tensor([0, 2], dtype=torch.int32), depths)
    expected = samples_around(planes, weights, quantiles.expand(len(planes), -1))
    torch.testing.assert_close(depths, expected, rtol=1e-4, atol=1e-4)


AROUND = Function("around", _build, _try)


def around() -> Program:
    """A program of planes [R, P], weights [R, P] and quantiles [S] evenly from 0 to 1: depths [R, S], increasing."""
    program = Program()
    inputs = [program.input("rays", "planes"), program.input("rays", "planes"), program.input("samples")]
    program.output(program.call(AROUND, inputs, ("rays", "samples")))
    return program
