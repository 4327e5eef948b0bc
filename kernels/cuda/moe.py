"""Mixtures of experts on NVIDIA GPUs: a counting sort of the tokens, and one product for each layer of the experts.

`SORT` lists the tokens of each expert, in no particular order, and counts them. The CPU does not wait for the counts.
`LAYER` then computes a layer for 64 tokens of one expert at a time. It starts the largest number of blocks that may be
needed. Each block reads the counts to find out which expert's tokens it has, or that it has none. The first layer reads
tokens from their places in x. The last layer writes them to their places in y, multiplied by the router's gate. Between
these layers, rows are sorted by expert.

The products are those of `product`, with its error bounds. A token's outcome does not depend on its place in a block,
so the order of the sort does not change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.product import COLUMNS, DTYPES, ROWS, Layer
from shiftadd3d.kernels.cuda.tile import grid, local, shared, wait
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.moe import ExpertLayer, width_of
from shiftadd3d.kernels.reference.trials import Draw
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec, by_name
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

_SORT_THREADS = 256

# The smallest of the architectures' limits to blocks along y.
_MAX_BLOCKS_ACROSS = 65535


def build_sort(target: CudaTarget, experts: int) -> T.PrimFunc:
    """The function ``(assignment [tokens] int64, counts [experts] int32, order [experts, tokens] int32)``.

    It lists each expert's tokens and counts them. The counts must be 0 before. Blocks: tokens along x.
    """

    def add(buffer: Buffer, index: Expr, value: Expr) -> Expr:
        """Add to an element atomically, as other threads add to it, too. Returns its value before."""
        return T.call("int32", "atomicAdd", buffer.address(index), value)

    with T.function("moe_sort") as function:
        (tokens,) = T.scalars("tokens")
        assignment = T.tensor("assignment", (tokens,), "int64")
        counts, order = T.tensor("counts", (experts,), "int32"), T.tensor("order", (experts, tokens), "int32")
        with grid((tokens + (_SORT_THREADS - 1)) // _SORT_THREADS, threads=_SORT_THREADS) as (number, thread):
            found = shared(experts, dtype="int32")  # tokens of the block, expert by expert
            begin = shared(experts, dtype="int32")  # their place among all of the expert
            rank = local(1, dtype="int32")
            token = T.bind(number * _SORT_THREADS + thread)
            expert = T.bind(T.cast(assignment[T.min(token, tokens - 1)], "int32"))
            rank[0] = T.int32(0)
            with T.when(thread < experts):
                found[thread] = T.int32(0)
            wait()  # TVM does not know what atomics do to shared memory
            with T.when(token < tokens):
                rank[0] = add(found, expert, T.int32(1))
            wait()
            with T.when(thread < experts):
                begin[thread] = add(counts, thread, found[thread])
            wait()
            with T.when(token < tokens):
                order[expert, begin[expert] + rank[0]] = token
    return function.get()


def trial_sort(function: CudaFunction, experts: int) -> None:
    """Several blocks, a partial one, and an expert without tokens."""
    tokens = 2 * _SORT_THREADS + 77
    assignment = torch.randint(max(1, experts - 1), (tokens,), generator=torch.Generator().manual_seed(0))
    counts, order = (tensor.cpu() for tensor in run_sort(function, assignment.to(function.device), experts))
    for expert in range(experts):
        expected = (assignment == expert).nonzero().flatten()
        assert counts[expert] == len(expected), f"it counts {counts[expert]} tokens, not {len(expected)}"
        assert torch.equal(order[expert, : len(expected)].sort().values, expected.int()), "it lists other tokens"


SORT = CudaKernel("moe_sort", build_sort, trial_sort, lambda _: [{"experts": 2}])


def run_sort(function: CudaFunction, assignment: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Call a compiled function: the number of tokens of each expert [experts], and their numbers [experts, tokens]."""
    tokens = len(assignment)
    counts = torch.zeros(experts, dtype=torch.int32, device=assignment.device)
    order = torch.empty(experts, tokens, dtype=torch.int32, device=assignment.device)
    function(-(-tokens // _SORT_THREADS), assignment=assignment, counts=counts, order=order, tokens=tokens)
    return counts, order


class LayerSpec(NamedTuple):
    """The compiled-in constants of a layer of all experts.

    Attributes:
        experts: kinds of the experts, ``"mult"`` or ``"shift"``, with commas between them.
        gathers: whether rows of x are tokens; if not, they are sorted rows.
        scatters: the same for y.
        gated: whether outputs are multiplied by the token's gate.
        form, bits, terms, dtype, activation: as in a layer of shifts.
    """

    experts: str
    gathers: bool
    scatters: bool
    gated: bool
    form: product.Form
    bits: int
    terms: int
    dtype: product.Dtype
    activation: Activation


def build(target: CudaTarget, spec: LayerSpec) -> T.PrimFunc:
    """The function ``(x, counts, order, tensors of all experts' layers, y)``; with gates, also [tokens] float32.

    x, y and ordinary weights are in the spec's dtype; biases are float32. Blocks: sorted rows along x, outputs along y.
    """
    experts, gathers, scatters, gated, form, bits, terms, dtype, activation = spec
    kinds = experts.split(",")
    with T.function("moe_layer") as function:
        tokens, tiles, across, x_width, y_width = T.scalars("tokens", "tiles", "across", "x_width", "y_width")
        x = T.tensor("x", (tokens if gathers else tiles * ROWS, x_width), dtype)
        y = T.tensor("y", (tokens if scatters else tiles * ROWS, y_width), dtype)
        counts, order = T.tensor("counts", (len(kinds),), "int32"), T.tensor("order", (len(kinds), tokens), "int32")
        gates = T.tensor("gates", (tokens,), "float32") if gated else None
        layers = [
            product.Weights.argument(str(expert), dtype, bits, 0 if kind == "mult" else terms)
            for expert, kind in enumerate(kinds)
        ]
        with grid(tiles, across, threads=product.THREADS) as (tile, block_column, thread):
            token_of = shared(ROWS, dtype="int32")  # -1 for rows that are not there
            applies = _share_out(tile, thread, counts, order, token_of)

            def load(row: Expr, k: Expr) -> Expr:
                return x[T.max(token_of[row], 0) if gathers else tile * ROWS + row, k]

            def store(row: Expr, column: Expr, value: Expr) -> None:
                value = value if gates is None else value * gates[token_of[row]]
                y[token_of[row] if scatters else tile * ROWS + row, column] = T.cast(value, dtype)

            choices = [product.Choice(*pair) for pair in zip(layers, applies, strict=True)]
            rows = product.Rows(lambda row: token_of[row] >= 0, load, store)
            product.emit(form, product.Task(dtype, activation, thread, block_column, choices, rows))
    return function.get()


def _share_out(tile: Expr, thread: Expr, counts: Buffer, order: Buffer, token_of: Buffer) -> list[Expr]:
    """Write the tokens of a block to `token_of` [ROWS]. Returns for each expert whether the block is one of its own."""
    tokens, applies = order.shape[1], []
    before, token = T.int32(0), T.int32(-1)
    for expert in range(counts.extent(0)):
        count = T.bind(counts[expert])
        after = T.bind(before + (count + (ROWS - 1)) // ROWS)
        applies.append(T.bind(T.both(tile >= before, tile < after)))
        place = T.bind((tile - before) * ROWS + thread)
        found = order[expert, T.max(0, T.min(place, tokens - 1))]
        token = T.bind(T.select(T.both(applies[-1], place < count), found, token))
        before = after
    with T.when(thread < ROWS):
        token_of[thread] = token
    wait()  # a block without tokens does not come by where TVM would have its threads wait
    return applies


def trial(function: CudaFunction, spec: LayerSpec) -> None:
    """Odd sizes with partial blocks on every side, blocks without tokens, exponents far apart."""
    draw, device, kinds = Draw(), function.device, spec.experts.split(",")
    tokens, inputs, outputs = 2 * ROWS + 19, 2 * product.INPUTS["tensor"] + 5, COLUMNS + 7
    x, gates = draw.normal(tokens, inputs, dtype=spec.dtype), draw.uniform(tokens)
    assignment = (draw.uniform(tokens).argsort() // ROWS).clamp(max=len(kinds) - 1)
    counts, order, sorted_rows = _sorted(assignment, len(kinds))
    drawn = [draw.layer(inputs, outputs, spec.bits, spec.terms, far_apart=True) for _ in kinds]
    layers: list[Layer] = []
    for kind, layer in zip(kinds, drawn, strict=True):
        weight = layer.weight.to(x.dtype) if kind == "mult" else layer.codes
        offset = None if kind == "mult" else layer.offset.to(device)
        layers.append(Layer(weight.to(device), offset, layer.bias.to(device), inputs))
    given = x if spec.gathers else x[sorted_rows].where(sorted_rows[:, None] >= 0, torch.nan)
    given_gates = gates.to(device) if spec.gated else None
    on_device = (given.to(device), counts.to(device), order.to(device))
    y = run(function, *on_device, layers, scatters=spec.scatters, gates=given_gates).cpu().double()
    if not spec.scatters:
        found = torch.zeros(tokens, outputs).double()
        found[sorted_rows[sorted_rows >= 0]] = y[sorted_rows >= 0]
        y = found
    exact_weights = [
        layer.weight.to(x.dtype) if kind == "mult" else layer.decoded for kind, layer in zip(kinds, drawn, strict=True)
    ]
    weight = torch.stack([weight.double() for weight in exact_weights])[assignment]
    bias = torch.stack([layer.bias.double() for layer in drawn])[assignment]
    exact = torch.einsum("ti,toi->to", x.double(), weight) + bias
    size = torch.einsum("ti,toi->to", x.double().abs(), weight.abs()) + bias.abs()
    last = gates[:, None] if spec.gated else 1.0
    product.check_product(y, exact, 2 * size, spec.form, spec.dtype, spec.activation, last)


def _sorted(assignment: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts and order as `SORT` makes them, and the token of each sorted row, -1 where there is none."""
    tokens, first = len(assignment), 0
    counts, order = assignment.bincount(minlength=experts).int(), torch.zeros(experts, tokens, dtype=torch.int32)
    sorted_rows = torch.full((_tiles(tokens, experts) * ROWS,), -1)
    for expert, count in enumerate(counts.tolist()):
        chosen = (assignment == expert).nonzero().flatten()
        order[expert, :count] = chosen
        sorted_rows[first : first + count] = chosen
        first += -(-count // ROWS) * ROWS
    return counts, order, sorted_rows


def variants(target: CudaTarget) -> Iterator[Spec]:
    """The paper's two experts, of one layer and of two: 4 bits, one term, all dtypes, exact and fast."""
    ends = [(True, True, gated, "none") for gated in (False, True)]  # one layer
    ends += [(True, False, False, activation) for activation in ("relu", "gelu")]  # the first of two
    ends += [(False, True, gated, "none") for gated in (False, True)]  # the second
    for dtype in DTYPES.values():
        found = dict.fromkeys(product.form(target, numerics, 4, dtype) for numerics in COMPILED)
        for one, (gathers, scatters, gated, activation) in itertools.product(found, ends):
            place = {"gathers": gathers, "scatters": scatters, "gated": gated}
            shift = {"form": one, "bits": 4, "terms": 1, "dtype": dtype}
            yield {"experts": "mult,shift", **place, **shift, "activation": activation}


LAYER = CudaKernel("moe_layer", by_name(LayerSpec, build), by_name(LayerSpec, trial), variants)


def _tiles(tokens: int, experts: int) -> int:
    """A number of blocks of rows that is enough for any assignment of the tokens."""
    return tokens // ROWS + experts


def run(
    function: CudaFunction,
    x: Tensor,
    counts: Tensor,
    order: Tensor,
    layers: Sequence[Layer],
    *,
    scatters: bool,
    gates: Tensor | None = None,
) -> Tensor:
    """Call a compiled function; all tensors contiguous.

    Returns:
        y [tokens, outputs]; without `scatters`, [sorted rows, outputs of the widest expert].
    """
    experts, tokens = order.shape
    tiles, widest = _tiles(tokens, experts), max(len(layer.bias) for layer in layers)
    y, across = x.new_empty(tokens if scatters else tiles * ROWS, widest), -(-widest // COLUMNS)
    arguments: dict[str, Tensor | int] = {} if gates is None else {"gates": gates}
    for expert, layer in enumerate(layers):
        arguments |= layer.arguments(str(expert))
    sizes = {"tokens": tokens, "tiles": tiles, "across": across, "x_width": x.shape[1], "y_width": widest}
    function(tiles, across, x=x, y=y, counts=counts, order=order, **sizes, **arguments)
    return y


def mixture(
    x: Tensor,  # [tokens, inputs]
    assignment: Tensor,  # [tokens] int64
    gates: Tensor | None,  # [tokens] float32
    experts: Sequence[Sequence[ExpertLayer]],
    bits: int,
    terms: int,
    activation: Activation,
    numerics: Numerics,
) -> Tensor | None:  # [tokens, outputs]
    """The outputs of each token's expert; None if the twin must run instead.

    Args:
        x: [tokens, inputs], neither of them 0.
        experts: the layers of each expert. All experts have the same number of layers, and no layer is empty.
        activation: between the layers of an expert.
    """
    dtype, depth, tokens = DTYPES[x.dtype], len(experts[0]), len(x)
    widest = max(x.shape[1], *(width_of(layer) for expert in experts for layer in expert))
    if _tiles(tokens, len(experts)) * ROWS * widest > MAX_ELEMENTS or widest > _MAX_BLOCKS_ACROSS * COLUMNS:
        LAYER.decline(f"a mixture of {list(x.shape)} with up to {widest} outputs is too large for it")
        return None
    if len(experts) > _SORT_THREADS:
        SORT.decline(f"{len(experts)} experts are too many for it")
        return None
    chosen = product.form(targets.of_gpu(x.device), numerics, bits, dtype)
    shift: Spec = {"form": chosen, "bits": bits, "terms": terms, "dtype": dtype}
    sort = SORT.function(device=x.device, experts=len(experts))
    functions = []
    for number in range(depth):
        is_last = number + 1 == depth
        kinds = ",".join("mult" if expert[number].offset is None else "shift" for expert in experts)
        place: Spec = {"gathers": number == 0, "scatters": is_last, "gated": is_last and gates is not None}
        between = "none" if is_last else activation
        functions.append(LAYER.function(device=x.device, experts=kinds, **place, **shift, activation=between))
    if sort is None:
        return None
    counts, order = run_sort(sort, assignment, len(experts))
    y, widths = x.contiguous(), [x.shape[1]] * len(experts)
    for number, function in enumerate(functions):
        if function is None:
            return None
        is_last, of_experts = number + 1 == depth, [expert[number] for expert in experts]
        layers = [Layer.ready(*layer, x, width) for layer, width in zip(of_experts, widths, strict=True)]
        y = run(function, y, counts, order, layers, scatters=is_last, gates=gates if is_last else None)
        widths = [width_of(layer) for layer in of_experts]
    return y
