"""A mixture of multiplication primitives: a router sends each token to the expert that suits it.

The experts are a multiplying layer and its shift twin, or any list of modules. Each token runs through exactly one of
them. The latency-aware load-balancing loss gives more tokens to faster experts. At its minimum, shares are proportional
to the inverse latencies, so that experts running side by side end at the same time.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4.3; the noisy load estimate is that of Shazeer et al.,
"Outrageously Large Neural Networks" (ICLR 2017), appendix A, for one expert a token.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.ops.moe import moe_mlp
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.runtime.numerics import uses_kernels
from shiftadd3d.kernels.runtime.recording import is_exported
from shiftadd3d.nn.derived_weight import WithoutWeight, derived_weight
from shiftadd3d.nn.frozen import register_frozen
from shiftadd3d.nn.mlp import FrozenMlp, activation_name, is_watched
from shiftadd3d.nn.shift import PackedShiftLinear, ShiftLinear
from shiftadd3d.nn.tracing import one_node

Gate = Literal["unit", "probability"]
GATES = ("unit", "probability")

# Losses nobody collects hold their graphs: beyond this many forward passes the oldest are let go.
_MAX_PENDING_LOSSES = 256
# Enough tokens for the experts' cost to outweigh that of calling them.
_MEASURED_TOKENS = 4096


def measure_latencies(experts: Sequence[nn.Module], tokens: Tensor, repeats: int = 15) -> tuple[float, ...]:
    """Seconds that each expert takes for `tokens`: the median of `repeats` runs.

    Experts take turns, so that other load on the machine affects all of them. They run in evaluation mode, without
    gradients.

    Args:
        experts: modules from [T, C] to [T, C'].
        tokens: example tokens [T, C] on the experts' device.
        repeats: timed runs of each expert, after two untimed ones.
    """
    times: list[list[float]] = [[] for _ in experts]
    modes = [[(module, module.training) for module in expert.modules()] for expert in experts]
    try:
        for expert in experts:
            expert.eval()
        with torch.no_grad():
            for run in range(repeats + 2):
                for expert, measured in zip(experts, times, strict=True):
                    _wait_for(tokens)
                    start = time.perf_counter()
                    expert(tokens)
                    _wait_for(tokens)
                    if run >= 2:
                        measured.append(time.perf_counter() - start)
    finally:
        for mode in modes:
            for module, training in mode:
                module.training = training
    return tuple(sorted(measured)[len(measured) // 2] for measured in times)


# What was measured on this machine so far: see `_latencies_here`.
_measured: dict[tuple, tuple[float, ...]] = {}


def _latencies_here(experts: Sequence[nn.Module], tokens: Tensor) -> tuple[float, ...]:
    """`measure_latencies`, once for all mixtures whose experts and tokens have the same kinds and shapes.

    Processes that train together use the mean of what each measured, so that they minimise the same loss.
    """
    tokens = tokens[:_MEASURED_TOKENS].detach()
    kind = tokens.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    structures = tuple(_structure(expert) for expert in experts)
    key = (structures, tokens.shape, tokens.dtype, tokens.device, autocast, torch.get_num_threads())
    if key not in _measured:
        _measured[key] = measure_latencies(experts, tokens)
    if not _is_distributed():
        return _measured[key]
    total = torch.tensor(_measured[key], device=tokens.device)
    dist.all_reduce(total)
    return tuple((total / dist.get_world_size()).tolist())


def _structure(module: nn.Module) -> tuple:
    """What the cost of running `module` depends on, but for its input."""
    parts = tuple((type(part), part.extra_repr()) for part in module.modules())
    tensors = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def latency_weights(latencies: Sequence[float]) -> tuple[float, ...]:
    """``alpha_i = Lat_i / sum_j Lat_j``.

    Raises:
        UserError: if a latency is not positive and finite.
    """
    if not all(math.isfinite(latency) and latency > 0 for latency in latencies):
        raise UserError(f"latencies must be positive and finite, not {tuple(latencies)}")
    total = sum(latencies)
    return tuple(latency / total for latency in latencies)


def squared_coefficient_of_variation(x: Tensor) -> Tensor:
    """Variance divided by the squared mean of the values of `x` [E].

    It is a scalar: 0 if all values are equal, and at most E - 1.
    """
    mean = x.mean()
    return (x - mean).square().mean() / (mean.square() + torch.finfo(x.dtype).tiny)


def balance_loss(
    logits: Tensor,  # [T, E]
    assignment: Tensor,  # [T]
    alpha: Tensor,  # [E]
    noisy_logits: Tensor | None = None,  # [T, E]
    noise: float = 0.0,
) -> Tensor:
    """The latency-aware load-balancing loss of one layer, a scalar.

    It is ``CV^2(importance) + CV^2(load)``, with ``importance_i = alpha_i sum_x p_i(x)``, where p is the softmax of
    `logits`, and with ``load_i``, which is ``alpha_i`` times the number of tokens of expert i. That number has no
    gradient. With noise on the router, its expectation is used instead, ``sum_x P(logits_i + noise > max_j!=i
    noisy_logits_j)``. Without noise, the count gets the gradient of p.

    Both terms are zero if the shares of the experts are proportional to ``1 / alpha``.

    If `torch.distributed` is initialised, sums are over the tokens of all processes. So the loss is the same in all of
    them. After data parallel training has averaged gradients, its gradient is that of the whole batch. All processes
    must take part.
    """
    probability = logits.softmax(-1)
    importance = probability.sum(0)
    if noisy_logits is not None and noise > 0:
        best = noisy_logits.topk(min(2, noisy_logits.shape[-1]), dim=-1)
        # The best among the others: the second best for the winner, the best for the rest.
        is_winner = F.one_hot(best.indices[:, 0], noisy_logits.shape[-1]).bool()
        rival = torch.where(is_winner, best.values[:, -1:], best.values[:, :1])
        load = torch.special.ndtr((logits - rival) / noise).sum(0)
    else:
        count = torch.bincount(assignment, minlength=logits.shape[-1]).to(importance.dtype)
        load = count + (importance - importance.detach())
    if _is_distributed():
        importance, load = _SumOverRanks.apply(torch.stack([importance, load])).unbind()
    return squared_coefficient_of_variation(alpha * importance) + squared_coefficient_of_variation(alpha * load)


class _SumOverRanks(Function):
    """Sum over all processes. The loss made of it is the same on each and so is its gradient: the sum of the gradients,
    which is the gradient of a sum, is a multiple and needs no communication.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * dist.get_world_size()


class _Permute(Function):
    """Reorder rows; the gradient is gathered back, which is cheaper than the scatter-add of plain indexing."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None


def dispatch(tokens: Tensor, assignment: Tensor, experts: Sequence[nn.Module]) -> tuple[Tensor, list[int]]:
    """Run each token through its expert only.

    Args:
        tokens: [T, C]; T may be 0.
        assignment: [T] int64, the number of each token's expert.
        experts: modules from [t, C] to [t, C'] for any t. In training every expert is called, if necessary without
            tokens, so that all parameters have gradients, as distributed training requires.

    Returns:
        The outputs [T, C'] in the order of the tokens, and the number of tokens of each expert.
    """
    counts = torch.bincount(assignment, minlength=len(experts)).tolist()
    busy = [i for i, count in enumerate(counts) if count] or [0]
    if torch.is_grad_enabled() and any(expert.training for expert in experts):
        busy = list(range(len(experts)))
    if len(busy) == 1:
        return experts[busy[0]](tokens), counts
    order = assignment.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    groups = _Permute.apply(tokens, order, inverse).split(counts)
    outputs = torch.cat([experts[i](groups[i]) for i in busy])
    return _Permute.apply(outputs, inverse, order), counts


def run_all(tokens: Tensor, assignment: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Run each token through all experts, and keep the output of its own one.

    This costs more than `dispatch`. But it does not depend on values, so a recording of it is valid for other tokens,
    too.

    Args:
        tokens, assignment, experts: as for `dispatch`.

    Returns:
        [T, C'].
    """
    outputs = torch.stack([expert(tokens) for expert in experts], 1)  # [T, E, C']
    return outputs.gather(1, assignment[:, None, None].expand(-1, 1, outputs.shape[-1])).squeeze(1)


def _router_logits(tokens: Tensor, router: nn.Linear, temperature: float) -> Tensor:  # [T, C] -> [T, E]
    if tokens.shape[-1] != router.in_features:
        raise UserError(f"the mixture takes tokens [..., {router.in_features}], not {list(tokens.shape)}")
    # The choice is discrete: keep it out of reduced precision.
    with torch.autocast(tokens.device.type, enabled=False):
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        bias = None if router.bias is None else router.bias.to(dtype)
        logits = F.linear(tokens.to(dtype), router.weight.to(dtype), bias)
    return logits if temperature == 1 else logits / temperature


def _chosen_probability(logits: Tensor, assignment: Tensor) -> Tensor:  # [T, E], [T] -> [T, 1]
    return logits.softmax(-1).gather(1, assignment.unsqueeze(1))


class MoE(nn.Module):
    """Top-1 mixture of experts over the last dimension of its input.

    Experts have no capacity: each takes all tokens that are sent to it, and none is dropped.

    Args:
        experts: modules from [t, dim] to [t, dim'], all with the same dim'.
        dim: token width.
        names: one name for each expert, for reports.
        gate: "unit" leaves the output of the expert unchanged and gives the router the gradient of ``p / p.detach()``.
            So a pretrained layer that becomes an expert still computes the same. "probability" multiplies the output by
            p, as in the paper, which makes it smaller.
        noise: standard deviation of the Gaussian noise on the router's logits in training; None for 1 / experts, 0 for
            no noise.
        temperature: divides the router's logits. Higher temperatures give more even probabilities and more weight to
            the noise. It may be changed between steps.
        latencies: latencies of the experts, in any unit; None for equal ones, "measure" to time them on the first
            training batch (once for all similar mixtures of a process).

    Shapes: x [*, dim] to [*, dim'].

    After a forward pass, `last_assignment` [*] int64, `last_shares` [E] and `token_counts` (the tokens of each expert
    since `reset_statistics`) can be read. They are not in the state dict. `collect_moe_losses` collects the balance
    loss of each training pass.

    Raises:
        UserError: if there are no experts, or for an unknown gate, wrong numbers of names or latencies, or impossible
            noise, temperature or latencies.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        dim: int,
        *,
        names: Sequence[str] | None = None,
        gate: Gate = "unit",
        noise: float | None = None,
        temperature: float = 1.0,
        latencies: Sequence[float] | Literal["measure"] | None = None,
    ) -> None:
        super().__init__()
        if not experts:
            raise UserError("a mixture needs at least one expert")
        if gate not in GATES:
            raise UserError(f"gate must be one of {', '.join(GATES)}, not {gate!r}")
        noise = 1 / len(experts) if noise is None else noise
        check_router(noise, temperature)
        names = [f"expert{i}" for i in range(len(experts))] if names is None else list(names)
        if len(names) != len(experts):
            raise UserError(f"{len(experts)} experts need as many names, not {len(names)}")
        self.experts = nn.ModuleList(experts)
        self.expert_names = tuple(names)
        self.dim, self.gate, self.noise, self.temperature = dim, gate, float(noise), float(temperature)
        self.router = nn.Linear(dim, len(experts))
        nn.init.zeros_(self.router.bias)
        # Like the first expert, so that a mixture made from a layer lives where the layer lived.
        example = next(experts[0].parameters(), None)
        if example is not None:
            self.router.to(example)
        if isinstance(latencies, str) and latencies != "measure":
            raise UserError(f"latencies must be numbers or 'measure', not {latencies!r}")
        self.latencies: tuple[float, ...] = ()
        self.set_latencies((1.0,) * len(experts) if latencies is None or isinstance(latencies, str) else latencies)
        self.measure_pending = isinstance(latencies, str)
        self._pending_losses: list[Tensor] = []
        self._passed_without_gradients = False
        self.last_assignment: Tensor | None = None
        self.last_shares: Tensor | None = None
        self.token_counts = [0] * len(experts)

    def set_latencies(self, latencies: Sequence[float]) -> None:
        """Set the latencies of the experts for the balance loss, in any unit. They are not measured afterwards.

        Raises:
            UserError: unless there is one positive number for each expert.
        """
        if len(latencies) != len(self.experts):
            raise UserError(f"{len(self.experts)} experts need as many latencies, not {len(latencies)}")
        latency_weights(latencies)  # complains about what cannot be
        self.latencies = tuple(float(latency) for latency in latencies)
        self.measure_pending = False

    def reset_statistics(self) -> None:
        """Forget which tokens went where."""
        self.last_assignment = self.last_shares = None
        self.token_counts = [0] * len(self.experts)

    def take_losses(self, keep: bool = False) -> list[Tensor]:
        """The balance losses of the training passes since the last call: scalars."""
        losses = list(self._pending_losses)
        if not keep:
            self._pending_losses.clear()
        return losses

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [T, E], assignment [T] and, in training with noise, the noisy logits [T, E] that decided."""
        logits = _router_logits(tokens, self.router, self.temperature)
        noisy = logits + torch.randn_like(logits) * self.noise if self.training and self.noise > 0 else None
        return logits, (logits if noisy is None else noisy).argmax(-1), noisy

    def forward(self, x: Tensor) -> Tensor:  # [*, dim] -> [*, dim']
        if isinstance(x, Proxy):
            return one_node(self, x)
        tokens = x.reshape(-1, x.shape[-1])
        # A process without tokens must not leave the others waiting for its share of the sums.
        counts_in_training = self.training and (len(tokens) > 0 or _is_distributed())
        if self.measure_pending and counts_in_training:
            self.set_latencies(_latencies_here(list(self.experts), tokens))
        logits, assignment, noisy = self.route(tokens)
        if is_exported():
            return self._exported(x, tokens, logits, assignment)
        out, counts = dispatch(tokens, assignment, list(self.experts))
        if self.gate == "probability" or (torch.is_grad_enabled() and logits.requires_grad):
            chosen = _chosen_probability(logits, assignment)
            scale = chosen if self.gate == "probability" else chosen / chosen.detach()
            out = out * scale.to(out.dtype)
        repeated = torch._C._current_graph_task_id() != -1  # by activation checkpointing, in the course of backward
        if counts_in_training and torch.is_grad_enabled():
            alpha = logits.new_tensor(latency_weights(self.latencies))
            loss = balance_loss(logits, assignment, alpha, noisy, self.noise)  # a repetition saves the same tensors
            if not repeated:
                self._record(loss)
            elif self._passed_without_gradients:
                warnings.warn(
                    "activation checkpointing loses the mixtures' balance losses: use it with use_reentrant=False",
                    stacklevel=2,
                )
        if not repeated:
            self._passed_without_gradients = counts_in_training and not torch.is_grad_enabled()
            self._count(assignment, counts, x.shape[:-1])
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _exported(self, x: Tensor, tokens: Tensor, logits: Tensor, assignment: Tensor) -> Tensor:
        """What a program for inference has to compute, without losses and statistics."""
        out = run_all(tokens, assignment, list(self.experts))
        if self.gate == "probability":
            out = out * _chosen_probability(logits, assignment).to(out.dtype)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _record(self, loss: Tensor) -> None:
        if len(self._pending_losses) >= _MAX_PENDING_LOSSES:
            warnings.warn(
                "the mixtures' balance losses are not collected: add collect_moe_losses(model) to the training loss",
                stacklevel=3,
            )
            self._pending_losses.pop(0)
        self._pending_losses.append(loss)

    def _count(self, assignment: Tensor, counts: list[int], shape: torch.Size) -> None:
        self.last_assignment = assignment.reshape(shape)
        self.last_shares = torch.tensor(counts, dtype=torch.float32) / max(1, sum(counts))
        self.token_counts = [total + count for total, count in zip(self.token_counts, counts, strict=True)]

    def train(self, mode: bool = True) -> MoE:
        if not mode:
            self._pending_losses.clear()
        return super().train(mode)

    def __getstate__(self) -> dict:
        # Losses are nodes of a graph: they cannot be copied, and a copy has no use for them.
        return {**self.__dict__, "_pending_losses": []}

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, experts={self.expert_names}, gate={self.gate!r}, noise={self.noise:g}, "
            f"temperature={self.temperature:g}"
        )


def check_router(noise: float, temperature: float) -> None:
    """Raise `UserError` for noise or a temperature that is impossible."""
    if not (noise >= 0 and math.isfinite(noise)):
        raise UserError(f"the router's noise must be finite and not negative, got {noise}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"the router's temperature must be positive and finite, got {temperature}")


class _InPlace(WithoutWeight):
    """A mixture in the place of a layer. It has the attributes that the layer had, with the values of its first expert.

    For a linear layer, these are `weight` and `bias`, for reading. For a perceptron, these are its parts (`fc1` and so
    on).
    """

    _read_only = "weight", "bias"
    experts: nn.ModuleList

    def _derived_weight(self) -> Tensor:
        return self._of_linear("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias of the first expert."""
        return self._of_linear("bias")

    @bias.setter
    def bias(self, value: Tensor | None) -> None:
        raise UserError(self._refusal())

    def _of_linear(self, name: str) -> Any:
        if getattr(self, "out_features", None) is None:
            raise AttributeError(name)
        first = self.experts[0]
        like = getattr(first, name)
        if like is None or isinstance(like, Proxy):  # torch.fx reads the parameter
            return like
        return derived_weight(lambda: getattr(first, name), like, tuple(like.shape), like.dtype, self._refusal())

    def _refusal(self) -> str:
        return (
            f"weight and bias of a {type(self).__name__} are read-only: each of its experts has its own, which can be "
            "written; weight.clone() is an ordinary tensor"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            experts = self.__dict__["_modules"].get("experts")
            if not experts or name not in experts[0]._modules:
                raise
            return experts[0]._modules[name]


class FrozenMoE(_InPlace):
    """A mixture for inference: no noise, no loss, no statistics.

    Args:
        mixture: the mixture whose experts and router are taken over, not copied, under the same names. In plain torch,
            the output equals that of `mixture` in evaluation, bit for bit.

    Without gradients, on CPUs and CUDA GPUs, routing and experts run as one op if experts are linear or packed shift
    layers, or perceptrons of two such layers (`FrozenMlp`); see `shiftadd3d.kernels`. The CPU does not wait for the
    GPU.

    Shapes: x [*, dim] to [*, dim'].

    Set `keep_assignment` to be able to read `last_assignment` [*] int64, the expert of each token, after a forward
    pass.
    """

    def __init__(self, mixture: MoE) -> None:
        super().__init__()
        self.experts, self.router, self.expert_names = mixture.experts, mixture.router, mixture.expert_names
        self.gate, self.temperature = mixture.gate, mixture.temperature
        self.in_features, self.out_features = mixture.dim, getattr(mixture, "out_features", None)
        self.keep_assignment = False
        self.last_assignment: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [*, dim] -> [*, dim']
        if isinstance(x, Proxy):
            return one_node(self, x)
        tokens = x.reshape(-1, x.shape[-1])
        logits = _router_logits(tokens, self.router, self.temperature)
        chains = _chains(self.experts) if uses_kernels("moe_mlp", x) and not is_watched(self.experts) else None
        if chains is not None:
            out, assignment = moe_mlp(tokens, logits, *chains, self.gate == "probability")
        else:
            assignment = logits.argmax(-1)
            if is_exported():
                out = run_all(tokens, assignment, list(self.experts))
            else:
                out, _ = dispatch(tokens, assignment, list(self.experts))
            if self.gate == "probability":
                out = out * _chosen_probability(logits, assignment).to(out.dtype)
        if self.keep_assignment:
            self.last_assignment = assignment.reshape(x.shape[:-1])
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def extra_repr(self) -> str:
        return f"experts={self.expert_names}, gate={self.gate!r}"


def _chains(experts: Iterable[nn.Module]) -> tuple[list[Tensor | None], int, int, Activation] | None:
    """What `moe_mlp` has to know of experts: all tensors, how many layers each has, bits of a code, and the activation.

    None if they are not chains of as many linear layers each, with codes of one format.
    """
    tensors: list[Tensor | None] = []
    depths, formats, between = set(), set(), set()
    for expert in experts:
        layers = (expert,)
        if isinstance(expert, FrozenMlp):
            layers = (expert.fc1, expert.fc2)
            between.add(activation_name(expert.act))
        depths.add(len(layers))
        for layer in layers:
            if isinstance(layer, PackedShiftLinear):
                formats.add((layer.bits, layer.terms))
                tensors += [layer.codes, layer.offset, layer.bias]
            elif type(layer) is nn.Linear:
                tensors += [layer.weight, None, layer.bias]
            else:
                return None
    activation = between.pop() if between else "none"
    if len(depths) != 1 or len(formats) > 1 or between or activation is None:
        return None
    bits = formats.pop()[0] if formats else 4
    return tensors, depths.pop(), bits, activation


class MoELinear(_InPlace, MoE):
    """A linear layer as a mixture of a multiplying and a shifting one.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: add a float bias.
        shift: arguments for `ShiftLinear` (bits, mode, terms, stochastic).
        moe: arguments for `MoE` (gate, noise, temperature, latencies).

    Shapes: x [*, in_features], y [*, out_features].
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, shift: dict | None = None, **moe
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias=bias)
        self._build(linear, shift, moe)

    def _build(self, linear: nn.Linear, shift: dict | None, moe: dict, name: str | None = None) -> None:
        twin = ShiftLinear.from_linear(linear, name=name, **(shift or {}))
        super().__init__([linear, twin], linear.in_features, names=("mult", "shift"), **moe)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, shift: dict | None = None, name: str | None = None, **moe) -> MoELinear:
        """A mixture of `linear` itself and its shift twin.

        Raises:
            UserError: if the weights hold NaN or infinity.
        """
        layer = cls.__new__(cls)
        layer._build(linear, shift, moe, name)
        return layer


class MoEMlp(_InPlace, MoE):
    """A two-layer perceptron as a mixture of a multiplying and a shifting one.

    Args:
        dim: token width in and out.
        hidden_dim: width between the two layers.
        shift: arguments for `ShiftLinear` (bits, mode, terms, stochastic).
        moe: arguments for `MoE` (gate, noise, temperature, latencies).

    Shapes: [*, dim] to [*, dim].
    """

    def __init__(self, dim: int, hidden_dim: int, *, shift: dict | None = None, **moe) -> None:
        mlp = _Mlp(dim, hidden_dim)
        self._build(mlp, dim, shift, moe)

    def _build(self, mlp: nn.Module, dim: int, shift: dict | None, moe: dict, name: str | None = None) -> None:
        super().__init__([mlp, shift_twin(mlp, name=name, **(shift or {}))], dim, names=("mult", "shift"), **moe)
        self.training = mlp.training

    @classmethod
    def from_mlp(
        cls, mlp: nn.Module, *, dim: int | None = None, shift: dict | None = None, name: str | None = None, **moe
    ) -> MoEMlp:
        """A mixture of `mlp` itself and a copy of it whose linear layers are shift layers.

        Args:
            mlp: a module from [t, dim] to [t, dim'] that treats tokens one by one.
            dim: token width; None for the inputs of its first linear layer.

        Raises:
            UserError: if it has no linear layer, or weights hold NaN or infinity.
        """
        if dim is None:
            dim = next((module.in_features for module in mlp.modules() if type(module) is nn.Linear), None)
            if dim is None:
                raise UserError(f"{name or type(mlp).__name__} has no linear layer to make a shift expert of")
        layer = cls.__new__(cls)
        layer._build(mlp, dim, shift, moe, name)
        return layer


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [*, dim] -> [*, dim]
        return self.fc2(self.act(self.fc1(x)))


register_frozen(_Mlp, FrozenMlp)


def shift_twin(module: nn.Module, *, name: str | None = None, **shift) -> nn.Module:
    """A deep copy of `module` whose `nn.Linear` layers are `ShiftLinear` layers with the same weights.

    Args:
        name: qualified name of the module, for errors.
        shift: arguments for `ShiftLinear.from_linear`.
    """
    twin = copy.deepcopy(module)
    for parent_name, parent in list(twin.named_modules()):
        for child_name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                qualified = ".".join(part for part in (name, parent_name, child_name) if part)
                setattr(parent, child_name, ShiftLinear.from_linear(child, name=qualified, **shift))
    return twin


def collect_moe_losses(model: nn.Module, reduction: Literal["mean", "sum"] = "mean", reset: bool = True) -> Tensor:
    """The load-balancing losses of all mixtures in `model`, from its training passes since the last call.

    Args:
        model: any module.
        reduction: "mean" or "sum" over layers and passes.
        reset: forget the losses afterwards, as a training step should.

    Returns:
        A scalar. Add it to the training loss with a small factor (the paper uses 0.01). It is zero if nothing was
        recorded: no mixture, no training pass, or no gradients.

    Raises:
        UserError: for an unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise UserError(f"reduction must be mean or sum, not {reduction!r}")
    losses = [
        loss for module in model.modules() if isinstance(module, MoE) for loss in module.take_losses(keep=not reset)
    ]
    if not losses:
        example = next(model.parameters(), None)
        return torch.zeros((), device=None if example is None else example.device)
    stacked = torch.stack([loss.to(losses[0]) for loss in losses])
    return stacked.mean() if reduction == "mean" else stacked.sum()


def reset_router_statistics(model: nn.Module) -> None:
    """Forget the routing statistics of every mixture in `model`."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.reset_statistics()


def router_statistics(model: nn.Module) -> dict[str, dict]:
    """What the routers of `model` did since `reset_router_statistics`, by qualified name.

    Each entry has `experts` (names), `tokens` (number of tokens of each expert), `shares` (the same as fractions),
    `last_shares` (of the last forward pass only) and `latencies` (for the balance loss). The expert of each single
    token is in the layer's `last_assignment`.
    """
    statistics = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            total = sum(module.token_counts)
            statistics[name] = {
                "experts": list(module.expert_names),
                "tokens": list(module.token_counts),
                "shares": [count / total if total else 0.0 for count in module.token_counts],
                "last_shares": [] if module.last_shares is None else module.last_shares.tolist(),
                "latencies": list(module.latencies),
            }
    return statistics
