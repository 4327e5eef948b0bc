"""`reparameterize_`: one verb that turns a model's multiplications into additions, shifts and mixtures, in place.

What becomes what is said by a frozen `Recipe`; which layers, by their place: linear layers inside an attention module
follow the recipe's `attention_linear`, those inside a two-layer perceptron its `mlp`, all others its `other_linear`.
This module knows no model. Attention classes are made known by `register_attention`, perceptrons are found by their
shape (children `fc1` and `fc2` and an activation) or made known by `register_mlp`.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4; the presets are the rows of its ablation tables.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from torch import nn

from shiftadd3d._errors import UserError
from shiftadd3d.nn import power_of_two
from shiftadd3d.nn.add import BINARIZERS, CODES, ORDERS, AddAttention
from shiftadd3d.nn.moe import GATES, MoE, MoELinear, MoEMlp, latency_weights
from shiftadd3d.nn.shift import SHIFT_MODES, PackedShiftLinear, ShiftLinear

if TYPE_CHECKING:
    from rich.console import Group

Primitive = Literal["mult", "shift", "moe"]
_CHOICES = {
    "attention": ("keep", "add"),
    "attention_linear": ("mult", "shift", "moe"),
    "mlp": ("mult", "shift", "moe"),
    "other_linear": ("mult", "shift"),
    "mode": SHIFT_MODES,
    "binarizer": tuple(BINARIZERS),
    "codes": CODES,
    "order": ORDERS,
    "gate": GATES,
}


@dataclass(frozen=True)
class Recipe:
    """What the layers of a model become. Raises `UserError` for a value that does not exist."""

    name: str = "custom"
    """How reports call the recipe."""
    attention: Literal["keep", "add"] = "keep"
    """"add" turns products with queries and keys into additions over binary codes."""
    attention_linear: Primitive = "mult"
    """Linear layers inside attention modules."""
    mlp: Primitive = "mult"
    """Two-layer perceptrons: their linear layers ("shift") or the whole as a mixture of experts ("moe")."""
    other_linear: Literal["mult", "shift"] = "mult"
    """All other linear layers: embeddings, heads."""
    bits: int = 4
    """Bits of a shift weight, 2 to 6."""
    terms: int = 1
    """Powers of two in a shift weight, 1 or 2."""
    mode: Literal["Q", "PS"] = "Q"
    """How shift layers train: a float weight that is quantised ("Q"), or shift and sign themselves ("PS")."""
    binarizer: str = "sign"
    """How queries and keys become codes."""
    codes: Literal["pm1", "01"] = "pm1"
    """Codes of -1 and +1, or of 0 and 1."""
    dwconv: int = 9
    """Kernel size of the depthwise convolution on the values, odd; 0 for none. The paper's released code has 9."""
    order: Literal["auto", "linear", "quadratic"] = "auto"
    """Order of the products in attention; "auto" takes the cheaper."""
    gate: Literal["unit", "probability"] = "unit"
    """What the router's probability does to an expert's output: nothing but its gradient, or scale it."""
    router_noise: float | None = None
    """Standard deviation of the noise on router logits in training; None for 1 / experts."""
    latencies: tuple[float, ...] | Literal["measure"] = "measure"
    """Latencies of (mult, shift) in any unit for the balance loss, or "measure" to time them on the first batch."""
    exclude: tuple[str, ...] = field(default=())
    """Qualified names to leave alone with all they contain, as shell patterns."""

    def __post_init__(self) -> None:
        for option, allowed in _CHOICES.items():
            value = getattr(self, option)
            if value not in allowed:
                raise UserError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
        power_of_two.check_format(self.bits, self.terms)
        if self.dwconv < 0 or (self.dwconv and self.dwconv % 2 == 0):
            raise UserError(f"dwconv must be 0 or an odd number of tokens, not {self.dwconv}")
        if isinstance(self.latencies, str):
            if self.latencies != "measure":
                raise UserError(f"latencies must be two numbers or 'measure', not {self.latencies!r}")
        else:
            if len(self.latencies) != 2:
                raise UserError(f"latencies must be two numbers, of mult and shift, not {self.latencies!r}")
            latency_weights(self.latencies)
        if isinstance(self.exclude, str):
            raise UserError(f"exclude must be a tuple of patterns, not the string {self.exclude!r}")

    def shift_options(self) -> dict:
        """Keyword arguments for `ShiftLinear.from_linear`."""
        return {"bits": self.bits, "mode": self.mode, "terms": self.terms}

    def moe_options(self) -> dict:
        """Keyword arguments for `MoE`."""
        return {"gate": self.gate, "noise": self.router_noise, "latencies": self.latencies}

    def add_options(self) -> dict:
        """Keyword arguments for `AddAttention`."""
        return {"binarizer": self.binarizer, "codes": self.codes, "dwconv": self.dwconv, "order": self.order}


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("mult"),
        Recipe("add", attention="add"),
        Recipe("add+shift-attn", attention="add", attention_linear="shift"),
        Recipe("add+shift", attention="add", attention_linear="shift", mlp="shift"),
        Recipe("add+shift-attn+moe", attention="add", attention_linear="shift", mlp="moe"),
        Recipe("moe", attention="add", attention_linear="moe", mlp="moe"),
    )
}


def recipe(name: str, **changes) -> Recipe:
    """The preset called `name`, with the given fields changed: ``recipe("add+shift", bits=5)``.

    Raises:
        UserError: listing the names (or the fields), if there is no such one.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    known = [f.name for f in fields(Recipe)]
    unknown = [change for change in changes if change not in known]
    if unknown:
        raise UserError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(known)}")
    return replace(RECIPES[name], **changes)


_preset = recipe  # where an argument called `recipe` hides the function

# Any: a converter may say which class it converts.
AttentionConverter = Callable[[Any, Recipe], nn.Module]

_attention_converters: dict[type[nn.Module], AttentionConverter | None] = {AddAttention: None}
_mlp_classes: dict[type[nn.Module], bool] = {}


def register_attention(module_class: type[nn.Module], converter: AttentionConverter | None = None) -> None:
    """Make an attention class known: its linear layers (small perceptrons inside it too) are attention linears.

    Args:
        module_class: the class; subclasses count unless registered themselves.
        converter: makes the module's additive twin, for recipes with ``attention="add"``. It gets the module and the
            recipe and returns a new module with the same weights, leaving the old one as it is (it may share submodules
            with it, as `AddAttention.from_projections` does). None if there is no product of queries and keys to
            replace.
    """
    _attention_converters[module_class] = converter


def register_mlp(module_class: type[nn.Module], token_wise: bool = True) -> None:
    """Make a class known as a perceptron whose linear layers follow the recipe's `mlp`.

    Args:
        module_class: the class; subclasses count too.
        token_wise: whether its forward pass takes one tensor and treats tokens one by one, so that a mixture may send
            each token to another copy. If not, its linear layers become mixtures one by one.
    """
    _mlp_classes[module_class] = token_wise


@dataclass(frozen=True)
class ReparameterizedLayer:
    """One replaced module: its qualified name, its class before and after, parameters after, bits of a weight."""

    name: str
    before: str
    after: str
    parameters: int
    bits: str


@dataclass(frozen=True)
class UntouchedLayer:
    """One module with parameters that stayed as it was, and why."""

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class ReparameterizationReport:
    """What `reparameterize_` did: `layers` it replaced, `untouched` ones it left alone. Printing shows a table."""

    recipe: Recipe
    layers: tuple[ReparameterizedLayer, ...]
    untouched: tuple[UntouchedLayer, ...]

    def as_dict(self) -> dict:
        """The report in plain types, for JSON."""
        return asdict(self)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        title = f"recipe {self.recipe.name}: {len(self.layers)} layers replaced"
        table = Table("module", "before", "after", "parameters", "bits", title=title, title_justify="left")
        table.columns[3].justify = table.columns[4].justify = "right"
        for layer in self.layers:
            table.add_row(layer.name, layer.before, layer.after, f"{layer.parameters:,}", layer.bits)
        left = Counter(f"{layer.kind} ({layer.reason})" for layer in self.untouched)
        lines = [f"left alone: {count} {kind}" for kind, count in sorted(left.items())]
        return Group(*([table] if self.layers else [f"recipe {self.recipe.name}: nothing to replace"]), *lines)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def reparameterize_(
    model: nn.Module,
    recipe: Recipe | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    verbose: bool = True,
) -> ReparameterizationReport:
    """Replace the layers of `model` as `recipe` says, in place. Weights, devices, dtypes and flags carry over.

    Doing it twice changes nothing more. To go back, keep the model's state dict (or a copy of the model) from before.
    For another recipe, start from the original model: layers already replaced stay what they are.

    Args:
        model: any module; its parts are found by the rules in the module's docstring.
        recipe: a `Recipe`, or the name of a preset.
        filter_fn: asked with (module, qualified name) for everything about to be replaced; False leaves it alone.
        verbose: print the report.

    Returns:
        The report. Modules with parameters that no rule covers are left alone and listed there.

    Raises:
        UserError: listing every layer that cannot be replaced (NaN or infinite weights, hooks that would be lost, the
            model itself being the layer). The model has not been changed then.
    """
    if isinstance(recipe, str):
        recipe = _preset(recipe)
    surgery = _Surgery(recipe, filter_fn)
    surgery.visit(None, "", model, "", role=None)
    if surgery.problems:
        listed = "\n".join(f"  {problem}" for problem in surgery.problems)
        raise UserError(f"cannot reparameterize this model with recipe {recipe.name!r}:\n{listed}")
    for parent, attribute, replacement in surgery.replacements:
        setattr(parent, attribute, replacement)
    report = ReparameterizationReport(recipe, tuple(surgery.layers), tuple(surgery.untouched))
    if verbose:
        from rich.console import Console

        Console().print(report)
    return report


class _Surgery:
    """One walk over a model that plans all replacements and changes nothing."""

    def __init__(self, recipe: Recipe, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
        self.recipe = recipe
        self.filter_fn = filter_fn
        self.replacements: list[tuple[nn.Module, str, nn.Module]] = []
        self.layers: list[ReparameterizedLayer] = []
        self.untouched: list[UntouchedLayer] = []
        self.problems: list[str] = []
        # A module that stands in two places (shared weights) becomes one replacement in both.
        self.done: dict[int, nn.Module | None] = {}

    def visit(self, parent: nn.Module | None, attribute: str, module: nn.Module, name: str, role: str | None) -> None:
        """Plan for `module`, which is `parent`'s `attribute`, and all below it. `role`: "attention", "mlp" or None."""
        if id(module) in self.done:
            replacement = self.done[id(module)]
            if replacement is not None and parent is not None:
                self.replacements.append((parent, attribute, replacement))
            return
        self.done[id(module)] = None
        if isinstance(module, (ShiftLinear, PackedShiftLinear, MoE)):
            return
        if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.recipe.exclude):
            for inner_name, inner in module.named_modules(prefix=name):
                self._leave(inner, inner_name, "excluded")
            return
        if role is None:
            known, converter = _find(_attention_converters, module)
            if known:
                role = "attention"
                if self.recipe.attention == "add" and converter is not None and self._wanted(module, name):
                    additive = self._attempt(module, name, lambda: converter(module, self.recipe))
                    if additive is None:
                        return
                    self._replace(parent, attribute, module, additive, name, "codes 1")
                    module = additive
            elif _is_mlp(module):
                role = "mlp"
                if self.recipe.mlp == "moe" and _is_token_wise(module) and self._wanted(module, name):
                    mixture = self._attempt(
                        module,
                        name,
                        lambda: MoEMlp.from_mlp(
                            module, shift=self.recipe.shift_options(), name=name, **self.recipe.moe_options()
                        ),
                    )
                    if mixture is not None:
                        self._replace(parent, attribute, module, mixture, name, f"{_float_bits(module)}/{self._bits()}")
                    return
        if type(module) is nn.Linear:
            self._visit_linear(parent, attribute, module, name, role)
            return
        self._leave(module, name, "no rule for it")
        for child_name, child in module.named_children():
            self.visit(module, child_name, child, f"{name}.{child_name}" if name else child_name, role)

    def _visit_linear(
        self, parent: nn.Module | None, attribute: str, linear: nn.Linear, name: str, role: str | None
    ) -> None:
        recipe = self.recipe
        place = {"attention": "attention_linear", "mlp": "mlp", None: "other_linear"}[role]
        primitive = getattr(recipe, place)
        if primitive == "mult":
            self._leave(linear, name, f"{place}: mult")
        elif not self._wanted(linear, name):
            self._leave(linear, name, "filtered out")
        elif primitive == "shift":
            shift = self._attempt(linear, name, lambda: _shift_in_place_of(linear, name, recipe))
            if shift is not None:
                self._replace(parent, attribute, linear, shift, name, str(self._bits()))
        else:
            mixture = self._attempt(
                linear,
                name,
                lambda: MoELinear.from_linear(linear, shift=recipe.shift_options(), name=name, **recipe.moe_options()),
            )
            if mixture is not None:
                self._replace(parent, attribute, linear, mixture, name, f"{_float_bits(linear)}/{self._bits()}")

    def _wanted(self, module: nn.Module, name: str) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(module, name))

    def _bits(self) -> int:
        return self.recipe.bits * self.recipe.terms

    def _attempt(self, module: nn.Module, name: str, make: Callable[[], nn.Module]) -> nn.Module | None:
        """The replacement, or None and one more problem on the list."""
        kind = type(module).__name__
        if not name:
            self.problems.append(f"the model itself is a {kind}: put it into a module, its place is what gets replaced")
            return None
        if any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules()):
            self.problems.append(f"{name} ({kind}): it has forward hooks, which would be lost; remove them first")
            return None
        try:
            return make()
        except UserError as error:
            self.problems.append(f"{name} ({kind}): {error}")
            return None

    def _replace(
        self, parent: nn.Module | None, attribute: str, old: nn.Module, new: nn.Module, name: str, bits: str
    ) -> None:
        assert parent is not None  # _attempt() has refused the model itself
        self.done[id(old)] = new
        self.replacements.append((parent, attribute, new))
        parameters = sum(parameter.numel() for parameter in new.parameters())
        self.layers.append(ReparameterizedLayer(name, type(old).__name__, type(new).__name__, parameters, bits))

    def _leave(self, module: nn.Module, name: str, reason: str) -> None:
        own = [parameter for parameter in module.parameters(recurse=False) if not nn.parameter.is_lazy(parameter)]
        if own:
            count = sum(parameter.numel() for parameter in own)
            self.untouched.append(UntouchedLayer(name or "(root)", type(module).__name__, count, reason))


def _shift_in_place_of(linear: nn.Linear, name: str, recipe: Recipe) -> ShiftLinear:
    """A shift layer that takes over the parameters themselves: ties between weights and optimizers stay valid."""
    shift = ShiftLinear.from_linear(linear, name=name, **recipe.shift_options())
    if recipe.mode == "Q":
        shift.weight = cast(nn.Parameter, linear.weight)
    shift.bias = linear.bias
    return shift


_Entry = TypeVar("_Entry")


def _find(registry: dict[type[nn.Module], _Entry], module: nn.Module) -> tuple[bool, _Entry | None]:
    """Whether the class of `module` or one it derives from is registered, and as what; the nearest one counts."""
    for module_class in type(module).__mro__:
        if module_class in registry:
            return True, registry[module_class]
    return False, None


def _is_mlp(module: nn.Module) -> bool:
    if _find(_mlp_classes, module)[0]:
        return True
    children = dict(module.named_children())
    linears = (nn.Linear, ShiftLinear, MoELinear)
    if not (isinstance(children.get("fc1"), linears) and isinstance(children.get("fc2"), linears)):
        return False
    return any(
        "act" in name or type(child).__module__ == "torch.nn.modules.activation" for name, child in children.items()
    )


def _is_token_wise(mlp: nn.Module) -> bool:
    """Whether `mlp` may be run on any subset of tokens: told, or only linear layers and norms, and one input."""
    known, token_wise = _find(_mlp_classes, mlp)
    if known:
        return bool(token_wise)
    inputs = inspect.signature(mlp.forward).parameters.values()
    required = [p for p in inputs if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    with_parameters = [inner for inner in mlp.modules() if inner._parameters]
    return len(required) == 1 and all(
        type(inner) is nn.Linear or isinstance(inner, (nn.LayerNorm, nn.RMSNorm)) for inner in with_parameters
    )


def _float_bits(module: nn.Module) -> int:
    return next(module.parameters()).element_size() * 8
