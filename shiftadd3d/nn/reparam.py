"""`reparameterize_` turns a model's multiplications into additions, shifts and mixtures, in place.

A frozen `Recipe` says what layers become, depending on their place. Linear layers inside an attention module follow the
recipe's `attention_linear`, those inside a two-layer perceptron its `mlp`, and all others its `other_linear`. A `Rule`
overrides this for layers by their qualified names. 1x1 convolutions count as linear layers in their place. Convolutions
that cut an image into patches count as linear layers that follow `other_linear` everywhere.

This module knows no model. `register_attention` registers attention classes. Perceptrons are recognised by their parts
(`fc1`, `fc2` and an activation) or registered by `register_mlp`.

Source: You et al., ShiftAddViT (NeurIPS 2023), section 4; the presets are the rows of its ablation tables.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.nn import power_of_two
from shiftadd3d.nn.add import ORDERS, AddAttention
from shiftadd3d.nn.attachments import (
    ADAPTED,
    foreign_to_linear,
    is_adapted,
    keep_attributes,
    offloaded,
    overridden_methods,
    would_be_lost,
)
from shiftadd3d.nn.binarize import BINARIZERS, CODES
from shiftadd3d.nn.bypassed import bypassed
from shiftadd3d.nn.moe import GATES, FrozenMoE, MoE, MoELinear, MoEMlp, check_router, latency_weights
from shiftadd3d.nn.shift import (
    SHIFT_MODES,
    PackedShiftLayer,
    ShiftConv2d,
    ShiftLayer,
    ShiftLinear,
    counts_as_linear,
)

if TYPE_CHECKING:
    from rich.console import Group

Primitive = Literal["mult", "shift", "moe"]
_RULE_PRIMITIVES = ("keep", "mult", "shift", "moe", "add")
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
class Rule:
    """What layers with certain names become, whatever their place.

    A rule that names a module applies to everything inside it: ``Rule("blocks.0", "shift")`` applies to all linear
    layers of the first block.

    Raises:
        UserError: for a value that does not exist.
    """

    pattern: str
    """Shell pattern for qualified names: `*` matches anything, including dots, and `?` one character."""
    primitive: Literal["keep", "mult", "shift", "moe", "add"]
    """"mult", "shift" and "moe" are about linear layers, "add" about the products in attention modules; "keep" leaves
    both as they are."""
    bits: int | None = None
    """Bits of the shift weights; None for the recipe's."""
    terms: int | None = None
    """Powers of two in the shift weights; None for the recipe's."""

    def __post_init__(self) -> None:
        if not (isinstance(self.pattern, str) and self.pattern):
            raise UserError(f"a rule's pattern must be a qualified name or a shell pattern, not {self.pattern!r}")
        if self.primitive not in _RULE_PRIMITIVES:
            raise UserError(
                f"the rule for {self.pattern!r} must say one of {', '.join(_RULE_PRIMITIVES)}, not {self.primitive!r}"
            )
        if self.primitive not in ("shift", "moe") and (self.bits, self.terms) != (None, None):
            raise UserError(f"the rule for {self.pattern!r} gives bits or terms, but {self.primitive!r} has no codes")
        power_of_two.check_format(
            power_of_two.MIN_BITS if self.bits is None else self.bits, 1 if self.terms is None else self.terms
        )


@dataclass(frozen=True)
class Recipe:
    """What the layers of a model become.

    Raises:
        UserError: for a value that does not exist.
    """

    name: str = "custom"
    """Name of the recipe in reports."""
    attention: Literal["keep", "add"] = "keep"
    """"add" turns products with queries and keys into additions over binary codes."""
    attention_linear: Primitive = "mult"
    """Linear layers inside attention modules."""
    mlp: Primitive = "mult"
    """Two-layer perceptrons: their linear layers ("shift") or the whole as a mixture of experts ("moe")."""
    other_linear: Literal["mult", "shift"] = "mult"
    """All other linear layers: embeddings (convolutions over patches too), heads."""
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
    code_dim: int | None = None
    """Bits of a code for each head; None for one bit a feature. Only "random" and "hash" can have another number."""
    share_codes: bool = False
    """One binarizer for queries and keys."""
    dwconv: int = 9
    """Kernel size of the depthwise convolution on the values, odd; 0 for none. The paper's released code has 9."""
    dwconv2d: int = 3
    """The same for images, whose tokens form a known grid: kernel size along each side of the grid."""
    contrast: float = 16.0
    """Start value of the factor by which outputs of attention differ more from the mean of the values than with the
    linear-angular map. It is learned (see `AddAttention`), or fitted if nothing is trained (`fit_contrast_`). 1 leaves
    the map as it is, with nothing to learn, as in the paper."""
    order: Literal["auto", "linear", "quadratic"] = "auto"
    """Order of the products in attention; "auto" takes the cheaper."""
    gate: Literal["unit", "probability"] = "unit"
    """Whether the router's probability only has a gradient ("unit"), or scales the output ("probability")."""
    router_noise: float | None = None
    """Standard deviation of the noise on router logits in training; None for 1 / experts."""
    router_temperature: float = 1.0
    """Divisor of router logits. Higher temperatures give more even probabilities."""
    latencies: tuple[float, ...] | Literal["measure"] = "measure"
    """Latencies of (mult, shift) in any unit for the balance loss, or "measure" to time them on the first batch."""
    rules: tuple[Rule, ...] = ()
    """What layers with certain names become. If several rules fit a layer, the last one counts."""
    exclude: tuple[str, ...] = ()
    """Shell patterns for names of modules to leave unchanged with all their parts: last rules, with "keep"."""

    def __post_init__(self) -> None:
        for option, allowed in _CHOICES.items():
            value = getattr(self, option)
            if value not in allowed:
                raise UserError(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
        power_of_two.check_format(self.bits, self.terms)
        if self.code_dim is not None and self.code_dim < 1:
            raise UserError(f"code_dim must be a positive number of bits, not {self.code_dim}")
        for option in ("dwconv", "dwconv2d"):
            size = getattr(self, option)
            if size < 0 or (size and size % 2 == 0):
                raise UserError(f"{option} must be 0 or an odd number of tokens, not {size}")
        if not 0.0 < self.contrast < float("inf"):
            raise UserError(f"contrast must be a positive number, not {self.contrast}")
        check_router(0.0 if self.router_noise is None else self.router_noise, self.router_temperature)
        if isinstance(self.latencies, str):
            if self.latencies != "measure":
                raise UserError(f"latencies must be two numbers or 'measure', not {self.latencies!r}")
        else:
            if len(self.latencies) != 2:
                raise UserError(f"latencies must be two numbers, of mult and shift, not {self.latencies!r}")
            latency_weights(self.latencies)
        if isinstance(self.exclude, str):
            raise UserError(f"exclude must be a tuple of patterns, not the string {self.exclude!r}")
        if not (isinstance(self.rules, tuple) and all(isinstance(rule, Rule) for rule in self.rules)):
            raise UserError(f"rules must be a tuple of Rule, not {self.rules!r}")

    def as_dict(self) -> dict[str, Any]:
        """The recipe in plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `as_dict` made `values` of, also after a round through JSON.

        Raises:
            UserError: for a field or a value that does not exist.
        """
        _refuse_unknown(values, cls, "recipe")
        values = dict(values)
        for rule in values.get("rules", ()):
            _refuse_unknown(rule, Rule, "rule")
        values["rules"] = tuple(Rule(**rule) for rule in values.get("rules", ()))
        # JSON has no tuples.
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)

    @classmethod
    def parse(cls, given: Recipe | str, **changes: Any) -> Recipe:
        """A recipe, or the preset of this name, with some fields changed.

        Raises:
            UserError: for an unknown preset, field or value.
        """
        if isinstance(given, str):
            if given not in RECIPES:
                raise UserError(f"there is no recipe {given!r}; the recipes are {', '.join(RECIPES)}")
            given = RECIPES[given]
        if not isinstance(given, Recipe):
            raise UserError(f"a recipe is a Recipe or the name of one, not {type(given).__name__}")
        _refuse_unknown(changes, cls, "recipe")
        return replace(given, **changes)

    def stages(self) -> tuple[Recipe | None, Recipe | None]:
        """The paper's two steps to this recipe: first attention only, then the rest.

        None for a step without changes.
        """
        rules = tuple(rule for rule in self.rules if rule.primitive in ("add", "keep"))
        attention = replace(self, attention_linear="mult", mlp="mult", other_linear="mult", rules=rules, name="add")
        primitives = self._primitives()
        return (attention if "add" in primitives else None), (self if primitives & {"shift", "moe"} else None)

    @property
    def has_mixtures(self) -> bool:
        """Whether layers become mixtures of experts."""
        return "moe" in self._primitives()

    def _primitives(self) -> set[str]:
        places = {self.attention, self.attention_linear, self.mlp, self.other_linear}
        return places | {rule.primitive for rule in self.rules}

    def shift_options(self) -> dict:
        """Keyword arguments for `ShiftLinear.from_linear`, where no rule says otherwise."""
        return {"bits": self.bits, "mode": self.mode, "terms": self.terms}

    def moe_options(self) -> dict:
        """Keyword arguments for `MoE`."""
        return {
            "gate": self.gate,
            "noise": self.router_noise,
            "temperature": self.router_temperature,
            "latencies": self.latencies,
        }

    def add_options(self) -> dict:
        """Keyword arguments for `AddAttention`."""
        return {
            "binarizer": self.binarizer,
            "codes": self.codes,
            "code_dim": self.code_dim,
            "share_codes": self.share_codes,
            "dwconv": self.dwconv,
            "order": self.order,
            "contrast": None if self.contrast == 1 else self.contrast,
        }


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
"""The presets, by name: the rows of the paper's tables."""


recipe = Recipe.parse
"""`Recipe.parse` as a function: ``recipe("add+shift", bits=5)``."""


def _refuse_unknown(given: Iterable[str], dataclass_type: type[Recipe] | type[Rule], kind: str) -> None:
    known = [f.name for f in fields(dataclass_type)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"a {kind} has no {', '.join(unknown)}; it has {', '.join(known)}")


AttentionConverter = Callable[..., nn.Module]


class _AttentionClass(NamedTuple):
    """How an attention class is converted: see `register_attention`."""

    converter: AttentionConverter | None = None
    within: type[nn.Module] | None = None
    base: type[nn.Module] | None = None


_attention_converters: dict[type[nn.Module], _AttentionClass] = {AddAttention: _AttentionClass()}
_mlp_classes: dict[type[nn.Module], bool] = {}


def register_attention(
    module_class: type[nn.Module],
    converter: AttentionConverter | None = None,
    within: type[nn.Module] | None = None,
) -> None:
    """Register an attention class. All linear layers in it, also those of small perceptrons, then follow
    `attention_linear`.

    Args:
        module_class: the class. Subclasses count unless they are registered themselves.
        converter: makes the additive twin of a module, for recipes with ``attention="add"``. It gets the module and the
            recipe, and returns a new module with the same weights. It leaves the old module unchanged, but may share
            submodules with it, as `AddAttention.from_projections` does. None if there is no product of queries and keys
            to replace.
        within: a class of models that know more about the tokens than their attention modules, such as the grid of the
            tokens. The converter then gets as a third argument the innermost module of that class around the attention,
            or None.
    """
    _attention_converters[module_class] = _AttentionClass(converter, within, module_class)


def register_mlp(module_class: type[nn.Module], token_wise: bool = True) -> None:
    """Register a class as a perceptron whose linear layers follow the recipe's `mlp`.

    Args:
        module_class: the class. Subclasses count too.
        token_wise: whether its forward pass takes one tensor and treats tokens one by one, so that a mixture may send
            tokens to different copies. If not, each of its linear layers becomes a mixture.
    """
    _mlp_classes[module_class] = token_wise


@dataclass(frozen=True)
class ReparameterizedLayer:
    """One replaced module: its qualified name, its class before and after, its parameters after, and the bits of a
    weight.
    """

    name: str
    before: str
    after: str
    parameters: int
    bits: str


@dataclass(frozen=True)
class UntouchedLayer:
    """One module with parameters that was not changed, and why."""

    name: str
    kind: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class ReparameterizationReport(RichReport):
    """The `layers` that `reparameterize_` replaced, and those that it left `untouched`. Printing shows a table."""

    recipe: Recipe
    layers: tuple[ReparameterizedLayer, ...]
    untouched: tuple[UntouchedLayer, ...]

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


def reparameterize_(
    model: nn.Module,
    recipe: Recipe | str,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    verbose: bool = True,
) -> ReparameterizationReport:
    """Replace the layers of `model` as `recipe` says, in place. Weights, devices, dtypes and flags carry over.

    Doing it twice changes nothing more. To be able to go back, keep the model's state dict or a copy of the model. For
    another recipe, start from the original model, because replaced layers are not replaced again.

    Args:
        model: any module. Its parts are found as the description of this Python module says.
        recipe: a `Recipe`, or the name of a preset.
        filter_fn: called with (module, qualified name) for everything about to be replaced. False leaves it unchanged.
        verbose: print the report.

    Returns:
        The report. It also lists modules with parameters that no rule covers. They are unchanged.

    Raises:
        UserError: listing every layer that cannot be replaced (NaN or infinite weights, hooks that would be lost, a
            layer that is the model itself), and every rule that matches nothing or does not fit what it matches. The
            model is unchanged then.
    """
    recipe = Recipe.parse(recipe)
    surgery = _Surgery(model, recipe, filter_fn)
    surgery.visit(None, "", model, "", role=None)
    problems = surgery.problems + surgery.rules.idle(model, surgery.additive)
    if surgery.replacements:
        problems += offloading_problems(model)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"cannot reparameterize this model with recipe {recipe.name!r}:\n{listed}")
    for parent, attribute, replacement in surgery.replacements:
        setattr(parent, attribute, replacement)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # torch's fast path would read the weights past the new layer
    changed = {parent for parent, _, _ in surgery.replacements}
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        if not changed.isdisjoint(encoder.modules()):
            encoder.use_nested_tensor = False  # which are for the fast path alone
    report = ReparameterizationReport(recipe, tuple(surgery.layers), tuple(surgery.untouched))
    if verbose:
        report.show()
    return report


class _Choice(NamedTuple):
    """What a layer becomes, and on whose word."""

    primitive: str
    bits: int
    terms: int
    reason: str


class _Rules:
    """The rules of a recipe, what they say about a module, and which of them were of use."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._rules = (*recipe.rules, *(Rule(pattern, "keep") for pattern in recipe.exclude))
        self._matches = [re.compile(fnmatch.translate(rule.pattern)).match for rule in self._rules]
        self._used: set[int] = set()

    def choose(self, name: str, place: str, fitting: tuple[str, ...], refused: tuple[str, ...] = ()) -> _Choice:
        """What becomes of the module called `name`.

        Args:
            place: the recipe's field that speaks where no rule does.
            fitting: primitives that are about such a module; rules that say others are passed over.
            refused: those that are an error if the last rule for the very name says them.
        """
        recipe, chosen = self._recipe, None
        for i, is_own in self._about(name):
            rule = self._rules[i]
            if rule.primitive in fitting:
                self._used.add(i)
                chosen = i if chosen is None else chosen
            elif chosen is None and is_own and rule.primitive in refused:
                self._used.add(i)  # one complaint is enough
                raise UserError(f"the rule {rule.pattern!r} says {rule.primitive}, which this layer cannot become")
        if chosen is None:
            primitive = getattr(recipe, place)
            return _Choice(primitive, recipe.bits, recipe.terms, f"{place}: {primitive}")
        rule = self._rules[chosen]
        return _Choice(
            rule.primitive,
            recipe.bits if rule.bits is None else rule.bits,
            recipe.terms if rule.terms is None else rule.terms,
            self._reason(chosen),
        )

    def keeps(self, name: str) -> str | None:
        """Why a module that nothing can become of stays: the last word about its name, if that is "keep"."""
        last = next((i for i, _ in self._about(name)), None)
        return self._reason(last) if last is not None and self._rules[last].primitive == "keep" else None

    def mark(self, name: str, fitting: tuple[str, ...]) -> None:
        """Rules about `name`, which an earlier surgery has replaced, were of use."""
        self._used.update(i for i, _ in self._about(name) if self._rules[i].primitive in fitting)

    def idle(self, model: nn.Module, converted: Mapping[str, nn.Module]) -> list[str]:
        """Complaints about the rules that were of no use in `model`. `converted`: what its attention modules become."""
        kinds = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False) if name}
        complaints = []
        for i, rule in enumerate(self._rules):
            if i in self._used:
                continue
            matched = [f"{name} ({kind})" for name, kind in kinds.items() if self._matches[i](name)]
            if not matched:
                close = difflib.get_close_matches(rule.pattern, kinds, n=3) or list(kinds)[:3]
                complaints.append(f"{rule.pattern!r} matches no module; there are {', '.join(close)}, ...")
            elif rule.primitive != "keep":
                listed = ", ".join(matched[:3]) + (", ..." if len(matched) > 3 else "")
                complaint = f"{rule.pattern!r}: nothing of what it matches can become {rule.primitive}: {listed}"
                inside = next((a for a in converted if any(match.startswith(f"{a}.") for match in matched)), None)
                if inside is not None:
                    layers = [name for name, layer in converted[inside].named_children() if type(layer) is nn.Linear]
                    complaint += f"; as an addition, {inside} has {', '.join(layers)}"
                complaints.append(complaint)
        return complaints

    def _about(self, name: str) -> Iterator[tuple[int, bool]]:
        """Numbers of the rules that name the module or one around it, the last first; and whether the module itself."""
        parts = name.split(".") if name else []
        around = [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]
        for i in reversed(range(len(self._rules))):
            is_own = bool(parts) and self._matches[i](name) is not None
            if is_own or any(self._matches[i](outer) for outer in around):
                yield i, is_own

    def _reason(self, number: int) -> str:
        rule = self._rules[number]
        return f"rule {rule.pattern}: {rule.primitive}" if number < len(self._recipe.rules) else "excluded"


_LINEAR_PRIMITIVES = ("keep", "mult", "shift", "moe")
_PLACES = {"attention": "attention_linear", "mlp": "mlp", None: "other_linear"}


class _Surgery:
    """One walk over a model that plans all replacements and changes nothing."""

    def __init__(self, model: nn.Module, recipe: Recipe, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
        self.model = model
        self.recipe = recipe
        self.rules = _Rules(recipe)
        self.filter_fn = filter_fn
        self.replacements: list[tuple[nn.Module, str, nn.Module]] = []
        self.layers: list[ReparameterizedLayer] = []
        self.untouched: list[UntouchedLayer] = []
        self.problems: list[str] = []
        self.additive: dict[str, nn.Module] = {}
        # A module that stands in two places (shared weights) becomes one replacement in both.
        self.done: dict[int, nn.Module | None] = {}
        self.bypassed = bypassed(model)
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    def visit(self, parent: nn.Module | None, attribute: str, module: nn.Module, name: str, role: str | None) -> None:
        """Plan for `module`, which is `parent`'s `attribute`, and all below it. `role`: "attention", "mlp" or None."""
        if id(module) in self.done:
            replacement = self.done[id(module)]
            if replacement is not None and parent is not None:
                self.replacements.append((parent, attribute, replacement))
            return
        self.done[id(module)] = None
        if isinstance(module, torch.jit.ScriptModule):
            if parent is None:
                self.problems.append("torch.jit compiled it; reparameterize the model before")
            self._leave(module, name, "torch.jit compiled it")
            return
        if isinstance(module, (ShiftLayer, PackedShiftLayer, MoE, FrozenMoE)):
            self._mark_replaced(module)
            return
        if is_adapted(module):
            self._visit_adapted(module, name, role)
            return
        if type(module) is nn.Linear or _is_linear_conv(module):
            self._visit_linear(parent, attribute, module, name, role)
            return
        if parametrize.is_parametrized(module):
            self._leave(module, name, self.rules.keeps(name) or f"it has {would_be_lost(module)}")
            return
        if role is None:
            known, attention_class = _find(_attention_converters, module)
            if known:
                role = "attention"
                additive = self._visit_attention(parent, attribute, module, name, attention_class or _AttentionClass())
                if additive is None:
                    return
                module = additive
            elif _is_mlp(module):
                role = "mlp"
                if self._visit_mlp(parent, attribute, module, name):
                    return
        if module in self.names:  # not a part of the addition that is to stand there
            self._leave(module, name, self.rules.keeps(name) or "no rule for it")
        for child_name, child in module._modules.items():  # named_children() hides a second place of one module
            if child is not None:
                self.visit(module, child_name, child, f"{name}.{child_name}" if name else child_name, role)

    def _visit_attention(
        self,
        parent: nn.Module | None,
        attribute: str,
        module: nn.Module,
        name: str,
        attention_class: _AttentionClass,
    ) -> nn.Module | None:
        """What stands there from now on, whose linear layers are still to be visited; None if there is a problem."""
        if isinstance(module, AddAttention):
            self.rules.mark(name, ("keep", "add"))
            return module
        converter, within, base = attention_class
        fitting = ("keep",) if converter is None else ("keep", "add")
        choice = self._choose(module, name, "attention", fitting, refused=("add",))
        if choice is None:
            return None
        if choice.primitive == "keep" or converter is None or not self._wanted(module, name):
            return module
        if module in self.bypassed:
            self.rules.mark(name, fitting)
            self._leave(module, name, self.bypassed[module])
            return module
        own = [] if base is None else overridden_methods(module, base)
        if own and base is not None:
            self.problems.append(
                f"{name} ({type(module).__name__}): it derives from {base.__name__} but has a {', '.join(own)} of its "
                "own, which would be lost; tell register_attention about this class, or leave it out by a rule that "
                "says keep"
            )
            return None
        surroundings = () if within is None else (self._innermost(within, name),)
        additive = self._attempt(module, name, lambda: converter(module, self.recipe, *surroundings))
        if additive is not None:
            keep_attributes(module, additive)
            self.additive[name] = additive
            self._replace(parent, attribute, module, additive, name, "codes 1")
        return additive

    def _innermost(self, within: type[nn.Module], name: str) -> nn.Module | None:
        """The innermost module of class `within` around the module called `name`."""
        while name:
            name = name.rpartition(".")[0]
            around = self.model.get_submodule(name)
            if isinstance(around, within):
                return around
        return None

    def _visit_mlp(self, parent: nn.Module | None, attribute: str, mlp: nn.Module, name: str) -> bool:
        """Whether the whole was dealt with; otherwise its linear layers are visited one by one."""
        choice = self._choose(mlp, name, "mlp", _LINEAR_PRIMITIVES, refused=("add",))
        if choice is None:
            return True
        if choice.primitive != "moe" or not _is_token_wise(mlp) or not self._wanted(mlp, name):
            return False
        if any(inner in self.bypassed for inner in mlp.modules()):
            return False
        for inner_name, inner in mlp.named_modules():
            if type(inner) is nn.Linear:
                own = self._choose(inner, f"{name}.{inner_name}", "mlp", _LINEAR_PRIMITIVES, refused=("add",))
                if own is None or own[:3] != choice[:3]:  # a rule wants another thing of this layer
                    return own is None
        mixture = self._attempt(
            mlp,
            name,
            lambda: MoEMlp.from_mlp(mlp, shift=self._shift_options(choice), name=name, **self.recipe.moe_options()),
        )
        if mixture is not None:
            self._replace(parent, attribute, mlp, mixture, name, f"{_float_bits(mlp)}/{choice.bits * choice.terms}")
        return True

    def _visit_linear(
        self, parent: nn.Module | None, attribute: str, layer: nn.Linear | nn.Conv2d, name: str, role: str | None
    ) -> None:
        fitting, refused = _LINEAR_PRIMITIVES, ("add",)
        if isinstance(layer, nn.Conv2d):
            fitting, refused = ("keep", "mult", "shift"), ("add", "moe")
            role = role if layer.kernel_size == (1, 1) else None
        choice = self._choose(layer, name, _PLACES[role], fitting, refused)
        if choice is None:
            return
        code_bits = choice.bits * choice.terms
        if choice.primitive in ("keep", "mult"):
            self._leave(layer, name, choice.reason)
        elif choice.primitive not in fitting:
            self._leave(layer, name, f"{choice.reason}, which no convolution becomes")
        elif not self._wanted(layer, name):
            self._leave(layer, name, "filtered out")
        elif layer in self.bypassed:
            self._leave(layer, name, self.bypassed[layer])
        elif choice.primitive == "shift":
            shift = self._attempt(layer, name, lambda: _shift_in_place_of(layer, name, **self._shift_options(choice)))
            if shift is not None:
                self._replace(parent, attribute, layer, shift, name, str(code_bits))
        else:
            linear = cast(nn.Linear, layer)
            mixture = self._attempt(
                linear,
                name,
                lambda: MoELinear.from_linear(
                    linear, shift=self._shift_options(choice), name=name, **self.recipe.moe_options()
                ),
            )
            if mixture is not None:
                self._replace(parent, attribute, linear, mixture, name, f"{_float_bits(linear)}/{code_bits}")

    def _visit_adapted(self, module: nn.Module, name: str, role: str | None) -> None:
        """A layer with adapters around it stays as a whole, or is refused."""
        choice = self._choose(module, name, _PLACES[role], _LINEAR_PRIMITIVES, refused=("add",))
        if choice is None:
            return
        if choice.primitive in ("keep", "mult") or not self._wanted(module, name):
            self._leave(module, name, f"{choice.reason}; it has {ADAPTED}")
        else:
            self.problems.append(f"{name} ({type(module).__name__}): it has {ADAPTED}")

    def _choose(
        self, module: nn.Module, name: str, place: str, fitting: tuple[str, ...], refused: tuple[str, ...]
    ) -> _Choice | None:
        """What the rules say, or None and one more problem on the list."""
        try:
            choice = self.rules.choose(name, place, fitting, refused)
            for other in self.names.get(module, ()):  # none: it is new, part of an additive attention
                also = self.rules.choose(other, place, fitting, refused)
                if also[:3] != choice[:3]:
                    raise UserError(
                        f"{choice.reason}; but it is the same module as {other!r}, {also.reason}; "
                        "expected the same for both"
                    )
            return choice
        except UserError as error:
            self.problems.append(f"{name} ({type(module).__name__}): {error}")
            return None

    def _mark_replaced(self, module: nn.Module) -> None:
        for name in self.names[module]:
            self.rules.mark(name, _LINEAR_PRIMITIVES)
            if isinstance(module, (MoE, FrozenMoE)):
                # A rule may have named a layer of the perceptron that the mixture has as its first expert.
                for inner_name, _ in module.experts[0].named_modules(prefix=name):
                    self.rules.mark(inner_name, _LINEAR_PRIMITIVES)

    def _shift_options(self, choice: _Choice) -> dict:
        return {**self.recipe.shift_options(), "bits": choice.bits, "terms": choice.terms}

    def _wanted(self, module: nn.Module, name: str) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(module, name))

    def _attempt(self, module: nn.Module, name: str, make: Callable[[], nn.Module]) -> nn.Module | None:
        """The replacement, or None and one more problem on the list."""
        try:
            return make_replacement(module, name, make)
        except UserError as error:
            self.problems.append(str(error))
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


_Module = TypeVar("_Module", bound=nn.Module)


def make_replacement(module: nn.Module, name: str, make: Callable[[], _Module]) -> _Module:
    """What `make` makes to stand in the place of `module`.

    Raises:
        UserError: naming the module, if it has no place or what is attached to it would be lost (see
            `shiftadd3d.nn.attachments`); or what `make` raises.
    """
    kind = type(module).__name__
    if not name:
        raise UserError(f"the model itself is a {kind}; put it into a module, where another can take its place")
    for inner_name, inner in module.named_modules():
        lost = would_be_lost(inner)
        if lost is None and type(inner) in (nn.Linear, nn.Conv2d):
            lost = foreign_to_linear(cast(nn.Linear, inner))
        if lost is not None:
            inside = f" in {inner_name}" if inner_name else ""
            raise UserError(f"{name} ({kind}): it has{inside} {lost}")
    try:
        return make()
    except UserError as error:
        raise UserError(f"{name} ({kind}): {error}") from None


def offloading_problems(model: nn.Module) -> list[str]:
    """What keeps the layers of `model` from being replaced because accelerate manages their weights by name."""
    name = offloaded(model)
    if name is None:
        return []
    return [
        f"{name}: accelerate offloads its weights, by names that would change; call "
        "accelerate.hooks.remove_hook_from_submodules(model) first, and offload the outcome"
    ]


def _shift_in_place_of(layer: nn.Linear | nn.Conv2d, name: str, **options) -> ShiftLayer:
    """A shift layer that takes over the parameters themselves: ties between weights and optimizers stay valid. (In mode
    PS there is no float weight that could be another layer's as well.)
    """
    if isinstance(layer, nn.Conv2d):
        shift = ShiftConv2d.from_conv(layer, name=name, **options)
    else:
        shift = ShiftLinear.from_linear(layer, name=name, **options)
    if shift.mode == "Q":
        shift.weight = cast(nn.Parameter, layer.weight)
    elif layer.weight._backward_hooks or getattr(layer.weight, "_post_accumulate_grad_hooks", None):
        raise UserError("it has hooks on its weight's gradient, which would be lost; remove them first, or take mode Q")
    shift.bias = cast(nn.Parameter, layer.bias)
    keep_attributes(layer, shift, type(layer))
    return shift


def _is_linear_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(module) is nn.Conv2d and counts_as_linear(module)


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
    for child in (children.get("fc1"), children.get("fc2")):
        if not (isinstance(child, (nn.Linear, ShiftLayer, PackedShiftLayer, MoELinear)) or _is_pointwise_conv(child)):
            return False
    return any(
        "act" in name or type(child).__module__ == "torch.nn.modules.activation" for name, child in children.items()
    )


def _is_pointwise_conv(module: nn.Module | None) -> bool:
    return module is not None and _is_linear_conv(module) and module.kernel_size == (1, 1)


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
