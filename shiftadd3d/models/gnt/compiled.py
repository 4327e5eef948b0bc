"""A frozen GNT as programs: a chunk of rays is one call for the plane sweep, and one for all that comes behind.

Importing this tells `shiftadd3d.compile` of GNTs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from shiftadd3d._errors import UserError
from shiftadd3d.kernels.cpu.forms.panels import AnyForm
from shiftadd3d.kernels.pack.gnt import plane_sweep as pack_plane_sweep
from shiftadd3d.kernels.pack.gnt import position_layer as pack_position_layer
from shiftadd3d.kernels.pack.gnt import ray_block as pack_ray_block
from shiftadd3d.kernels.pack.gnt import view_attention as pack_view_attention
from shiftadd3d.kernels.pack.gnt.gather import pixels_of
from shiftadd3d.kernels.pack.shift import WholeWeights, as_bfloat16, in_int16, panel_form
from shiftadd3d.kernels.reference.activations import Activation
from shiftadd3d.kernels.reference.gnt.view_attention import MAX_VIEWS
from shiftadd3d.kernels.runtime import kernel
from shiftadd3d.kernels.runtime.numerics import Numerics, uses_kernels
from shiftadd3d.kernels.runtime.targets import current
from shiftadd3d.kernels.runtime.threads import follow_torch, in_team
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.gnt import blocks, head, rays
from shiftadd3d.kernels.whole.gnt.perceptrons import Perceptron, perceptron_of, perceptrons, shift_perceptron_of
from shiftadd3d.kernels.whole.gnt.rays import Rays, Shown
from shiftadd3d.kernels.whole.gnt.samples import around, between
from shiftadd3d.kernels.whole.parts import NormWeights
from shiftadd3d.kernels.whole.program import Exactness, Program, Value
from shiftadd3d.models.gnt.frozen import (
    FrozenGNT,
    FrozenImageColorHead,
    FrozenPlaneSweepProposal,
    FrozenPointLookUp,
    FrozenPositionLayer,
    FrozenRayTransformer,
    FrozenViewAttention,
)
from shiftadd3d.models.gnt.model import GNTModel
from shiftadd3d.models.gnt.projection import SourceViews, projection_matrices
from shiftadd3d.models.gnt.proposal import PlaneSweepProposal
from shiftadd3d.models.gnt.transformer import GNT, FeedForward, ViewTransformer
from shiftadd3d.nn import FrozenMlp, FrozenModule, FrozenMoE
from shiftadd3d.nn.attachments import has_hooks
from shiftadd3d.nn.compiled import (
    Compiled,
    Emission,
    Unserved,
    register_compiler,
    register_emitter,
    say_not_compiled,
)
from shiftadd3d.nn.frozen import weights_and_biases, whole_layers
from shiftadd3d.nn.mlp import activation_name

# Of the rays of a call: bytes of what the views show. Few enough for threads to end at about the same time; four times
# as many took as long.
_BYTES_OF_VIEWS = 768 * 1024
# Enough rays for calls to cost little. Nothing of what views show leaves the function of the sweep.
_FEWEST_RAYS, _RAYS_OF_A_SWEEP = 16, 512


def _norm(e: Emission, module: nn.Module) -> NormWeights:
    found = e.norm(module)
    if found is None:
        raise e.refusal(module, "which is not registered")
    return found


def _shift_panels(module: FrozenModule, form: AnyForm, names: Sequence[str]) -> tuple[AnyForm, list[Tensor]]:
    """A module's panels of integers of these names; float32 where it has none."""
    wanted = [f"panel_{form}_{name}" for name in names]
    if form == "float32" or not all(hasattr(module, name) for name in wanted):
        return "float32", []
    return form, [getattr(module, name) for name in wanted]


def _emit_view_transformer(
    e: Emission,
    block: ViewTransformer,
    x: Value,
    *,
    shown: Shown,
    embedding: Value,
    form: AnyForm,
    view_form: AnyForm,
    routed: list[Value],
) -> Value:
    attention = block.attn
    if type(attention) is not FrozenViewAttention:
        raise e.refusal(attention, "which is not registered")
    norm, panels = _norm(e, block.attn_norm), _view_panels(attention)
    names = ("row", "out") if view_form == "bfloat16" or pack_view_attention.merges_key(current()) else ()
    found, shifts = _shift_panels(attention, view_form, names or ("key", "row", "out"))
    if found == "bfloat16" and not pack_view_attention.fits_tiles(panels):
        found, shifts = "float32", []
    x = blocks.view_block(e.program, x, shown, embedding, panels, shifts, found, norm)
    return _feed_forward(e, block.ff, x, _norm(e, block.ff_norm), form, routed)


def _view_panels(attention: FrozenViewAttention) -> pack_view_attention.Panels:
    return pack_view_attention.Panels(*attention.panels()[:8])


register_emitter(ViewTransformer, _emit_view_transformer)


def _emit_ray_transformer(
    e: Emission, block: FrozenRayTransformer, x: Value, *, form: AnyForm, routed: list[Value]
) -> Value:
    panels = pack_ray_block.Panels(*block.panels()[:9])
    names = ("projections", "out", *(("first", "second") if block.has_perceptron else ()))
    found, shifts = _shift_panels(block, form, names)
    norms = [cast(Tensor, block.panel_norms)] if shifts else []
    options = {"heads": block.attn.num_heads, "attention": block.attention, "eps": block.attn_norm.eps}
    x = blocks.rays_block(e.program, x, panels, [*norms, *shifts], found, **options)
    return x if block.has_perceptron else _feed_forward(e, block.ff, x, _norm(e, block.ff_norm), form, routed)


register_emitter(FrozenRayTransformer, _emit_ray_transformer)


def _feed_forward(
    e: Emission, module: nn.Module, x: Value, norm: NormWeights, form: AnyForm, routed: list[Value]
) -> Value:
    """A perceptron or a mixture of such, with norm and residual; notes the values that say where tokens went."""
    experts = list(module.experts) if type(module) is FrozenMoE else [module]
    perceptron = [_perceptron(e, expert, form) for expert in experts]
    activations: set[Activation | None] = {activation_name(cast(FrozenMlp, expert).act) for expert in experts}
    activation: Activation | None = activations.pop()
    if activations or activation is None:
        raise e.refusal(module, "whose experts are not alike")
    if type(module) is not FrozenMoE:
        return perceptrons(e.program, x, norm, perceptron, activation)[0]
    weight, bias = module.router.weight.detach(), module.router.bias.detach()
    router = (weight / module.temperature).contiguous(), (bias / module.temperature).contiguous()
    gated = module.gate == "probability"
    x, assignment = perceptrons(e.program, x, norm, perceptron, activation, router=router, gated=gated)
    routed.append(assignment)
    return x


def _mixtures(net: GNT) -> list[FrozenMoE]:
    """In the order in which tokens meet them."""
    pairs = zip(net.view_crosstrans, net.view_selftrans, strict=True)
    return [block.ff for pair in pairs for block in pair if type(block.ff) is FrozenMoE]


def _perceptron(e: Emission, module: nn.Module, form: AnyForm) -> Perceptron:
    if type(module) not in (FrozenMlp, FeedForward):
        raise e.refusal(module, "which is not registered")
    layers: dict[str, nn.Module] = {name: module.get_submodule(name) for name in ("fc1", "fc2")}
    try:
        weights, biases = weights_and_biases(layers)
    except UserError as error:
        raise e.refusal(module, str(error)) from None
    whole, form = _whole_or_rounded([*layers.values()], weights, form)
    made = None if whole is None else shift_perceptron_of(whole, biases, form)
    return made or perceptron_of(weights, biases, current().lanes)


def _whole(layers: Sequence[nn.Module], weights: Sequence[Tensor], form: AnyForm) -> list[WholeWeights] | None:
    """The layers' weights for panels of a form; None where it would round one."""
    if form == "float32":
        return None
    found = whole_layers(layers)
    return as_bfloat16(weights) if found is None and form == "bfloat16" else found


def _whole_or_rounded(
    layers: Sequence[nn.Module], weights: Sequence[Tensor], form: AnyForm
) -> tuple[list[WholeWeights] | None, AnyForm]:
    """`_whole` and the form. Bytes would round ordinary weights too much: these get integers of 16 bits."""
    whole = _whole(layers, weights, form)
    if whole is None and form == "int8":
        return [in_int16(weight) for weight in weights], "int16"
    return whole, form


def _emit_position_layer(e: Emission, layer: FrozenPositionLayer, x: Value, *, rays: Rays, canonical: bool) -> Value:
    if not current().has_fma:
        raise e.refusal(layer, "whose sines take fused multiply-adds, which this CPU has not")
    panels = pack_position_layer.Panels(*layer.panels())
    return blocks.position(e.program, x, rays, panels, canonical=canonical)


register_emitter(FrozenPositionLayer, _emit_position_layer)


def _emit_identity(e: Emission, layer: nn.Identity, x: Value, **_: Any) -> Value:
    return x


register_emitter(nn.Identity, _emit_identity)


def _network(e: Emission, net: GNT, form: AnyForm, view_form: AnyForm, *, channels: int, canonical: bool) -> None:
    """Inputs and outputs of a program that renders rays with a network, once their samples' depths are known.

    Outputs are rgb [R, 3], weights [R, S], whether any view sees a sample [R, S], and where the mixtures' tokens went.
    """
    if type(net) is not FrozenGNT:
        raise e.refusal(net, "which is not registered")
    color_head, width = net.color_head, net.width
    if color_head is None:
        raise e.refusal(net, "without a colour head")
    if type(color_head) is not FrozenImageColorHead:
        raise e.refusal(color_head, "which is not registered")
    if width % current().lanes:
        raise e.refusal(net, f"of {width} channels, which are no whole vectors")
    of_rays, routed = Rays.inputs(e.program, channels), list[Value]()
    layers, tiles = net.embedding_layers(), _tiles_of(net, form)
    embedding_form, shifts = (form, tiles[0]) if tiles else _integers_of(net, form)
    panels = rays.embedding_panels(*_all(layers), current().lanes, features_first=tiles is not None)
    shown, embedding, x = rays.views(e.program, of_rays, panels, width, embedding_form, shifts)
    for i, (of_views, of_ray) in enumerate(zip(net.view_crosstrans, net.view_selftrans, strict=True)):
        x = e.emit(of_views, x, shown=shown, embedding=embedding, form=form, view_form=view_form, routed=routed)
        if i % 2 == 0:
            x = e.emit(net.q_fcs[i], x, rays=of_rays, canonical=canonical)
        x = e.emit(of_ray, x, form=form, routed=routed)
    gain, shift, eps = _norm(e, net.norm)
    blending = *_all(color_head.blend_layers()), color_head.scales(), current().lanes
    blend = head.blend_panels(*blending, tiles=tiles[1] if tiles else None)
    weight, bias = (color_head.regressed_scale * x for x in (net.rgb_fc.weight, net.rgb_fc.bias))
    tensors = head.behind_norm(blend, weight, bias, gain, shift)
    e.program.output(*head.colors(e.program, x, shown, tensors, color_head.hidden, eps), *routed)


def _tiles_of(net: FrozenGNT, form: AnyForm) -> tuple[list[Tensor], Tensor] | None:
    """Panels of the embedding's layers and of the blend's for matrix tiles: what views show is then packed.

    None where a weight would be rounded, or where something reads what views show that takes no tiles.
    """
    if form != "bfloat16" or not isinstance(net.color_head, FrozenImageColorHead):
        return None
    embedding = [*net.embedding_layers().values()][:2]
    layers = [*embedding, net.color_head.view_fc]
    weights, _ = weights_and_biases({str(number): layer for number, layer in enumerate(layers)})
    whole = [found for pair in zip(layers, weights, strict=True) for found in _whole(pair[:1], pair[1:], form) or ()]
    if len(whole) < len(layers) or not all(map(_takes_tiles, net.view_crosstrans)):
        return None
    of_embedding, of_blend = rays.embedding_shifts(whole[:2], form, current().lanes), head.color_tiles_of(whole[2])
    return None if not of_embedding or of_blend is None else (of_embedding, of_blend)


def _integers_of(net: FrozenGNT, form: AnyForm) -> tuple[AnyForm, list[Tensor]]:
    """The form of the embedding's products without matrix tiles, and its panels."""
    layers = [*net.embedding_layers().values()][:2]
    weights, _ = weights_and_biases({str(number): layer for number, layer in enumerate(layers)})
    whole, found = _whole_or_rounded(layers, weights, form)
    if whole is None or found in ("float32", "bfloat16"):
        return "float32", []
    shifts = rays.embedding_shifts(whole, found, current().lanes)
    return (found, shifts) if shifts else ("float32", [])


def _takes_tiles(block: nn.Module) -> bool:
    """Whether the attention of a view transformer takes matrix tiles."""
    attention = block.attn
    if type(attention) is not FrozenViewAttention or not hasattr(attention, "panel_bfloat16_out"):
        return False
    return pack_view_attention.fits_tiles(_view_panels(attention))


def _all(layers: dict[str, nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of layers that have both."""
    weights, biases = weights_and_biases(layers)
    return weights, [bias for bias in biases if bias is not None]


def _sweep(e: Emission, proposal: PlaneSweepProposal) -> None:
    """Inputs and outputs of a program for the plane sweep: rgb [R, 3], weights [R, S], and whether points are seen."""
    if type(proposal) is not FrozenPlaneSweepProposal:
        raise e.refusal(proposal, "which is not registered")
    panels = pack_plane_sweep.Panels(*proposal.panels())
    compared = pack_plane_sweep.channels_compared(panels)
    e.program.output(*rays.sweep(e.program, Rays.inputs(e.program, compared), panels, proposal.hidden))


def programs_of(model: GNTModel, exactness: Exactness) -> dict[str, Program]:
    """The programs of a frozen GNT.

    They are ``"sweep"``, ``"around"`` and ``"between"`` if it has a proposal, ``"coarse"``, and ``"fine"`` of two
    networks.

    Raises:
        Unserved: something in it is not registered, or someone watches it.
    """
    forms: tuple[AnyForm, AnyForm] = "float32", "float32"
    if exactness != "safe":
        of_views = pack_view_attention.shift_form(current(), exactness)
        forms = panel_form(current(), exactness) or "float32", of_views or "float32"
    channels, canonical = model.config.feature_dim, model.config.canonical
    programs: dict[str, Program] = {}

    def emit(name: str, part: nn.Module, emitter: Callable[..., None], **options: Any) -> None:
        emission = Emission(model)
        emission.check_unwatched(part)
        with torch.no_grad():
            emitter(emission, part, **options)
        programs[name] = emission.program

    if type(model.look_up) is not FrozenPointLookUp:
        raise Emission(model).refusal(model.look_up, "which is not registered")
    if model.proposal is not None:
        emit("sweep", model.proposal, _sweep)
        programs |= {"around": around(), "between": between()}
    for name, net in (("coarse", model.net_coarse), ("fine", model.net_fine)):
        if net is not None:
            emit(name, net, _network, form=forms[0], view_form=forms[1], channels=channels, canonical=canonical)
    return programs


class CompiledGNT(Compiled, GNTModel):
    """A frozen GNT, compiled: the plane sweep is one call of an executable, and everything after it is another.

    It is for inference only, and has the parts of the frozen model. The frozen model encodes the source views. Weights
    and numerics are those of the time when it was compiled. Attributes are those of `Compiled`.
    """

    model: GNTModel

    def __init__(self, model: GNTModel, numerics: Numerics, background: bool = False) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(model))
        self.__dict__["model"] = model  # not as a part of this model, because they have the same parts
        self._begin(numerics, None, background)
        self._programs: dict[Exactness, dict[str, Program]] = {}
        self._of_views: dict[str, tuple[list[Tensor | None], Tensor]] = {}
        self._found_in: dict[int, list[nn.Module]] = {}  # modules of a part, by its id

    def _ready(self, exactness: Exactness) -> bool:
        if exactness not in self._executables and self.reason is None:
            try:
                if exactness not in self._programs:
                    self._programs[exactness] = programs_of(self.model, exactness)
                found = self._supply.executable(self._programs[exactness], exactness)
            except (Unserved, *kernel.FAILURES) as error:
                self.reason = str(error) if isinstance(error, Unserved) else kernel.first_line(error)
                say_not_compiled(self.reason)
                return False
            if found is not None:
                self._executables[exactness] = _Executables(found, self._programs.pop(exactness))
        return self.reason is None and exactness in self._executables

    def _sweep(
        self,
        proposal: PlaneSweepProposal,
        sources: SourceViews,
        origins: Tensor,
        directions: Tensor,
        planes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._serves(proposal, sources, origins):
            return super()._sweep(proposal, sources, origins, directions, planes)
        # A copy of the maps' first channels alone, which caches hold.
        maps = self._derived("maps", [sources.features[0]], partial(_first_channels, count=proposal.feature_dim))
        given = maps, origins, directions, planes
        found = self._call("sweep", sources, *given, rays_at_once=_RAYS_OF_A_SWEEP)
        if found is None:
            return super()._sweep(proposal, sources, origins, directions, planes)
        rgb, weights, seen = found
        return rgb, weights, seen.view(torch.bool)

    def _samples_around(
        self, planes: Tensor, weights: Tensor, num_samples: int, *, stratified: bool, board: tuple[int, int] | None
    ) -> Tensor:
        def in_torch() -> Tensor:
            return super(CompiledGNT, self)._samples_around(
                planes, weights, num_samples, stratified=stratified, board=board
            )

        if stratified or not self._is_wanted(planes):
            return in_torch()
        given = [planes.contiguous(), weights.contiguous(), torch.linspace(0, 1, num_samples)]
        name = "around"
        if board is not None:
            rays, columns = board
            name, given = "between", [*given, torch.empty(rays // columns, columns, dtype=torch.uint8)]
        found = self._run(name, [given], 1)
        return in_torch() if found is None else found[0][0].view(-1, num_samples)

    def _render(
        self, net: GNT, sources: SourceViews, origins: Tensor, directions: Tensor, depths: Tensor, feature_maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._serves(net, sources, origins):
            return super()._render(net, sources, origins, directions, depths, feature_maps)
        name = "coarse" if net is self.net_coarse else "fine"
        mixtures = [mixture for mixture in _mixtures(net) if mixture.keep_assignment]
        wanted = 3 + len(_mixtures(net)) if mixtures else 3
        of_a_ray = 4 * len(sources.images) * depths.shape[1] * self.config.width
        rays_at_once = max(_FEWEST_RAYS, _BYTES_OF_VIEWS // of_a_ray)
        given = feature_maps, origins, directions, depths
        found = self._call(name, sources, *given, rays_at_once=rays_at_once, outcomes=wanted)
        if found is None:
            return super()._render(net, sources, origins, directions, depths, feature_maps)
        rgb, weights, seen, *routed = found
        for mixture, assignment in zip(_mixtures(net), routed, strict=bool(mixtures)):
            if mixture.keep_assignment:
                mixture.last_assignment = assignment
        return rgb, weights, seen.view(torch.bool)

    def _serves(self, part: nn.Module, sources: SourceViews, origins: Tensor) -> bool:
        """Whether executables do the work of a part for these rays."""
        if origins.device.type != "cpu":
            raise UserError(f"a compiled GNT takes rays on the CPU, not on {origins.device}")
        known = origins.dtype == torch.float32 and 0 < len(sources.images) <= MAX_VIEWS
        if id(part) not in self._found_in:
            self._found_in[id(part)] = [*part.modules()]
        return known and self._is_wanted(origins) and not has_hooks(*self._found_in[id(part)])

    def _is_wanted(self, of_rays: Tensor) -> bool:
        """Whether there are rays, and nothing else than inference in numerics with kernels is asked for."""
        used = self.is_compiled and not self.training and uses_kernels("view_attention", of_rays)
        return used and len(of_rays) > 0

    def _call(
        self,
        name: str,
        sources: SourceViews,
        feature_maps: Tensor,
        *of_rays: Tensor,
        rays_at_once: int,
        outcomes: int = 3,
    ) -> list[Tensor] | None:
        """The first outcomes of a program, for so many rays at a time; None where there is no executable yet."""
        views = (
            projection_matrices(sources.cameras),
            sources.cameras.camera_to_world[:, :3, 3],
            self._derived("pixels", [sources.images, sources.valid], pixels_of),
            feature_maps.permute(0, 2, 3, 1),
        )
        ready = [x.detach().contiguous() for x in views]
        chunks = zip(*(x.detach().contiguous().split(rays_at_once) for x in of_rays), strict=True)
        parts = self._run(name, [[*chunk, *ready] for chunk in chunks], outcomes)
        if parts is None:
            return None
        return parts[0] if len(parts) == 1 else [torch.cat(some) for some in zip(*parts, strict=True)]

    def _derived(self, name: str, given: list[Tensor | None], make: Callable[..., Tensor]) -> Tensor:
        """What `make` makes of source views; that of the views asked for last is kept."""
        known = self._of_views.get(name)
        if known is None or any(x is not y for x, y in zip(known[0], given, strict=True)):
            known = self._of_views[name] = given, make(*given)
        return known[1]

    def _run(self, name: str, calls: Sequence[Sequence[Tensor]], outcomes: int) -> list[list[Tensor]] | None:
        """The first outcomes of each call; None where there is no executable yet."""
        with self._lock:
            if not self._ready(self.numerics):
                return None
            found = self._executables[self.numerics].run(name, calls, outcomes)
            overflowed = [number for number, outcome in enumerate(found) if outcome is None]
            self.overflows += len(overflowed)
            if overflowed and self._ready("safe"):
                again = self._executables["safe"].run(name, [calls[number] for number in overflowed], outcomes)
                for number, outcome in zip(overflowed, again, strict=True):
                    found[number] = outcome
        known = [outcome for outcome in found if outcome is not None]
        return known if len(known) == len(calls) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_programs": {}, "_of_views": {}, "_found_in": {}}


def _first_channels(maps: Tensor, count: int) -> Tensor:
    return maps[:, :count].contiguous(memory_format=torch.channels_last)


class _Executables:
    """Programs ready to be called, with their weights."""

    def __init__(self, library: executable.Executable, programs: dict[str, Program]) -> None:
        weights = {name: executable.weights_of(one) for name, one in programs.items()}
        self._of_threads = [_OfThread(library, weights)]

    def run(self, name: str, calls: Sequence[Sequence[Tensor]], outcomes: int) -> list[list[Tensor] | None]:
        """The first outcomes of calls of one; None for a call that met an activation that it cannot express.

        Args:
            calls: the inputs of each. A thread that is done with one takes the next.
        """
        found: list[list[Tensor] | None] = [None] * len(calls)
        threads = torch.get_num_threads()
        if threads == 1 or len(calls) == 1:
            follow_torch()
            for number, inputs in enumerate(calls):
                found[number] = self._of_threads[0].run(name, inputs, outcomes, threads)
            return found
        while len(self._of_threads) < threads:
            self._of_threads.append(self._of_threads[0].another())
        numbers = iter(range(len(calls)))

        def work(member: int) -> None:
            for number in numbers:
                found[number] = self._of_threads[member].run(name, calls[number], outcomes, 1)

        in_team(work)
        return found


class _OfThread:
    """Programs with what one thread at a time may use of them."""

    def __init__(self, library: executable.Executable, weights: dict[str, Any]) -> None:
        self._library, self._weights = library, weights
        self._functions = {name: library[name] for name in weights}
        self._control = executable.Control()

    def another(self) -> _OfThread:
        """The like for another thread."""
        return _OfThread(self._library.another(), self._weights)

    def run(self, name: str, inputs: Sequence[Tensor], outcomes: int, threads: int) -> list[Tensor] | None:
        """The first outcomes of a program; None if it met an activation that it cannot express."""
        self._control.reset(threads)
        outcome = self._functions[name](*inputs, self._control.tensor, self._weights[name])
        if self._control.overflowed:
            return None
        return (
            [torch.from_dlpack(outcome)] if outcomes == 1 else [torch.from_dlpack(outcome[i]) for i in range(outcomes)]
        )


def compile_gnt(model: nn.Module, numerics: Numerics, background: bool = False) -> CompiledGNT:
    """A frozen GNT compiled; where that cannot be, it runs as before, and one warning says why.

    Args:
        background: by another process, and it runs as before until that is done.

    Raises:
        UserError: it is not frozen.
    """
    assert isinstance(model, GNTModel)
    if type(model.net_coarse) is GNT:
        raise UserError("net_coarse is a GNT, not frozen; call freeze_ first")
    compiled = CompiledGNT(model, numerics, background)
    compiled.load(numerics)
    return compiled


register_compiler(GNTModel, compile_gnt)
