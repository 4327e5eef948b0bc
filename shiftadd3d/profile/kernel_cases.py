"""The problems that kernels are measured on, and all solutions of them.

Sizes are those of the paper's models: linear layers and attention of PVT for pictures of 224 pixels, and of GNT for
rays of a NeRF.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels import COMPILED, Numerics, matshift, numerics, shift_mlp
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

__all__ = ["BASELINE", "CASES", "Case", "Setup", "cases", "late", "name_of", "rivals"]

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
MOE_WIDTHS = (64, 256)
"""Width, hidden width."""

POINTS, VIEWS, WIDTH = 8192, 8, 64
"""Points on rays, source views and channels of GNT's view transformer."""
RAYS, SAMPLES = 512, 64

CHUNK, CHUNK_VIEWS = 500, 10
"""Rays that a GNT renders at once, and their source views."""


@dataclass
class Case:
    """One problem.

    Attributes:
        group: its group, a key of `CASES`.
        name: its sizes.
        operations: additions and multiplications of the form with multiplications; None if there are hardly any.
        bytes: float32 inputs and outputs, each counted once.
        ours: solutions by this project's kernels, by name.
        others: solutions by torch and torchao, by name. A function may return None if only its side effects count.
        rays: number of rendered rays of a NeRF, if there are any.
        reference: the outcome in float64, for errors.
        inexact: names of solutions to another problem (with other weights), for which `reference` has no meaning.
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


@dataclass(frozen=True)
class Setup:
    """Settings for making problems.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        sizes: sizes of the problems, in the form of the group's own; None for the group's own.
        narrow: number formats besides float32 in which torch solves them. In the first one, torch also solves them
            compiled.
        options: options of `torch.compile`; None for those that make the fastest code.
    """

    device: str
    sizes: Sequence[tuple[int, ...]] | None = None
    narrow: tuple[torch.dtype, ...] = (torch.bfloat16,)
    options: Mapping[str, Any] | None = None

    def compiled(self, function: Callable[..., Any], *arguments: Any) -> Run:
        """The function, compiled by `torch.compile` for these arguments."""
        options = self.options
        if options is None:
            options = {"mode": "max-autotune-no-cudagraphs"} if self.device == "cuda" else {}
        compiled = torch.compile(function, dynamic=False, **options)
        return lambda: compiled(*arguments)


def cases(group: str, setup: Setup) -> Iterator[Case]:
    """The problems of a group, one after the other. The tensors of one are freed before the next one is made.

    Raises:
        UserError: if there is no such group.
    """
    if group not in CASES:
        raise UserError(f"--groups {group}: expected some of {', '.join(CASES)}")
    torch.manual_seed(0)
    return CASES[group](setup)


def _in(name: Numerics, function: Callable[..., Any], *arguments: Any) -> Run:
    """The function of these arguments, in such numerics."""

    def run() -> Any:
        with numerics(name):
            return function(*arguments)

    return run


def name_of(dtype: torch.dtype) -> str:
    """The name of a number format in names of solutions."""
    return str(dtype).removeprefix("torch.")


def rivals(function: Callable[..., Any], arguments: tuple[Any, ...], setup: Setup) -> dict[str, Run]:
    """Plain torch, eager and compiled, in float32 and narrower formats.

    Args:
        function: a function of its arguments only, or a module.
        arguments: in float32: tensors, and lists, tuples and dataclasses of tensors.
    """
    runs: dict[str, Run] = {}
    for dtype in (torch.float32, *setup.narrow):
        wide = dtype == torch.float32
        form = copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) and not wide else function
        given = arguments if wide else _cast(arguments, dtype)
        runs[f"torch {name_of(dtype)}"] = lambda form=form, given=given: form(*given)
        if wide and setup.device == "cuda":
            runs[f"{BASELINE}, TF32"] = _with_tf32(runs[BASELINE])
        if dtype in (torch.float32, *setup.narrow[:1]):
            runs[f"torch.compile {name_of(dtype)}"] = setup.compiled(form, *given)
    return runs


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(one, dtype) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _cast(getattr(value, one.name), dtype) for one in fields(value)})
    return value


def _with_tf32(function: Run) -> Run:
    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return function()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def _matshift_cases(setup: Setup) -> Iterator[Case]:
    for rows, inputs, outputs in setup.sizes or LINEAR_SHAPES:
        x = torch.randn(rows, inputs, device=setup.device)
        weight = torch.randn(outputs, inputs) / inputs**0.5
        yield _matshift_case(x, weight, setup)


def _matshift_case(x: Tensor, trained: Tensor, setup: Setup) -> Case:
    (rows, inputs), outputs, device = x.shape, trained.shape[0], setup.device

    def ours(x: Tensor, bits: int, terms: int, name: Numerics) -> Run:
        codes, offset, _ = power_of_two.encode(trained, bits, terms)
        packed, offset = power_of_two.pack(codes, bits).to(x.device), offset.to(x.device)
        return _in(name, matshift, x, packed, offset, None, bits)

    weight = power_of_two.quantize(trained, 4).to(device)
    first, narrow_weight = name_of(setup.narrow[0]), weight.to(setup.narrow[0])
    others = rivals(F.linear, (x, weight), setup) | {
        f"torch {first}, casts": lambda: F.linear(x.to(setup.narrow[0]), narrow_weight).float(),
        "torchao int8 dynamic": _torchao_int8(x, weight, setup),
    }
    if device == "cpu":
        others["torch int8 dynamic"] = _torch_int8(x, weight)
    narrow_ours = {
        f"MatShift {form}, {name_of(dtype)}": ours(x.to(dtype), 4, 1, form)
        for dtype in setup.narrow
        for form in ("exact", "fast")
    }
    return Case(
        group="matshift",
        name=f"{rows} x {inputs} x {outputs}",
        operations=2 * rows * inputs * outputs,
        bytes=4 * (rows * inputs + rows * outputs) + inputs * outputs // 2,
        ours={
            "MatShift exact": ours(x, 4, 1, "exact"),
            "MatShift fast": ours(x, 4, 1, "fast"),
            "MatShift int8": ours(x, 4, 1, "int8"),
            **narrow_ours,
            "MatShift fast, 5 bits": ours(x, 5, 1, "fast"),
            "MatShift exact, 2 terms": ours(x, 4, 2, "exact"),
        },
        others=others,
        reference=F.linear(x.double(), weight.double()),
        inexact=frozenset({"MatShift fast, 5 bits", "MatShift exact, 2 terms"}),
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

    return late(prepare)


def _torchao_int8(x: Tensor, weight: Tensor, setup: Setup) -> Run:
    """torchao's, compiled, as its documentation says."""

    def prepare() -> Run:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = nn.Sequential(_linear(weight))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        return setup.compiled(model, x)

    return late(prepare)


def late(prepare: Callable[[], Run]) -> Run:
    """A function that `prepare` makes on the first call, so that its errors are reported for this function only."""
    made: list[Run] = []

    def run() -> Any:
        if not made:
            made.append(prepare())
        return made[0]()

    return run


def _matadd_cases(setup: Setup) -> Iterator[Case]:
    def signs(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q @ (k.transpose(-2, -1) @ v)

    def binarized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return products(signs(q), signs(k), v)

    for pictures, heads, tokens, width in setup.sizes or ADD_SHAPES:
        q, k, v = (torch.randn(pictures, heads, tokens, width, device=setup.device) for _ in range(3))
        yield _matadd_case(q, k, v, signs, products, binarized, setup)


def _matadd_case(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signs: Callable[[Tensor], Tensor],
    products: Callable[..., Tensor],
    binarized: Callable[..., Tensor],
    setup: Setup,
) -> Case:
    q_signs, k_signs = signs(q), signs(k)
    q_bits, k_bits = reference_matadd.pack_signs(q), reference_matadd.pack_signs(k)
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
        others=rivals(products, (q_signs, k_signs, v), setup)
        | {
            "torch float32, signs taken": lambda: binarized(q, k, v),
            "torch.compile float32, signs taken": setup.compiled(binarized, q, k, v),
        },
        reference=products(q_signs.double(), k_signs.double(), v.double()),
    )


def _view_attention_cases(setup: Setup) -> Iterator[Case]:
    for points, views, width in setup.sizes or ((POINTS, VIEWS, WIDTH),):
        yield _view_attention_case(points, views, width, setup)


def _view_attention_case(points: int, count: int, width: int, setup: Setup) -> Case:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setup.device)

    hidden = width // 8
    square, narrowing, widening = (width, width), (hidden, width), (width, hidden)
    sizes = (square, square, square, (hidden, 4), widening, narrowing, widening, square)
    weights = [draw(*size) / size[1] ** 0.5 for size in sizes]
    biases = [draw(sizes[reference_view_attention.WEIGHTS.index(name)][0]) for name in reference_view_attention.BIASES]
    query, views, ray_diff = draw(points, width), draw(points, count, width), draw(points, count, 4)
    mask = torch.rand(points, count, device=setup.device) > 0.1
    inputs = (query, views, ray_diff)
    arguments = (*inputs, mask, weights, biases)
    panels = list(pack_view_attention.panels(weights, biases, lanes_on(query.device)))

    def narrow(dtype: torch.dtype) -> Run:
        q, v, d = (x.to(dtype) for x in inputs)
        return lambda: ops_view_attention.view_attention(q, v, d, mask, panels)

    per_view = sum(2 * rows * columns for rows, columns in (sizes[i] for i in range(1, 7)))
    return Case(
        group="view-attention",
        name=f"{points} x {count} x {width}",
        operations=points * (count * per_view + 4 * width**2),
        bytes=4 * sum(x.numel() for x in inputs) + 4 * query.numel(),
        ours={
            "view attention": lambda: ops_view_attention.view_attention(*inputs, mask, panels),
            **{f"view attention, {name_of(dtype)}": narrow(dtype) for dtype in setup.narrow},
        },
        others=rivals(reference_view_attention.view_attention_twin, arguments, setup),
        reference=reference_view_attention.view_attention_twin(*_cast(arguments, torch.float64)),
    )


def _ray_block_cases(setup: Setup) -> Iterator[Case]:
    def block(*arguments: Any) -> Run:
        return lambda: ops_ray_block.ray_block(*arguments)[0]

    for attention, hidden in (("softmax", 4 * WIDTH), ("pm1", 4 * WIDTH)):
        kernel = 0 if attention == "softmax" else 3
        x, weights, biases, conv, heads = reference_ray_block.random_block(
            0, rays=RAYS, samples=SAMPLES, width=WIDTH, heads=4, hidden=hidden, kernel=kernel
        )

        def on_device(tensor: Tensor | None) -> Any:
            return tensor if tensor is None else tensor.to(setup.device)

        wide = (
            on_device(x), [on_device(w) for w in weights], [on_device(b) for b in biases], on_device(conv),
            heads, attention, 1e-5, False,
        )  # fmt: skip
        narrow = _cast(wide, torch.bfloat16)
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
            others=rivals(lambda *given: reference_ray_block.ray_block_twin(*given)[0], wide, setup),
            # No reference: signs of queries near zero differ, and each makes another outcome.
        )


def _gnt_cases(setup: Setup) -> Iterator[Case]:
    """A whole network, rays in and colours out: 4 blocks, dense and of shifts, frozen, with random weights."""
    for rays, depths, views in setup.sizes or ((CHUNK, SAMPLES, CHUNK_VIEWS),):
        yield _gnt_case(rays, depths, views, setup)


def _gnt_case(rays: int, depths: int, views: int, setup: Setup) -> Case:
    device, features = setup.device, 32
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    samples = PointSamples(
        draw(rays, depths, views, 3 + features),
        2.0 * draw(rays, depths, views, 4) - 1.0,
        draw(rays, depths, views, 1) > 0.1,
    )
    points, directions = draw(rays, depths, 3), draw(rays, 3) - 0.5

    def original() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(GNT(depth=4, width=WIDTH, feature_dim=features)).to(device).eval()

    def network(recipe: str) -> nn.Module:
        holder = original()
        reparameterize_(holder, recipe, verbose=False)
        freeze_(holder, verbose=False)
        return holder[0]

    def run(network: nn.Module, name: Numerics) -> Run:
        return _in(name, lambda: network(samples, points, directions)[0])

    dense, shifts = network("mult"), network("add+shift")
    return Case(
        group="gnt",
        name=f"{rays} rays x {depths} x {views} x {WIDTH}",
        operations=None,
        bytes=4 * samples.values.numel(),
        rays=rays,
        ours={
            "GNT dense, exact": run(dense, "exact"),
            "GNT dense, fast": run(dense, "fast"),
            **{f"GNT add+shift, {name}": run(shifts, name) for name in COMPILED},
        },
        others=rivals(original()[0], (samples, points, directions), setup),
    )


def _gather_cases(setup: Setup) -> Iterator[Case]:
    for rays, depths, views in setup.sizes or ((POINTS // SAMPLES, SAMPLES, VIEWS),):
        yield _gather_case(rays, depths, views, setup)


def _gather_case(rays: int, depths: int, views: int, setup: Setup) -> Case:
    channels, points = 32, rays * depths
    scene = reference_gather.random_scene(
        0, rays=rays, samples=depths, views=views, channels=channels, with_valid=False
    )
    wide: tuple[Any, ...] = tuple(x if x is None else x.to(setup.device) for x in scene)
    return Case(
        group="gather",
        name=f"{points} x {views} x {channels}",
        operations=None,
        bytes=4 * points * views * (2 * (3 + channels) + 4),
        ours={"gather": lambda: ops_gather.point_samples(*wide)},
        others={
            BASELINE: lambda: reference_gather.point_samples_twin(*wide),
            "torch.compile float32": setup.compiled(reference_gather.point_samples_twin, *wide),
        },
    )


def _mlp_cases(setup: Setup) -> Iterator[Case]:
    for tokens, width, hidden in setup.sizes or MLP_SHAPES:
        yield _mlp_case(tokens, width, hidden, setup)


def _mlp_case(tokens: int, width: int, hidden: int, setup: Setup) -> Case:
    device = setup.device
    x = torch.randn(tokens, width, device=device)
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
            **{f"MLP fast, {name_of(dtype)}": ours(x.to(dtype), "fast") for dtype in setup.narrow},
        },
        others=rivals(torchs, arguments, setup),
        reference=torchs(*(tensor.double() for tensor in arguments)),
    )


def _moe_cases(setup: Setup) -> Iterator[Case]:
    for tokens, width, hidden in setup.sizes or [(tokens, *MOE_WIDTHS) for tokens in MOE_TOKENS]:
        yield _moe_case(tokens, width, hidden, setup)


def _moe_case(tokens: int, width: int, hidden: int, setup: Setup) -> Case:
    device = setup.device
    dense_mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(device).eval()
    moe = MoEMlp(width, hidden)
    mixture, router = nn.Sequential(moe).to(device), moe.router
    with torch.no_grad():
        # One expert where a random projection is positive, the other where it is negative: half of the tokens each.
        router.weight.copy_(torch.randn(1, width, device=device) * torch.tensor([[1.0], [-1.0]], device=device))
        router.bias.zero_()
    freeze_(mixture, verbose=False)

    def run(name: Numerics, dtype: torch.dtype = torch.float32) -> Run:
        form, given = copy.deepcopy(mixture).to(dtype), x.to(dtype)

        def mix() -> Tensor:
            with numerics(name):
                return form(given)

        return mix

    x = torch.randn(1, tokens, width, device=device)
    return Case(
        group="moe",
        name=f"{tokens} x {width}-{hidden}-{width}",
        operations=4 * tokens * width * hidden,
        bytes=8 * tokens * width,
        ours={f"MoE {name}": run(name) for name in COMPILED}
        | {f"MoE fast, {name_of(dtype)}": run("fast", dtype) for dtype in setup.narrow},
        others=rivals(dense_mlp, (x,), setup),
    )


#: Groups of problems by name: functions of what they are made for.
CASES: dict[str, Callable[[Setup], Iterator[Case]]] = {
    "matshift": _matshift_cases,
    "matadd": _matadd_cases,
    "mlp": _mlp_cases,
    "moe": _moe_cases,
    "view-attention": _view_attention_cases,
    "ray-block": _ray_block_cases,
    "gather": _gather_cases,
    "gnt": _gnt_cases,
}
