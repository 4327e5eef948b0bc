"""`freeze_` turns a trained model into its form for inference, in place.

Shift layers become packed codes. Mixtures lose what only training needs, and binarizers lose their straight-through
estimator. Parts that can run as kernels are prepared for that: perceptrons of shift layers, additive attention, and
modules of registered classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.nn.add import AddAttention, TokenConv2d
from shiftadd3d.nn.attachments import keep_attributes, overridden_methods, would_be_lost
from shiftadd3d.nn.binarize import Binarizer
from shiftadd3d.nn.frozen import FrozenModule, frozen_class
from shiftadd3d.nn.mlp import FrozenConvMlp, FrozenMlp, is_conv_mlp, is_plain_mlp
from shiftadd3d.nn.moe import FrozenMoE, MoE, MoELinear, MoEMlp
from shiftadd3d.nn.reparam import make_replacement, offloading_problems
from shiftadd3d.nn.shift import PackedShiftLinear, ShiftConv2d, ShiftLinear

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class FrozenLayer:
    """One replaced module: its qualified name, its class, and the bytes of its state dict before and after."""

    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class FreezeReport(RichReport):
    """What `freeze_` did. Printing shows a table."""

    layers: tuple[FrozenLayer, ...]
    """Shift layers and mixtures that were replaced, the experts of mixtures as well as the mixtures around them."""
    binarizers: int
    """Number of binarizers whose codes no longer have a gradient."""
    perceptrons: int
    """Number of perceptrons, also as experts of mixtures, that became a `FrozenMlp` or a `FrozenConvMlp`."""
    blocks: int
    """Number of other modules that became a `FrozenModule`."""
    left: dict[str, str]
    """Modules of registered classes that were not replaced, by name, and why."""
    bytes_before: int
    """Bytes of the whole model's state dict. A tensor that is used in several places counts once."""
    bytes_after: int

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        table = Table("module", "before", "after", "bytes before", "bytes after", title_justify="left")
        table.title = f"{len(self.layers)} layers frozen"
        table.columns[3].justify = table.columns[4].justify = "right"
        for layer in self.layers:
            sizes = f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"
            table.add_row(layer.name, layer.before, layer.after, *sizes)
        lines = [f"{self.binarizers} binarizers frozen"] if self.binarizers else []
        if self.perceptrons:
            lines.append(f"{self.perceptrons} perceptrons ready to run as kernels")
        if self.blocks:
            lines.append(f"{self.blocks} other blocks ready to run as kernels")
        lines += [f"{name} stays as it is: {reason}" for name, reason in self.left.items()]
        lines.append(f"the model: {self.bytes_before:,} bytes before, {self.bytes_after:,} after")
        return Group(*([table] if self.layers else ["no layers to freeze"]), *lines)


def freeze_(model: nn.Module, verbose: bool = True) -> FreezeReport:
    """Turn `model` into its form for inference, in place. It becomes smaller, and its outputs in evaluation stay the
    same.

    `ShiftLinear` becomes `PackedShiftLinear`, `ShiftConv2d` becomes `PackedShiftConv2d`, and `MoE` becomes `FrozenMoE`.
    Binarizers give no more gradients. A perceptron of two packed layers `fc1` and `fc2` with an activation `act`
    between them becomes a `FrozenMlp`, if its class is known (`register_frozen`), as those of timm and GNT are. With a
    depthwise convolution `dwconv` before the activation, it becomes a `FrozenConvMlp`. Other modules of registered
    classes, such as GNT's attention, become a `FrozenModule`, with shift layers or without. If mixtures, hooks or
    derived classes prevent this, they stay, and the report says so. Everything else stays, in evaluation mode.

    In plain torch (``numerics("twin")``), outputs are the same bit for bit. On CPUs and GPUs kernels run, which sum in
    another order. A state dict saved afterwards loads into a new model that was reparameterized and frozen in the same
    way.

    Freezing cannot be undone: keep the earlier state dict for further training. Doing it twice changes nothing more.

    Args:
        model: any module that contains such layers.
        verbose: print the report.

    Returns:
        The report.

    Raises:
        UserError: listing every layer that cannot be frozen: NaN or infinite weights, hooks and the like that would be
            lost, or a layer that is the model itself. The model is unchanged then.
    """
    bytes_before = _stored_bytes(model)
    new: dict[nn.Module, nn.Module] = {}  # a module that stands in several places becomes one in all of them
    places: list[tuple[nn.Module, str, nn.Module]] = []
    names: dict[nn.Module, str] = {}
    problems: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (ShiftLinear, ShiftConv2d, MoE)):
            continue
        if module not in names:
            names[module] = name
            try:
                new[module] = make_replacement(module, name, lambda module=module, name=name: _frozen(module, name))
            except UserError as error:
                problems.append(str(error))
        if module in new:
            parent, _, attribute = name.rpartition(".")
            places.append((model.get_submodule(parent), attribute, new[module]))
    if places:
        problems += offloading_problems(model)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"cannot freeze this model:\n{listed}")

    sizes_before = {module: _stored_bytes(module) for module in new}
    for parent, attribute, replacement in places:
        setattr(parent, attribute, replacement)
    perceptrons = _freeze_mlps(model)
    blocks, left = _freeze_blocks(model)
    binarizers = [module for module in model.modules() if isinstance(module, Binarizer) and not module.frozen]
    for module in (*binarizers, *(module for module in model.modules() if isinstance(module, TokenConv2d))):
        module.frozen = True
    for module in model.modules():
        if isinstance(module, AddAttention) and module.joint is None:
            module.repack()
    model.eval()
    layers = tuple(
        FrozenLayer(names[old], type(old).__name__, type(frozen).__name__, sizes_before[old], _stored_bytes(frozen))
        for old, frozen in new.items()
    )
    report = FreezeReport(layers, len(binarizers), perceptrons, blocks, left, bytes_before, _stored_bytes(model))
    if verbose:
        report.show()
    return report


def _frozen(module: ShiftLinear | ShiftConv2d | MoE, name: str) -> nn.Module:
    kind = next(kind for kind in (ShiftLinear, ShiftConv2d, MoE) if isinstance(module, kind))
    known = type(module) if type(module) in (MoELinear, MoEMlp) else kind
    own = overridden_methods(module, known)
    if own:
        raise UserError(f"it derives from {known.__name__} but has a {', '.join(own)} of its own, which would be lost")
    if isinstance(module, MoE):
        return FrozenMoE(module)
    frozen = module.freeze(name=name)
    keep_attributes(module, frozen, kind)
    return frozen


def _freeze_mlps(model: nn.Module) -> int:
    """Put a `FrozenMlp` or `FrozenConvMlp` wherever there is something for a kernel to fuse, and count them."""
    experts = {expert for module in model.modules() if isinstance(module, FrozenMoE) for expert in module.experts}
    frozen: dict[nn.Module, FrozenMlp | FrozenConvMlp] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        linear = [getattr(module, attribute, None) for attribute in ("fc1", "fc2")]
        packed = all(isinstance(layer, PackedShiftLinear | FrozenMoE) for layer in linear)
        if not name or not (packed or module in experts):
            continue
        if module not in frozen:
            if is_plain_mlp(module):
                frozen[module] = FrozenMlp(module)
            elif is_conv_mlp(module, (FrozenMoE,)):
                frozen[module] = FrozenConvMlp(module)
            else:
                continue
            keep_attributes(module, frozen[module])
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, frozen[module])
    return len(frozen)


def _freeze_blocks(model: nn.Module) -> tuple[int, dict[str, str]]:
    """Put a `FrozenModule` wherever one is registered; how many, and why others stay, by name."""
    frozen: dict[nn.Module, FrozenModule] = {}
    left: dict[nn.Module, tuple[str, str]] = {}
    # Parts before the modules that they are parts of.
    for name, module in reversed(list(model.named_modules(remove_duplicate=False))):
        kind = frozen_class(module)
        if kind is None or not issubclass(kind, FrozenModule) or isinstance(module, FrozenModule):
            continue
        if module not in frozen:
            try:
                frozen[module] = _frozen_block(module, kind, name)
            except UserError as error:
                left[module] = name or "(root)", str(error)
                continue
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, frozen[module])
    return len(frozen), dict(reversed(left.values()))


def _frozen_block(module: nn.Module, kind: type[FrozenModule], name: str) -> FrozenModule:
    if not name:
        raise UserError("it is the model itself; put it into a module, where another can take its place")
    lost = would_be_lost(module)
    if lost is not None:
        raise UserError(f"it has {lost}")
    frozen = kind(module)
    for part in frozen.parts():
        lost = would_be_lost(part)
        if lost is not None:
            raise UserError(f"a {type(part).__name__} in it has {lost}")
    return frozen


def _stored_bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
