"""The problems that kernels are measured on, and everything that solves them.

Sizes are those of the paper's models: PVT's linear layers and attention for pictures of 224 pixels, and GNT's for rays
of a NeRF.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import COMPILED, Numerics, matshift, numerics, shift_mlp
from shiftadd3d.kernels.ops import literal as ops_literal
from shiftadd3d.kernels.ops import matadd as ops_matadd
from shiftadd3d.kernels.ops.gnt import gather as ops_gather
from shiftadd3d.kernels.ops.gnt import ray_block as ops_ray_block
from shiftadd3d.kernels.ops.gnt import view_attention as ops_view_attention
from shiftadd3d.kernels.pack.gnt import ray_block as pack_ray_block
from shiftadd3d.kernels.pack.gnt import view_attention as pack_view_attention
from shiftadd3d.kernels.pack.panel import lanes_on
from shiftadd3d.kernels.reference import matadd as reference_matadd
from shiftadd3d.kernels.reference import power_of_two
from shiftadd3d.kernels.reference.gnt import gather as reference_gather
from shiftadd3d.kernels.reference.gnt import ray_block as reference_ray_block
from shiftadd3d.kernels.reference.gnt import view_attention as reference_view_attention
from shiftadd3d.models.gnt.projection import PointSamples
from shiftadd3d.models.gnt.transformer import GNT
from shiftadd3d.nn import MoEMlp, freeze_, reparameterize_

__all__ = ["BASELINE", "CASES", "Case", "cases"]

#: What all speedups are given over: plain torch in float32, as the paper's tables are.
BASELINE = "torch float32"

Run = Callable[[], Any]

LINEAR_SHAPES = (
    (3136, 64, 512),
    (3136, 512, 64),
    (784, 128, 1024),
    (784, 1024, 128),
    (196, 192, 768),
    (196, 768, 192),
    (32768, 64, 64),
    (32768, 64, 256),
    (32768, 256, 64),
)
"""Rows, inputs, outputs: the multilayer perceptrons of PVT's first three stages, and GNT's linear layers."""

ADD_SHAPES = (
    (1, 1, 3136, 32),
    (1, 2, 784, 32),
    (1, 5, 196, 32),
    (1, 3, 197, 64),
    (32, 1, 3136, 32),
    (32, 2, 784, 32),
    (32, 3, 197, 64),
)
"""Pictures, heads, tokens, width of a head: PVT's stages and DeiT-tiny."""

MLP_SHAPES = ((32768, 64, 256), (196, 192, 768))
"""Tokens, width, hidden width."""

MOE_TOKENS = (256, 1024, 2048, 4096, 16384, 65536)

POINTS, VIEWS, WIDTH = 8192, 8, 64
"""Points on rays, source views and channels of GNT's view transformer."""
RAYS, SAMPLES = 512, 64

CHUNK, CHUNK_VIEWS = 500, 10
"""Rays that a GNT renders at once, and their source views."""


@dataclass
class Case:
    """One problem.

    Attributes:
        group: what it is a problem of, a key of `CASES`.
        name: its sizes.
        operations: additions and multiplications of the form with multiplications; None where there are hardly any.
        bytes: of float32 inputs and outputs, each once.
        ours: solutions by this project's kernels, by name.
        others: solutions by torch and torchao, by name. A function may return None where only its side effects
            count.
        rays: of a NeRF that are rendered, where that is what is solved.
        reference: the outcome in float64, where errors are wanted.
        inexact: names of solutions to another problem (other weights), which `reference` has nothing to say about.
    """

    group: str
    name: str
    operations: int | None
    bytes: int
    ours: dict[str, Run]
    others: dict[str, Run]
    rays: int | None = None
    reference: Tensor | None = None
    inexact: frozenset[str] = field(default_factory=frozenset)


def cases(group: str, device: str) -> Iterator[Case]:
    """The problems of a group, one after the other: the tensors of one are gone when the next one is made.

    Raises:
        UserError: if there is no such group.
    """
    if group not in CASES:
        raise UserError(f"no group of kernels {group!r}: expected some of {', '.join(CASES)}")
    torch.manual_seed(0)
    return CASES[group](device)


def _in(name: Numerics, function: Callable[..., Any], *arguments: Any) -> Run:
    """The function of these arguments, in such numerics."""

    def run() -> Any:
        with numerics(name):
            return function(*arguments)

    return run


def _compiled(function: Callable[..., Any], *arguments: Any) -> Run:
    """`torch.compile`'s best for these very arguments."""
    on_cuda = any(isinstance(argument, Tensor) and argument.is_cuda for argument in arguments)
    mode = "max-autotune-no-cudagraphs" if on_cuda else None
    compiled = torch.compile(function, dynamic=False, mode=mode)
    return lambda: compiled(*arguments)


def _with_tf32(function: Run) -> Run:
    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return function()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def _matshift_cases(device: str) -> Iterator[Case]:
    for rows, inputs, outputs in LINEAR_SHAPES:
        x = torch.randn(rows, inputs, device=device)
        weight = torch.randn(outputs, inputs) / inputs**0.5
        yield _matshift_case(x, weight)


def _matshift_case(x: Tensor, trained: Tensor) -> Case:
    (rows, inputs), outputs, device = x.shape, trained.shape[0], x.device.type
    narrow = x.bfloat16()

    def ours(x: Tensor, bits: int, terms: int, name: Numerics) -> Run:
        codes, offset, _ = power_of_two.encode(trained, bits, terms)
        packed, offset = power_of_two.pack(codes, bits).to(x.device), offset.to(x.device)
        return _in(name, matshift, x, packed, offset, None, bits)

    weight = power_of_two.quantize(trained, 4).to(device)
    narrow_weight = weight.bfloat16()
    others = {
        BASELINE: lambda: F.linear(x, weight),
        "torch bfloat16": lambda: F.linear(narrow, narrow_weight),
        "torch bfloat16, casts": lambda: F.linear(x.bfloat16(), narrow_weight).float(),
        "torch.compile float32": _compiled(F.linear, x, weight),
        "torch.compile bfloat16": _compiled(F.linear, narrow, narrow_weight),
        "torchao int8 dynamic": _torchao_int8(x, weight),
    }
    if device == "cpu":
        others["torch int8 dynamic"] = _torch_int8(x, weight)
    else:
        others["torch float32, TF32"] = _with_tf32(others[BASELINE])
    whole = torch.randint(-128, 128, x.shape, dtype=torch.int32, device=device)
    codes, offset, _ = power_of_two.encode(trained, 4)
    packed, offset = power_of_two.pack(codes, 4).to(device), offset.to(device)
    return Case(
        group="matshift",
        name=f"{rows} x {inputs} x {outputs}",
        operations=2 * rows * inputs * outputs,
        bytes=4 * (rows * inputs + rows * outputs) + inputs * outputs // 2,
        ours={
            "MatShift exact": ours(x, 4, 1, "exact"),
            "MatShift fast": ours(x, 4, 1, "fast"),
            "MatShift int8": ours(x, 4, 1, "int8"),
            "MatShift exact, bfloat16": ours(narrow, 4, 1, "exact"),
            "MatShift fast, bfloat16": ours(narrow, 4, 1, "fast"),
            "MatShift fast, 5 bits": ours(x, 5, 1, "fast"),
            "MatShift exact, 2 terms": ours(x, 4, 2, "exact"),
            "MatShift literal >>": lambda: ops_literal.matshift_literal(whole, packed, offset),
        },
        others=others,
        reference=F.linear(x.double(), weight.double()),
        inexact=frozenset({"MatShift fast, 5 bits", "MatShift exact, 2 terms", "MatShift literal >>"}),
    )


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data.copy_(weight)
    return linear.eval()


def _torch_int8(x: Tensor, weight: Tensor) -> Run:
    """torch's own layer of int8 weights, with a scale an output, which rounds activations as it goes."""

    def prepare() -> Run:
        from torch.ao.nn.quantized import dynamic
        from torch.ao.quantization import per_channel_dynamic_qconfig

        linear = _linear(weight)
        linear.qconfig = per_channel_dynamic_qconfig  # type: ignore[assignment]
        quantized = dynamic.Linear.from_float(linear)
        return lambda: quantized(x)

    return _late(prepare)


def _torchao_int8(x: Tensor, weight: Tensor) -> Run:
    """torchao's, compiled, as its documentation says."""

    def prepare() -> Run:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(_linear(weight))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return _compiled(model, x)

    return _late(prepare)


def _late(prepare: Callable[[], Run]) -> Run:
    """A function that `prepare` makes on the first call: what it raises then is told of that function alone."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(prepare())
        return made[0]()

    return run


def _matadd_cases(device: str) -> Iterator[Case]:
    def signs(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1) @ v)

    def binarized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return products(signs(q), signs(k), v)

    for pictures, heads, tokens, width in ADD_SHAPES:
        q, k, v = (torch.randn(pictures, heads, tokens, width, device=device) for _ in range(3))
        yield _matadd_case(q, k, v, signs, products, binarized)


def _matadd_case(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signs: Callable[[Tensor], Tensor],
    products: Callable[..., Tensor],
    binarized: Callable[..., Tensor],
) -> Case:
    q_signs, k_signs = signs(q), signs(k)
    q_bits, k_bits = reference_matadd.pack_signs(q), reference_matadd.pack_signs(k)
    narrow = tuple(x.bfloat16() for x in (q_signs, k_signs, v))
    pictures, heads, tokens, width = q.shape
    return Case(
        group="matadd",
        name=f"{pictures} x {heads} x {tokens} x {width}",
        operations=4 * q.numel() * width,
        bytes=4 * 4 * q.numel(),
        ours={
            "MatAdd, signs fused": lambda: ops_matadd.matadd(q, k, v),
            "MatAdd, packed signs": lambda: ops_matadd.matadd(q_bits, k_bits, v, features=width),
        },
        others={
            BASELINE: lambda: products(q_signs, k_signs, v),
            "torch bfloat16": lambda: products(*narrow),
            "torch float32, signs taken": lambda: binarized(q, k, v),
            "torch.compile float32, signs taken": _compiled(binarized, q, k, v),
        },
        reference=products(q_signs.double(), k_signs.double(), v.double()),
    )


def _view_attention_cases(device: str) -> Iterator[Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    hidden = WIDTH // 8
    square, narrowing, widening = (WIDTH, WIDTH), (hidden, WIDTH), (WIDTH, hidden)
    sizes = (square, square, square, (hidden, 4), widening, narrowing, widening, square)
    weights = [draw(*size) / size[1] ** 0.5 for size in sizes]
    biases = [draw(sizes[reference_view_attention.WEIGHTS.index(name)][0]) for name in reference_view_attention.BIASES]
    query, views, ray_diff = draw(POINTS, WIDTH), draw(POINTS, VIEWS, WIDTH), draw(POINTS, VIEWS, 4)
    mask = torch.rand(POINTS, VIEWS, device=device) > 0.1
    inputs = (query, views, ray_diff)
    narrow_inputs = query.bfloat16(), views.bfloat16(), ray_diff.bfloat16()
    narrow = (*narrow_inputs, mask, [w.bfloat16() for w in weights], [b.bfloat16() for b in biases])
    exact: tuple[Any, ...] = (
        *(x.double() for x in inputs),
        mask,
        [w.double() for w in weights],
        [b.double() for b in biases],
    )
    arguments = (*inputs, mask, weights, biases)
    panels = list(pack_view_attention.panels(weights, biases, lanes_on(query.device)))
    per_view = sum(2 * rows * columns for rows, columns in (sizes[i] for i in range(1, 7)))
    yield Case(
        group="view-attention",
        name=f"{POINTS} x {VIEWS} x {WIDTH}",
        operations=POINTS * (VIEWS * per_view + 4 * WIDTH**2),
        bytes=4 * sum(x.numel() for x in inputs) + 4 * query.numel(),
        ours={
            "view attention": lambda: ops_view_attention.view_attention(*inputs, mask, panels),
            "view attention, bfloat16": lambda: ops_view_attention.view_attention(*narrow_inputs, mask, panels),
        },
        others=_eager_and_compiled(reference_view_attention.view_attention_twin, arguments, narrow),
        reference=reference_view_attention.view_attention_twin(*exact),
    )


def _eager_and_compiled(twin: Callable[..., Any], arguments: tuple, narrow: tuple) -> dict[str, Run]:
    return {
        BASELINE: lambda: twin(*arguments),
        "torch bfloat16": lambda: twin(*narrow),
        "torch.compile float32": _compiled(twin, *arguments),
        "torch.compile bfloat16": _compiled(twin, *narrow),
    }


def _ray_block_cases(device: str) -> Iterator[Case]:
    def block(*arguments: Any) -> Run:
        return lambda: ops_ray_block.ray_block(*arguments)[0]

    for attention, hidden in (("softmax", 4 * WIDTH), ("pm1", 4 * WIDTH)):
        kernel = 0 if attention == "softmax" else 3
        x, weights, biases, conv, heads = reference_ray_block.random_block(
            0, rays=RAYS, samples=SAMPLES, width=WIDTH, heads=4, hidden=hidden, kernel=kernel
        )

        def arguments(
            dtype: torch.dtype,
            x: Tensor = x,
            weights: list[Tensor] = weights,
            biases: list[Tensor | None] = biases,
            conv: Tensor | None = conv,
            rest: tuple = (heads, attention, 1e-5, False),
        ) -> tuple:
            def on_device(tensor: Tensor | None) -> Any:
                return tensor if tensor is None else tensor.to(device, dtype)

            return (
                on_device(x), [on_device(w) for w in weights], [on_device(b) for b in biases], on_device(conv), *rest
            )  # fmt: skip

        wide, narrow = arguments(torch.float32), arguments(torch.bfloat16)
        panels = pack_ray_block.panels(*wide[1:4], heads=heads, lanes=lanes_on(wide[0].device))
        tokens = RAYS * SAMPLES
        products = 4 * WIDTH**2 + 2 * WIDTH * hidden
        products += 2 * SAMPLES * WIDTH if attention == "softmax" else 2 * WIDTH * (WIDTH // heads)
        yield Case(
            group="ray-block",
            name=f"{attention}, {RAYS} x {SAMPLES} x {WIDTH}",
            operations=2 * tokens * products,
            bytes=8 * tokens * WIDTH,
            ours={
                "ray block": block(wide[0], panels, *wide[4:]),
                "ray block, bfloat16": block(narrow[0], panels, *narrow[4:]),
            },
            others=_eager_and_compiled(lambda *given: reference_ray_block.ray_block_twin(*given)[0], wide, narrow),
            # No reference: signs of queries near zero differ, and each makes another outcome.
        )


def _gnt_cases(device: str) -> Iterator[Case]:
    """A whole network, rays in and colours out: 4 blocks, dense and of shifts, frozen, with random weights."""
    rays, views, features = CHUNK, CHUNK_VIEWS, 32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    samples = PointSamples(
        draw(rays, SAMPLES, views, 3 + features),
        2.0 * draw(rays, SAMPLES, views, 4) - 1.0,
        draw(rays, SAMPLES, views, 1) > 0.1,
    )
    points, directions = draw(rays, SAMPLES, 3), draw(rays, 3) - 0.5

    def network(recipe: str) -> nn.Module:
        torch.manual_seed(0)
        holder = nn.Sequential(GNT(depth=4, width=WIDTH, feature_dim=features)).to(device).eval()
        reparameterize_(holder, recipe, verbose=False)
        freeze_(holder, verbose=False)
        return holder[0]

    def run(network: nn.Module, name: Numerics) -> Run:
        return _in(name, lambda: network(samples, points, directions)[0])

    dense, shifts = network("mult"), network("add+shift")
    yield Case(
        group="gnt",
        name=f"{rays} rays x {SAMPLES} x {views} x {WIDTH}",
        operations=None,
        bytes=4 * samples.values.numel(),
        rays=rays,
        ours={
            "GNT dense, exact": run(dense, "exact"),
            "GNT dense, fast": run(dense, "fast"),
            **{f"GNT add+shift, {name}": run(shifts, name) for name in COMPILED},
        },
        others={BASELINE: run(dense, "twin")},
    )


def _gather_cases(device: str) -> Iterator[Case]:
    channels = 32
    scene = reference_gather.random_scene(
        0, rays=POINTS // SAMPLES, samples=SAMPLES, views=VIEWS, channels=channels, with_valid=False
    )
    wide: tuple[Any, ...] = tuple(x if x is None else x.to(device) for x in scene)
    yield Case(
        group="gather",
        name=f"{POINTS} x {VIEWS} x {channels}",
        operations=None,
        bytes=4 * POINTS * VIEWS * (2 * (3 + channels) + 4),
        ours={"gather": lambda: ops_gather.point_samples(*wide)},
        others={
            BASELINE: lambda: reference_gather.point_samples_twin(*wide),
            "torch.compile float32": _compiled(reference_gather.point_samples_twin, *wide),
        },
    )


def _mlp_cases(device: str) -> Iterator[Case]:
    for tokens, width, hidden in MLP_SHAPES:
        yield _mlp_case(tokens, width, hidden, device)


def _mlp_case(tokens: int, width: int, hidden: int, device: str) -> Case:
    x = torch.randn(tokens, width, device=device)
    narrow = x.bfloat16()
    trained = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    biases = torch.randn(hidden, device=device), torch.randn(width, device=device)
    layers: list[Tensor] = []
    for weight, bias in zip(trained, biases, strict=True):
        codes, offset, _ = power_of_two.encode(weight)
        layers += [power_of_two.pack(codes, 4).to(device), offset.to(device), bias]
    first, second = (power_of_two.quantize(weight).to(device) for weight in trained)

    def ours(x: Tensor, name: Numerics) -> Run:
        return _in(name, shift_mlp, x, *layers)

    def torchs(x: Tensor, first: Tensor, b: Tensor, second: Tensor, c: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, first, b)), second, c)

    arguments = (x, first, biases[0], second, biases[1])
    return Case(
        group="mlp",
        name=f"{tokens} x {width}-{hidden}-{width}",
        operations=4 * tokens * width * hidden,
        bytes=8 * tokens * width + width * hidden,
        ours={
            "MLP exact": ours(x, "exact"),
            "MLP fast": ours(x, "fast"),
            "MLP int8": ours(x, "int8"),
            "MLP fast, bfloat16": ours(narrow, "fast"),
        },
        others=_eager_and_compiled(torchs, arguments, tuple(tensor.bfloat16() for tensor in arguments)),
        reference=torchs(*(tensor.double() for tensor in arguments)),
    )


def _moe_cases(device: str) -> Iterator[Case]:
    width, hidden = 64, 256
    dense_mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(device).eval()
    moe = MoEMlp(width, hidden)
    mixture, router = nn.Sequential(moe).to(device), moe.router
    with torch.no_grad():
        # One expert where a random projection is positive, the other where it is negative: half of the tokens each.
        router.weight.copy_(torch.randn(1, width, device=device) * torch.tensor([[1.0], [-1.0]], device=device))
        router.bias.zero_()
    freeze_(mixture, verbose=False)

    for tokens in MOE_TOKENS:
        x = torch.randn(1, tokens, width, device=device)
        yield Case(
            group="moe",
            name=f"{tokens} x {width}-{hidden}-{width}",
            operations=4 * tokens * width * hidden,
            bytes=8 * tokens * width,
            ours={f"MoE {name}": _in(name, mixture, x) for name in COMPILED},
            others={BASELINE: lambda x=x: dense_mlp(x)},
        )


#: Groups of problems by name: functions of a device.
CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    "matshift": _matshift_cases,
    "matadd": _matadd_cases,
    "mlp": _mlp_cases,
    "moe": _moe_cases,
    "view-attention": _view_attention_cases,
    "ray-block": _ray_block_cases,
    "gather": _gather_cases,
    "gnt": _gnt_cases,
}
