"""Looking up 3D points in source views, as an op. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.gnt.gather import KERNEL, run
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS
from shiftadd3d.kernels.cuda.gnt import gather as cuda_gather
from shiftadd3d.kernels.cuda.gnt.gather import CUDA_KERNEL
from shiftadd3d.kernels.ops.define import define_op
from shiftadd3d.kernels.reference.gnt.gather import VALID, Scene, point_samples_twin


def check_scene(scene: Scene) -> None:
    """Raise `UserError` unless the points and views fit together."""
    points, _, _, _, images, maps, valid = scene
    rays, views = points.shape[0], images.shape[0]
    expected: dict[str, tuple[int, ...]] = {
        "points": (rays, points.shape[1], 3),
        "origins": (rays, 3),
        "projection": (views, 3, 4),
        "centers": (views, 3),
        "images": (views, *images.shape[1:3], 3),
        "maps": (views, *maps.shape[1:]),
        "valid": tuple(images.shape[:3]),
    }
    if valid is not None and valid.dtype != torch.bool:
        raise UserError(f"valid must be bool, not {valid.dtype}")
    for (name, shape), tensor in zip(expected.items(), scene, strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{name} must be {list(shape)} beside the others, not {list(tensor.shape)}")
    if maps.dim() != 4 or min(*images.shape[1:3], *maps.shape[1:3]) < 2:
        raise UserError(
            "images and maps must be [views, height, width, channels] of 2 x 2 pixels or more, not "
            f"{list(images.shape)} and {list(maps.shape)}"
        )


def is_served(scene: Scene) -> bool:
    """Whether compiled kernels take these tensors: all must be float32, and none empty."""
    return all(tensor is not None and tensor.dtype == torch.float32 and tensor.numel() for tensor in scene[:-1])


def _cpu(scene: Scene) -> tuple[Tensor, Tensor, Tensor] | None:
    function = KERNEL.function(with_valid=scene.valid is not None) if is_served(scene) else None
    return None if function is None else run(function, scene)


def _cuda(scene: Scene) -> tuple[Tensor, Tensor, Tensor] | None:
    points, _, _, _, images, maps, valid = scene
    if not is_served(scene):
        return None
    rows = points[..., 0].numel() * len(images)
    if max(rows * (3 + maps.shape[-1]), images.numel(), maps.numel()) > MAX_ELEMENTS:
        CUDA_KERNEL.decline(f"points {list(points.shape)} in maps {list(maps.shape)} are too many for it")
        return None
    function = CUDA_KERNEL.function(device=points.device, with_valid=valid is not None, least_valid=VALID)
    return None if function is None else cuda_gather.run(function, scene)


def _fake(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    points, shape = scene.points, (*scene.points.shape[:2], scene.images.shape[0])
    values = points.new_empty(*shape, 3 + scene.maps.shape[-1])
    return values, points.new_empty(*shape, 4), points.new_empty(*shape, dtype=torch.bool)


point_samples = define_op(
    "point_samples", Scene, twin=point_samples_twin, check=check_scene, cpu=_cpu, cuda=_cuda, fake=_fake
)
