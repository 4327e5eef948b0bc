"""Layer tests run on one thread."""

from __future__ import annotations

import pytest
import torch

from shiftadd3d.kernels import numerics


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_torch():
    """Frozen layers are compared bit for bit; kernels sum in an order of their own (`tests/kernels` compares those)."""
    with numerics("twin"):
        yield
