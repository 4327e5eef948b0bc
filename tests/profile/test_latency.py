"""The forms that models are timed in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shiftadd3d import UserError
from shiftadd3d.nn import reparameterize_
from shiftadd3d.profile.latency import FORMS, device_of, find_meter, measure_latencies, measure_peak
from shiftadd3d.profile.parts import ROOT


def test_a_model_that_cannot_be_compiled_has_no_such_form() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    found = measure_latencies({"mult": (model, batch)}, tuple(FORMS), inputs=2, depth=1, seconds=0.0)
    assert list(found["mult"]) == ["eager", "frozen"]
    assert set(found["mult"]["eager"].parts) == {ROOT, "0", "1"}


@pytest.mark.slow
def test_a_compiled_model_is_a_single_part() -> None:
    timm = pytest.importorskip("timm")
    import shiftadd3d.models.vit  # noqa: F401 tells what becomes of timm's layers

    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    reparameterize_(model, "add+shift", verbose=False)
    batch = torch.randn(1, 3, 32, 32)
    found = measure_latencies({"add+shift": (model, batch)}, tuple(FORMS), inputs=1, depth=1, seconds=0.0)["add+shift"]
    assert list(found) == ["eager", "frozen", "compiled"] and list(found["compiled"].parts) == [ROOT]


def test_forms_that_nothing_has() -> None:
    with pytest.raises(UserError, match="there is no form 'fast' of a model; expected some of eager, frozen, compiled"):
        measure_latencies({}, ("fast",), inputs=1, depth=1)


@pytest.mark.gpu
def test_a_model_on_a_card_is_timed_there() -> None:
    model, batch = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()).cuda().eval(), torch.randn(4096, 1024).cuda()
    found = measure_latencies({"mult": (model, batch)}, ("eager", "frozen"), inputs=4096, depth=1, seconds=0.0)["mult"]
    peak = measure_peak(device_of(model))
    assert peak.card == torch.cuda.get_device_name() == peak.place
    # No faster than the products take at the fastest that the card has been seen to be, but for noise.
    least = 2 * 1024**2 / peak.operations_per_second
    for times in found.values():
        assert times.total.median > 0.5 * least and sum(times.parts.values()) > 0.5 * least
    meter = find_meter(device_of(model))
    assert meter is None or (found["eager"].joules or 0) > 0
