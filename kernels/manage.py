"""List, build or check all kernels at once."""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeAlias

import shiftadd3d.kernels
from shiftadd3d._errors import UserError
from shiftadd3d._progress import progress
from shiftadd3d._report import write_json
from shiftadd3d.kernels.cuda.driver import CUDA_KERNELS
from shiftadd3d.kernels.runtime import bundle, cache, targets
from shiftadd3d.kernels.runtime.kernel import KERNELS, DeviceKernel, Spec, Target
from shiftadd3d.kernels.runtime.library import packed_launcher, runtime_library
from shiftadd3d.kernels.runtime.targets import CpuTarget, CudaTarget

Facts: TypeAlias = dict[str, object]
"""The facts about a variant in tables and JSON."""


@dataclass(frozen=True)
class Variant(Generic[Target]):
    """One specialisation of a kernel for one target."""

    kernel: DeviceKernel[Target]
    target: Target
    spec: Spec

    @property
    def entry(self) -> str:
        """Its key in the cache."""
        return self.kernel.entry(self.target, **self.spec)

    @property
    def is_cached(self) -> bool:
        """Whether the cache holds it, undamaged."""
        return cache.find(self.entry, self.kernel.suffix) is not None

    def facts(self) -> Facts:
        """The facts about it for tables and JSON."""
        return {"kernel": self.kernel.name, "target": self.target.name, "spec": self.spec}

    def load(self) -> None:
        """Compile it into the cache, if it is not there."""
        self.kernel.load(self.target, **self.spec)

    def check(self) -> None:
        """Compare it with its twin on this machine."""
        self.kernel.check(self.target, **self.spec)

    def packed(self) -> bundle.Packed:
        """Its library, for a bundle."""
        return self.kernel.packed(self.target, **self.spec)


AnyVariant: TypeAlias = Variant[CpuTarget] | Variant[CudaTarget]
_Row: TypeAlias = tuple[AnyVariant, Facts]
"""A variant and the facts about it."""


def all_variants(names: Iterable[str] = (), target: str | None = None) -> Iterator[AnyVariant]:
    """The variants that are built ahead, of all kernels or of those named.

    Args:
        names: kernels to take; all if empty.
        target: name of the target, in particular of a GPU's; None for this machine's CPU.

    Raises:
        UserError: an unknown kernel or target, or a CPU target that is not the one of this process.
    """
    for module in pkgutil.walk_packages(shiftadd3d.kernels.__path__, f"{shiftadd3d.kernels.__name__}."):
        importlib.import_module(module.name)
    chosen = targets.current() if target is None else targets.find(target)
    if isinstance(chosen, CudaTarget):
        yield from _variants(CUDA_KERNELS, chosen, names)
    elif chosen == targets.current():
        yield from _variants(KERNELS, chosen, names)
    else:
        # Trials run on this CPU, and for the target of this process.
        raise UserError(
            f"target {target!r}: this process compiles for {targets.current().name}; set "
            f"{targets.ENVIRONMENT_VARIABLE}={target} to change that"
        )


def _variants(
    kernels: Mapping[str, DeviceKernel[Target]], target: Target, names: Iterable[str]
) -> Iterator[Variant[Target]]:
    for name in list(names) or sorted(kernels):
        if name not in kernels:
            raise UserError(f"no kernel {name!r}: expected some of {', '.join(sorted(kernels))}")
        for spec in kernels[name].variants(target):
            yield Variant(kernels[name], target, dict(spec))


def list_kernels(names: Iterable[str] = (), json: Path | None = None, target: str | None = None) -> None:
    """Print which variants exist and which of them the cache holds. Also write this to `json`.

    Raises:
        UserError: an unknown kernel or target, or the file cannot be written.
    """
    rows: list[_Row] = [(variant, {"cached": variant.is_cached}) for variant in all_variants(names, target)]
    _show(rows, json, "cached", lambda facts: "yes" if facts["cached"] else "[dim]no[/dim]")


def build_kernels(
    names: Iterable[str] = (), json: Path | None = None, target: str | None = None, out: Path | None = None
) -> None:
    """Compile all variants for a target that the cache does not hold. Print what was done, and write it to `json`.

    Args:
        names, target: as for `all_variants`.
        json: a file for the same facts.
        out: a folder for a bundle of them (see `shiftadd3d.kernels.runtime.bundle`).

    Raises:
        UserError: an unknown kernel or target, a variant that could not be built, or a folder that cannot be written.
    """

    def build(variant: AnyVariant) -> Facts:
        if variant.is_cached:
            return {"built": False, "seconds": 0.0, "error": None}
        return {"built": True, **_attempt(variant.load)}

    variants = list(all_variants(names, target))
    rows: list[_Row] = [(variant, build(variant)) for variant in _with_progress("building", variants)]
    if out is not None and not any(facts["error"] for _, facts in rows):
        libraries = [variant.packed() for variant in variants]
        on_cpu = [variant for variant in variants if isinstance(variant.target, CpuTarget)]
        if on_cpu:
            libraries.append(packed_launcher())
        bundle.write(out, libraries, runtime_library() if on_cpu else None)
    _show(rows, json, "built", lambda facts: f"{facts['seconds']:.1f} s" if facts["built"] else "[dim]was there[/dim]")


def check_kernels(names: Iterable[str] = (), json: Path | None = None, target: str | None = None) -> None:
    """Compare all variants with their twins on this machine. Print the outcome, and write it to `json`.

    Raises:
        UserError: an unknown kernel or target, or a variant that differs from its twin or could not be built.
    """
    variants = _with_progress("checking", all_variants(names, target))
    rows: list[_Row] = [(variant, _attempt(variant.check)) for variant in variants]
    _show(rows, json, "as its twin", lambda facts: "yes")


def _with_progress(what: str, variants: Iterable[AnyVariant]) -> Iterator[AnyVariant]:
    from rich.console import Console

    variants = list(variants)
    with progress(what, len(variants), unit="variants", console=Console(stderr=True)) as shown:
        for variant in variants:
            shown.advance(0, status=variant.kernel.name)
            yield variant
            shown.advance()


def _attempt(action: Callable[[], None]) -> Facts:
    start = time.perf_counter()
    try:
        action()
        error = None
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}".strip()
    return {"seconds": round(time.perf_counter() - start, 3), "error": error}


def _show(rows: Sequence[_Row], json: Path | None, column: str, value: Callable[[Facts], str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("kernel", "target", "variant", column, box=box.SIMPLE_HEAD)
    listed, failed = [], []
    for variant, facts in rows:
        listed.append({**variant.facts(), **facts})
        outcome = value(facts)
        if error := facts.get("error"):
            outcome = "[red]" + escape(str(error).splitlines()[0])
            failed.append(variant.kernel.name)
        spec = ", ".join(f"{name} {setting}" for name, setting in variant.spec.items())
        table.add_row(variant.kernel.name, variant.target.name, spec, outcome)
    Console(highlight=False).print(table)
    if json is not None:
        write_json(json, {"folder": str(cache.folder()), "variants": listed})
    if failed:
        kernels = ", ".join(sorted(set(failed)))
        raise UserError(f"{len(failed)} of {len(rows)} variants failed ({kernels}); plain torch runs instead of them")
