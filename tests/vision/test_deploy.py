"""Classifiers as folders that run without torch: what they compute, in which languages, and what is not opened."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from shiftadd3d import UserError, cli
from shiftadd3d.kernels.runtime.cache import digest_of
from shiftadd3d.kernels.whole import executable
from shiftadd3d.kernels.whole.deployment import ABOUT, SUMS
from shiftadd3d.nn import recipe
from shiftadd3d.vision.checkpoint import ClassifierConfig, create_classifier, load, save_classifier
from shiftadd3d.vision.data import InputConfig, eval_transform
from shiftadd3d.vision.deploy import DeployedClassifier

pytest.importorskip("tvm")

SHALLOW = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of one block, as finetune would save it, with random weights."""
    torch.manual_seed(0)
    labels = ("blue", "green and grün", "red")
    config = ClassifierConfig("deit_tiny_patch16_224", labels, InputConfig(size=16), SHALLOW, recipe("add+shift"))
    model = create_classifier(config)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("deploy") / "best"
    save_classifier(folder, model.state_dict(), config)
    return folder


@pytest.fixture(scope="module")
def made(trained: Path) -> Path:
    """The classifier, packed, and its executable in int8."""
    out = trained.parent / "out"
    command = ["export", str(trained), "--out", str(out), "--numerics", "int8", "--formats", "packed", "so"]
    assert cli.main([*command, "--json", str(out / "facts.json")]) == 0
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The executable's folder, to be damaged."""
    return Path(shutil.copytree(made / "so", tmp_path / "so"))


@pytest.fixture
def picture(save_picture: Callable[..., None], tmp_path: Path) -> Path:
    save_picture(tmp_path / "picture.png", (200, 50, 40), size=37)
    return tmp_path / "picture.png"


def predicted(folder: Path, picture: Path) -> dict[str, float]:
    assert cli.main(["predict", str(folder), str(picture), "--json", str(picture.with_suffix(".json"))]) == 0
    (found,) = json.loads(picture.with_suffix(".json").read_text(encoding="utf-8"))["predictions"]
    return {one["label"]: one["probability"] for one in found["top"]}


def seal(folder: Path) -> None:
    """Write the digests anew, as whoever may change the folder could."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    (folder / SUMS).write_text("".join(f"{digest_of(file)}  {file.name}\n" for file in files))


def test_an_executable_predicts_what_the_packed_classifier_does(made: Path, picture: Path, monkeypatch) -> None:
    monkeypatch.setattr(executable, "compile_programs", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr("shiftadd3d.kernels.runtime.numerics._current", "int8")
    assert predicted(made / "so", picture) == predicted(made / "packed", picture)
    facts = json.loads((made / "facts.json").read_text())
    (row,) = [row for row in facts["files"] if row["file"] == str(made / "so")]
    assert row["numerics"] == "int8" and row["bytes"] == sum(file.stat().st_size for file in (made / "so").iterdir())
    with pytest.raises(UserError, match=r"it takes \[batch, 3, 16, 16\] float32"):
        DeployedClassifier(made / "so")(torch.zeros(1, 3, 8, 8))


def test_where_there_is_a_gpu_an_executable_stays_on_the_cpu(made: Path, picture: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert predicted(made / "so", picture)
    assert cli.main(["predict", str(made / "so"), str(picture), "--device", "cuda"]) == 1
    assert "so is an executable for a CPU; expected --device cpu" in capsys.readouterr().err


def test_an_executable_is_evaluated_like_any_classifier(made: Path, folder: Path, tmp_path: Path, capsys) -> None:
    for name, color in (("blue", "blue"), ("green and grün", "green"), ("red", "red")):
        for split in ("train", "val"):
            shutil.copytree(folder / split / color, tmp_path / "pictures" / split / name)
    command = [
        "evaluate",
        str(made / "so"),
        "--data",
        str(tmp_path / "pictures"),
        "--json",
        str(tmp_path / "facts.json"),
    ]
    assert cli.main(command) == 0
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert facts["compiled"] and facts["numerics"] == "int8" and "int8 numerics, compiled" in capsys.readouterr().out
    assert cli.main([*command, "--numerics", "fast"]) == 1
    assert "is an executable for int8" in capsys.readouterr().err


def test_what_int8_cannot_express_is_done_again_in_float32(trained: Path, tmp_path: Path) -> None:
    model = load(trained)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[3] = 2.0**66
    save_classifier(tmp_path / "best", model.state_dict(), model.classifier_config)
    command = [
        "export",
        str(tmp_path / "best"),
        "--out",
        str(tmp_path / "out"),
        "--numerics",
        "int8",
        "--formats",
        "so",
    ]
    assert cli.main(command) == 0
    deployed, images = DeployedClassifier(tmp_path / "out" / "so"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), model(images), rtol=1e-3, atol=1e-3)
    assert deployed.deployment.overflows == 1


def test_the_folder_is_its_owners_and_its_digests_are_those_of_sha256sum(made: Path) -> None:
    for path in (made / "so", *(made / "so").iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path
    about = json.loads((made / "so" / ABOUT).read_text(encoding="utf-8"))
    assert about["numerics"] == "int8" and "native code" in about["care"] and "avx2" in about["cpu"]
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=made / "so", check=True)


def _truncate(folder: Path) -> None:
    with (folder / "program.so").open("rb+") as file:
        file.truncate(1000)


def _describe(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        (folder / ABOUT).write_text(json.dumps(about | changes))
        seal(folder)

    return change


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, r"is damaged, or not an executable .*: program\.so is not what was written"),
    "altered": (lambda f: (f / ABOUT).write_text("{}"), r"executable\.json is not what was written"),
    "missing": (lambda f: (f / "safe.so").unlink(), r"safe\.so is missing"),
    "no digests": (lambda f: (f / SUMS).unlink(), r"SHA256SUMS is missing"),
    "odd digests": (lambda f: (f / SUMS).write_text("what?\n"), "is damaged.*: SHA256SUMS cannot be read: "),
    "digests of files elsewhere": (lambda f: (f / SUMS).write_text("0  ../x\n"), "SHA256SUMS is not what was written"),
    "no executable": (lambda f: ((f / ABOUT).write_text("[]"), seal(f)), r"executable\.json does not say all that"),
    "half a description": (lambda f: ((f / ABOUT).write_text('{"form'), seal(f)), r"executable\.json cannot be read: "),
    "a file for others": (lambda f: (f / "program.so").chmod(0o666), r"program\.so .*can be written to by others"),
    "a folder for others": (lambda f: f.chmod(0o777), r"so belongs to someone else, is a link, or can be written to"),
    "another CPU": (_describe(cpu=["avx2", "avx20"]), "is for another CPU: this one lacks avx20"),
    "another machine": (_describe(machine="vax"), "is for vax, and this is "),
    "another TVM": (_describe(made_with={"tvm": "0.1"}), r"another version of TVM .*tvm 0\.1, not .*; export again"),
    "a later format": (_describe(version=9), "is of format version 9; this shiftadd3d reads 1"),
    "other files": (_describe(programs=["../safe.so"]), "is damaged, or not an executable"),
    "another classifier": (_describe(classifier={}), "not the configuration of a classifier"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_opened_is_told_in_one_line(name: str, copied: Path, picture: Path, monkeypatch, capsys) -> None:
    change, line = BAD[name]
    change(copied)
    if name != "another classifier":  # which is found last
        monkeypatch.setattr(executable, "open_library", lambda _: pytest.fail("its code was loaded"))
    assert cli.main(["predict", str(copied), str(picture)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and re.search(line, said), said


def test_options_that_do_not_fit_are_told_in_one_line(made: Path, trained: Path, picture: Path, tmp_path: Path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for command, line in [
        (
            ["predict", str(made / "so"), str(picture), "--show-routing", *out],
            "is an executable; expected the classifier",
        ),
        (["predict", str(made), str(picture)], "holds what export wrote; expected one form of that, such as .*so"),
        (["export", str(trained), "--numerics", "int8", *out], "--numerics int8: only the format so has them"),
        (["export", str(made / "packed"), *out], "exported already; expected .* or --formats so"),
    ]:
        assert cli.main(command) == 1
        assert re.search(line, capsys.readouterr().err)
    dense = tmp_path / "dense"
    config = replace(load(trained).classifier_config, recipe=None, model_args=SHALLOW | {"num_heads": 4})
    save_classifier(dense, create_classifier(config).state_dict(), config)
    assert cli.main(["export", str(dense), "--formats", "so", *out]) == 1
    expected = "--formats so: it cannot be compiled: .* is an Attention, with heads that are no whole vectors"
    assert re.search(expected, capsys.readouterr().err)


def test_a_folder_is_there_whole_or_not_at_all(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    export = ["export", str(made / "packed"), "--formats", "so", "--numerics", "int8", "--out", str(tmp_path)]
    (tmp_path / "so").mkdir()
    (tmp_path / "so" / "diary.txt").write_text("dear")
    assert cli.main(export) == 1
    assert "holds something else" in capsys.readouterr().err
    (tmp_path / "so" / "diary.txt").unlink()
    copy = shutil.copyfile
    for failure in (OSError(30, "Read-only file system"), KeyboardInterrupt()):

        def fail(source, file, failure=failure):
            if Path(file).name == "safe.so":
                raise failure
            return copy(source, file)

        with monkeypatch.context() as patched:
            patched.setattr(shutil, "copyfile", fail)
            assert cli.main(export) in (1, 130)
        assert "Traceback" not in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["so"] and not any((tmp_path / "so").iterdir())
    for _ in range(2):  # in place of an empty folder, and of an earlier one
        assert cli.main(export) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "so"]
    DeployedClassifier(tmp_path / "so")


@pytest.fixture(scope="module")
def bare(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with numpy, pillow and apache-tvm-ffi, in the versions of the lock, and what these need."""
    lock = (repository / "requirements.lock").read_text(encoding="utf-8")
    wanted = ("numpy", "pillow", "apache-tvm-ffi", "typing-extensions")
    chosen = re.findall(rf"^(?:{'|'.join(wanted)})==.*?[^\\]$\n", lock, re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("bare")
    (folder / "chosen.txt").write_text("".join(chosen))
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uv is None:
        pytest.skip("no uv here")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--python", python]
    for where in (["--offline"], []):  # what `make setup` has brought is enough
        tried = subprocess.run([*install, *where, "-r", folder / "chosen.txt"], capture_output=True, text=True)
        if tried.returncode == 0:
            return python
    pytest.skip(f"no packages to be had: {tried.stderr.strip()}")


def test_python_without_torch_predicts_the_same(made: Path, bare: Path, picture: Path, repository: Path) -> None:
    for package in ("torch", "tvm", "timm", "shiftadd3d"):
        tried = subprocess.run([bare, "-c", f"import {package}"], capture_output=True, cwd=picture.parent)
        assert tried.returncode != 0, package
    script = repository / "examples" / "12_deploy_without_torch.py"
    said = subprocess.run([bare, script, made / "so", picture], check=True, capture_output=True, text=True).stdout
    found = {label: float(share) for label, _, share in (line.rpartition(" ") for line in said.splitlines())}
    expected = predicted(made / "so", picture)
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-3)


def test_cpp_predicts_the_same(made: Path, picture: Path, repository: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    config = [sys.executable, "-m", "tvm_ffi.config", "--cxxflags", "--ldflags", "--libs"]
    options = subprocess.run(config, check=True, capture_output=True, text=True).stdout.split()
    options = [word for word in options if not word.startswith("-l")] + ["-ltvm_ffi", "-ldl"]
    program = tmp_path / "deploy"
    source = repository / "examples" / "deploy.cpp"
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", source, *options, "-o", program], check=True)
    classifier = DeployedClassifier(made / "so")
    image = Image.open(picture).convert("RGB").resize((16, 16))
    image.save(tmp_path / "picture.ppm")
    whole = replace(classifier.classifier_config.input, crop_pct=1.0)
    logits = classifier(eval_transform(whole)(image)[None])[0]
    environment = os.environ | {"LD_LIBRARY_PATH": str(made / "so")}
    run = [program, made / "so", tmp_path / "picture.ppm"]
    said = subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout
    label, _, logit = said.strip().rpartition(" ")
    best = int(logits.argmax())
    assert label == classifier.classifier_config.classes[best]
    assert float(logit) == pytest.approx(float(logits[best]), abs=1e-3)
