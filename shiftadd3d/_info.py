"""Facts about this installation and this machine, for `shiftadd3d info`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shiftadd3d._entry_points import GROUPS, SharedName, own_names, shared_names

PACKAGES = (
    "shiftadd3d",
    "torch",
    "torchvision",
    "timm",
    "apache-tvm",
    "apache-tvm-ffi",
    "nerfstudio",
    "numpy",
    "tyro",
    "imageio-ffmpeg",
)

NOT_FOUND = "[dim]not found[/dim]"

# The instruction sets that kernels choose between, as torch names them.
CPU_FEATURES = (
    "avx2",
    "fma3",
    "f16c",
    "avx_vnni",
    "avx512_f",
    "avx512_bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "dot",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)


def collect() -> dict[str, Any]:
    """The facts, ready for JSON; `show` prints them."""
    methods, dataparsers = (sorted(_entry_points(group)) for group in GROUPS)
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "torch_cuda": _torch_cuda(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "gpus": _gpus(),
        "compilers": {"nvcc": _nvcc(), "c++": _first_line("c++")},
        "nerfstudio_methods": methods,
        "nerfstudio_dataparsers": dataparsers,
        "shared_names": [shared._asdict() for shared in shared_names()],
        "scenes": _scenes(),
    }


def show(facts: dict[str, Any]) -> None:
    """Print what `collect` found as one table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def section(rows: list[tuple[str, str]]) -> None:
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()

    section([(name, value or "[dim]not installed[/dim]") for name, value in facts["versions"].items()])
    cpu = facts["cpu"]
    section(
        [
            ("system", facts["system"]),
            (
                "cpu",
                f"{cpu['model']}, {_count(cpu['cores'], 'core')}, {_count(cpu['usable_threads'], 'usable thread')}",
            ),
            ("memory", f"{cpu['memory_gib']:.1f} GiB"),
            ("cpu features", _features(cpu["features"])),
            *(("gpu", _gpu_line(gpu)) for gpu in facts["gpus"]),
            *([] if facts["gpus"] else [("gpu", "[dim]none[/dim]")]),
        ]
    )
    cuda = facts["torch_cuda"] or "[dim]a build without CUDA[/dim]"
    section([("torch's cuda", cuda), *((name, found or NOT_FOUND) for name, found in facts["compilers"].items())])
    section(
        [
            ("methods", _names(facts["nerfstudio_methods"])),
            ("dataparsers", _names(facts["nerfstudio_dataparsers"])),
            *(("[yellow]two packages[/yellow]", str(SharedName(**shared))) for shared in facts["shared_names"]),
            ("scenes", _names(facts["scenes"])),
        ]
    )
    Console(highlight=False).print(table)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import psutil
    import torch

    # Newer torch tells them; an older one leaves the features unknown.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_model() or capabilities.get("cpu_name") or platform.processor() or "unknown",
        "cores": psutil.cpu_count(logical=False),
        "usable_threads": usable,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 2),
        "features": {name: bool(capabilities[name]) for name in CPU_FEATURES if name in capabilities},
    }


def _cpu_model() -> str | None:
    """The model with its number, which neither torch nor the standard library tells."""
    if sys.platform == "darwin":
        return _first_line("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "device": f"cuda:{index}",
                "model": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 2),
            }
        )
    if torch.backends.mps.is_available():
        gpus.append({"device": "mps", "model": "Apple GPU (MPS)", "capability": None, "memory_gib": None})
    return gpus


def _nvcc() -> str | None:
    """The release line of the CUDA compiler on the path, or in `CUDA_HOME` or `CUDA_PATH`."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("PATH", os.defpath), *(os.path.join(home, "bin") for home in homes)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    return _first_line(nvcc, "--version", matching="release") if nvcc else None


def _first_line(program: str, *args: str, matching: str = "") -> str | None:
    """The first line with `matching` in what a program prints about itself; None where there is no such program."""
    found = shutil.which(program)
    if found is None:
        return None
    try:
        output = subprocess.run([found, *(args or ("--version",))], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in output.splitlines() if matching in line), None)


def _entry_points(group: str) -> set[str]:
    """The names that this project offers to nerfstudio; none where nerfstudio is not installed."""
    if _version("nerfstudio") is None:
        return set()
    return own_names(group)


def _scenes() -> list[str]:
    from shiftadd3d.scenes import scene_names

    return scene_names()


def _count(number: int | None, noun: str) -> str:
    return f"{number or 'unknown'} {noun}" + ("" if number == 1 else "s")


def _features(features: dict[str, bool]) -> str:
    if not features:
        return "[dim]unknown to this torch[/dim]"
    return ", ".join(name for name, present in features.items() if present) or "[dim]none of those that matter[/dim]"


def _gpu_line(gpu: dict[str, Any]) -> str:
    capability = f", compute capability {gpu['capability']}" if gpu["capability"] else ""
    memory = f", {gpu['memory_gib']:.1f} GiB" if gpu["memory_gib"] else ""
    return f"{gpu['device']}: {gpu['model']}{capability}{memory}"


def _names(names: list[str]) -> str:
    return ", ".join(names) or "[dim]none[/dim]"
