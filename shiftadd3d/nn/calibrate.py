"""Post-training conversion: power-of-two weights that preserve the outputs of a layer, not only its weights.

Rounding to the nearest value minimises the error of each weight alone. `calibrate_` uses the inputs of the layer on a
few batches. It rounds one input column after the other, and the columns not yet rounded make up for the error so far
(GPTQ). Then it goes over all columns again and changes every code that is no longer the best one, given the rounding of
the others (coordinate descent). It searches a window of exponents for each output channel. The mean of the remaining
error goes into the bias.

Layers are taken in the order in which the model runs them. Each sees the outputs of the layers before it after they
have been rounded.

Source: Frantar et al., GPTQ (ICLR 2023), with the columns ordered by activation; Behdin et al., QuantEase (2023), for
the coordinate descent; Nagel et al., Data-Free Quantization (ICCV 2019), section 4.2, for the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d._progress import passing_bar
from shiftadd3d._report import RichReport
from shiftadd3d.nn import power_of_two
from shiftadd3d.nn.activations import (
    Forward,
    InputStatistics,
    as_batches,
    call_model,
    evaluating,
    gather_statistics,
    trace_inputs,
    watching,
)
from shiftadd3d.nn.add import AddAttention
from shiftadd3d.nn.attachments import keep_attributes
from shiftadd3d.nn.binarize import HashBinarizer
from shiftadd3d.nn.fit import (
    FittedAttention,
    FittedBinarizer,
    FittedContrast,
    fit_attention_,
    fit_binarizers_,
    fit_contrast_,
)
from shiftadd3d.nn.moe import MoE
from shiftadd3d.nn.reparam import Recipe, ReparameterizationReport, reparameterize_
from shiftadd3d.nn.shift import ShiftConv2d, ShiftLayer, ShiftLinear

if TYPE_CHECKING:
    from rich.console import Group

# Added to the diagonal of the second moments, as a share of its mean, so that inputs which the batches never told apart
# are not played off against each other (GPTQ's value).
_DAMPING = 0.01
_BLOCK = 64  # columns between two updates of all others
_ROUNDED_AT_ONCE = 8192  # rows times windows
_SWEEPS = 2  # of coordinate descent; further ones take off less than 2 % of the error

# Windows to try, by their tops: the first one's above the power of two nearest to the channel's largest weight, the
# second one's above the first one's. Making up for errors lets weights grow, and short windows gain by cutting the
# largest weights off.
_FIRST_WINDOWS = (1, 0, -1, -2)
_SECOND_WINDOWS = (-1, -2, -3)

_ROUTER_TOKENS = 4096


@dataclass(frozen=True)
class CalibratedLayer:
    """One shift layer and its errors.

    An error is the root mean square of the change of the output, divided by that of the float output, on the inputs
    that the layer saw. If the layer has a bias, which corrects the mean, the mean is subtracted first.
    """

    name: str
    bits: int
    terms: int
    inputs: int
    """Number of input vectors that the layer was calibrated with."""
    nearest_error: float
    """Error of nearest rounding."""
    error: float
    """Error of its present weights."""


@dataclass(frozen=True)
class FittedRouter:
    """The router of one mixture, fitted to send the tokens with the largest error of the shift expert to the
    multiplying expert.

    It is a linear function of one token, so it can only tell tokens apart that way. Training makes it better.
    """

    name: str
    mult_share: float
    """Share of the tokens that go to the multiplying expert."""
    caught_error: float
    """Share of the shift expert's squared error that these tokens have, and that therefore disappears."""


@dataclass(frozen=True)
class CalibrationReport(RichReport):
    """What `calibrate_` did. Printing shows tables."""

    reparameterization: ReparameterizationReport
    layers: tuple[CalibratedLayer, ...]
    binarizers: tuple[FittedBinarizer, ...]
    contrasts: tuple[FittedContrast, ...]
    attentions: tuple[FittedAttention, ...]
    routers: tuple[FittedRouter, ...]
    unreached: tuple[str, ...]
    """Shift layers that no batch reached. They are rounded to the nearest powers of two."""
    untuned: tuple[str, ...]
    """Parts whose loss only fine-tuning can repair, and why."""

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        name = self.reparameterization.recipe.name
        table = Table("module", "bits", "inputs", "nearest", "calibrated", title_justify="left")
        table.title = f"recipe {name}: relative output error of {len(self.layers)} shift layers"
        for column in table.columns[1:]:
            column.justify = "right"
        for layer in self.layers:
            bits = f"{layer.terms} x {layer.bits}" if layer.terms > 1 else str(layer.bits)
            table.add_row(layer.name, bits, f"{layer.inputs:,}", f"{layer.nearest_error:.2%}", f"{layer.error:.2%}")
        lines = [
            f"codes of {fitted.name}: agreement with the softmax {fitted.before:.3f} before, {fitted.after:.3f} now"
            for fitted in self.binarizers
        ]
        lines += [
            f"contrast of {fitted.name}: {fitted.before:.1f} before, {fitted.after:.1f} now; its heads' outputs are "
            f"{fitted.error_before:.0%} off before, {fitted.error_after:.0%} now"
            for fitted in self.contrasts
        ]
        lines += [
            f"outputs of {fitted.name}: {fitted.error_before:.0%} off the softmax's before, "
            f"{fitted.error_after:.0%} now"
            for fitted in self.attentions
        ]
        lines += [
            f"router of {router.name}: {router.mult_share:.0%} of the tokens to mult, which takes off "
            f"{router.caught_error:.0%} of the shift expert's squared error"
            for router in self.routers
        ]
        lines += [f"never reached, rounded to the nearest: {name}" for name in self.unreached]
        lines += [f"needs fine-tuning: {what}" for what in self.untuned]
        return Group(*([table] if self.layers else [f"recipe {name}: no shift layer was calibrated"]), *lines)


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Recipe | str,
    *,
    forward: Forward | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    sequential: bool = True,
    attention_steps: int = 0,
    verbose: bool = True,
) -> CalibrationReport:
    """Do what `reparameterize_` does, and round the weights so that the outputs of layers change least on `batches`.

    The model runs in evaluation mode, without gradients. Afterwards its modules are in their earlier modes again. Shift
    layers, also those in mixtures, get new codes and, if they have a bias, a corrected bias. Hash functions and
    contrast of additive attention are fitted (see `fit_binarizers_` and `fit_contrast_`). Routers of mixtures are
    fitted to the errors of the shift experts. Layers from an earlier call or from training are not changed.

    Args:
        model: any module, with its float weights.
        batches: example inputs, a few dozen to a few hundred. All are kept in memory. Each batch is a tensor (the
            model's only argument), a tuple or list (its arguments) or a mapping (its keyword arguments).
        recipe: a `Recipe`, or the name of a preset.
        forward: called with (model, batch) to run the model instead, for labelled batches or other calls.
        filter_fn: as in `reparameterize_`.
        sequential: round each layer on the inputs that it gets after all layers before it have been rounded. This takes
            half a pass over the batches for each group of layers with one input. If False, one pass serves all layers,
            which is faster and less accurate.
        attention_steps: training steps for each additive attention before weights are rounded, in which it learns to
            put out what its softmax did (`fit_attention_`). 0 leaves this to fine-tuning.
        verbose: show progress, and print the report.

    Returns:
        The report.

    Raises:
        UserError: if there are no batches, the model cannot be called with them, its layers see NaN or infinity, or the
            recipe does not fit the model (see `reparameterize_`) or has been applied already. The model is unchanged
            then, except if the reparameterized model's layers see NaN or infinity.
    """
    batches = as_batches(batches)
    recipe = Recipe.parse(recipe)
    old = set(model.modules())
    with evaluating(model):
        floats = {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
        trace_inputs(model, floats, batches[:1], forward)
    # Mode "PS" has no float weights to start from: it comes last.
    surgery = reparameterize_(model, replace(recipe, mode="Q"), filter_fn, verbose=False)
    if not surgery.layers and any(isinstance(module, ShiftLayer) for module in old):
        raise UserError(
            f"recipe {recipe.name!r} replaces nothing in this {type(model).__name__}: calibration starts from a model "
            "with float weights, and leaves layers that are shift layers already as they are"
        )
    new = {name: module for name, module in model.named_modules() if module not in old}
    with evaluating(model):
        calibration = calibrate_layers_(
            model,
            new,
            batches,
            forward=forward,
            sequential=sequential,
            attention_steps=attention_steps,
            verbose=verbose,
        )
    if recipe.mode == "PS":
        _train_shift_and_sign(model, {name: module for name, module in new.items() if isinstance(module, ShiftLayer)})
    report = CalibrationReport(
        replace(surgery, recipe=recipe),
        tuple(calibration.layers),
        calibration.binarizers,
        calibration.contrasts,
        calibration.fitted_attentions,
        tuple(calibration.routers),
        tuple(calibration.unreached),
        tuple(_untuned(new, calibration.routers, calibration.fitted_attentions)),
    )
    if verbose:
        report.show()
    return report


def calibrate_layers_(
    model: nn.Module,
    new: Mapping[str, nn.Module],
    batches: Sequence[Any],
    *,
    forward: Forward | None = None,
    sequential: bool = True,
    attention_steps: int = 0,
    verbose: bool = False,
) -> _Calibration:
    """Round the shift layers among the modules `new` of `model` (by qualified name), and fit their routers."""
    calibration = _Calibration(model, new, batches, forward, attention_steps)
    calibration.run(sequential, verbose)
    return calibration


class _Calibration:
    """One run over the new layers of a model, in the order in which it calls them."""

    def __init__(
        self,
        model: nn.Module,
        new: Mapping[str, nn.Module],
        batches: Sequence[Any],
        forward: Forward | None,
        attention_steps: int,
    ) -> None:
        self.model, self.batches, self.forward, self.attention_steps = model, batches, forward, attention_steps
        self.shifts = {name: module for name, module in new.items() if isinstance(module, ShiftLayer)}
        _untie_(model, self.shifts.values())
        self.mixtures = {name: module for name, module in new.items() if isinstance(module, MoE)}
        self.attentions = [module for module in new.values() if isinstance(module, AddAttention)]
        self.layers: list[CalibratedLayer] = []
        self.binarizers: tuple[FittedBinarizer, ...] = ()
        self.contrasts: tuple[FittedContrast, ...] = ()
        self.fitted_attentions: tuple[FittedAttention, ...] = ()
        self.routers: list[FittedRouter] = []
        self.unreached: list[str] = []
        self._rounded: set[Tensor] = set()

    def run(self, sequential: bool, verbose: bool) -> None:
        with passing_bar(verbose) as progress:
            task = progress.add_task("looking at activations", total=None)
            with _float_weights(self.shifts.values()):  # attention follows what the float model attends to
                if any(isinstance(attention.q_code, HashBinarizer) for attention in self.attentions):
                    fitted = fit_binarizers_(self.model, self.batches, forward=self.forward, verbose=False)
                    self.binarizers = fitted.layers
                if any(attention.log_contrast is not None for attention in self.attentions):
                    self.contrasts = fit_contrast_(self.model, self.batches, forward=self.forward, verbose=False).layers
                if self.attention_steps and self.attentions:
                    fitted = fit_attention_(
                        self.model, self.batches, steps=self.attention_steps, forward=self.forward, verbose=False
                    )
                    self.fitted_attentions = fitted.layers
            trace = trace_inputs(self.model, self.shifts, self.batches, self.forward)
            progress.update(task, description="rounding", total=sum(len(group) for group in trace.groups))
            reached = {name for group in trace.groups for name in group}
            self.unreached = [name for name in self.shifts if name not in reached]
            for stage in [[group] for group in trace.groups] if sequential else [trace.groups]:
                leaders = {group[0]: self.shifts[group[0]] for group in stage}
                statistics = gather_statistics(self.model, leaders, self.batches, trace, self.forward)
                for group in stage:
                    for name in group:
                        progress.update(task, description=f"rounding {name}")
                        self._round(name, statistics[group[0]])
                        progress.advance(task)
                self._fit_routers(reached)

    def _round(self, name: str, statistics: InputStatistics) -> None:
        layer = self.shifts[name]
        # Two layers with one weight: it holds what the first one was given.
        if layer.weight not in self._rounded:
            self._rounded.add(layer.weight)
            self.layers.append(round_layer_(layer, statistics, name))

    def _fit_routers(self, reached: set[str]) -> None:
        """Fit the routers whose shift experts are done."""
        for name, mixture in list(self.mixtures.items()):
            inner = [module for module in mixture.experts.modules() if isinstance(module, ShiftLayer)]
            if inner and all(module.weight in self._rounded for module in inner):
                del self.mixtures[name]
                self.routers.append(_fit_router_(name, mixture, self._tokens(name, mixture)))

    def _tokens(self, name: str, mixture: MoE) -> Tensor:
        """A sample of the tokens that reach a mixture, [t, dim], evenly spread over each batch."""
        tokens: list[Tensor] = []
        limit = -(-_ROUTER_TOKENS // len(self.batches))

        def see(_: str, inputs: Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            tokens.append(rows[:: -(-len(rows) // limit)])

        with watching(self.model, {name: mixture}, see):
            for batch in self.batches:
                call_model(self.model, batch, self.forward)
        return torch.cat(tokens)


def _untie_(model: nn.Module, layers: Iterable[ShiftLayer]) -> None:
    """Give shift layers weights of their own where others, such as embeddings, compute with the same: rounding writes
    into them. Ties between shift layers stay.
    """
    others = (module for module in model.modules() if not isinstance(module, ShiftLayer))
    elsewhere = {parameter for module in others for parameter in module.parameters(recurse=False)}
    own: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        weight = layer.weight
        if weight in elsewhere:
            if weight not in own:
                own[weight] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            layer.weight = own[weight]


@contextmanager
def _float_weights(layers: Iterable[ShiftLayer]) -> Iterator[None]:
    """Inside this context, shift layers in mode "Q" compute with their float weights."""
    layers = list(layers)

    def floats(layer: ShiftLayer) -> Callable[[], Tensor]:
        return lambda: layer.weight.flatten(1)

    for layer in layers:
        vars(layer)["quantized_weight"] = floats(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["quantized_weight"]


@torch.no_grad()
def round_layer_(layer: ShiftLayer, statistics: InputStatistics, name: str) -> CalibratedLayer:
    """Round the float weight of a shift layer in mode "Q" with the statistics of its inputs, and correct its bias.

    Afterwards `quantize` leaves the weight as it is, except for channels for which nearest rounding is best.
    """
    # A bias can take the mean of the error away, so that only what varies counts.
    moments = statistics.second_moments(centered=layer.bias is not None)
    before = layer.weight.flatten(1).to(torch.float64, copy=True)
    nearest = power_of_two.quantize(layer.weight.flatten(1), layer.bits, layer.terms).double()
    stored = round_with_compensation(layer.weight.flatten(1), moments, layer.bits, layer.terms)
    after = power_of_two.quantize(stored, layer.bits, layer.terms).double()
    layer.weight.copy_(stored.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.add_(((before - after) @ statistics.mean).to(layer.bias.dtype))
    scale = _energy(before, moments)
    uncorrected = _energy(before - nearest, statistics.second_moments(centered=False))
    return CalibratedLayer(
        name,
        layer.bits,
        layer.terms,
        statistics.rows,
        _ratio(uncorrected, scale),
        _ratio(_energy(before - after, moments), scale),
    )


def round_with_compensation(weight: Tensor, moments: Tensor, bits: int, terms: int) -> Tensor:
    """Round a weight to powers of two so that the error of the layer's output is small.

    Args:
        weight: [out, in], any floating dtype.
        moments: second moments H of the inputs [in, in], float64. Rounding the weights w of an output channel to q
            changes the output by ``(w - q)^T H (w - q)`` in the mean square.
        bits, terms: the format.

    Returns:
        [out, in] in the dtype of `weight`, for a layer that computes with `power_of_two.quantize` of it. No row is
        worse than with nearest rounding. `quantize` leaves rows as they are, with one exception: if nearest rounding to
        two terms is best and would round again differently, the row is that of `weight`.
    """
    weight = weight.detach()
    work = weight if weight.dtype == torch.float64 else weight.float()
    # Columns are rounded from the last to the first: the ones with the largest inputs come first, as their errors have
    # the most others to make up for them ("act-order").
    order = moments.diagonal().argsort(stable=True)
    factor, moments = _factorize(moments[order][:, order])
    factor, moments = factor.to(work.dtype), moments.to(work.dtype)
    windows = _windows_to_try(work, bits, terms, weight.dtype)
    nearest = power_of_two.quantize(weight, bits, terms)
    stored = torch.where(_is_kept(nearest, bits, terms), nearest, weight)
    for rows in torch.arange(len(work), device=work.device).split(max(1, _ROUNDED_AT_ONCE // windows.shape[1])):
        wanted = work[rows][:, order].T  # [in, rows]
        least = _errors(wanted - nearest[rows][:, order].T.to(work.dtype), moments)
        tried = windows[:, :, rows]  # [terms, windows, rows]
        count = tried.shape[1]
        rounded = _compensate(wanted.repeat(1, count), factor, tried.flatten(1), bits)
        rounded, errors = _as_stored(rounded, wanted.repeat(1, count), moments, bits, terms, weight.dtype)
        error, chosen = errors.view(count, -1).min(0)
        window = tried.gather(1, chosen.expand(len(tried), 1, -1)).squeeze(1)  # [terms, rows]
        rounded = rounded.view(len(wanted), count, -1).gather(1, chosen.expand(len(wanted), 1, -1)).squeeze(1)
        refined = _descend(wanted, rounded, moments, window, bits)
        refined, refined_error = _as_stored(refined, wanted, moments, bits, terms, weight.dtype)
        rounded = torch.where(refined_error < error, refined, rounded)
        better = torch.minimum(error, refined_error) < least
        result = rounded[order.argsort()].T.to(weight.dtype)
        stored[rows] = torch.where(better.unsqueeze(1), result, stored[rows])
    return stored


def _factorize(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Damped moments H (their scale does not matter), and R with ones on its diagonal and ``H = R^T D R``."""
    if not bool(torch.isfinite(moments).all()):
        raise UserError("the inputs are too large: their second moments are not finite")
    scale = moments.diagonal().abs().mean()
    moments, damping = moments / torch.where(scale > 0, scale, 1), _DAMPING
    while True:
        damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
        if not failed:
            return factor / factor.diagonal().unsqueeze(1), damped
        damping = damping * 10


def _windows_to_try(weight: Tensor, bits: int, terms: int, dtype: torch.dtype) -> Tensor:
    """Tops of windows [terms, windows, out], int32, around the largest weight of each channel of `weight` [out, in]."""
    fraction, exponent = torch.frexp(weight.abs().amax(1))
    nearest = exponent - (fraction < 0.75).to(exponent.dtype)  # fractions are from 1/2 to 1
    tops = [[first] for first in _FIRST_WINDOWS]
    for _ in range(terms - 1):
        tops = [[*top, top[-1] + drop] for top in tops for drop in _SECOND_WINDOWS]
    above = torch.tensor(tops, dtype=exponent.dtype, device=weight.device).T.unsqueeze(-1)
    return (nearest + above).clamp(*power_of_two.offset_range(bits, dtype))


def _compensate(wanted: Tensor, factor: Tensor, window: Tensor, bits: int) -> Tensor:
    """GPTQ as back-substitution. wanted [in, rows]; factor [in, in] of `_factorize`; window [terms, rows].

    With ``H = R^T D R`` the error ``d^T H d`` of a row is ``|D^1/2 R d|^2``: once the columns behind column i are
    rounded, its best value is ``w_i + sum_(j > i) R_ij d_j``. (GPTQ takes the factor of H^-1 and moves all columns at
    once, which comes to the same.)
    """
    rounded, difference, compensation = torch.empty_like(wanted), torch.empty_like(wanted), torch.zeros_like(wanted)
    for end in range(len(wanted), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        for i in reversed(range(start, end)):
            target = wanted[i] + compensation[i] + factor[i, i + 1 : end] @ difference[i + 1 : end]
            rounded[i] = power_of_two.round_to_windows(target.unsqueeze(-1), window, bits).squeeze(-1)
            difference[i] = wanted[i] - rounded[i]
        compensation[:start] += factor[:start, start:end] @ difference[start:end]
    return rounded


def _descend(wanted: Tensor, rounded: Tensor, moments: Tensor, window: Tensor, bits: int) -> Tensor:
    """Coordinate descent: one column at a time takes the best value for what all others are."""
    rounded = rounded.clone()
    difference, diagonal = wanted - rounded, moments.diagonal()
    for _ in range(_SWEEPS):
        for start in range(0, len(wanted), _BLOCK):
            block = moments[start : start + _BLOCK]
            gradient = block @ difference
            for i in range(start, start + len(block)):
                target = rounded[i] + gradient[i - start] / diagonal[i]
                better = power_of_two.round_to_windows(target.unsqueeze(-1), window, bits).squeeze(-1)
                gradient += torch.outer(block[:, i], rounded[i] - better)
                rounded[i] = better
                difference[i] = wanted[i] - better
    return rounded


def _as_stored(
    rounded: Tensor, wanted: Tensor, moments: Tensor, bits: int, terms: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights [in, rows] as `dtype` holds them, and errors [rows]: infinite where `quantize` would change them."""
    rows = rounded.T.contiguous().to(dtype)
    rounded = rows.T.to(wanted.dtype)
    return rounded, _errors(wanted - rounded, moments).masked_fill(~_is_kept(rows, bits, terms)[:, 0], torch.inf)


def _is_kept(weight: Tensor, bits: int, terms: int) -> Tensor:
    """Whether `quantize` leaves a row of weights [out, in] as it is, [out, 1]."""
    return (power_of_two.quantize(weight, bits, terms) == weight).all(1, keepdim=True)


def _errors(difference: Tensor, moments: Tensor) -> Tensor:
    """``d^T H d`` for each column of `difference` [in, rows]."""
    return ((moments @ difference) * difference).sum(0)


def _energy(weight: Tensor, moments: Tensor) -> float:
    """Mean square of the output of weights [out, in], summed over channels."""
    return float(((weight @ moments) * weight).sum())


def _ratio(energy: float, scale: float) -> float:
    return (max(0.0, energy) / scale) ** 0.5 if scale > 0 else 0.0


@torch.no_grad()
def _fit_router_(name: str, mixture: MoE, tokens: Tensor) -> FittedRouter:
    """Make the router tell tokens apart by the shift expert's error, and set its threshold so that the shares are those
    which the balance loss asks for: proportional to the inverse latencies.

    A ridge regression of the logarithm of the error; the difference of the logits has a standard deviation of 1.
    """
    mult, shift = mixture.experts
    error = (mult(tokens) - shift(tokens)).square().sum(-1).double()
    target = (error + error.mean() * 1e-6 + torch.finfo(error.dtype).tiny).log()
    mean = tokens.double().mean(0)
    x = tokens.double() - mean
    covariance = x.T @ x / len(x)
    ridge = covariance + torch.diag((_DAMPING * covariance.diagonal().mean() + 1e-12).expand(len(covariance)))
    slope = torch.linalg.solve(ridge, x.T @ (target - target.mean()) / len(x))
    score = x @ slope
    spread = score.std(correction=0).clamp(min=1e-12)
    inverse = [1 / latency for latency in mixture.latencies]
    threshold = torch.quantile(score, 1 - inverse[0] / sum(inverse))
    weight, bias = slope / spread, -(mean @ slope + threshold) / spread
    router = mixture.router
    router.weight.copy_(torch.stack((weight / 2, -weight / 2)))
    router.bias.copy_(torch.stack((bias / 2, -bias / 2)))
    to_mult = mixture.route(tokens)[1] == 0
    return FittedRouter(
        name, float(to_mult.double().mean()), float(error[to_mult].sum() / error.sum().clamp(min=1e-300))
    )


def _train_shift_and_sign(model: nn.Module, layers: Mapping[str, ShiftLayer]) -> None:
    """Put layers of mode "PS" in the place of those of mode "Q"."""
    for name, layer in layers.items():
        options: dict[str, Any] = {"bits": layer.bits, "mode": "PS", "terms": layer.terms, "name": name}
        if isinstance(layer, ShiftConv2d):
            twin: ShiftLayer = ShiftConv2d.from_conv(layer.to_conv(), **options)
        else:
            assert isinstance(layer, ShiftLinear)
            twin = ShiftLinear.from_linear(layer.to_linear(), **options)
        twin.bias = layer.bias
        keep_attributes(layer, twin, type(layer))
        for parameter in (twin.shift, twin.sign):
            parameter.requires_grad_(layer.weight.requires_grad)
        for parent in list(model.modules()):
            for attribute, child in list(parent._modules.items()):
                if child is layer:
                    setattr(parent, attribute, twin)


def _untuned(
    new: Mapping[str, nn.Module], routers: Sequence[FittedRouter], fitted_attentions: Sequence[FittedAttention]
) -> list[str]:
    fitted = {one.name for one in (*routers, *fitted_attentions)}
    attentions = [
        f"{name}: additive attention in the place of softmax"
        for name, module in new.items()
        if isinstance(module, AddAttention) and name not in fitted
    ]
    unfitted = [
        f"{name}: its router is untrained"
        for name, module in new.items()
        if isinstance(module, MoE) and name not in fitted
    ]
    return attentions + unfitted
