"""An accelerator as data: its processing elements and memories, and the energy of each access and operation."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from shiftadd3d._errors import UserError
from shiftadd3d.nn.counting import Primitive

DEFAULT_FILE = Path(__file__).with_name("accelerator.toml")
PRIMITIVES: tuple[Primitive, ...] = ("mult", "shift", "add")

_WHOLE = ("pes", "buffer_kib", "register_file_bytes", "accumulator_bits")


@dataclass(frozen=True)
class Levels:
    """Picojoules for moving one bit to or from each memory."""

    register: float
    noc: float
    """Network between the buffer and the processing elements, and among the elements."""
    buffer: float
    dram: float


@dataclass(frozen=True)
class Formats:
    """Picojoules of one operation, by number format."""

    float32: float
    float16: float
    bfloat16: float
    int8: float


@dataclass(frozen=True)
class Area:
    """Square micrometres of one unit for float32, and of one bit of registers."""

    mult: float
    add: float
    shift: float
    register_bit: float


@dataclass(frozen=True)
class ElementwiseCost:
    special: float
    """Number of multiplications and additions in a division, root or exponential."""


@dataclass(frozen=True)
class Accelerator:
    """Arrays of processing elements for multiplications, shifts and additions, with equal areas, behind one buffer."""

    name: str
    clock_mhz: float
    pes: int
    """Number of processing elements that multiply."""
    buffer_kib: int
    register_file_bytes: int
    """Bytes of registers in one processing element."""
    accumulator_bits: int
    energy_per_bit: Levels
    mult: Formats
    add: Formats
    shift: Formats
    area: Area
    elementwise: ElementwiseCost

    @cached_property
    def arrays(self) -> dict[Primitive, int]:
        """Number of processing elements of each kind.

        Each has a register file. Those for shifts and products also have an adder.
        """
        registers = 8 * self.register_file_bytes * self.area.register_bit
        one = {
            "mult": self.area.mult + self.area.add + registers,
            "shift": self.area.shift + self.area.add + registers,
            "add": self.area.add + registers,
        }
        return {kind: int(self.pes * one["mult"] / one[kind]) for kind in PRIMITIVES}

    def operation(self, kind: Primitive, dtype: str) -> float:
        """Picojoules of one multiplication, shift or addition in a number format.

        Raises:
            UserError: the energy of this format is unknown.
        """
        prices: Formats = getattr(self, kind)
        if dtype in ("float64", "int64", "int32", "bool"):  # what float32 costs; sums of indices and the like
            dtype = "float32"
        if dtype == "uint8":
            dtype = "int8"
        price = getattr(prices, dtype, None)
        if price is None:
            known = ", ".join(each.name for each in fields(Formats))
            raise UserError(f"no energy is known of a {kind} in {dtype}; those known are {known}")
        return price

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, each.name) for each in fields(self)))


def load_accelerator(path: Path | None = None) -> Accelerator:
    """Read an accelerator from a TOML file. Without a path, this is the file that comes with the package.

    Raises:
        UserError: no such file, not TOML, an unknown or missing key, or an impossible number.
    """
    path = DEFAULT_FILE if path is None else path
    tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--accelerator {path}: {error.strerror or error}; expected a file like {DEFAULT_FILE}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--accelerator {path}: not TOML ({error}); expected a file like {DEFAULT_FILE}") from None
    return _build(Accelerator, values, str(path), "")


_TABLES: dict[str, type] = {
    "Levels": Levels,
    "Formats": Formats,
    "Area": Area,
    "ElementwiseCost": ElementwiseCost,
}


def _build(kind: type, values: Any, path: str, prefix: str) -> Any:
    known = {each.name: str(each.type) for each in fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} must be a table with {', '.join(known)}")
    for name in values:
        if name not in known:
            raise UserError(f"{path}: unknown key {prefix}{name}; expected one of {', '.join(known)}")
    built: dict[str, Any] = {}
    for name, type_name in known.items():
        full = f"{prefix}{name}"
        if name not in values:
            raise UserError(f"{path}: {full} is missing")
        value = values[name]
        if type_name in _TABLES:
            built[name] = _build(_TABLES[type_name], value, path, f"{full}.")
        elif type_name == "str":
            built[name] = str(value)
        else:
            built[name] = _number(value, full, path)
    return kind(**built)


def _number(value: Any, name: str, path: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name in _WHOLE and not (is_number and value >= 1 and value == int(value)):
        raise UserError(f"{path}: {name} must be a whole number of at least 1, not {value!r}")
    if not (is_number and value >= 0) or (name == "clock_mhz" and value == 0):
        raise UserError(f"{path}: {name} must be a number that is not negative, not {value!r}")
    return int(value) if name in _WHOLE else float(value)
