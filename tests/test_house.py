"""What the project promises about itself: packaging, the lock, the Makefile, and which part may import which."""

from __future__ import annotations

import configparser
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

LOCKS = ("requirements.lock", "requirements-peers.lock")
# What the lock is for: every supported Python on the systems that it has been tried or resolved on.
ENVIRONMENTS = [
    {
        "python_version": version,
        "python_full_version": f"{version}.9",
        "sys_platform": platform,
        "platform_system": "Darwin" if platform == "darwin" else "Linux",
        "platform_machine": "arm64" if platform == "darwin" else "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for version in ("3.10", "3.11", "3.12")
    for platform in ("linux", "darwin")
]


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def lock(repository: Path) -> list[tuple[Requirement, list[str]]]:
    """The requirements of both locks, each with its hashes."""
    text = "".join((repository / name).read_text() for name in LOCKS).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (
            Requirement(" ".join(word for word in words if not word.startswith("--"))),
            [word.partition("=")[2] for word in words if word.startswith("--hash=")],
        )
        for words in lines
    ]


def tracked_files(repository: Path) -> list[Path]:
    """The files that are, or would be, committed."""
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode:
        pytest.skip("not a git checkout")
    files = [repository / name for name in git.stdout.split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def python_tree(repository: Path, destination: Path) -> Path:
    """Copy what the package is made of to `destination`, links as links; returns it."""
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("shiftadd3d", "kernels", "scenes", "configs"):
        shutil.copytree(repository / folder, destination / folder, symlinks=True, ignore=skip)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / file, destination)
    return destination


# The lock


def test_every_locked_requirement_is_pinned_and_hashed_and_names_no_address(
    lock: list[tuple[Requirement, list[str]]], repository: Path
):
    assert len(lock) > 200
    for requirement, hashes in lock:
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), requirement
    for name in LOCKS:
        text = (repository / name).read_text()
        assert "://" not in text
        assert "index-url" not in text


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: f"{e['python_version']}-{e['sys_platform']}")
def test_the_lock_satisfies_pyproject(
    environment: dict[str, str], lock: list[tuple[Requirement, list[str]]], project: dict[str, Any]
):
    locked: dict[str, str] = {}
    for requirement, _ in lock:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in locked, f"{name} is locked twice"
            locked[name] = next(iter(requirement.specifier)).version
    wanted = list(project["project"]["dependencies"])
    for group in [*project["project"]["optional-dependencies"].values(), *project["dependency-groups"].values()]:
        wanted += group
    overridden = {
        canonicalize_name(override.name): override
        for override in map(Requirement, project["tool"]["uv"]["override-dependencies"])
    }
    for requirement in [*map(Requirement, wanted), *overridden.values()]:
        name = canonicalize_name(requirement.name)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(locked[name], prereleases=True), f"{requirement}, not {locked[name]}"
        else:
            assert name not in locked


def test_what_is_installed_is_what_the_lock_says(lock: list[tuple[Requirement, list[str]]]):
    """Also tells that `make setup` is due."""
    from importlib.metadata import version

    for name in ("torch", "timm", "nerfstudio", "apache-tvm", "numpy", "pytest", "ruff"):
        pinned = next(
            requirement
            for requirement, _ in lock
            if canonicalize_name(requirement.name) == name and (not requirement.marker or requirement.marker.evaluate())
        )
        assert pinned.specifier.contains(version(name), prereleases=True), f"{name} {version(name)}: run make setup"


def test_cv2_has_one_owner(lock: list[tuple[Requirement, list[str]]]):
    """Two distributions that write the same cv2/ folder leave it to chance which one is there."""
    assert [requirement.name for requirement, _ in lock if "opencv" in requirement.name] == ["opencv-python-headless"]


# The Makefile and the words about it


def test_the_make_commands_that_the_documents_name_exist(repository: Path):
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "test", "demo", "lint", "lock", "clean"} <= targets
    named: dict[str, set[str]] = {}
    for document in [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]:
        named[document.name] = set(re.findall(r"(?:^\s*(?:\$ )?|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named[document.name] <= targets, document
    assert {"demo", "test"} <= named["README.md"]


def test_version_and_date_are_the_same_everywhere(repository: Path, project: dict[str, Any]):
    version = project["project"]["version"]
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == version
    dated = re.findall(
        r"^## \[([\d.]+)\] - (\d{4}-\d{2}-\d{2})$", (repository / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert dated[0] == (version, citation["date-released"])


def test_pre_commit_runs_what_make_lint_runs(repository: Path):
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (repository / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in local["hooks"])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("python", ["no-such-python", "false", ""], ids=["missing", "broken", "none on the path"])
def test_setup_without_a_fitting_python_says_so_in_one_line(python: str, repository: Path, tmp_path: Path):
    for file in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(repository / file, tmp_path)
    make = shutil.which("make")
    assert make
    for tool in ("sh", "rm", "false"):
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(found)
    environment = {"PATH": str(tmp_path / "bin"), "PYTHON": python}
    result = subprocess.run([make, "setup"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: shiftadd3d needs Python 3.10, 3.11 or 3.12")
    assert (python or "python3.12 python3.11 python3.10") in errors[0]
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("ends", "complaint"),
    [("kill -9 $$", "error: signal 9 ended this; 9 is what the system sends when memory runs out"), ("exit 1", "")],
)
def test_a_demo_that_is_killed_is_said_to_have_been(ends: str, complaint: str, repository: Path, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for name, content in (("bin/uv", ""), ("bin/shiftadd3d", f"#!/bin/sh\n{ends}\n"), (".installed", "")):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["make", "demo", f"VENV={tmp_path}"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert errors == ([complaint] if complaint else [])


def test_no_file_names_a_package_index_or_a_place_on_one_machine(repository: Path):
    # In pieces, so that this file names none either.
    hosts = "|".join(rf"{name}\.org" for name in ("pypi", "pythonhosted", "download.pytorch", "anaconda", "npmjs"))
    places = r"(?<![\w.~-])/(?:root|work|home/[a-z]+|Users/[a-z]+|opt/(?:pypi|wheels))[/\w-]*"
    pattern = re.compile(f"{hosts}|{places}".encode())
    found: list[str] = []
    files = tracked_files(repository)
    assert len(files) > 20
    for file in files:
        if file != Path(__file__).resolve():
            found += [f"{file}: {match.decode()}" for match in pattern.findall(file.read_bytes())]
    assert not found
    assert pattern.findall(b"--index-url https://" + b"pypi" + b".org/simple")
    assert pattern.findall(b"data=/home/someone/data")


# The package


def test_every_package_is_declared(repository: Path, project: dict[str, Any]):
    """setuptools is given a list, because kernels, scenes and configs stand outside the package's folder."""
    links = {"kernels", "scenes", "configs"}
    folders = {
        file.parent.relative_to(repository)
        for root in ("shiftadd3d", *links)
        for file in (repository / root).rglob("__init__.py")
        if file.parent.relative_to(repository).parts[:2] not in {("shiftadd3d", link) for link in links}
    }
    names = {".".join(folder.parts) for folder in folders}
    names = {name if name.startswith("shiftadd3d") else f"shiftadd3d.{name}" for name in names}
    assert names == set(project["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", ["kernels", "scenes", "configs"])
def test_folders_at_the_top_level_are_subpackages(name: str, repository: Path):
    link = repository / "shiftadd3d" / name
    if link.is_symlink():  # a checkout without links leaves a small file, and the installed mapping does the work
        assert os.readlink(link) == f"../{name}"
    code = f"import shiftadd3d.{name} as module; print(module.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).resolve() == repository / name / "__init__.py"


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, so that nothing is left behind in it."""
    tree = python_tree(repository, tmp_path_factory.mktemp("tree"))
    code = "import setuptools.build_meta as backend, sys; print(backend.build_wheel(sys.argv[1]), end='')"
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", code, str(dist)], cwd=tree, capture_output=True, check=True)
    (built,) = dist.glob("*.whl")
    return built


def test_the_wheel_carries_every_source_file_and_the_embedded_data(wheel: Path, repository: Path):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected: set[str] = set()
    for file in tracked_files(repository):
        parts = file.relative_to(repository).parts
        if parts[0] in {"kernels", "scenes", "configs"}:
            parts = ("shiftadd3d", *parts)
        if parts[0] == "shiftadd3d" and parts[-1] != ".gitkeep":
            expected.add("/".join(parts))
    assert "shiftadd3d/cli.py" in expected
    assert any(name.startswith("shiftadd3d/scenes/") and name.endswith("/transforms.json") for name in expected)
    assert any(name.startswith("shiftadd3d/scenes/") and name.endswith(".png") for name in expected)
    assert inside == expected


def test_the_wheel_declares_commands_methods_and_licence(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        entry_points = configparser.ConfigParser(delimiters=("=",))
        entry_points.read_file(io.StringIO(archive.read(f"{info}/entry_points.txt").decode()))
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert entry_points["console_scripts"]["shiftadd3d"] == "shiftadd3d.cli:main"
    methods = entry_points["nerfstudio.method_configs"]
    assert set(methods) == {"gnt", "gnt-tiny", "gnt-big", "shiftadd-gnt", "shiftadd-gnt-tiny", "shiftadd-gnt-big"}
    for name, target in methods.items():
        assert target == f"shiftadd3d.configs.methods:{name.replace('-', '_')}"
    assert "License-Expression: Apache-2.0" in metadata
    # nerfstudio's pin on timm makes pip refuse the two together.
    assert 'Requires-Dist: nerfstudio==1.1.5; extra == "nerf"' in metadata
    assert 'Requires-Dist: timm>=1.0.28; extra == "vision"' in metadata


def test_the_wheel_works_away_from_the_source_tree(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import shiftadd3d.kernels, shiftadd3d.configs, shiftadd3d.scenes as scenes; print(scenes.__file__);"
        "print(all((scenes.scene_path(name) / 'transforms.json').is_file() for name in scenes.scene_names()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, complete = result.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert complete == "True"


# Which part may import which


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on a tree: (0, its report) where all contracts are kept."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)


def test_import_contracts_are_kept(repository: Path):
    result = lint_imports(repository)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("file", "statement", "contract"),
    [
        ("kernels/probe.py", "import shiftadd3d.nn", "Imports go one way"),
        ("shiftadd3d/nn/probe.py", "from shiftadd3d.models import gnt", "Imports go one way"),
        ("shiftadd3d/models/probe.py", "def late():\n    import shiftadd3d.nerf", "Imports go one way"),
        ("shiftadd3d/nerf/probe.py", "import shiftadd3d.configs", "Imports go one way"),
        ("shiftadd3d/unplaced/__init__.py", "", "Imports go one way"),
        ("shiftadd3d/models/probe.py", "from nerfstudio.cameras.rays import RayBundle", "Only nerf and configs import"),
        ("shiftadd3d/nn/probe.py", "import timm", "Only vision and models.vit import timm"),
        ("shiftadd3d/nn/probe.py", "import tvm", "Only kernels import TVM"),
        ("configs/probe.py", "import mitsuba", "Only scenes import the renderer"),
    ],
)
def test_import_contracts_bite(file: str, statement: str, contract: str, repository: Path, tmp_path: Path):
    tree = python_tree(repository, tmp_path)
    (tree / file).parent.mkdir(exist_ok=True)
    (tree / file).write_text(statement + "\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    report = " ".join(result.stdout.split())
    assert re.search(re.escape(contract) + r".{0,100}? BROKEN", report), report


@pytest.mark.parametrize("module", ["shiftadd3d", "shiftadd3d.nn", "shiftadd3d.models.gnt", "shiftadd3d.kernels"])
def test_the_core_loads_no_optional_package(module: str):
    code = f"import sys, {module}; print(sorted({{'nerfstudio', 'tvm', 'timm', 'mitsuba'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_package_itself_does_not_load_torch():
    code = "import sys, shiftadd3d; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
