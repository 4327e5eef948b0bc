"""A report as one web page that needs no network, made of the facts in its JSON file.

Every number in the text of the page is a ``<data>`` element with its place in the JSON file (``data-place``) and its
value there (``value``).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from shiftadd3d.profile import charts
from shiftadd3d.profile.model_report import UNCHANGED

_TEMPLATE = "page.html.jinja"


def render_page(facts: dict[str, Any]) -> str:
    """The page.

    Args:
        facts: `ProfileReport.as_dict()`, or what its JSON file holds.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("shiftadd3d.profile", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip

    def number(place: str, form: str, scale: float = 1.0) -> Markup:
        value = look_up(facts, place)
        text = format(value * scale, form)
        return Markup('<data value="{}" data-place="{}">{}</data>').format(repr(value), place, text)

    models = list(dict.fromkeys(each["model"] for each in facts["profiles"]))
    by_model = []
    for model in models:
        numbers = [at for at, each in enumerate(facts["profiles"]) if each["model"] == model]
        drawn = [charts.work_by_part(facts, model), charts.energy_by_level(facts, model)]
        drawn.append(charts.energy_by_part(facts, model))
        if facts["peak"] is not None:
            drawn += [charts.latency(facts, model), charts.latency_by_part(facts, model)]
        routed = [at for at in numbers if any(router["map"] for router in facts["profiles"][at]["routing"])]
        drawn += [charts.routing(facts, at) for at in routed]
        same = [facts["profiles"][at]["recipe"] for at in numbers if facts["profiles"][at]["is_unchanged"]]
        best = _best(facts, numbers)
        by_model.append({"name": model, "numbers": numbers, "charts": drawn, "best": best, "same": same})
    forms = list(dict.fromkeys(form for each in facts["profiles"] for form in each["latency"]))
    measured = [
        form for form in forms if any(each["latency"].get(form, {}).get("joules") for each in facts["profiles"])
    ]
    has_quality = any(each["quality"] for each in facts["profiles"])
    page = environment.get_template(_TEMPLATE).render(
        facts=facts,
        models=by_model,
        number=number,
        forms=forms,
        measured=measured,
        levels=charts.LEVELS,
        operations=charts.OPERATIONS,
        unchanged=UNCHANGED,
        has_quality=has_quality,
        pareto=charts.pareto(facts) if has_quality else None,
        svg=Markup,
    )
    return page + "\n"


def look_up(facts: Any, place: str) -> Any:
    """The value at a place such as ``profiles.1.energy.accelerator.saved``."""
    return reduce(lambda part, key: part[int(key)] if isinstance(part, list) else part[key], place.split("."), facts)


def _best(facts: dict[str, Any], numbers: list[int]) -> list[tuple[str, int]]:
    """For each account, which recipe saves the most."""
    if len(numbers) < 2:
        return []
    saved = {
        account: max(numbers[1:], key=lambda at: facts["profiles"][at]["energy"][account]["saved"])
        for account in facts["assumptions"]
    }
    return list(saved.items())
