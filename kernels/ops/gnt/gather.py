"""Looking up 3D points in source views, as an op. Inference only.

A pixel of a map that is infinite or NaN also spoils points next to the border nearest to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d.kernels.cpu.gnt.gather import KERNEL, run
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS
from shiftadd3d.kernels.cuda.gnt.gather import CUDA_KERNEL, run_on_tensors
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.gather import VALID, check_scene, point_samples_twin


def is_served(*tensors: Tensor) -> bool:
    """Whether the compiled kernels take these: all float32, none empty."""
    return all(tensor.dtype == torch.float32 and tensor.numel() for tensor in tensors)


def _cpu(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    check_scene(*scene, valid)
    function = KERNEL.function(with_valid=valid is not None) if is_served(*scene) else None
    if function is None:
        return point_samples_twin(*scene, valid)
    return run(function, *scene, valid)


def _cuda(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scene = (points, origins, projection, centers, images, maps)
    check_scene(*scene, valid)
    function = None
    if is_served(*scene):
        rows = points[..., 0].numel() * len(images)
        if max(rows * (3 + maps.shape[-1]), images.numel(), maps.numel()) > MAX_ELEMENTS:
            CUDA_KERNEL.decline(f"points {list(points.shape)} in maps {list(maps.shape)} are too many for it")
        else:
            function = CUDA_KERNEL.function(device=points.device, with_valid=valid is not None, least_valid=VALID)
    if function is None:
        return point_samples_twin(*scene, valid)
    return run_on_tensors(function, *scene, valid)


def _fake(
    points: Tensor,
    origins: Tensor,
    projection: Tensor,
    centers: Tensor,
    images: Tensor,
    maps: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*points.shape[:2], images.shape[0])
    return (
        points.new_empty(*shape, 3 + maps.shape[-1]),
        points.new_empty(*shape, 4),
        points.new_empty(*shape, dtype=torch.bool),
    )


#: ``torch.ops.shiftadd3d.point_samples``; arguments and outcome as those of its twin. float32, on CPUs and CUDA GPUs;
#: maps stored with a pixel's channels side by side are read where they are, others are copied first.
point_samples = define_op(
    "point_samples(Tensor points, Tensor origins, Tensor projection, Tensor centers, Tensor images, Tensor maps, "
    "Tensor? valid) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    twin=point_samples_twin,
    fake=_fake,
)
