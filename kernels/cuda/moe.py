"""Mixtures of experts on NVIDIA GPUs: a counting sort of the tokens, and one product for each layer of the experts.

`SORT` lists the tokens of each expert, in no particular order, and counts them; nobody waits for the counts. `LAYER`
then takes 64 tokens of one expert at a time through a layer. There are as many blocks as there could be at most, and
each finds out by the counts which expert's tokens it has, or that it has none. The first layer reads tokens from where
they lie, the last one writes to where they belong, times the router's gate; in between, rows stay as they are sorted.

The products are those of `cuda_product`, with whose bounds a layer's outcome agrees. A token's outcome does not depend
on its place in a block, so the order of the sort is not seen in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
    FloatWeights,
    Form,
    PackedWeights,
    Rows,
    Weights,
    error_bound,
    form,
)
from shiftadd3d.kernels.reference import activations, power_of_two
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime import memory, targets
from shiftadd3d.kernels.runtime.numerics import COMPILED, Numerics
from shiftadd3d.kernels.runtime.targets import CudaTarget


class Layer(NamedTuple):
    """A linear layer of one expert, as kernels take it: contiguous tensors."""

    weight: Tensor  # [outputs, inputs] in the dtype of x, or codes [terms, outputs, bytes]
    offset: Tensor | None  # beside codes, [terms, outputs]
    bias: Tensor  # [outputs] float32
    inputs: int


_SORT_THREADS = 256

# The smallest of the architectures' limits to blocks along y.
_MAX_BLOCKS_ACROSS = 65535


def build_sort(target: CudaTarget, experts: int) -> Any:
    """The function of (assignment [tokens] int64, counts [experts] int32, order [experts, tokens] int32): adds to the
    counts, which begin at 0, and lists each expert's tokens. Blocks: tokens along x."""
    from tvm.script import tirx as T

    def add(buffer: Any, index: Any, value: Any) -> Any:
        """Add to an element that other threads add to as well; what it was before."""
        return T.call_extern("int32", "atomicAdd", T.address_of(buffer[index]), value)

    def block(assignment: Any, counts: Any, order: Any, tokens: Any, number: Any, thread: Any) -> None:
        found = T.alloc_buffer((experts,), "int32", scope="shared")  # tokens of the block, expert by expert
        begin = T.alloc_buffer((experts,), "int32", scope="shared")  # their place among all of the expert
        rank = T.alloc_buffer((1,), "int32", scope="local")
        token = T.bind(number * _SORT_THREADS + thread)
        expert = T.bind(T.cast(assignment[T.min(token, tokens - 1)], "int32"))
        T.buffer_store(rank, T.int32(0), [0])
        with T.If(thread < experts), T.Then():
            T.buffer_store(found, T.int32(0), [thread])
        # TVM does not know what atomics do to shared memory.
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(token < tokens), T.Then():
            T.buffer_store(rank, add(found, expert, T.int32(1)), [0])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(thread < experts), T.Then():
            T.buffer_store(begin, add(counts, thread, found[thread]), [thread])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(token < tokens), T.Then():
            T.buffer_store(order, token, [expert, begin[expert] + rank[0]])

    @T.prim_func(s_tir=True)
    def moe_sort(assignment: T.handle, counts: T.handle, order: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        tokens = T.int32()
        A = T.match_buffer(assignment, (tokens,), "int64")
        C = T.match_buffer(counts, (experts,), "int32")
        L = T.match_buffer(order, (experts, tokens), "int32")
        for number in T.thread_binding((tokens + (_SORT_THREADS - 1)) // _SORT_THREADS, "blockIdx.x"):
            for thread in T.thread_binding(_SORT_THREADS, "threadIdx.x"):
                block(A, C, L, tokens, number, thread)

    return moe_sort


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


def run_sort(function: Callable[..., None], assignment: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Call a compiled function: how many tokens each expert has [experts], and which [experts, tokens]."""
    tokens = len(assignment)
    counts = torch.zeros(experts, dtype=torch.int32, device=assignment.device)
    order = torch.empty(experts, tokens, dtype=torch.int32, device=assignment.device)
    function(-(-tokens // _SORT_THREADS), A=assignment, C=counts, L=order, tokens=tokens)
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
) -> Any:
    """The function of (x, counts, order, all layers' tensors, y), and of gates [tokens] float32 if they are wanted.

    x and y are in `dtype`, ordinary weights too; biases are float32. Blocks: sorted rows along x, outputs along y.

    Args:
        experts: kinds of the experts, ``"mult"`` or ``"shift"``, with commas between them.
        gathers: whether x holds tokens, not sorted rows.
        scatters: whether y does.
        gated: whether what is stored is multiplied by the token's gate.
    """
    from tvm.script import tirx as T
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import prim_func

    kinds = experts.split(",")

    def number(name: str) -> Any:
        return T.arg(name, T.int32())

    def tensor(name: str, shape: Sequence[Any], kind: str) -> Any:
        return IRBuilder.name(name, T.match_buffer(T.arg(f"{name}_handle", T.handle()), shape, kind))

    def layer(expert: int, kind: str) -> Weights:
        inputs, outputs = number(f"inputs{expert}"), number(f"outputs{expert}")
        bias = tensor(f"bias{expert}", (outputs,), "float32")
        if kind == "mult":
            weight = tensor(f"weight{expert}", (outputs, inputs), dtype)
            return FloatWeights(weight, dtype, inputs, outputs, bias)
        codes = tensor(f"codes{expert}", (terms, outputs, number(f"length{expert}")), "uint8")
        offset = tensor(f"offset{expert}", (terms, outputs), "int8")
        return PackedWeights(codes, offset, bits, terms, inputs, outputs, bias)

    with IRBuilder() as builder, prim_func(s_tir=True):
        T.func_name("moe_layer")
        T.func_attr({"tirx.noalias": True})
        tokens, tiles, across = number("tokens"), number("tiles"), number("across")
        X = tensor("x", (tokens if gathers else tiles * ROWS, number("x_width")), dtype)
        Y = tensor("y", (tokens if scatters else tiles * ROWS, number("y_width")), dtype)
        counts = tensor("counts", (len(kinds),), "int32")
        order = tensor("order", (len(kinds), tokens), "int32")
        gates = tensor("gates", (tokens,), "float32") if gated else None
        layers = [layer(expert, kind) for expert, kind in enumerate(kinds)]
        with (
            T.thread_binding(tiles, "blockIdx.x") as tile,
            T.thread_binding(across, "blockIdx.y") as block_column,
            T.thread_binding(THREADS, "threadIdx.x") as thread,
        ):
            token_of = T.alloc_buffer((ROWS,), "int32", scope="shared")  # -1 for rows that are not there
            applies = _share_out(len(kinds), tile, thread, counts, order, token_of)

            def exists(row: Any) -> Any:
                return token_of[row] >= 0

            def load(row: Any, k: Any) -> Any:
                return X[T.max(token_of[row], 0) if gathers else tile * ROWS + row, k]

            def store(row: Any, column: Any, y: Any) -> None:
                y = y if gates is None else y * gates[token_of[row]]
                T.buffer_store(Y, T.cast(y, dtype), [token_of[row] if scatters else tile * ROWS + row, column])

            choices = [Choice(*pair) for pair in zip(layers, applies, strict=True)]
            product.emit(form, dtype, activation, thread, block_column, choices, Rows(exists, load, store))
    return builder.get()


def _share_out(experts: int, tile: Any, thread: Any, counts: Any, order: Any, token_of: Any) -> list[Any]:
    """Emit which tokens a block has, into `token_of` [ROWS]; returns, for each expert, whether they are its own."""
    import tvm.script

    T: Any = tvm.script.tirx
    tokens = order.shape[1]
    before, token, applies = T.int32(0), T.int32(-1), []
    for expert in range(experts):
        count = T.bind(counts[expert])
        after = T.bind(before + (count + (ROWS - 1)) // ROWS)
        applies.append(T.bind(T.And(tile >= before, tile < after)))
        place = T.bind((tile - before) * ROWS + thread)
        found = order[expert, T.max(0, T.min(place, tokens - 1))]
        token = T.bind(T.Select(T.And(applies[-1], place < count), found, token))
        before = after
    with T.If(thread < ROWS), T.Then():
        T.buffer_store(token_of, token, [thread])
    # A block without tokens does not come by where TVM would have its threads wait.
    T.evaluate(T.tvm_storage_sync("shared"))
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
    error = 2 * error_bound(form, dtype) * size
    rounding = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype] * (exact.abs() + error)
    bound = 1.2 * (error + rounding) + (2.0**-24 if dtype == "float16" else 0.0)
    exact = activations.apply(activation, exact)
    if gated:
        exact = exact * gates[:, None]
    worst = ((found - exact).abs() - bound).max().item()
    assert worst <= 0, f"it is off by {worst:.2g} more than it may be"


def variants(target: CudaTarget) -> Iterator[dict[str, Any]]:
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
    function: Callable[..., None],
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
    tiles = _tiles(tokens, experts)
    widths = [len(layer.bias) for layer in layers]
    y = x.new_empty(tokens if scatters else tiles * ROWS, max(widths))
    across = -(-max(widths) // COLUMNS)
    arguments: dict[str, Any] = {} if gates is None else {"gates": gates}
    for expert, (weight, offset, bias, inputs) in enumerate(layers):
        arguments |= {f"inputs{expert}": inputs, f"outputs{expert}": widths[expert], f"bias{expert}": bias}
        if offset is None:
            arguments[f"weight{expert}"] = weight
        else:
            arguments |= {f"codes{expert}": weight, f"offset{expert}": offset, f"length{expert}": weight.shape[2]}
    function(
        tiles,
        across,
        tokens=tokens,
        tiles=tiles,
        across=across,
        x=x,
        x_width=x.shape[1],
        y=y,
        y_width=y.shape[1],
        counts=counts,
        order=order,
        **arguments,
    )
    return y


def mixture(
    x: Tensor,  # [tokens, inputs]
    assignment: Tensor,  # [tokens] int64
    gates: Tensor | None,  # [tokens] float32
    experts: Sequence[Sequence[tuple[Tensor, Tensor | None, Tensor | None]]],
    bits: int,
    activation: Activation,
    numerics: Numerics,
) -> Tensor | None:  # [tokens, outputs]
    """Each token through the layers of its expert, or None where the twin has to do.

    Args:
        x: neither without tokens nor without inputs.
        experts: for each layer of each expert a weight and None, or codes and offset, and a bias, which may be None.
            All experts have as many layers, all layers outputs, and all codes the same number of terms.
        activation: between the layers of an expert.
    """
    dtype, depth, tokens = DTYPES[x.dtype], len(experts[0]), len(x)
    chains = [_ready(chain, x) for chain in experts]
    widest = max(x.shape[1], *(len(layer.bias) for chain in chains for layer in chain))
    if _tiles(tokens, len(experts)) * ROWS * widest > MAX_ELEMENTS or widest > _MAX_BLOCKS_ACROSS * COLUMNS:
        LAYER.decline(f"a mixture of {list(x.shape)} with up to {widest} outputs is too large for it")
        return None
    if len(experts) > _SORT_THREADS:
        SORT.decline(f"{len(experts)} experts are too many for it")
        return None
    terms = {layer.weight.shape[0] for chain in chains for layer in chain if layer.offset is not None} or {1}
    shift = {
        "form": form(targets.of_gpu(x.device), numerics, bits, dtype),
        "bits": bits,
        "terms": terms.pop(),
        "dtype": dtype,
    }
    sort = SORT.function(device=x.device, experts=len(experts))
    functions = []
    for number in range(depth):
        is_last = number + 1 == depth
        kinds = ",".join("mult" if chain[number].offset is None else "shift" for chain in chains)
        place = {"gathers": number == 0, "scatters": is_last, "gated": is_last and gates is not None}
        between = "none" if is_last else activation
        functions.append(LAYER.function(device=x.device, experts=kinds, **place, **shift, activation=between))
    if sort is None or any(function is None for function in functions):
        return None
    counts, order = run_sort(sort, assignment, len(experts))
    y = x.contiguous()
    for number, function in enumerate(functions):
        is_last = number + 1 == depth
        layers = [chain[number] for chain in chains]
        y = run(function, y, counts, order, layers, scatters=is_last, gates=gates if is_last else None)
    return y


def _ready(chain: Sequence[tuple[Tensor, Tensor | None, Tensor | None]], x: Tensor) -> list[Layer]:
    layers, inputs = [], x.shape[1]
    for weight, offset, bias in chain:
        outputs = weight.shape[0 if offset is None else 1]
        bias = memory.float32_bias(bias, outputs, x.device)
        if offset is None:
            layers.append(Layer(weight.to(x.dtype).contiguous(), None, bias, inputs))
        else:
            layers.append(Layer(weight.contiguous(), offset.contiguous(), bias, inputs))
        inputs = outputs
    return layers
