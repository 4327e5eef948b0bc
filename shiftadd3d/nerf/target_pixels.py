"""Pixels of target views to train on."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, UInt8
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from shiftadd3d._errors import UserError
from shiftadd3d.nerf.source_bank import SourceBank, load_image


class TargetPixels:
    """Draws pixels of one view at a time, every view once before any comes again.

    Args:
        dataset: the target views.
        bank: the same views as sources: where it has not changed the pixels, they are not kept twice.

    Raises:
        UserError: no pixel is inside its mask.
    """

    def __init__(self, dataset: InputDataset, bank: SourceBank | None = None) -> None:
        self.images: list[UInt8[Tensor, "h w 3"]] = []
        self.usable: list[Int[Tensor, " m"] | None] = []
        """Flat indices of the pixels inside the mask, or None for all."""
        for index in range(len(dataset)):
            if bank is not None and bank.pristine:
                image = bank.images[index]
                mask = None if bank.valid is None else bank.valid[index]
            else:
                pixels, mask = load_image(dataset, index)
                image = torch.from_numpy(pixels)
                mask = None if mask is None else torch.from_numpy(mask)
            self.images.append(image)
            self.usable.append(None if mask is None or bool(mask.all()) else _flat_indices(mask))
        self.views = [index for index, usable in enumerate(self.usable) if usable is None or len(usable) > 0]
        if not self.views:
            raise UserError(
                f"all {len(dataset)} views are masked throughout; expected masks that are white where a pixel may be "
                "used, and a fisheye_crop_radius in pixels of the camera file's images"
            )
        self.queue: list[int] = []

    def draw(self, count: int) -> tuple[int, Int[Tensor, " count"], Int[Tensor, " count"], UInt8[Tensor, "count 3"]]:
        """View, rows, columns and colours of `count` pixels (with replacement), from torch's global generator."""
        if not self.queue:
            self.queue = [self.views[i] for i in torch.randperm(len(self.views)).tolist()]
        view = self.queue.pop()
        return view, *self.draw_of(view, count)

    def draw_of(
        self, view: int, count: int, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, " count"], Int[Tensor, " count"], UInt8[Tensor, "count 3"]]:
        """Rows, columns and colours of `count` pixels of a view (with replacement)."""
        image, usable = self.images[view], self.usable[view]
        height, width = image.shape[:2]
        if usable is None:
            pixels = torch.randint(height * width, (count,), generator=generator)
        else:
            pixels = usable[torch.randint(len(usable), (count,), generator=generator)].long()
        return pixels // width, pixels % width, image.view(-1, 3)[pixels]


def _flat_indices(mask: Bool[Tensor, "h w"]) -> Int[Tensor, " m"]:
    return mask.flatten().nonzero()[:, 0].int()
