"""What NerfBaselines has to know of the method `shiftadd-gnt`. Python alone is enough to read it: it imports no torch.

`method_class` is the module beside this file: that folder has to be on the PYTHONPATH (docs/nerfbaselines.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nerfbaselines import register

if TYPE_CHECKING:
    from nerfbaselines import MethodSpec

ShiftAddGNTSpec: MethodSpec = {
    "id": "shiftadd-gnt",
    "method_class": "shiftadd_gnt:ShiftAddGNT",
    "backends_order": ["python"],
    "metadata": {
        "name": "ShiftAdd GNT",
        "description": (
            "GNT, a NeRF transformer over the nearest source views, whose layers became shifts, adds and a mixture of "
            "experts, as ShiftAddViT says. A checkpoint holds the source views beside the weights."
        ),
        "paper_title": "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        "paper_authors": ["Haoran You", "Huihong Shi", "Yipin Guo", "Yingyan (Celine) Lin"],
        "paper_link": "https://arxiv.org/pdf/2306.06446.pdf",
        "licenses": [{"name": "Apache 2.0"}],
    },
    # A later preset wins over an earlier one.
    "presets": {
        "blender": {
            "@apply": [{"dataset": "blender"}],
            "@description": "Rays of a step and steps of a run as the original GNT has them on Blender scenes.",
            "pipeline.datamanager.train_num_rays_per_batch": 2048,
            "max_num_iterations": 250_000,
        },
        "llff": {
            "@apply": [{"dataset": "llff"}],
            "@description": "Rays of a step and steps of a run as the original GNT has them on LLFF.",
            "pipeline.datamanager.train_num_rays_per_batch": 2048,
            "max_num_iterations": 250_000,
        },
        "shiftadd-gnt-tiny": {
            "@description": "A small network for a CPU, which starts from the weights that come with shiftadd3d.",
            "method": "shiftadd-gnt-tiny",
            "pipeline.warm_start": "pretrained",
            "pipeline.datamanager.train_num_rays_per_batch": 512,
            "max_num_iterations": 800,
        },
    },
}

register(ShiftAddGNTSpec)
