"""`compile`: a frozen model as one executable, in place of hundreds of calls from Python.

`register_emitter` tells for a class of modules which functions it calls (see `shiftadd3d.kernels.whole`). If a module
in a model is of no registered class, the model runs uncompiled, and a warning names the module.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError, kind_of
from shiftadd3d.kernels.pack.whole import LinearWeights, ordinary, shifts, side_by_side
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.matadd import LOW
from shiftadd3d.kernels.runtime import kernel, targets
from shiftadd3d.kernels.runtime.numerics import Numerics, check_numerics, get_numerics, numerics
from shiftadd3d.kernels.runtime.recording import is_exported
from shiftadd3d.kernels.runtime.threads import follow_torch
from shiftadd3d.kernels.whole import (
    conv_mixtures,
    conv_perceptrons,
    deployment,
    executable,
    grids,
    mixtures,
    products,
    softmax,
    tokens,
)
from shiftadd3d.kernels.whole.background import Supply
from shiftadd3d.kernels.whole.grids import Window
from shiftadd3d.kernels.whole.parts import NormWeights
from shiftadd3d.kernels.whole.program import Dim, Exactness, Program, Value
from shiftadd3d.nn import power_of_two
from shiftadd3d.nn.add import AddAttention, TokenConv2d
from shiftadd3d.nn.attachments import has_own_forward, overridden_methods
from shiftadd3d.nn.binarize import Binarizer, SignBinarizer
from shiftadd3d.nn.mlp import FrozenConvMlp, FrozenMlp, activation_name, is_depthwise
from shiftadd3d.nn.moe import FrozenMoE, MoE
from shiftadd3d.nn.shift import PackedShiftConv2d, PackedShiftLinear, ShiftLayer


class Unserved(Exception):
    """A module cannot be part of a program."""


class Emission:
    """The argument of emitters: the program that is being made, and methods that add modules to it.

    Attributes:
        program: see `Program`. The functions that it calls are in `shiftadd3d.kernels.whole`.

    Args:
        numerics: what the program will be compiled for.
    """

    def __init__(self, model: nn.Module, numerics: Numerics = "exact") -> None:
        self.program, self._model = Program(), model
        self._integers = products.form_of(targets.current(), numerics, 0, 0) == "int16"
        self._names = {module: name for name, module in model.named_modules()}

    def emit(self, module: nn.Module, *values: Value, **options: Any) -> Value:
        """The outcome of a module for some values.

        Raises:
            Unserved: its class, or that of a module in it, is not registered.
        """
        kind = next((kind for kind in type(module).__mro__ if kind in _emitters), None)
        if kind is None or overridden_methods(module, kind):
            raise self.refusal(module, "which is not registered")
        emitter = _emitters[kind]
        if module is self._model and _asks_for_more(emitter):
            raise self.refusal(module, "which is compiled as part of a model only")
        return emitter(self, module, *values, **options)

    def refusal(self, module: nn.Module, reason: str) -> Unserved:
        """The exception to raise for a module that cannot be part of a program."""
        return Unserved(f"{self._names.get(module) or 'the model'} is {kind_of(module)}, {reason}")

    def check_unwatched(self, module: nn.Module) -> None:
        """Raise `Unserved` if hooks see or change the inputs or outputs of a module or of its parts."""
        watched = next(filter(_is_watched, module.modules()), None)
        if watched is not None:
            raise self.refusal(watched, "which has hooks")

    # What emitters of several classes need.

    def weights(self, layer: nn.Module) -> LinearWeights:
        """The weights of a linear layer, or of a convolution that is one over patches."""
        if type(layer) in (PackedShiftLinear, PackedShiftConv2d):
            layer = cast(PackedShiftLinear, layer)
            return shifts(layer.codes, layer.offset, layer.bias, layer.in_features, layer.bits)
        if type(layer) in (nn.Linear, nn.Conv2d):
            layer = cast(nn.Linear, layer)
            return self._ordinary(layer.weight.detach().flatten(1), layer.bias)
        raise self.refusal(layer, "which is not registered")

    def _ordinary(self, weight: Tensor, bias: Tensor | None) -> LinearWeights:
        return ordinary(weight, bias, 2 * targets.current().lanes, integers=self._integers)

    def norm(self, module: nn.Module) -> NormWeights | None:
        """A layer norm, to be computed with the product that follows it; None for nothing."""
        if type(module) is nn.Identity:
            return None
        # timm's own is torch's, which it may run faster.
        if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
            raise self.refusal(module, "which is not registered")
        width = module.normalized_shape[0]
        gain = torch.ones(width) if module.weight is None else module.weight.detach().float().contiguous()
        shift = torch.zeros(width) if module.bias is None else module.bias.detach().float().contiguous()
        return gain, shift, module.eps

    def mixture_parts(
        self, mixture: FrozenMoE
    ) -> tuple[tuple[Tensor, Tensor], list[list[LinearWeights]], Activation, bool]:
        """The router's weight and bias, the layers of all experts, the activation between them, and whether there are
        gates."""
        if mixture.keep_assignment:
            raise self.refusal(mixture, "which keeps where tokens go")
        chains: list[list[LinearWeights]] = []
        between: set[Activation | None] = set()
        for expert in mixture.experts:
            layers = [expert.fc1, expert.fc2] if isinstance(expert, FrozenMlp) else [expert]
            chains.append([self.weights(layer) for layer in layers])
            between |= {activation_name(expert.act)} if isinstance(expert, FrozenMlp) else set()
        activation = between.pop() if between else "none"
        formats = {layer.bits for chain in chains for layer in chain if layer.terms}
        mixed = any(len({layer.terms for layer in chain}) > 1 for chain in chains)
        if between or activation is None or mixed or len(formats) > 1 or len({len(chain) for chain in chains}) > 1:
            raise self.refusal(mixture, "whose experts are not alike")
        weight, bias = mixture.router.weight.detach(), mixture.router.bias.detach()
        router = ((weight / mixture.temperature).contiguous(), (bias / mixture.temperature).contiguous())
        gated = mixture.gate == "probability"
        return router, chains, activation, gated

    def linear(
        self, layer: nn.Module, x: Value, norm: NormWeights | None = None, residual: Value | None = None
    ) -> Value:
        """A linear layer, or a mixture in its place."""
        if isinstance(layer, FrozenMoE):
            return self.emit(layer, x, norm=norm, residual=residual)
        return products.linear(self.program, x, self.weights(layer), norm=norm, residual=residual)

    def queries_keys_values(
        self, module: AddAttention, x: Value, norm: NormWeights | None, context: Value | None = None
    ) -> list[Value]:
        """The projections for `attention`, of queries and keys signs alone if products can keep just those.

        Those of one input lie side by side in one tensor if one product can make them.

        Args:
            context: what keys and values are projections of, if not of x after the norm.
        """
        q, k, v = module.q_fc, module.k_fc, module.v_fc
        taken = [([q, k, v], x, norm)] if context is None else [([q], x, norm), ([k, v], context, None)]
        joint = [self._side_by_side(layers) for layers, *_ in taken]
        signed = [sum(_width(layer) for layer in layers if layer is not v) for layers, *_ in taken]
        whole = _width(q) // module.num_heads % 8 == 0 and all(map(products.keeps_signs, signed))
        parts: list[Value] = []
        for (layers, source, before), weights, columns in zip(taken, joint, signed, strict=True):
            if weights is None:
                parts += [self.linear(layer, source, before) for layer in layers]
            elif whole and None not in joint:
                some = products.linear_with_signs(self.program, source, weights, columns, before)
                parts += some if layers[-1] is v else some[:1]
            else:
                parts.append(products.linear(self.program, source, weights, norm=before))
        return parts

    def _side_by_side(self, layers: Sequence[nn.Module]) -> LinearWeights | None:
        """Linear layers as one; None if one product cannot make all."""
        if any(isinstance(layer, FrozenMoE) for layer in layers):
            return None
        packed = [self.weights(layer) for layer in layers]
        if len({(one.bits, one.terms) for one in packed}) > 1:
            return None
        if packed[0].terms:
            return side_by_side(packed)
        weight = torch.cat([cast(nn.Linear, layer).weight.detach() for layer in layers])
        return self._ordinary(weight, torch.cat([one.bias for one in packed]))

    def perceptron(
        self,
        first: nn.Module,
        act: nn.Module,
        second: nn.Module,
        x: Value,
        norm: NormWeights | None,
        residual: Value | None = None,
    ) -> Value:
        """Two linear layers with an activation function between them."""
        activation = activation_name(act)
        if activation is None:
            raise self.refusal(act, "which is not registered")
        one, two = self.weights(first), self.weights(second)
        if (one.bits, one.terms) == (two.bits, two.terms):
            return products.perceptron(self.program, x, one, two, activation, norm=norm, residual=residual)
        hidden = products.linear(self.program, x, one, norm=norm, activation=activation)
        return products.linear(self.program, hidden, two, residual=residual)

    def _experts(self, mixture: FrozenMoE) -> conv_mixtures.Experts:
        """A mixture of linear layers."""
        router, chains, _, gated = self.mixture_parts(mixture)
        if len(chains[0]) > 1:
            raise self.refusal(mixture, "whose experts are no linear layers")
        return conv_mixtures.Experts(router, [layer for chain in chains for layer in chain], gated)

    def conv_perceptron(
        self,
        first: nn.Module,
        conv: nn.Module,
        act: nn.Module,
        second: nn.Module,
        x: Value,
        norm: NormWeights | None,
        residual: Value,
        grid: tuple[int, int],
    ) -> Value:
        """Two linear layers, a depthwise convolution and an activation function between them."""
        activation = activation_name(act)
        if activation is None:
            raise self.refusal(act, "which is not registered")
        if not (isinstance(conv, nn.Conv2d) and is_depthwise(conv) and conv.out_channels >= targets.current().lanes):
            raise self.refusal(conv, "which is not registered, or has fewer channels than a vector")
        if isinstance(first, FrozenMoE) and isinstance(second, FrozenMoE) and norm is not None:
            both = self._experts(first), self._experts(second)
            if conv_mixtures.serves(both, conv.weight, grid, 2 * targets.current().lanes):
                return conv_mixtures.conv_mixture(
                    self.program, x, both, conv.weight, conv.bias, grid, activation, norm=norm, residual=residual
                )
        if not isinstance(first, FrozenMoE) and not isinstance(second, FrozenMoE):
            layers = self.weights(first), self.weights(second)
            if conv_perceptrons.serves(layers, conv.weight, grid, 2 * targets.current().lanes):
                return conv_perceptrons.conv_perceptron(
                    self.program, x, layers, conv.weight, conv.bias, grid, activation, norm=norm, residual=residual
                )
        hidden = self.linear(first, x, norm)
        behind = None if isinstance(second, FrozenMoE) else self.weights(second)
        hidden = tokens.depthwise(
            self.program, hidden, conv.weight, conv.bias, grid, activation=activation, behind=behind
        )
        if behind is None:
            return self.linear(second, hidden, None, residual)
        return products.linear(self.program, hidden, behind, residual=residual)

    def convolution(
        self,
        conv: nn.Module,
        x: Value,
        size: tuple[int, int],
        of_pictures: bool,
        before: NormWeights | None,
        behind: NormWeights | None,
    ) -> tuple[Value, tuple[int, int]]:
        """A convolution of pictures or of a grid of tokens, between two norms. Returns tokens and their grid."""
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
        if not (plain or (type(conv) is PackedShiftConv2d and not of_pictures)):
            raise self.refusal(conv, "which is not registered")
        conv = cast(nn.Conv2d, conv)
        sides = {conv.kernel_size, conv.stride, cast(tuple[int, int], conv.padding)}
        window = Window(of_pictures, conv.in_channels, *size, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))
        if any(side[0] != side[1] for side in sides) or conv.dilation != (1, 1) or conv.groups != 1:
            raise self.refusal(conv, "which is not the same along both sides, dilated or in groups")
        if min(window.grid) < 1:
            raise UserError(f"pictures are too small: {kind_of(conv)} has no output for {size[0]} x {size[1]}")
        layer = self._convolution_weights(conv, window)
        y = grids.convolution(self.program, x, layer, window, before=before, behind=behind)
        return y, window.grid

    def _convolution_weights(self, conv: nn.Module, window: Window) -> LinearWeights:
        if isinstance(conv, PackedShiftConv2d):
            codes, offset, bits = conv.weight_codes()
            arranged = [window.arranged(some.unflatten(1, (-1, *conv.kernel_size))) for some in codes]
            packed = power_of_two.pack(torch.stack(arranged), bits)
            return shifts(packed, offset, conv.bias, window.inputs, bits)
        conv = cast(nn.Conv2d, conv)
        return self._ordinary(window.arranged(conv.weight.detach()), conv.bias)

    def attention(self, module: AddAttention, parts: Sequence[Value]) -> Value:
        """`AddAttention.attend` for projected queries, keys and values; see `tokens.attention`."""
        codes = module.q_code if module.k_code is None else module.k_code
        for binarizer in (module.q_code, codes):
            if type(binarizer) is not SignBinarizer:
                raise self.refusal(binarizer, "which is not registered")
        if module.order == "quadratic":
            raise self.refusal(module, "in quadratic order")
        heads = module.num_heads
        contrast = torch.ones(heads) if module.log_contrast is None else module.log_contrast.detach().float().exp()
        features = _width(module.q_fc) // heads
        columns = _width(module.v_fc) // heads
        return tokens.attention(self.program, parts, contrast, features, columns, float(LOW[module.q_code.codes]))

    def softmax_attention(self, module: nn.Module, parts: Sequence[Value], heads: int) -> Value:
        """Softmax attention of projected queries, keys and values; see `softmax.softmax_attention`."""
        if _columns(parts[0]) // (3 if len(parts) == 1 else 1) // heads % targets.current().lanes:
            raise self.refusal(module, "with heads that are no whole vectors")
        return softmax.softmax_attention(self.program, parts, heads)


Emitter = Callable[..., Value]
Compiler = Callable[[nn.Module, Numerics, bool], Any]
_compilers: dict[type[nn.Module], Compiler] = {}
_emitters: dict[type[nn.Module], Emitter] = {}
_harmless_hooks: set[type] = set()


def register_emitter(module_class: type[nn.Module], emitter: Emitter) -> None:
    """Tell which functions a class of modules calls.

    Args:
        module_class: the class. Subclasses count as well if they override none of its methods.
        emitter: ``emitter(emission, module, *values, **options)`` adds the calls to ``emission.program`` and returns
            their outcome. For what it cannot do, it raises ``emission.refusal(module, reason)``. If it has keyword-only
            options without defaults, the class is only compiled as a part of a model.
    """
    _emitters[module_class] = emitter


def _asks_for_more(emitter: Emitter) -> bool:
    """Whether an emitter needs more than values, such as the grid of the tokens."""
    parameters = inspect.signature(emitter).parameters.values()
    return any(each.kind is each.KEYWORD_ONLY and each.default is each.empty for each in parameters)


def register_compiler(module_class: type[nn.Module], compiler: Compiler) -> None:
    """Let `compile` handle models of a class that cannot be one function of tensors.

    Args:
        module_class: the class and its subclasses.
        compiler: ``compiler(model, numerics, background)`` returns the compiled model; see `compile`.
    """
    _compilers[module_class] = compiler


def register_harmless_hook(kind: type) -> None:
    """Declare that hooks of this class change nothing that a compiled model computes."""
    _harmless_hooks.add(kind)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks see or change the inputs or outputs of a module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return has_own_forward(module) or not all(type(hook) in _harmless_hooks for hook in hooks)


def _columns(x: Value) -> int:
    return cast(int, x.shape[-1])


def _width(layer: nn.Module) -> int:
    return cast(nn.Linear, layer).out_features


def _emit_mlp(
    e: Emission, mlp: FrozenMlp, x: Value, *, norm: NormWeights | None = None, residual: Value | None = None
) -> Value:
    return e.perceptron(mlp.fc1, mlp.act, mlp.fc2, x, norm, residual)


register_emitter(FrozenMlp, _emit_mlp)


def _emit_conv_mlp(
    e: Emission, mlp: FrozenConvMlp, x: Value, *, norm: NormWeights | None, residual: Value, grid: tuple[int, int]
) -> Value:
    return e.conv_perceptron(mlp.fc1, mlp.dwconv, mlp.act, mlp.fc2, x, norm, residual, grid)


register_emitter(FrozenConvMlp, _emit_conv_mlp)


def _emit_mixture(
    e: Emission, mixture: FrozenMoE, x: Value, *, norm: NormWeights | None = None, residual: Value | None = None
) -> Value:
    router, chains, activation, gated = e.mixture_parts(mixture)
    return mixtures.mixture(e.program, x, router, chains, activation, gated=gated, norm=norm, residual=residual)


register_emitter(FrozenMoE, _emit_mixture)


def grid_convolution(
    e: Emission, conv: nn.Module, values: Value, grid: tuple[int, int], added: Value | None = None
) -> Value:
    """A convolution on the values of an attention, which lie last in `values`, and a sum with something else."""
    if type(conv) is not TokenConv2d:
        raise e.refusal(conv, "which is not registered")
    if conv.channels < targets.current().lanes:
        raise e.refusal(conv, "which has fewer channels than a vector")
    return tokens.depthwise(e.program, values, conv.weight, None, grid, added=added)


# Models


# Bytes of inputs for each thread: two pictures of 224 pixels. Their activations stay in caches from function to
# function, and there are so many tokens that decoding weights takes little of the time.
_BYTES_AT_A_TIME = 2 * 3 * 224 * 224 * 4


def _rows_at_a_time(inputs: Sequence[Tensor]) -> int:
    """How many items of a batch go into one call of the executable."""
    of_each = sum(x.nbytes for x in inputs) // len(inputs[0])
    return torch.get_num_threads() * max(1, _BYTES_AT_A_TIME // max(1, of_each))


class Compiled(nn.Module):
    """The common part of compiled models: executables from the cache, the compiler or another process.

    Attributes:
        model: the frozen model. It does the work if compiling failed, or as long as it takes.
        reason: why the model could not be compiled, or None.
        numerics: the precision that it was compiled for.
        overflows: number of calls that were repeated.
    """

    def _begin(self, numerics: Numerics, reason: str | None, background: bool) -> None:
        """Set the attributes, after the constructor of `nn.Module`."""
        self.numerics: Numerics = numerics
        self.reason, self.overflows = reason, 0
        self._lock, self._supply = threading.Lock(), Supply(background)
        self._executables: dict[Exactness, Any] = {}

    def _ready(self, exactness: Exactness) -> bool:
        """Compile now if necessary, under the lock. Returns whether there is an executable."""
        raise NotImplementedError

    @property
    def is_compiled(self) -> bool:
        """Whether there is an executable. If not, `reason` says why; without a reason, it is still being compiled."""
        return self.load(self.numerics)

    def load(self, exactness: Exactness) -> bool:
        """Compile now if necessary. Returns whether there is an executable."""
        with self._lock:
            return self._ready(exactness)

    def wait(self) -> bool:
        """Wait until the model has been compiled in the background. Returns whether there is an executable."""
        self._supply.wait()
        return self.is_compiled

    def __getstate__(self) -> dict[str, Any]:
        # Executables come from the cache again.
        return {**vars(self), "_lock": None, "_executables": {}, "_supply": Supply(self._supply.background)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()


class CompiledModel(Compiled):
    """A frozen model, compiled: a call runs its executable, several times for a large batch.

    It is for inference only. Weights and numerics are those of the time when it was compiled. If an integer product
    cannot express an activation, the call is repeated with an executable that computes in float32. That one is compiled
    when it is first needed. Attributes are those of `Compiled`.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program | None,
        numerics: Numerics,
        reason: str | None,
        background: bool = False,
    ) -> None:
        super().__init__()
        self._begin(numerics, reason, background)
        self.model, self._program = model, program
        self._weights: Any = None
        self.training = False

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the model for its inputs, in evaluation.

        Raises:
            UserError: for inputs of another rank, size, dtype or device than those it was compiled for.
        """
        wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if self._program is not None and not wants_gradients and not is_exported():
            check_inputs(self._program, inputs)
            with self._lock:
                y = self._run([x.detach().contiguous() for x in inputs])
            if y is not None:
                return y
        with numerics(self.numerics):
            return self.model(*inputs)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor | None:
        """The executable's outcome; None where there is none yet."""
        y: Tensor | None = None
        exactness: Exactness
        for exactness in (self.numerics, "safe"):
            if not self._ready(exactness):
                return None
            main, control = self._executables[exactness]
            follow_torch()
            control.reset(torch.get_num_threads())
            parts = [
                torch.from_dlpack(main(*part, control.tensor, self._weights))
                for part in zip(*(x.split(_rows_at_a_time(inputs)) for x in inputs), strict=True)
            ]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
            if not control.overflowed:
                break
            self.overflows += exactness == self.numerics
        return y

    def _ready(self, exactness: Exactness) -> bool:
        if exactness not in self._executables and self._program is not None:
            try:
                found = self._supply.executable({"main": self._program}, exactness)
            except kernel.FAILURES as error:
                self._program, self.reason = None, kernel.first_line(error)
                say_not_compiled(self.reason)
                return False
            if found is not None:
                if self._weights is None:
                    self._weights = executable.weights_of(self._program)
                self._executables[exactness] = found["main"], executable.Control()
        return exactness in self._executables

    def deploy(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the executable and its weights to a folder that runs without torch: see `deployment.write`."""
        assert self._program is not None
        deployment.write(folder, self._program, self.numerics, about)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_weights": None}

    def train(self, mode: bool = True) -> CompiledModel:
        if mode:
            raise UserError("a compiled model is for inference; train the model that it was made of, before freeze_")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModel:
        raise UserError(
            "a compiled model stays where it is; move or cast the model that it was made of, and compile that"
        )

    def extra_repr(self) -> str:
        return f"numerics={self.numerics!r}" + ("" if self.reason is None else f", not compiled: {self.reason}")


def check_inputs(program: Program, inputs: Sequence[Tensor]) -> None:
    """Raise `UserError` unless a program takes inputs of these shapes, dtypes and devices."""
    if len(inputs) != len(program.inputs):
        raise UserError(f"the compiled model takes {len(program.inputs)} inputs, not {len(inputs)}")
    sizes: dict[Dim, int] = {}
    for x, value in zip(inputs, program.inputs, strict=True):
        expected = f"[{', '.join(map(str, value.shape))}] {value.dtype} on the CPU"
        dtype = str(x.dtype).removeprefix("torch.")
        fits = len(x.shape) == len(value.shape) and all(
            size > 0 and size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim)
            for size, dim in zip(x.shape, value.shape, strict=True)
        )
        if not fits or dtype != value.dtype or x.device.type != "cpu":
            raise UserError(f"the compiled model takes {expected}, not {list(x.shape)} {dtype} on {x.device}")


def say_not_compiled(reason: str) -> None:
    """Warn, once for each model, that it runs uncompiled."""
    warnings.warn(f"not compiled, so it runs as before: {reason}", RuntimeWarning, stacklevel=4)


def compile(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | None = None,
    numerics: Numerics | None = None,
    background: bool = False,
) -> Any:
    """Compile a frozen model into one executable, or find it in the cache.

    If a module has no registered emitter, or the machine has no TVM or C compiler, the model runs uncompiled, and one
    warning says why.

    Args:
        model: a model that `freeze_` has frozen, in float32 on the CPU. It is not changed.
        example: an input of the model, or a list of all its inputs. The executable takes pictures of this size, in
            batches of any size. A GNT needs no example.
        numerics: "exact", "fast" or "int8"; None for the setting of the process (`get_numerics`).
        background: return at once. If the cache has no executable, another process compiles one, and calls run the
            frozen model until it is ready.

    Returns:
        A `CompiledModel`; for a GNT, a `shiftadd3d.models.gnt.compiled.CompiledGNT`.

    Raises:
        UserError: for a model that is not frozen, not in evaluation mode, not on the CPU or not in float32; for an
            example that the model does not take; for numerics ``"twin"``, which are never compiled.
    """
    exactness = check_numerics(get_numerics() if numerics is None else numerics)
    if exactness == "twin":
        raise UserError("numerics 'twin' are plain torch; expected exact, fast or int8 to compile for")
    check_model(model)
    own = next((_compilers[kind] for kind in type(model).__mro__ if kind in _compilers), None)
    if own is not None:
        return own(model, exactness, background)
    if example is None:
        raise UserError(f"compiling {kind_of(model)} needs an example input, such as a batch of pictures")
    examples = [example] if isinstance(example, Tensor) else list(example)
    check_examples(examples)
    reason: str | None = None
    program: Program | None = None
    try:
        program = program_of(model, examples, exactness)
    except Unserved as error:
        reason = str(error)
    compiled = CompiledModel(model, program, exactness, reason, background)
    if program is None:
        say_not_compiled(str(reason))
    else:
        check_inputs(program, examples)
        compiled.load(exactness)
    return compiled


def program_of(model: nn.Module, examples: Sequence[Tensor], numerics: Numerics) -> Program:
    """The program of a model for such inputs and numerics. The first dimension of each input is the batch.

    Raises:
        Unserved: a class in it is not registered, or hooks watch it.
    """
    emission = Emission(model, numerics)
    emission.check_unwatched(model)
    inputs = [emission.program.input("batch", *x.shape[1:]) for x in examples]
    with torch.no_grad():
        emission.program.output(emission.emit(model, *inputs))
    return emission.program


def check_model(model: nn.Module) -> None:
    """Raise `UserError` unless a model can be compiled on its device and in its present state."""
    for name, module in model.named_modules():
        if isinstance(module, (ShiftLayer, MoE)) or (isinstance(module, Binarizer) and not module.frozen):
            raise UserError(f"{name or 'the model'} is {kind_of(module)}, not frozen; call freeze_ first")
    if model.training:
        raise UserError("the model is in training mode; expected one in evaluation: model.eval()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise UserError(f"the model is on {tensor.device}; models are compiled for CPUs: model.cpu()")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(f"{name} is {tensor.dtype}; models are compiled in float32: model.float()")


def check_examples(examples: Sequence[Tensor]) -> None:
    """Raise `UserError` unless these can be inputs of a compiled model."""
    for x in examples:
        if not isinstance(x, Tensor):
            raise UserError(f"an example is a tensor, or a list of such, not {type(x).__name__}")
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise UserError(f"the example is {x.dtype} on {x.device}; expected float32 on the CPU")
        if x.dim() < 2 or 0 in x.shape:
            raise UserError(f"the example is of shape {list(x.shape)}; expected a batch of at least one")
