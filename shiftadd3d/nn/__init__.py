"""The layer library: shift, add and mixture-of-experts layers, and the verb that puts them into a model.

It needs torch only and knows no model.
"""

from shiftadd3d.nn.add import AddAttention, TokenConv, TokenConv2d, first_query_weights, linear_add_attention
from shiftadd3d.nn.binarize import (
    BINARIZERS,
    HashBinarizer,
    RandomBinarizer,
    SignBinarizer,
    binarize,
    make_binarizer,
)
from shiftadd3d.nn.moe import (
    MoE,
    MoELinear,
    MoEMlp,
    balance_loss,
    collect_moe_losses,
    dispatch,
    latency_weights,
    measure_latencies,
    reset_router_statistics,
    router_statistics,
    shift_twin,
    squared_coefficient_of_variation,
)
from shiftadd3d.nn.reparam import (
    RECIPES,
    Recipe,
    ReparameterizationReport,
    ReparameterizedLayer,
    Rule,
    UntouchedLayer,
    recipe,
    register_attention,
    register_mlp,
    reparameterize_,
)
from shiftadd3d.nn.shift import PackedShiftLinear, ShiftLinear

__all__ = [
    "BINARIZERS",
    "RECIPES",
    "AddAttention",
    "HashBinarizer",
    "MoE",
    "MoELinear",
    "MoEMlp",
    "PackedShiftLinear",
    "RandomBinarizer",
    "Recipe",
    "ReparameterizationReport",
    "ReparameterizedLayer",
    "Rule",
    "ShiftLinear",
    "SignBinarizer",
    "TokenConv",
    "TokenConv2d",
    "UntouchedLayer",
    "balance_loss",
    "binarize",
    "collect_moe_losses",
    "dispatch",
    "first_query_weights",
    "latency_weights",
    "linear_add_attention",
    "make_binarizer",
    "measure_latencies",
    "recipe",
    "register_attention",
    "register_mlp",
    "reparameterize_",
    "reset_router_statistics",
    "router_statistics",
    "shift_twin",
    "squared_coefficient_of_variation",
]
