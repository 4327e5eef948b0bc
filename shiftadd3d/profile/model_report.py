"""Models beside each other: what they do, what they move and what that takes, recipe by recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shiftadd3d._errors import UserError
from shiftadd3d._report import RichReport
from shiftadd3d.nn import OperationReport, count_operations
from shiftadd3d.profile.accelerator import Accelerator
from shiftadd3d.profile.energy import ACCOUNTS, LEVELS, Account, EnergyReport, energy
from shiftadd3d.profile.subjects import Subject

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

RECIPES = ("mult", "add", "add+shift", "add+shift-attn+moe")
"""What is compared where nothing else is asked for; the first is what the others are compared with."""


@dataclass(frozen=True)
class Profile:
    """One model in one recipe."""

    model: str
    recipe: str
    operations: OperationReport
    energy: dict[Account, EnergyReport]
    """By each account."""


@dataclass(frozen=True)
class ProfileReport(RichReport):
    """What `profile` found. Printing shows a table a model."""

    setting: str
    """What the models see."""
    unit: str
    """What all numbers are for one of, such as a picture."""
    accelerator: Accelerator
    profiles: tuple[Profile, ...]

    def baseline(self, profile: Profile) -> Profile:
        """The same model in the first recipe."""
        return next(other for other in self.profiles if other.model == profile.model)

    def as_dict(self) -> dict[str, Any]:
        return {
            "setting": self.setting,
            "unit": self.unit,
            "accelerator": self.accelerator.name,
            "profiles": [
                {
                    "model": each.model,
                    "recipe": each.recipe,
                    "operations": each.operations.as_dict(),
                    "energy": {
                        account: {**found.as_dict(), "saved": found.saved(self.baseline(each).energy[account])}
                        for account, found in each.energy.items()
                    },
                }
                for each in self.profiles
            ],
        }

    def __rich__(self) -> Group:
        from rich.console import Group

        parts: list[Any] = []
        for model in dict.fromkeys(each.model for each in self.profiles):
            chosen = [each for each in self.profiles if each.model == model]
            parts += [self._work(model, chosen), self._energy(chosen), self._levels(chosen)]
        notes = [f"{account}: {found.assumptions}" for account, found in self.profiles[0].energy.items()]
        return Group(
            *parts, *notes, "elementwise work: norms, softmax, activation functions, sums; apart from products"
        )

    def _work(self, model: str, profiles: Sequence[Profile]) -> Table:
        table = _table("recipe", "Mmult", "Mshift", "Madd", "Melementwise", "weights KiB", "activations KiB")
        table.title = f"{model}: one {self.unit} ({self.setting})"
        for each in profiles:
            done, inputs = each.operations, each.operations.inputs
            elementwise = sum(sum(counts.values()) for counts in done.elementwise.values())
            moved = done.moved_bytes
            sizes = moved["weight_bytes"], moved["input_bytes"] + moved["output_bytes"]
            cells = [f"{count / inputs / 1e6:,.2f}" for count in (done.mult, done.shift, done.add, elementwise)]
            table.add_row(each.recipe, *cells, *(f"{size / inputs / 1024:,.1f}" for size in sizes))
        return table

    def _energy(self, profiles: Sequence[Profile]) -> Table:
        table = _table("energy", *(f"{account}{what}" for account in ACCOUNTS for what in (", uJ", " saved")))
        for each in profiles:
            cells = []
            for account, found in each.energy.items():
                saved = found.saved(self.baseline(each).energy[account])
                cells += [f"{found.total / 1e6:,.2f}", f"{saved:.1%}"]
            table.add_row(each.recipe, *cells)
        return table

    def _levels(self, profiles: Sequence[Profile]) -> Table:
        table = _table("accelerator, uJ", *LEVELS)
        for each in profiles:
            pj = each.energy["accelerator"].pj
            table.add_row(each.recipe, *(f"{pj[level] / 1e6:,.2f}" for level in LEVELS))
        return table


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def profile(
    subjects: Sequence[Subject], recipes: Sequence[str] = RECIPES, *, accelerator: Accelerator
) -> ProfileReport:
    """Count what models do in each recipe, and what that takes by each account.

    Raises:
        UserError: no models or recipes, models whose inputs differ, or one that fails.
    """
    if not subjects or not recipes:
        raise UserError("there is nothing to profile: name at least one model and one recipe")
    first = subjects[0]
    for other in subjects[1:]:
        if (other.unit, other.setting) != (first.unit, first.setting):
            raise UserError(
                f"{first.name} sees {first.setting}, but {other.name} {other.setting}: profile models beside each "
                "other that see the same"
            )
    found = []
    for subject in subjects:
        for recipe in subject.recipes or recipes:
            operations = count(subject, recipe)
            reports: dict[Account, EnergyReport] = {
                account: energy(operations, account, accelerator) for account in ACCOUNTS
            }
            found.append(Profile(subject.name, recipe, operations, reports))
    return ProfileReport(first.setting, first.unit, accelerator, tuple(found))


def count(subject: Subject, recipe: str) -> OperationReport:
    """What a model in one recipe does with its input.

    Raises:
        UserError: the recipe does not fit, or the model fails.
    """
    model = subject.make(recipe)
    try:
        return count_operations(model, subject.batch(model), inputs=subject.inputs)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{subject.name} in recipe {recipe} fails with {subject.setting}: {reason}") from error
