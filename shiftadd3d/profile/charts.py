"""Charts of a report as SVG, drawn by matplotlib from the facts in its JSON file.

Each chart has two shapes: with panels side by side for wide pages, and below one another for narrow pages. Colours are
CSS variables of the page, so one drawing suits light, dark and printed pages. Each element that shows a number has as
its id the place of that number in the JSON file, such as ``profiles.1.energy.accelerator.pj.dram``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OPERATIONS = {"mult": "multiplications", "shift": "shifts", "add": "additions", "elementwise": "elementwise"}
LEVELS = {
    "arithmetic": "arithmetic",
    "register": "registers",
    "noc": "network",
    "buffer": "buffer",
    "dram": "DRAM",
    "elementwise": "elementwise",
}

_LEVEL_COLORS = (0, 1, 2, 6, 4, 3)  # elementwise work has the same grey in all charts

# Colours that stand for variables of the page until the drawing is done: no drawing has them otherwise.
_VARIABLES = {
    "#0f0001": "--ink",
    "#0f0002": "--faint",
    "#0f0003": "--line",
    "#0f0004": "--paper",
    **{f"#0f01{number:02d}": f"--series-{number}" for number in range(1, 9)},
}
_INK, _FAINT, _LINE, _PAPER = list(_VARIABLES)[:4]
_SERIES = list(_VARIABLES)[4:]
_WIDE, _NARROW = 10.0, 4.6
"""Inches. A point is a pixel where the page is as wide as the drawing."""
_BAR = 0.72
_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Chart:
    """One chart in both shapes."""

    title: str
    note: str
    wide: str
    narrow: str


class _Segment(NamedTuple):
    """A part of a bar: its length, its place in the JSON file, and which of the series it belongs to."""

    value: float
    place: str
    series: int


class _Panel(NamedTuple):
    title: str
    rows: list[str]
    bars: list[list[_Segment]]
    """One for each row: side by side, or below one another if they are `apart`."""


def work_by_part(facts: dict[str, Any], model: str) -> Chart:
    """Operations of each part, stacked by kind, recipe by recipe."""
    panels = []
    for number, each in _of_model(facts, model):
        rows, bars = [], []
        for index, part in enumerate(each["parts"]):
            rows.append(part["part"])
            bars.append(
                [
                    _Segment(part["work"][kind], f"profiles.{number}.parts.{index}.work.{kind}", series)
                    for series, kind in enumerate(OPERATIONS)
                ]
            )
        panels.append(_Panel(each["recipe"], rows, bars))
    title = f"Operations of one {facts['unit']} by part"
    note = "An addition follows each multiplication and each shift. Elementwise: norms, softmax, activation functions."
    return _bars(title, note, panels, list(OPERATIONS.values()), "", f"work {model}")


def energy_by_level(facts: dict[str, Any], model: str) -> Chart:
    """Energy of each recipe, stacked by level, account by account."""
    panels = []
    for account in facts["assumptions"]:
        rows, bars = [], []
        for number, each in _of_model(facts, model):
            rows.append(each["recipe"])
            bars.append(
                [
                    _Segment(
                        each["energy"][account]["pj"][level] * 1e-12,
                        f"profiles.{number}.energy.{account}.pj.{level}",
                        series,
                    )
                    for series, level in enumerate(LEVELS)
                ]
            )
        panels.append(_Panel(account, rows, bars))
    title = f"Energy of one {facts['unit']} by level"
    note = "Each account has a scale of its own: they assume different things and do not add up."
    return _bars(
        title, note, panels, list(LEVELS.values()), "J", f"energy {model}", own_scales=True, colors=_LEVEL_COLORS
    )


def energy_by_part(facts: dict[str, Any], model: str) -> Chart:
    """Energy of each part on the accelerator, stacked by level, recipe by recipe."""
    panels = []
    for number, each in _of_model(facts, model):
        rows, bars = [], []
        for index, part in enumerate(each["parts"]):
            rows.append(part["part"])
            bars.append(
                [
                    _Segment(value * 1e-12, f"profiles.{number}.parts.{index}.pj.accelerator.{level}", series)
                    for series, (level, value) in enumerate(part["pj"]["accelerator"].items())
                ]
            )
        panels.append(_Panel(each["recipe"], rows, bars))
    title = f"Energy of one {facts['unit']} by part, on the accelerator"
    return _bars(title, "", panels, list(LEVELS.values()), "J", f"parts {model}", colors=_LEVEL_COLORS)


def latency_by_part(facts: dict[str, Any], model: str) -> Chart:
    """Seconds of each part in each form, beside the roofline, recipe by recipe."""
    forms = _forms(facts)
    panels = []
    for number, each in _of_model(facts, model):
        rows, bars = [], []
        for index, part in enumerate(each["parts"]):
            place = f"profiles.{number}.parts.{index}"
            rows.append(part["part"])
            bars.append(
                [
                    _Segment(seconds, f"{place}.seconds.{form}", forms.index(form))
                    for form, seconds in part["seconds"].items()
                ]
                + [_Segment(part["roofline_seconds"], f"{place}.roofline_seconds", len(forms))]
            )
        panels.append(_Panel(each["recipe"], rows, bars))
    title = f"Latency of one {facts['unit']} by part"
    note = (
        "What each part does itself: medians of warm calls. What runs within another part's kernel counts there. "
        "Roofline: products at the speed of torch's in float32, or all data from memory, whichever takes longer."
    )
    return _bars(title, note, panels, [*forms, "roofline"], "s", f"latency {model}", apart=True)


def latency(facts: dict[str, Any], model: str) -> Chart:
    """Seconds of each recipe in each form."""
    forms = _forms(facts)
    rows, bars = [], []
    for number, each in _of_model(facts, model):
        rows.append(each["recipe"])
        bars.append(
            [
                _Segment(times["median"], f"profiles.{number}.latency.{form}.median", forms.index(form))
                for form, times in each["latency"].items()
            ]
            + [_Segment(each["roofline_seconds"], f"profiles.{number}.roofline_seconds", len(forms))]
        )
    panel = _Panel("", rows, bars)
    title = f"Latency of one {facts['unit']}"
    note = "Medians of warm calls that take turns."
    missing = {form for _, each in _of_model(facts, model) for form in forms if form not in each["latency"]}
    if "eager" in missing:
        note += " What is frozen already has no eager form."
    if "compiled" in missing:
        note += " Not every model can be compiled."
    return _bars(title, note, [panel], [*forms, "roofline"], "s", f"total {model}", apart=True)


class _Point(NamedTuple):
    x: float
    y: float
    label: str
    place: str
    series: int


def pareto(facts: dict[str, Any]) -> Chart:
    """Quality against energy on the accelerator, and against latency if it was measured."""
    models = list(dict.fromkeys(each["model"] for each in facts["profiles"]))
    energies: list[_Point] = []
    times: dict[str, list[_Point]] = {}
    name = ""
    for number, each in enumerate(facts["profiles"]):
        if each["quality"] is None:
            continue
        name, quality = each["quality"]["name"], each["quality"]["value"]
        label = each["recipe"] if len(models) == 1 else f"{each['model']}, {each['recipe']}"
        place, series = f"profiles.{number}", models.index(each["model"])
        joules = each["energy"]["accelerator"]["total_pj"] * 1e-12
        energies.append(_Point(joules, quality, label, f"{place}.energy.accelerator.total_pj", series))
        for form, spread in each["latency"].items():
            point = _Point(spread["median"], quality, label, f"{place}.latency.{form}.median", series)
            times.setdefault(form, []).append(point)
    panels = [("energy on the accelerator", "J", energies)]
    panels += [(f"latency, {form}", "s", points) for form, points in times.items()]
    drawings = []
    for width, beside in ((_WIDE, True), (_NARROW, False)):
        columns = len(panels) if beside else 1
        rows = -(-len(panels) // columns)
        figure = _figure(width, 3.6 * rows + 0.2)
        for axis, (label, unit, points) in zip(
            figure.subplots(rows, columns, squeeze=False).ravel(), panels, strict=True
        ):
            _scatter(axis, points, unit)
            axis.set_xlabel(label)
            axis.set_ylabel(f"{name}" + (", dB" if name == "PSNR" else ""))
        for axis, (_, _, points) in zip(figure.axes, panels, strict=True):
            label_points(axis, [(point.x, point.y, point.label) for point in points], 9)
        drawings.append(_svg(figure, f"pareto {width}"))
    note = "Up and to the left is better. The line joins those that no other one beats in both."
    return Chart("Quality against what it takes", note, *drawings)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points (cost, quality) that no other point beats in both, the cheapest first."""
    order = sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1]))
    front: list[int] = []
    for at in order:
        if not front or points[at][1] > points[front[-1]][1]:
            front.append(at)
    return front


def routing(facts: dict[str, Any], number: int) -> Chart:
    """The patches or rays that each mixture sent to its first expert."""
    from matplotlib.colors import LinearSegmentedColormap

    each = facts["profiles"][number]
    shown = [router for router in each["routing"] if router["map"] is not None]
    colors = LinearSegmentedColormap.from_list("experts", ["#2f6db3", "#e8d9c0", "#d9631e"])
    titles = _told_apart([router["layer"].removesuffix(".mlp") for router in shown], 22)
    # Pictures of few mixtures can be large; of one alone, as large as one of four.
    few = len(shown) <= 4
    tall = max(len(router["map"]) / len(router["map"][0]) for router in shown)
    drawings = []
    for width, columns in ((_WIDE, 4 if few else 6), (_NARROW, 2 if few else 3)):
        rows = -(-len(shown) // columns)
        figure = _figure(width, rows * (tall * width / columns + 0.4))
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, router, title in zip(axes, shown, titles, strict=False):
            axis.imshow(router["map"], cmap=colors, vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{title}\n{router['share']:.0%} {router['experts'][0]}", fontsize=9)
        drawings.append(_svg(figure, f"routing {number} {width}"))
    first, *others = shown[0]["experts"]
    between = "; in between, some samples of a ray to each" if facts["unit"] == "ray" else ""
    note = f"Orange went to {first}, blue to {', '.join(others)}{between}. Weights: {each['weights']}."
    return Chart(f"Routing: {each['model']}, {each['recipe']}", note, *drawings)


def _of_model(facts: dict[str, Any], model: str) -> list[tuple[int, dict[str, Any]]]:
    return [(number, each) for number, each in enumerate(facts["profiles"]) if each["model"] == model]


def _forms(facts: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(form for each in facts["profiles"] for form in each["latency"]))


def _told_apart(names: Sequence[str], most: int) -> list[str]:
    """Qualified names in at most so many characters: if need be without what all of them begin with, then cut."""
    if max(map(len, names)) > most:
        parts = [name.split(".") for name in names]
        shortest = min(map(len, parts)) - 1
        same = next((at for at in range(shortest) if len({each[at] for each in parts}) > 1), shortest)
        names = [".".join(each[same:]) for each in parts]
    return [_shortened(name, most) for name in names]


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


# --------------------------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bars(
    title: str,
    note: str,
    panels: Sequence[_Panel],
    series: Sequence[str],
    unit: str,
    salt: str,
    *,
    apart: bool = False,
    own_scales: bool = False,
    colors: Sequence[int] = range(8),
) -> Chart:
    """Horizontal bars, panel by panel; a series that is zero everywhere has no entry in the legend."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter

    used = sorted({segment.series for panel in panels for bar in panel.bars for segment in bar if segment.value})
    handles = [Patch(color=_SERIES[colors[number]], label=series[number]) for number in used]
    names_repeat = len({tuple(panel.rows) for panel in panels}) == 1
    drawings = []
    for width, columns in ((_WIDE, min(4, len(panels))), (_NARROW, 1)):
        rows = -(-len(panels) // columns)
        thickness = 0.26 if not apart else 0.14 * (1 + len(used))
        heights = [
            max(len(panel.rows) for panel in panels[row * columns : (row + 1) * columns]) * thickness + 0.6
            for row in range(rows)
        ]
        figure = _figure(width, sum(heights) + 0.45)
        axes = figure.subplots(
            rows, columns, squeeze=False, sharex=not own_scales, sharey="row" if names_repeat else False,
            height_ratios=heights,
        )  # fmt: skip
        for axis in axes.ravel()[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes.ravel(), panels, strict=False):
            axis.margins(x=0.02)
            _draw_bars(axis, panel, apart, colors)
            axis.set_title(panel.title, fontsize=11, fontweight="bold", loc="left")
            axis.xaxis.set_major_formatter(EngFormatter(unit, sep="\N{NO-BREAK SPACE}" if unit else ""))
            axis.tick_params(axis="x", labelbottom=True)
            axis.xaxis.set_major_locator(_few_ticks())
        figure.legend(handles=handles, loc="outside upper left", ncols=len(used) if columns > 1 else 3, frameon=False)
        drawings.append(_svg(figure, f"{salt} {width}"))
    return Chart(title, note, *drawings)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)


def _draw_bars(axis: Any, panel: _Panel, apart: bool, colors: Sequence[int]) -> None:
    for row, bar in enumerate(panel.bars):
        left = 0.0
        thickness = _BAR / len(bar) if apart else _BAR
        for number, segment in enumerate(bar):
            if not segment.value:
                continue
            at = row + ((number + 0.5) * thickness - _BAR / 2 if apart else 0.0)
            (drawn,) = axis.barh(at, segment.value, thickness * 0.94, left, color=_SERIES[colors[segment.series]])
            drawn.set_gid(segment.place)
            left += 0.0 if apart else segment.value
    axis.set_yticks(range(len(panel.rows)), [_shortened(name, 30) for name in panel.rows])
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    axis.grid(axis="x", color=_LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _scatter(axis: Any, points: Sequence[_Point], unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    front = pareto_front([(point.x, point.y) for point in points])
    axis.plot([points[at].x for at in front], [points[at].y for at in front], color=_FAINT, linewidth=1.2, zorder=1)
    for point in points:
        marker = _MARKERS[point.series % len(_MARKERS)]
        (drawn,) = axis.plot(point.x, point.y, marker, color=_SERIES[point.series % len(_SERIES)], markersize=7)
        drawn.set_gid(point.place)
    axis.margins(x=0.25, y=0.18)
    axis.grid(color=_LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_formatter(EngFormatter(unit))
    axis.xaxis.set_major_locator(_few_ticks())
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


# Where a label may stand beside its point: its offset in points, and what of it lies there.
_BESIDE = tuple(
    (dx, dy, across, along)
    for near in (1, 3.4)
    for dy, along in ((5 * near, "bottom"), (-5 * near, "top"))
    for dx, across in ((6, "left"), (-6, "right"), (0, "center"))
)


def label_points(axis: Any, points: Sequence[tuple[float, float, str]], size: float) -> None:
    """Write labels beside points (x, y, label), inside the axes and over no other label or point, if there is room.

    Call it after everything else is drawn, because the layout decides where there is room. `size` is the font size in
    points.
    """
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()
    centres = axis.transData.transform([(x, y) for x, y, _ in points]) if points else []
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    for x, y, label in points:
        found: list[tuple[int, Any, Any]] = []
        for dx, dy, across, along in _BESIDE:
            text = axis.annotate(
                label, (x, y), (dx, dy), textcoords="offset points", fontsize=size, ha=across, va=along
            )
            box = text.get_window_extent()
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0
            inside = inside and box.y1 <= axis.bbox.y1
            found.append((box.count_overlaps(taken) + 2 * (not inside), text, box))
        _, chosen, box = min(found, key=lambda each: each[0])
        taken.append(box)
        for _, text, _ in found:
            if text is not chosen:
                text.remove()


def _svg(figure: Any, salt: str) -> str:
    """The drawing as an element for a page, as wide as its place there."""
    from matplotlib import rc_context

    for axis in figure.axes:
        axis.set_facecolor("none")
        for text in (axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts):
            text.set_color(_INK)
        for spine in axis.spines.values():
            spine.set_color(_LINE)
        axis.tick_params(colors=_FAINT, labelcolor=_INK, which="both")
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(_INK)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A page has each chart twice, and no id twice. Those of markers and clips are made of the salt.
    text = re.sub(r' id="(profiles\.[^"]*)"', r' data-place="\1"', text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
