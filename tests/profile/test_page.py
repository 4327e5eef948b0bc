"""The page shows what the JSON file holds, and nothing else; browsers show it on any width."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shiftadd3d import UserError, cli
from shiftadd3d.nn import MoEMlp, PackedShiftLinear
from shiftadd3d.profile.accelerator import load_accelerator
from shiftadd3d.profile.charts import _told_apart, label_points, pareto_front
from shiftadd3d.profile.model_report import profile
from shiftadd3d.profile.page import look_up, render_page
from shiftadd3d.profile.quality import read_evaluation
from shiftadd3d.profile.subjects import Subject

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def make(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    middle = {"mult": nn.Linear(24, 24), "add+shift": PackedShiftLinear(24, 24), "moe": MoEMlp(24, 48)}[recipe]
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), middle, nn.Linear(24, 8)).eval()


def subject(name: str = "mine <b>") -> Subject:
    return Subject(name, make, lambda model: torch.randn(1, 16, 24), 1, "picture", "16 patches")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evaluations")
    words = []
    for recipe, top1 in (("mult", 0.9), ("add+shift", 0.85), ("moe", 0.87)):
        file = folder / f"{recipe}.json"
        file.write_text(json.dumps({"top1": top1}))
        words.append(f"{recipe}={file}")
    report = profile(
        [subject()],
        ("mult", "add+shift", "moe"),
        accelerator=load_accelerator(),
        forms=("eager", "frozen"),
        evaluations=[read_evaluation(word) for word in words],
    )
    found = json.loads(json.dumps(report.as_dict()))
    found["profiles"][1]["latency"]["frozen"]["joules"] = 0.002  # as on a machine that counts them
    return found


@pytest.fixture(scope="module")
def page(facts: dict[str, Any]) -> str:
    return render_page(facts)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list[Element] = field(default_factory=list)

    def everything(self) -> Iterator[Element]:
        yield self
        for child in self.inside:
            yield from child.everything()


class Tree(HTMLParser):
    """A page's elements. Ends must fit what was begun."""

    VOID = ("meta", "br", "path", "use", "image", "link", "rect")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("document", {})
        self._open = [self.root]
        self.feed(page)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].inside.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].inside.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].text += data


def test_every_number_is_that_of_the_json_file(facts: dict[str, Any], page: str) -> None:
    tree = Tree(page).root
    numbers = [element for element in tree.everything() if element.tag == "data"]
    assert len(numbers) > 100
    for number in numbers:
        value = look_up(facts, number.attributes["data-place"])
        assert float(number.attributes["value"]) == value
        shown = float(number.text.replace(",", "").rstrip("%"))
        scales = (1, 100, 1e3, 1e-6, 1e-9, 1 / 1024)  # as they are, %, ms, millions or uJ, G, KiB
        digits = len(number.text.rstrip("%").partition(".")[2])
        assert any(abs(value * scale - shown) <= 0.5000001 * 10**-digits for scale in scales)
    cells = [element for element in tree.everything() if element.tag == "td"]
    assert cells and not [cell.text for cell in cells if re.search(r"\d", cell.text.replace("top-1", ""))]


def test_energies_and_times_of_every_recipe_are_there(facts: dict[str, Any], page: str) -> None:
    for number, each in enumerate(facts["profiles"]):
        place = f"profiles.{number}"
        for account in ("arithmetic", "authors", "accelerator"):
            assert f'data-place="{place}.energy.{account}.total_pj"' in page
        for form in each["latency"]:
            assert f'data-place="{place}.latency.{form}.median"' in page
    assert 'data-place="profiles.1.latency.frozen.joules"' in page
    assert set(facts["profiles"][0]["latency"]) == {"eager", "frozen"}
    assert set(facts["profiles"][1]["latency"]) == {"frozen"}  # it is packed already


def test_bars_are_as_long_as_the_numbers_that_they_stand_for(facts: dict[str, Any], page: str) -> None:
    tree = Tree(page).root
    seen = touching = 0
    for drawing in (element for element in tree.everything() if element.tag == "svg"):
        # Bars of one kind, such as energies by one account, are drawn to one scale.
        scales: dict[str, list[tuple[float, float]]] = defaultdict(list)
        stacks: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for bar in drawing.everything():
            place = bar.attributes.get("data-place", "")
            if not place or bar.inside[0].tag != "path":
                continue
            steps = [float(x) for x in re.findall(r"[ML] (\S+) \S+", bar.inside[0].attributes["d"])]
            kind = re.search(r"(energy\.\w+|pj|work|seconds|latency)", place.replace("roofline_", ""))
            assert kind is not None
            scales[kind[1].replace("latency", "seconds")].append((look_up(facts, place), max(steps) - min(steps)))
            if kind[1] not in ("seconds", "latency"):  # stacked, those of a row one after the other
                stacks[place.rpartition(".")[0]].append((min(steps), max(steps)))
        for bars in scales.values():
            longest = max(bars)
            for value, length in bars:
                assert length == pytest.approx(longest[1] * value / longest[0], rel=1e-3, abs=2e-3)
                seen += 1
        for stack in stacks.values():
            for (_, end), (start, _) in itertools.pairwise(sorted(stack)):
                assert start == pytest.approx(end, abs=0.05)
                touching += 1
    assert seen > 100 and touching > 100


def test_parts_add_up_to_the_model(facts: dict[str, Any]) -> None:
    for each in facts["profiles"]:
        for kind, count in each["work"].items():
            assert sum(part["work"][kind] for part in each["parts"]) == pytest.approx(count)
        for account, found in each["energy"].items():
            parts = sum(sum(part["pj"][account].values()) for part in each["parts"])
            assert parts == pytest.approx(found["total_pj"])
        assert all(time >= 0 for part in each["parts"] for time in part["seconds"].values())


def test_the_page_needs_nothing_from_elsewhere(facts: dict[str, Any], page: str) -> None:
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", page.replace("xlink:href", "href"))
    assert "@import" not in page and "<script" not in page and "url(http" not in page
    assert "http://" not in page and "https://" not in page
    assert "mine &lt;b&gt;" in page and "mine <b>" not in page
    assert render_page(facts) == page  # the same facts, the same bytes


def test_no_id_stands_twice(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 10


def test_routing_is_shown_where_there_is_a_mixture(facts: dict[str, Any], page: str) -> None:
    assert "Routing: mine &lt;b&gt;, moe" in page and "Routing: mine &lt;b&gt;, mult" not in page
    (router,) = facts["profiles"][2]["routing"]
    assert (router["layer"], router["experts"]) == ("2", ["mult", "shift"])
    cells = [cell for row in router["map"] for cell in row]
    assert len(cells) == 16 and router["share"] == pytest.approx(sum(cells) / 16)


def test_a_recipe_that_changes_nothing_is_said_to(facts: dict[str, Any], page: str) -> None:
    assert not any(each["is_unchanged"] for each in facts["profiles"]) and "nothing" not in page
    still = Subject("still", lambda recipe: make("mult"), lambda model: torch.randn(1, 16, 24), 1, "picture", "16 px")
    report = profile([still], ("mult", "add", "moe"), accelerator=load_accelerator())
    unchanged = [each["is_unchanged"] for each in report.as_dict()["profiles"]]
    assert unchanged == [False, True, True]
    for text in (str(report), render_page(report.as_dict())):
        assert "add and moe change nothing here" in " ".join(re.sub("<[^>]*>", "", text).split())


def test_names_of_mixtures_are_told_apart() -> None:
    short = ["blocks.0", "blocks.1"]
    assert _told_apart(short, 22) == short
    rays = ["net_coarse.view_crosstrans.0.ff", "net_coarse.view_selftrans.1.ff"]
    assert _told_apart(rays, 22) == ["view_crosstrans.0.ff", "view_selftrans.1.ff"]
    assert _told_apart(["a" * 9, "a" * 8 + "b"], 5) == ["…aaaa", "…aaab"]
    assert _told_apart(["encoder.layer.mlp"], 10) == ["mlp"]


def test_a_frozen_model_says_why_it_has_no_eager_time(page: str) -> None:
    assert "What is frozen already has no eager form." in page and "can be compiled" not in page


def test_the_front_has_what_no_other_beats_in_both() -> None:
    assert pareto_front([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (1, 0.2)]) == [1, 3, 0]
    assert pareto_front([]) == []


def test_labels_of_points_that_lie_close_stay_apart_and_inside() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    points = [(1.0, 1.0, "first recipe"), (1.01, 1.0, "second recipe"), (1.0, 1.01, "third"), (3.0, 3.0, "at the edge")]
    axis.plot(*zip(*((x, y) for x, y, _ in points), strict=True), "o")
    axis.margins(0.2, 0.3)
    label_points(axis, points, 9)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [label for _, _, label in points]
    assert not any(box.overlaps(other) for box, other in itertools.combinations(boxes, 2))
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and box.y1 <= axis.bbox.y1 for box in boxes)


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_page_and_json_of_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page, file = tmp_path / "out" / "a.html", tmp_path / "out" / "a.json"
    words = ["profile", "gnt-tiny", "--rays", "2", "--recipes", "mult", "add+shift", "--latency", "eager"]
    assert cli.main([*words, "--html", str(page), "--json", str(file)]) == 0
    assert page.read_text() == render_page(json.loads(file.read_text()))
    assert sorted(path.name for path in page.parent.iterdir()) == ["a.html", "a.json"]
    assert "latency, ms" in capsys.readouterr().out


def test_tables_fit_a_terminal() -> None:
    from rich.console import Console

    report = profile([subject("a model")], ("mult", "moe"), accelerator=load_accelerator(), forms=("frozen",))
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert "…" not in capture.get() and "latency, ms" in capture.get()


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_a_place_that_cannot_be_written_is_one_line_before_anything_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("shiftadd3d.profile.model_report.count_operations", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "out", tmp_path / "folder"):
        assert cli.main(["profile", "gnt-tiny", option, str(place)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(place) in error and option in error
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "folder").iterdir())


def test_page_and_json_are_two_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "a"
    assert cli.main(["profile", "gnt-tiny", "--html", str(file), "--json", f"{tmp_path}/../{tmp_path.name}/a"]) == 1
    assert capsys.readouterr().err == f"error: --html and --json both name {file}; expected two different files\n"
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_if_a_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["profile", "no-such-model", "--html", str(tmp_path / "new" / "a.html"), "--json", str(tmp_path / "a.json")]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------------
# Evaluations
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "name", "value"),
    [
        ({"top1": 0.5, "checkpoint": "out/best", "architecture": "vit", "recipe": "add"}, "top-1", 0.5),
        ({"results": {"psnr": 30.5}}, "PSNR", 30.5),
        ({"scenes": [{"psnr": 20}, {"psnr": 30}]}, "PSNR", 25.0),
    ],
)
def test_what_evaluations_say(tmp_path: Path, facts: dict[str, Any], name: str, value: float) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(facts))
    found = read_evaluation(str(file))
    assert (found.quality.name, found.quality.value) == (name, value)
    assert found.is_of("out/best", "add") and found.is_of("vit", "add")
    assert found.is_of("other", "mult") == (name == "PSNR")
    labelled = read_evaluation(f"vit:moe={file}")
    assert labelled.is_of("vit", "moe") and not labelled.is_of("vit", "add") and not labelled.is_of("other", "moe")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, ["missing.json"], "cannot read the evaluation missing.json: No such file"),
        ("{", ["{file}"], "is no JSON"),
        ('{"top1": "high"}', ["{file}"], "holds no top-1 and no PSNR; expected what"),
        ("[]", ["{file}"], "holds no top-1 and no PSNR"),
        ('{"top1": 1}', ["{file}"], "is of several of mine <b>:mult, mine <b>:moe: say which by --quality"),
        ('{"top1": 1}', ["add={file}"], "is of none of mine <b>:mult, mine <b>:moe"),
        ('{"top1": 1}', ["moe={file}", "moe={file}"], "are both of mine <b>:moe"),
    ],
)
def test_evaluations_that_say_nothing(tmp_path: Path, content: str | None, words: list[str], message: str) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)

    def profiled() -> None:
        evaluations = [read_evaluation(word.format(file=file)) for word in words]
        profile([subject()], ("mult", "moe"), accelerator=load_accelerator(), evaluations=evaluations)

    with pytest.raises(UserError, match=re.escape(message)):
        profiled()


def test_different_qualities_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"top1": 0.5}')
    (tmp_path / "b.json").write_text('{"results": {"psnr": 20.0}}')
    evaluations = [read_evaluation(f"mult={tmp_path / 'a.json'}"), read_evaluation(f"moe={tmp_path / 'b.json'}")]
    with pytest.raises(UserError, match="evaluations measure top-1 and PSNR"):
        profile([subject()], ("mult", "moe"), accelerator=load_accelerator(), evaluations=evaluations)


# --------------------------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------------------------

_MEASURE = """<script>
const shown = [...document.querySelectorAll("figure svg")].filter(each => each.getBoundingClientRect().width > 0);
document.documentElement.setAttribute("data-found", JSON.stringify({
  page: document.documentElement.scrollWidth, window: innerWidth, drawings: shown.length,
  all: document.querySelectorAll("figure").length, wide: shown.filter(each => each.closest(".wide")).length,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  widest: Math.max(...shown.map(each => each.getBoundingClientRect().width)),
}));
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False)])
def test_a_browser_shows_it(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", _MEASURE + "</body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run(
        [str(BROWSER), *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(Tree(done.stdout).root.inside[0].attributes["data-found"])
    assert found["page"] <= found["window"] == width  # tables scroll within, the page does not
    assert found["drawings"] == found["all"] > 5 and found["widest"] <= width
    assert found["wide"] == (found["all"] if width > 700 else 0)
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) for name in ("paper", "ink"))
    assert (paper < ink) == dark
