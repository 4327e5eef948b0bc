"""A cache for feature maps of source views, so that each is computed once for a whole camera path."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Maps = tuple[Tensor, Tensor]


class FeatureCache:
    """Keeps the most recently used maps, up to a limit of memory.

    Args:
        max_bytes: the limit. Maps of one call are always kept until the next call.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, Maps] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all maps. Call this after weights or views have changed."""
        self._kept.clear()

    def maps(self, ids: Sequence[int], compute: Callable[[list[int]], Maps]) -> Maps:
        """The maps of some views, for the coarse and the fine network, [V, C, h, w] each.

        Args:
            ids: ids of V views.
            compute: computes the maps of some views, in their order. It is called for views that are not in the cache.
        """
        missing = [view for view in dict.fromkeys(ids) if view not in self._kept]
        if missing:
            coarse, fine = compute(missing)
            one = coarse is fine
            for index, view in enumerate(missing):
                own = coarse[index].clone(memory_format=torch.preserve_format)
                self._kept[view] = (own, own if one else fine[index].clone(memory_format=torch.preserve_format))
        for view in ids:
            self._kept.move_to_end(view)
        chosen = [self._kept[view] for view in ids]
        self._drop_oldest(len(set(ids)))
        coarse = _stacked([maps[0] for maps in chosen])
        return coarse, coarse if chosen[0][0] is chosen[0][1] else _stacked([maps[1] for maps in chosen])

    def _drop_oldest(self, needed: int) -> None:
        total = sum(_size(maps) for maps in self._kept.values())
        while total > self._max_bytes and len(self._kept) > needed:
            total -= _size(self._kept.popitem(last=False)[1])


def _stacked(maps: Sequence[Tensor]) -> Tensor:
    """[V, C, h, w] with a pixel's channels side by side, as kernels want them."""
    return torch.stack(list(maps)).contiguous(memory_format=torch.channels_last)


def _size(maps: Maps) -> int:
    tensors = {id(tensor): tensor for tensor in maps}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
