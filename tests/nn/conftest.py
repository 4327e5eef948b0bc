"""Layer tests run on one thread, from one seed."""

from __future__ import annotations

import pytest
import torch

from shiftadd3d.kernels import numerics


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_torch():
    """Frozen layers are compared bit for bit; kernels sum in an order of their own (`tests/kernels` compares those)."""
    with numerics("twin"):
        yield
