"""Make additive attention follow the softmax that a model was trained with: fit its hash functions, its contrast, or
all of its weights.

Source: Liu et al., EcoFormer (NeurIPS 2022), section 4, for hash functions. The fit itself is `HashBinarizer.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d._progress import passing_bar
from shiftadd3d._report import RichReport
from shiftadd3d.nn.activations import Forward, as_batches, call_model, evaluating, trace_inputs
from shiftadd3d.nn.add import AddAttention, broadcastable_mask, flat_attention
from shiftadd3d.nn.binarize import HashBinarizer

if TYPE_CHECKING:
    from rich.console import Group

# What is kept of the queries and keys that a layer sees: further ones make the codes follow by less than 0.01 better.
_QUERIES = 32  # of a sequence
_KEYS = 256  # of a sequence
_PAIRS = 2**16  # of queries and keys, for each head
# Where the softmax is flat, or hardly related to the codes, least squares would take a head's queries away altogether,
# or blow up what few tokens happen to have in common.
_CONTRAST = (0.25, 64.0)


@dataclass(frozen=True)
class FittedBinarizer:
    """The hash functions of one attention layer.

    `before` and `after` say how closely codes follow the softmax (see `Binarizer.agreement`); 1 is perfect.
    """

    name: str
    code_dim: int
    before: float
    after: float


@dataclass(frozen=True)
class BinarizerReport(RichReport):
    """What `fit_binarizers_` did. Printing shows a table."""

    layers: tuple[FittedBinarizer, ...]
    unreached: tuple[str, ...]
    """Layers that no batch reached. They are unchanged."""

    def __rich__(self) -> Group:
        rows = [(one.name, str(one.code_dim), f"{one.before:.3f}", f"{one.after:.3f}") for one in self.layers]
        return _fitted("hash functions", ("bits of a code", "agreement before", "after"), rows, self.unreached)


@dataclass(frozen=True)
class FittedContrast:
    """The contrast of one attention layer, before and after, as the geometric mean over its heads.

    Errors are the root mean square distance of outputs from those of the softmax, divided by the distance of the latter
    from the mean of the values.
    """

    name: str
    before: float
    after: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class ContrastReport(RichReport):
    """What `fit_contrast_` did. Printing shows a table."""

    layers: tuple[FittedContrast, ...]
    unreached: tuple[str, ...]
    """Layers that no batch reached. They are unchanged."""

    def __rich__(self) -> Group:
        rows = [
            (one.name, f"{one.before:.1f}", f"{one.after:.1f}", f"{one.error_before:.1%}", f"{one.error_after:.1%}")
            for one in self.layers
        ]
        return _fitted("contrast", ("contrast before", "after", "error before", "after"), rows, self.unreached)


@dataclass(frozen=True)
class FittedAttention:
    """One attention layer.

    Errors are the root mean square distance of outputs from those of the softmax, divided by the distance of the latter
    from their mean.
    """

    name: str
    error_before: float
    error_after: float


@dataclass(frozen=True)
class AttentionReport(RichReport):
    """What `fit_attention_` did. Printing shows a table."""

    layers: tuple[FittedAttention, ...]
    unreached: tuple[str, ...]
    """Layers that no batch reached. They are unchanged."""

    def __rich__(self) -> Group:
        rows = [(one.name, f"{one.error_before:.1%}", f"{one.error_after:.1%}") for one in self.layers]
        return _fitted("all weights", ("error before", "after"), rows, self.unreached)


def _fitted(what: str, facts: Sequence[str], rows: Sequence[Sequence[str]], unreached: Sequence[str]) -> Group:
    """A table of `what` was fitted: the name of each layer, and some facts about it."""
    from rich.console import Group
    from rich.table import Table

    table = Table("attention", *facts, title=f"{what} of {len(rows)} attention layers fitted", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return Group(table, *(f"never reached, left as they are: {name}" for name in unreached))


def fit_binarizers_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    attention: Literal["softmax", "add"] = "softmax",
    verbose: bool = True,
) -> BinarizerReport:
    """Fit the hash functions of all additive attention in `model` to the queries and keys of a few batches, in place.

    Use it for a model that comes from `reparameterize_` with ``binarizer="hash"``, before it is fine-tuned. The model
    runs once, in evaluation mode and without gradients. Afterwards its modules are in their earlier modes again. A
    random share of the queries and keys is kept. Masks are ignored.

    Args:
        model: any module with `AddAttention` in it.
        batches: example inputs, in all a few dozen images or a few thousand rays. Each is a tensor (the model's only
            argument), a tuple or list (its arguments) or a mapping (its keyword arguments).
        forward: called with (model, batch) to run the model instead, for labelled batches or other calls.
        attention: what the layers compute while the model runs. "softmax": as before they were made additive, so that
            each layer sees the inputs that it was trained for. "add": as now, for a model that has been fine-tuned
            since.
        verbose: show progress, and print the report.

    Returns:
        The report.

    Raises:
        UserError: if there are no batches or no hash functions, the model cannot be called with the batches, or its
            queries or keys are not finite. The model is unchanged then.
    """
    if attention not in ("softmax", "add"):
        raise UserError(f"attention must be softmax or add, not {attention!r}")
    batches = as_batches(batches)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AddAttention) and isinstance(module.q_code, HashBinarizer)
    }
    if not layers:
        raise UserError("the model has no hash functions to fit; reparameterize it with binarizer='hash'")
    samples: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if not bool(torch.isfinite(q).all() and torch.isfinite(k).all()):
            raise UserError(f"the queries or keys of {name} are not all finite")
        samples[name].append(_sample(q, k, _PAIRS // len(batches)))
        if attention == "add":
            return AddAttention.attend(layers[name], q, k, v, *args, **kwargs)
        return _softmax_attention(q, k, v, *args, **kwargs)

    with passing_bar(verbose) as progress, evaluating(model):
        task = progress.add_task("looking at queries and keys", total=len(batches) + len(layers))
        with _attending(layers, attend):
            for batch in batches:
                call_model(model, batch, forward)
                progress.advance(task)
        fitted = []
        for name, layer in layers.items():
            progress.update(task, description=f"fitting {name}")
            if samples[name]:
                fitted.append(_fit(name, layer, *_joined(samples.pop(name))))
            progress.advance(task)
    reached = {layer.name for layer in fitted}
    report = BinarizerReport(tuple(fitted), tuple(name for name in layers if name not in reached))
    if verbose:
        report.show()
    return report


def _fit(name: str, layer: AddAttention, q: Tensor, k: Tensor) -> FittedBinarizer:
    assert isinstance(layer.q_code, HashBinarizer) and isinstance(layer.k_code, HashBinarizer | None)
    before = layer.q_code.agreement(q, k, layer.k_code)
    layer.q_code.fit(q, k, layer.k_code)
    return FittedBinarizer(name, layer.q_code.code_dim, before, layer.q_code.agreement(q, k, layer.k_code))


def fit_contrast_(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None, verbose: bool = True
) -> ContrastReport:
    """Fit the contrast of all additive attention in `model` to the softmax that it replaced, in place.

    Each head gets the factor that brings its outputs closest to those of the softmax (least squares), for the inputs
    that the layer saw before it was made additive. Use it for a model that is not fine-tuned afterwards. Training has
    had better results from a larger contrast (`Recipe.contrast`). Fit hash functions first, if there are any.

    Args:
        model: any module with `AddAttention` in it.
        batches, forward: as for `fit_binarizers_`.
        verbose: show progress, and print the report.

    Returns:
        The report.

    Raises:
        UserError: if there are no batches or no contrast, the model cannot be called with the batches, or the inputs of
            its attention are not finite. The model is unchanged then.
    """
    batches = as_batches(batches)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AddAttention) and module.log_contrast is not None
    }
    if not layers:
        raise UserError("the model's attention has no contrast to fit; reparameterize it with one that is not 1")
    # [4, H]: of additive and softmax, additive and itself, softmax and itself; and the square of what rounds off
    products: dict[str, Tensor] = {}

    def attend(
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        softmax, weights = _softmax_attention(q, k, v, mask, bias, return_weights)
        out, _ = AddAttention.attend(layers[name], q, k, v, mask, bias)
        flat = flat_attention(v, broadcastable_mask(mask), bias)
        add, target = ((x - flat).double().transpose(0, 1).flatten(1) for x in (out, softmax))
        rounded = (out.double() * torch.finfo(out.dtype).eps).square().transpose(0, 1).flatten(1)
        found = torch.stack([(add * target).sum(1), add.square().sum(1), target.square().sum(1), rounded.sum(1)])
        if not bool(torch.isfinite(found).all()):
            raise UserError(f"what {name} sees is not all finite")
        products[name] = products.get(name, 0) + found
        return softmax, weights

    with passing_bar(verbose) as progress, evaluating(model), _attending(layers, attend):
        task = progress.add_task("looking at attention", total=len(batches))
        for batch in batches:
            call_model(model, batch, forward)
            progress.advance(task)
    fitted = tuple(_fit_contrast(name, layer, products[name]) for name, layer in layers.items() if name in products)
    report = ContrastReport(fitted, tuple(name for name in layers if name not in products))
    if verbose:
        report.show()
    return report


@torch.no_grad()
def _fit_contrast(name: str, layer: AddAttention, products: Tensor) -> FittedContrast:
    assert layer.log_contrast is not None
    before = layer.log_contrast.detach().double().exp()
    both, add, softmax, rounded = products
    # A head that sees one key only, or values that are all alike, is not moved: nothing that it does depends on its
    # contrast, which multiplies what a handful of roundings leave.
    add, softmax = (
        torch.where(squares > (4 * scale).square() * rounded, squares, 0.0)
        for squares, scale in ((add, 1 + before), (softmax, torch.ones_like(before)))
    )
    both = torch.where(add > 0, both, 0.0)
    after = torch.where(add > 0, before * both / add.clamp(min=1e-300), before).clamp(*_CONTRAST)
    layer.log_contrast.copy_(after.log())

    def error(factor: Tensor) -> float:
        squares = softmax - 2 * factor * both + factor.square() * add
        return float((squares.sum() / softmax.sum().clamp(min=1e-300)).clamp(min=0).sqrt())

    def mean(contrast: Tensor) -> float:
        return float(contrast.log().mean().exp())

    return FittedContrast(name, mean(before), mean(after), error(torch.ones_like(before)), error(after / before))


def fit_attention_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 600,
    rate: float = 2e-3,
    forward: Forward | None = None,
    verbose: bool = True,
) -> AttentionReport:
    """Train each additive attention in `model`, by itself, to put out what the softmax that it replaced would put out.

    Layers are taken in the order in which the model runs them. Each sees the outputs of the layers before it after they
    have been fitted. Its target is softmax attention of these inputs with the layer's earlier weights. All of its
    weights are trained, through the signs as in training, with one batch a step. The whole model runs without
    gradients, in evaluation mode, once for each layer. Use it for a model that comes from `reparameterize_` and is not
    fine-tuned afterwards.

    Args:
        model: any module with `AddAttention` in it.
        batches, forward: as for `fit_binarizers_`.
        steps: number of steps of Adam, for each layer.
        rate: learning rate of the first step. It falls to zero.
        verbose: show progress, and print the report.

    Returns:
        The report. No layer's error is larger than before: if training made weights worse, they are reset.

    Raises:
        UserError: if there are no batches or no additive attention, the model cannot be called with the batches, the
            inputs of its attention are not finite, or `steps` or `rate` is not positive.
    """
    if steps < 1 or not 0.0 < rate < float("inf"):
        raise UserError(f"steps {steps}, rate {rate:g}: expected at least one step and a positive rate")
    batches = as_batches(batches)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AddAttention)}
    if not layers:
        raise UserError("the model has no additive attention to fit; reparameterize it with recipe 'add'")

    from rich.progress import Progress

    with Progress(transient=True, disable=not verbose) as progress, evaluating(model):
        task = progress.add_task("looking at inputs", total=steps * len(layers))
        order = [name for group in trace_inputs(model, layers, batches, forward).groups for name in group]
        fitted = []
        for name in order:
            progress.update(task, description=f"fitting {name}")
            calls = _calls(model, layers[name], batches, forward)
            fitted.append(_fit_attention(name, layers[name], calls, steps, rate, lambda: progress.advance(task)))
    report = AttentionReport(tuple(fitted), tuple(name for name in layers if name not in order))
    if verbose:
        from rich.console import Console

        Console().print(report)
    return report


def _calls(
    model: nn.Module, layer: AddAttention, batches: Sequence[Any], forward: Forward | None
) -> list[tuple[tuple, dict]]:
    """The arguments of all calls of a layer."""
    calls: list[tuple[tuple, dict]] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        for batch in batches:
            call_model(model, batch, forward)
    finally:
        handle.remove()
    return calls


def _fit_attention(
    name: str,
    layer: AddAttention,
    calls: Sequence[tuple[tuple, dict]],
    steps: int,
    rate: float,
    advance: Callable[[], None],
) -> FittedAttention:
    def outputs(index: int) -> Tensor:
        args, kwargs = calls[index]
        out = layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    convolution, layer.dwconv = layer.dwconv, None
    try:
        with _attending({name: layer}, lambda _, *args, **kwargs: _softmax_attention(*args, **kwargs)):
            targets = [outputs(index) for index in range(len(calls))]
    finally:
        layer.dwconv = convolution
    tokens = torch.cat([target.flatten(0, -2) for target in targets]).double()
    scale = float((tokens - tokens.mean(0)).square().sum())

    def error() -> float:
        squares = sum(float((outputs(i) - target).double().square().sum()) for i, target in enumerate(targets))
        return (squares / scale) ** 0.5 if scale > 0 else 0.0

    parameters = [parameter for parameter in layer.parameters() if parameter.is_floating_point()]
    before = [(parameter.requires_grad, parameter.grad, parameter.detach().clone()) for parameter in parameters]
    error_before = error()
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            index = int(torch.randint(len(calls), ()))
            optimizer.zero_grad()
            F.mse_loss(outputs(index), targets[index]).backward()
            optimizer.step()
            schedule.step()
            advance()
    error_after = error()
    for parameter, (requires_grad, grad, value) in zip(parameters, before, strict=True):
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad
        if not error_after < error_before:
            parameter.copy_(value)
    return FittedAttention(name, error_before, min(error_before, error_after))


@contextmanager
def _attending(
    layers: Mapping[str, AddAttention], attend: Callable[..., tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    """Inside this context, ``attend(name, q, k, v, ...)`` replaces `AddAttention.attend` in `layers`."""
    for name, layer in layers.items():
        vars(layer)["attend"] = partial(attend, name)
    try:
        yield
    finally:
        for layer in layers.values():
            del vars(layer)["attend"]


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`AddAttention.attend` with the map that it stands for."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    mask = broadcastable_mask(mask)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # queries without keys: as in `linear_add_attention`
    return weights @ v, weights[:, :, 0].mean(1) if return_weights else None


def _sample(q: Tensor, k: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """At random, as many queries, keys and sequences as are kept."""
    q = q[:, :, torch.randperm(q.shape[2], device=q.device)[:_QUERIES]]
    k = k[:, :, torch.randperm(k.shape[2], device=k.device)[:_KEYS]]
    sequences = torch.randperm(len(q), device=q.device)[: max(1, pairs // (q.shape[2] * k.shape[2]))]
    return q[sequences], k[sequences]


def _joined(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All sequences, at the length of the shortest."""
    queries, keys = zip(*samples, strict=True)
    q_length, k_length = (min(tokens.shape[2] for tokens in side) for side in (queries, keys))
    return torch.cat([q[:, :, :q_length] for q in queries]), torch.cat([k[:, :, :k_length] for k in keys])
