"""Models by their names."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shiftadd3d import UserError
from shiftadd3d.kernels import numerics
from shiftadd3d.nn import count_operations
from shiftadd3d.profile.subjects import subject


def test_products_of_a_gnt_are_those_that_torch_counts() -> None:
    found = subject("gnt-tiny", rays=4)
    model = found.make("mult")
    batch = found.batch(model)
    # Not every torch counts the fused attention of CPUs. It counts the products of its plain form.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), numerics("twin"), plain:
        model(**batch)
    report = count_operations(model, batch, inputs=4)
    assert report.products == counter.get_total_flops() // 2 > 1e6
    assert report.elementwise["float32"]["special"] > 0


def test_a_recipe_changes_what_a_gnt_does_and_not_how_much() -> None:
    found = subject("gnt-tiny", rays=4)
    dense, changed = (found.make(recipe) for recipe in ("mult", "add+shift"))
    before, after = (count_operations(model, found.batch(model), inputs=4) for model in (dense, changed))
    assert before.shift == 0 and after.shift > 0.7 * before.mult
    assert after.multiplications_removed(before) > 0.9


def test_names_that_nothing_has() -> None:
    with pytest.raises(UserError, match=r"timm knows no model 'gnt-huge'.* gnt-tiny"):
        subject("gnt-huge")
    with pytest.raises(UserError, match="--rays 0: expected 1 or more"):
        subject("gnt", rays=0)
