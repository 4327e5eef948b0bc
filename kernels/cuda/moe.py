"""Mixtures of experts on NVIDIA GPUs: a counting sort of the tokens, and one product for each layer of the experts.

`SORT` lists the tokens of each expert, in no particular order, and counts them; nobody waits for the counts. `LAYER`
then takes 64 tokens of one expert at a time through a layer. There are as many blocks as there could be at most, and
each finds out by the counts which expert's tokens it has, or that it has none. The first layer reads tokens from where
they lie, the last one writes to where they belong, times the router's gate; in between, rows stay as they are sorted.

The products are those of `product`, with whose bounds a layer's outcome agrees. A token's outcome does not depend
on its place in a block, so the order of the sort is not seen in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shiftadd3d.kernels.cuda import product
from shiftadd3d.kernels.cuda.driver import MAX_ELEMENTS, CudaFunction, CudaKernel
from shiftadd3d.kernels.cuda.product import (
    COLUMNS,
    DTYPES,
    INPUTS,
    ROWS,
    THREADS,
    Choice,
    Dtype,
    Form,
    Layer,
    Rows,
    Weights,
    check_product,
    form,
)
from shiftadd3d.kernels.cuda.tile import grid, local, shared, wait
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.moe import ExpertLayer, width_of
from shiftadd3d.kernels.runtime import targets
from shiftadd3d.kernels.runtime import tir as T
from shiftadd3d.kernels.runtime.kernel import Spec
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget
from shiftadd3d.kernels.runtime.tir import Buffer, Expr

_SORT_THREADS = 256

# The smallest of the architectures' limits to blocks along y.
_MAX_BLOCKS_ACROSS = 65535


def build_sort(target: CudaTarget, experts: int) -> T.PrimFunc:
    """The function of (assignment [tokens] int64, counts [experts] int32, order [experts, tokens] int32): adds to the
    counts, which begin at 0, and lists each expert's tokens. Blocks: tokens along x."""

    def add(buffer: Buffer, index: Expr, value: Expr) -> Expr:
        """Add to an element that other threads add to as well; what it was before."""
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
    """Several blocks, a tail, and an expert without tokens."""
    tokens = 2 * _SORT_THREADS + 77
    assignment = torch.randint(max(1, experts - 1), (tokens,), generator=torch.Generator().manual_seed(0))
    counts, order = (tensor.cpu() for tensor in run_sort(function, assignment.to(function.device), experts))
    for expert in range(experts):
        expected = (assignment == expert).nonzero().flatten()
        assert counts[expert] == len(expected), f"it counts {counts[expert]} tokens, not {len(expected)}"
        assert torch.equal(order[expert, : len(expected)].sort().values, expected.int()), "it lists other tokens"


SORT = CudaKernel("moe_sort", build_sort, trial_sort, lambda _: [{"experts": 2}])


def run_sort(function: CudaFunction, assignment: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Call a compiled function: how many tokens each expert has [experts], and which [experts, tokens]."""
    tokens = len(assignment)
    counts = torch.zeros(experts, dtype=torch.int32, device=assignment.device)
    order = torch.empty(experts, tokens, dtype=torch.int32, device=assignment.device)
    function(-(-tokens // _SORT_THREADS), assignment=assignment, counts=counts, order=order, tokens=tokens)
    return counts, order


def build(
    target: CudaTarget,
    experts: str,
    gathers: bool,
    scatters: bool,
    gated: bool,
    form: Form,
    bits: int,
    terms: int,
    dtype: Dtype,
    activation: Activation,
) -> T.PrimFunc:
    """The function of (x, counts, order, all layers' tensors, y), and of gates [tokens] float32 if they are wanted.

    x and y are in `dtype`, ordinary weights too; biases are float32. Blocks: sorted rows along x, outputs along y.

    Args:
        experts: kinds of the experts, ``"mult"`` or ``"shift"``, with commas between them.
        gathers: whether x holds tokens, not sorted rows.
        scatters: whether y does.
        gated: whether what is stored is multiplied by the token's gate.
    """
    kinds = experts.split(",")
    with T.function("moe_layer") as function:
        tokens, tiles, across, x_width, y_width = T.scalars("tokens", "tiles", "across", "x_width", "y_width")
        x = T.tensor("x", (tokens if gathers else tiles * ROWS, x_width), dtype)
        y = T.tensor("y", (tokens if scatters else tiles * ROWS, y_width), dtype)
        counts, order = T.tensor("counts", (len(kinds),), "int32"), T.tensor("order", (len(kinds), tokens), "int32")
        gates = T.tensor("gates", (tokens,), "float32") if gated else None
        layers = [
            Weights.argument(str(expert), dtype, bits, 0 if kind == "mult" else terms)
            for expert, kind in enumerate(kinds)
        ]
        with grid(tiles, across, threads=THREADS) as (tile, block_column, thread):
            token_of = shared(ROWS, dtype="int32")  # -1 for rows that are not there
            applies = _share_out(tile, thread, counts, order, token_of)

            def load(row: Expr, k: Expr) -> Expr:
                return x[T.max(token_of[row], 0) if gathers else tile * ROWS + row, k]

            def store(row: Expr, column: Expr, value: Expr) -> None:
                value = value if gates is None else value * gates[token_of[row]]
                y[token_of[row] if scatters else tile * ROWS + row, column] = T.cast(value, dtype)

            choices = [Choice(*pair) for pair in zip(layers, applies, strict=True)]
            rows = Rows(lambda row: token_of[row] >= 0, load, store)
            product.emit(form, dtype, activation, thread, block_column, choices, rows)
    return function.get()


def _share_out(tile: Expr, thread: Expr, counts: Buffer, order: Buffer, token_of: Buffer) -> list[Expr]:
    """Emit which tokens a block has, into `token_of` [ROWS]; returns, for each expert, whether they are its own."""
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


def trial(
    function: CudaFunction,
    experts: str,
    gathers: bool,
    scatters: bool,
    gated: bool,
    form: Form,
    bits: int,
    terms: int,
    dtype: Dtype,
    activation: Activation,
) -> None:
    """Odd sizes with tails on every side, blocks that are left without tokens, exponents far apart."""
    generator = torch.Generator().manual_seed(0)
    kinds = experts.split(",")
    tokens, inputs, outputs = 2 * ROWS + 19, 2 * INPUTS["tensor"] + 5, COLUMNS + 7
    layers: list[Layer] = []
    exact_weights = []
    for kind in kinds:
        weight = torch.randn(outputs, inputs, generator=generator)
        weight = (weight * torch.exp2(torch.arange(outputs) % 8 - 4.0)[:, None]).to(getattr(torch, dtype))
        bias = torch.randn(outputs, generator=generator)
        if kind == "mult":
            layers.append(Layer(weight, None, bias, inputs))
            exact_weights.append(weight.double())
        else:
            codes, offset, _ = power_of_two.encode(weight, bits, terms)
            layers.append(Layer(power_of_two.pack(codes, bits), offset, bias, inputs))
            exact_weights.append(power_of_two.decode(codes, offset, bits).double())
    assignment = (torch.randperm(tokens, generator=generator) // ROWS).clamp(max=len(kinds) - 1)
    counts = assignment.bincount(minlength=len(kinds)).int()
    order = torch.zeros(len(kinds), tokens, dtype=torch.int32)
    tiles, first = _tiles(tokens, len(kinds)), 0
    sorted_rows = torch.full((tiles * ROWS,), -1)  # the token of each
    for expert, count in enumerate(counts.tolist()):
        chosen = (assignment == expert).nonzero().flatten()
        order[expert, :count] = chosen
        sorted_rows[first : first + count] = chosen
        first += -(-count // ROWS) * ROWS
    x = torch.randn(tokens, inputs, generator=generator).to(getattr(torch, dtype))
    gates = torch.rand(tokens, generator=generator)
    given = x if gathers else x[sorted_rows].where(sorted_rows[:, None] >= 0, torch.nan)
    device = function.device
    layers = [Layer(w.to(device), e if e is None else e.to(device), b.to(device), k) for w, e, b, k in layers]
    on_device = (given.to(device), counts.to(device), order.to(device))
    y = run(function, *on_device, layers, scatters=scatters, gates=gates.to(device) if gated else None).cpu()
    found = y.double() if scatters else torch.zeros(tokens, outputs).double()
    if not scatters:
        found[sorted_rows[sorted_rows >= 0]] = y[sorted_rows >= 0].double()
    weight, bias = (
        torch.stack(parts)[assignment].double() for parts in (exact_weights, [layer.bias.cpu() for layer in layers])
    )
    exact = torch.einsum("ti,toi->to", x.double(), weight) + bias
    size = torch.einsum("ti,toi->to", x.double().abs(), weight.abs()) + bias.abs()
    given_gates = gates[:, None] if gated else 1.0
    check_product(found, exact, 2 * size, form, dtype, activation, given_gates)


def variants(target: CudaTarget) -> Iterator[Spec]:
    """The paper's two experts, of one layer and of two: 4 bits, one term, all dtypes, exact and fast."""
    ends = [(True, True, gated, "none") for gated in (False, True)]  # one layer
    ends += [(True, False, False, activation) for activation in ("relu", "gelu")]  # the first of two
    ends += [(False, True, gated, "none") for gated in (False, True)]  # the second
    for dtype in DTYPES.values():
        found = dict.fromkeys(form(target, numerics, 4, dtype) for numerics in COMPILED)
        for one, (gathers, scatters, gated, activation) in itertools.product(found, ends):
            place = {"gathers": gathers, "scatters": scatters, "gated": gated}
            shift = {"form": one, "bits": 4, "terms": 1, "dtype": dtype}
            yield {"experts": "mult,shift", **place, **shift, "activation": activation}


LAYER = CudaKernel("moe_layer", build, trial, variants)


def _tiles(tokens: int, experts: int) -> int:
    """Blocks of rows that are enough however the tokens are shared out."""
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
        y [tokens, outputs], or where it does not scatter, [sorted rows, outputs of the widest expert].
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
    """Each token through the layers of its expert, or None where the twin has to do.

    Args:
        x: neither without tokens nor without inputs.
        experts: all have as many layers, and all layers outputs.
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
    chosen = form(targets.of_gpu(x.device), numerics, bits, dtype)
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
