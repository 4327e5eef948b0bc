"""Write a kernel: what it computes in plain torch, how a CPU computes it in TVM's TIR, and the torch op of both.

It is compiled for the CPU at hand, tried against the plain form, and used only if it agrees.
"""

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.isa import Isa
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Kernel
from shiftadd3d.kernels.runtime.targets import CpuTarget


def scaled_relu_twin(x: Tensor) -> Tensor:
    """The specification."""
    return 3 * x.relu()


def build(target: CpuTarget) -> T.PrimFunc:
    """Whole vectors of the target, one after the other; the last may overlap the one before."""
    isa = Isa(target)
    with T.function("scaled_relu") as function:
        (count,) = T.sizes(1)
        x, y = T.argument("x", (count,)), T.argument("y", (count,))
        with T.serial(T.truncdiv(count + (isa.lanes - 1), T.int64(isa.lanes))) as number:
            place = isa.at(T.bind(T.min(number * isa.lanes, count - isa.lanes)))
            value = isa.keep(isa.relu(x[place]))
            y[place] = value + value + value
    return function.get()


def trial(function) -> None:
    """A small problem, with sizes that are no whole vectors."""
    for size in (64, 65, 1000):
        x, y = torch.randn(size), torch.empty(size)
        function(x, y)
        torch.testing.assert_close(y, scaled_relu_twin(x))


KERNEL = Kernel("scaled_relu", build, trial, lambda target: iter([{}]))


@torch.library.custom_op("examples::scaled_relu", mutates_args=())
def scaled_relu(x: Tensor) -> Tensor:
    """By the kernel where it serves, else by the twin."""
    served = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() >= 64
    function = KERNEL.function() if served else None
    if function is None:
        return scaled_relu_twin(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    function(x.contiguous().view(-1), y.view(-1))
    return y


scaled_relu.register_fake(torch.empty_like)  # shapes, for torch.compile and torch.export

x = torch.randn(7, 1000)
torch.testing.assert_close(scaled_relu(x), scaled_relu_twin(x))
print("kernel" if KERNEL.function() is not None else "plain torch", tuple(scaled_relu(x).shape))
