"""Features of source views, computed once."""

from __future__ import annotations

import torch

from shiftadd3d.nerf.feature_cache import FeatureCache

SIZE = 4 * 6 * 5 * 4
"""Bytes of a view's map below."""


class Network:
    """Maps that name their view; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += ids
        maps = torch.stack([torch.full((4, 6, 5), float(view)) for view in ids])
        return maps, maps


def test_a_view_is_computed_once_for_a_whole_path():
    cache, network = FeatureCache(), Network()
    for ids in ((0, 1, 2), (2, 1, 3), (3, 0)):
        coarse, fine = cache.maps(ids, network)
        assert coarse is fine
        assert coarse[:, 0, 0, 0].tolist() == list(ids)
        assert coarse.is_contiguous(memory_format=torch.channels_last)
    assert network.asked == [0, 1, 2, 3]


def test_memory_is_bounded_and_what_was_asked_for_last_stays():
    cache, network = FeatureCache(max_bytes=3 * SIZE), Network()
    for view in range(10):
        cache.maps((view,), network)
        assert len(cache) <= 3
    cache.maps((9, 8, 7), network)
    assert network.asked == list(range(10))
    cache.maps((0,), network)
    assert network.asked[-1] == 0


def test_one_call_may_ask_for_more_than_the_bound():
    cache, network = FeatureCache(max_bytes=SIZE), Network()
    coarse, _ = cache.maps(range(5), network)
    assert coarse.shape[0] == 5


def test_two_networks_keep_two_maps():
    cache = FeatureCache()
    coarse, fine = cache.maps((1,), lambda ids: (torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)))
    assert float(coarse.sum()) == 18.0 and float(fine.sum()) == 0.0


def test_nothing_is_kept_once_it_is_cleared():
    cache, network = FeatureCache(), Network()
    cache.maps((1,), network)
    cache.clear()
    cache.maps((1,), network)
    assert network.asked == [1, 1]
