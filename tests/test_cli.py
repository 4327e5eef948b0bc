"""The command line: help, errors and exit codes, and `shiftadd3d info`."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shiftadd3d import UserError, _info, cli
from shiftadd3d._wrong_arguments import one_line_for_wrong_arguments
from shiftadd3d.scenes.photo_options import FromPhotosOptions
from shiftadd3d.vision.settings import DataSettings, FinetuneSettings, StageSettings, TrainSettings


def test_help_loads_nothing_heavy_and_so_answers_at_once():
    code = "import sys, shiftadd3d.cli; print({'torch', 'numpy', 'nerfstudio', 'tvm', 'timm'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "Exit codes: 0 done, 1 failed, 2 unknown or missing arguments, 130 interrupted." in text
    for verb in cli.VERBS:
        assert f"• {verb} " in text


def option_docstrings(verb: type) -> dict[str, str]:
    """Each field of a verb's dataclass that is an option, with the string below it, "" where there is none."""
    body = next(node for node in ast.walk(ast.parse(inspect.getsource(verb))) if isinstance(node, ast.ClassDef)).body
    found: dict[str, str] = {}
    for node, following in itertools.zip_longest(body, body[1:]):
        shown = isinstance(node, ast.AnnAssign) and "tyro.conf.Suppress" not in ast.unparse(node.annotation)
        if shown and isinstance(node.target, ast.Name):
            below = following.value if isinstance(following, ast.Expr) else None
            found[node.target.id] = str(below.value) if isinstance(below, ast.Constant) else ""
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_explains_the_verb_and_each_of_its_options(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"])
    assert exit_.value.code == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    summary = (cli.VERBS[verb].__doc__ or "").partition("\n")[0]
    assert summary
    assert summary in words
    for option, docstring in option_docstrings(cli.VERBS[verb]).items():
        assert docstring, f"{verb}: {option} is not explained"
        assert " ".join(docstring.split()[:3]) in words


@pytest.mark.parametrize(
    "options",
    [
        *cli.VERBS.values(),
        cli.ListKernels,
        cli.BuildKernels,
        cli.CheckKernels,
        cli.FromPhotos,
        cli.MakeFactory,
        cli._Origin,
        DataSettings,
        StageSettings,
        TrainSettings,
        FinetuneSettings,
        FromPhotosOptions,
    ],
)
def test_help_of_an_option_breaks_lines_only_between_sentences(options: type):
    """tyro keeps the line breaks of an option's docstring, whatever the width of the terminal."""
    for option, docstring in option_docstrings(options).items():
        for line in docstring.splitlines():
            assert line.endswith("."), f"{options.__name__}.{option}: {line}"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("", "no command: expected one of demo, movie, "),
        ("inform", "unexpected inform: expected one of demo, movie, "),
        ("scenes", "no command: expected one of from-photos, make-factory, contact-sheets; see shiftadd3d scenes -"),
        ("scenes draw", "unexpected draw: expected one of from-photos, make-factory, contact-sheets"),
        ("info --jsn x", "unknown option --jsn: perhaps --json; see shiftadd3d info --help"),
        ("info --seed 3", "unknown option --seed; see shiftadd3d info --help"),  # an option of other commands
        ("info x y", "unexpected x y; see shiftadd3d info --help"),
        ("info --json", "--json: expected a value; see shiftadd3d info --help"),
        ("finetune --preset nonsense", "--preset nonsense: expected one of deit-small, deit-tiny, digits, laptop, "),
        ("finetune --workers 1.5", "--workers 1.5: expected a whole number or None; see shiftadd3d finetune --help"),
        ("finetune --stage1.lr x", "--stage1.lr x: expected a number; see shiftadd3d finetune --help"),
        ("finetune --epoch 3", "unknown option --epoch: perhaps --stage0.epochs, --stage0.warmup-epochs, "),
        ("demo --steps 1e3", "--steps 1e3: expected a whole number or None; see shiftadd3d demo --help"),
        ("bench layers", "WHAT layers: expected kernels; see shiftadd3d bench --help"),
        (
            "scenes make-factory OUT --count 1 --size 3",
            "--size 3: expected two whole numbers or None; see shiftadd3d scenes make-factory --help",
        ),
        ("scenes make-factory", "missing OUT, --count N; see shiftadd3d scenes make-factory --help"),
        (
            "render --load-confg x --out y",
            "missing --load-config CONFIG.yml; unknown option --load-confg; see shiftadd3d render --help",
        ),
    ],
)
def test_wrong_arguments_exit_with_2_and_one_line_with_what_is_wrong_and_what_would_be_right(
    args: str, line: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit_:
        cli.main(args.split())
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(f"error: {line}")
    assert printed.err.count("\n") == 1


def test_wrong_arguments_are_one_line_in_a_colourful_terminal_of_few_columns():
    terminal = {**os.environ, "COLUMNS": "40", "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    code = (
        "import sys, tyro._fmtlib as text; from shiftadd3d import cli\n"
        "text._FORCE_ANSI = text._FORCE_UTF8_BOXES = True\n"
        f"cli.main(['render', '--load-config', {'folder/' * 20!r}, '--frames', 'many', '--out', 'x'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, env=terminal
    )
    assert result.returncode == 2
    assert result.stderr == "error: --frames many: expected a whole number or None; see shiftadd3d render --help\n"


def test_what_no_box_is_known_to_say_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]):
    box = "╭─ Another ───╮\n│ other words │\n╰─────────────╯\n"

    def refuse() -> None:
        with one_line_for_wrong_arguments("shiftadd3d", []):
            print(box, end="", file=sys.stderr)
            sys.exit(2)

    with pytest.raises(SystemExit):
        refuse()
    assert capsys.readouterr().err == box


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (
            "predict nowhere photo.jpg",
            "nowhere: no such file or folder; expected a folder that finetune or export wrote",
        ),
        ("evaluate nowhere", "nowhere: no such file or folder"),
        ("export nowhere --out there", "nowhere: no such file or folder"),
        ("render --load-config nowhere --out a.mp4", "nowhere: no such file; expected the config.yml"),
        ("render --load-config . --out a.mp4", ".: a folder, not a file"),
        ("eval-scenes --scenes nowhere", "--scenes nowhere: no such file or folder; expected scene folders"),
        ("eval-scenes --scenes . --max-side 0", "--max-side 0: expected 1 or more"),
        ("demo --data nowhere", "--data nowhere: no such file or folder"),
        ("demo --steps 0", "--steps 0: expected 1 or more"),
        ("import-gnt nowhere --data . --out there", "nowhere: no such file or folder; expected a checkpoint"),
        ("finetune --data nowhere", "--data nowhere: no such file or folder; expected a folder of pictures"),
        ("finetune --resume nowhere", "--resume nowhere: no such file or folder"),
        ("finetune --image-size 3", "--image-size 3: expected 8 or more"),
        ("kernels build --model nowhere", "--model nowhere: no such file or folder"),
        ("profile gnt-tiny --accelerator nowhere", "--accelerator nowhere: no such file or folder"),
    ],
)
def test_what_is_not_there_is_told_in_one_line_before_torch_is_imported(args: str, line: str, tmp_path: Path):
    code = (
        "import sys; from shiftadd3d import cli; "
        f"code = cli.main({args.split()!r}); print(code, {{'torch', 'nerfstudio', 'timm'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "1 set()\n"
    assert result.stderr.startswith(f"error: {line}") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_user_error_becomes_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(self: cli.Info) -> None:
        raise UserError("no scene 'chair':\n    expected one of still_life")

    monkeypatch.setattr(cli.Info, "run", fail)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "error: no scene 'chair': expected one of still_life\n"


def test_a_user_error_is_a_value_error_to_a_library_user():
    assert issubclass(UserError, ValueError)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(self: cli.Info) -> None:
        raise ValueError("a mistake of this project")

    monkeypatch.setattr(cli.Info, "run", fail)
    with pytest.raises(ValueError, match="a mistake of this project"):
        cli.main(["info"])


def test_an_interrupt_prints_one_line_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(self: cli.Info) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Info, "run", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_output_that_nobody_reads_ends_the_command_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def print_to_a_closed_pipe(self: cli.Info) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            pipe.write("something")

    monkeypatch.setattr(cli.Info, "run", print_to_a_closed_pipe)
    with capsys.disabled():  # what is the process's own output is left to nobody
        kept = os.dup(1)
        try:
            assert cli.main(["info"]) == 141
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signals")
@pytest.mark.parametrize("sigint", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_a_process_says_so_and_does_what_ctrl_c_does(
    name: str, sigint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    number = signal.Signals[name]

    def work(self: cli.Info) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(cli.Info, "run", work)
    handlers = {signal.SIGINT: sigint, number: signal.SIG_DFL}  # under nohup, SIGHUP would be ignored
    before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
    try:
        assert cli.main(["info"]) == 130
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capsys.readouterr().err == f"{name} came: ending as after Ctrl-C\ninterrupted\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_under_nohup_a_terminal_that_closes_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli.Info, "run", lambda self: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["info"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_info_prints_and_writes_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "new folder" / "info.json"
    assert cli.main(["info", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    text = capsys.readouterr().out
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for name, version in facts["versions"].items():
        assert name in text
        assert version is None or version in text
    assert facts["cpu"]["usable_threads"] >= 1
    assert facts["cpu"]["memory_gib"] > 0.1
    assert set(facts["cpu"]["features"]) <= set(_info.CPU_FEATURES)
    for scene in facts["scenes"]:
        assert scene in text
    for method in facts["nerfstudio_methods"]:
        assert method in text


def test_info_names_the_nerfstudio_methods():
    pytest.importorskip("nerfstudio")
    plain = {"gnt", "gnt-tiny", "gnt-big"}
    assert set(_info.collect()["nerfstudio_methods"]) == plain | {f"shiftadd-{name}" for name in plain}


@pytest.fixture(params=["before", "after"])
def another_package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """nerfstudio-gnt, which registers a method of the same name; returns the package that is found first."""
    pytest.importorskip("nerfstudio")
    info = tmp_path / "nerfstudio_gnt-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nerfstudio-gnt\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[nerfstudio.method_configs]\ngnt = other_gnt:method\nother = other_gnt:method\n"
    )
    path = list(sys.path)
    path.insert(0 if request.param == "before" else len(path), str(tmp_path))
    monkeypatch.setattr(sys, "path", path)
    return "nerfstudio-gnt" if request.param == "before" else "shiftadd3d"


def test_info_says_which_names_another_package_has_too(another_package: str, capsys: pytest.CaptureFixture[str]):
    facts = _info.collect()
    (shared,) = facts["shared_names"]
    assert shared["name"] == "gnt"
    assert set(shared["packages"]) == {"nerfstudio-gnt", "shiftadd3d"}
    assert shared["taken"] == another_package
    assert "gnt" in facts["nerfstudio_methods"]
    _info.show(facts)
    assert f"nerfstudio takes that of {another_package}" in " ".join(capsys.readouterr().out.split())


def test_nerfstudio_commands_warn_of_a_name_that_another_package_has_too(
    another_package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from shiftadd3d.nerf.error_hook import warn_of_shared_names

    monkeypatch.setattr(sys, "argv", ["/usr/bin/ns-train", "gnt"])
    warn_of_shared_names()
    printed = capsys.readouterr().err
    assert printed.startswith("warning: gnt is registered by ") and printed.count("\n") == 1
    assert f"takes that of {another_package}" in printed
    monkeypatch.setattr(sys, "argv", ["/usr/bin/shiftadd3d", "movie"])  # names no method
    warn_of_shared_names()
    assert capsys.readouterr().err == ""


def test_there_is_no_warning_where_no_name_is_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("nerfstudio")
    from shiftadd3d.nerf.error_hook import warn_of_shared_names

    monkeypatch.setattr(sys, "argv", ["ns-train"])
    warn_of_shared_names()
    assert capsys.readouterr().err == ""


def test_info_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(_info, "PACKAGES", ("torch", "a-package-that-is-not-there"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    facts = _info.collect()
    assert facts["versions"]["a-package-that-is-not-there"] is None
    assert facts["compilers"] == {"nvcc": None, "c++": None}
    _info.show(facts)
    text = capsys.readouterr().out
    assert "not installed" in text
    assert text.count("not found") == 2


def test_info_shows_gpus(capsys: pytest.CaptureFixture[str]):
    facts = _info.collect()
    facts["gpus"] = [{"device": "cuda:0", "model": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.6}]
    _info.show(facts)
    assert "cuda:0: NVIDIA H100, compute capability 9.0, 79.6 GiB" in capsys.readouterr().out


@pytest.mark.gpu
def test_info_finds_the_cuda_device():
    import torch

    assert _info.collect()["gpus"][0]["model"] == torch.cuda.get_device_name(0)


def test_a_file_that_is_being_replaced_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shiftadd3d._report import write_json

    file = tmp_path / "facts.json"
    write_json(file, {"old": 1})
    before = file.read_text()

    def full(self: Path, text: str, encoding: str) -> None:
        with self.open("w", encoding=encoding) as out:
            out.write(text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_json(file, {"new": 2})
    assert file.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_info_reports_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "occupied").write_text("a file, not a folder")
    assert cli.main(["info", "--json", str(tmp_path / "occupied" / "info.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ")
    assert error.count("\n") == 1
