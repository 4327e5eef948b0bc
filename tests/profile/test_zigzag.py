"""Our memory model on dense layers, beside that of zigzag-dse, which is not among this project's packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shiftadd3d.nn.counting import Product
from shiftadd3d.profile.accelerator import Accelerator, load_accelerator
from shiftadd3d.profile.tiling import best_mapping

api = pytest.importorskip("zigzag.api")
yaml = pytest.importorskip("yaml")

_PORT_BITS = 32  # as wide as an element: an access moves one


def memory(bits: int, pj_per_bit: float, served: list[str], holds_all: bool = False) -> dict:
    """A memory for all operands; `holds_all`: the last one, with nothing above it."""
    lower = ["I1, tl", "I2, tl", "O, tl", "O, fl"]
    upper = ["I1, fh", "I2, fh", "O, fh", "O, th"]
    port = {
        "name": "rw_port_1",
        "type": "read_write",
        "bandwidth_min": _PORT_BITS,
        "bandwidth_max": _PORT_BITS,
        "allocation": lower if holds_all else [*lower, *upper],
    }
    cost = _PORT_BITS * pj_per_bit
    return {
        "size": bits,
        "r_cost": cost,
        "w_cost": cost,
        "area": 0,
        "latency": 1,
        "operands": ["I1", "I2", "O"],
        "ports": [port],
        "served_dimensions": served,
    }


def by_zigzag(chip: Accelerator, outputs: int, inputs: int, rows: int, folder: Path) -> float:
    """Picojoules of a matrix product on one element of `chip`, without a network."""
    prices = chip.energy_per_bit
    hardware = {
        "name": "one",
        "memories": {
            "registers": memory(8 * chip.register_file_bytes, prices.register, []),
            "buffer": memory(8192 * chip.buffer_kib, prices.buffer, ["D1"]),
            "dram": memory(10**10, prices.dram, ["D1"], holds_all=True),
        },
        "operational_array": {
            "unit_energy": chip.mult.float32 + chip.add.float32,
            "unit_area": 1,
            "dimensions": ["D1"],
            "sizes": [1],
        },
    }
    links = {"O": "O", "W": "I2", "I": "I1"}
    mapping = [{"name": "default", "spatial_mapping": {"D1": ["K, 1"]}, "memory_operand_links": links}]
    layer = {
        "id": 0,
        "operator_type": "Gemm",
        "equation": "O[b][k]+=W[k][c]*I[b][c]",
        "dimension_relations": [],
        "loop_dims": ["B", "K", "C"],
        "loop_sizes": [rows, outputs, inputs],
        "operand_precision": {"W": 32, "I": 32, "O": 32, "O_final": 32},
        "operand_source": {"I": 0, "W": 0},
    }
    files = []
    for name, content in (("workload", [layer]), ("hardware", hardware), ("mapping", mapping)):
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(content, sort_keys=False))
    energy, *_ = api.get_hardware_performance_zigzag(
        *map(str, files),
        opt="energy",
        dump_folder=str(folder / "out"),
        pickle_filename=str(folder / "out.pickle"),
        lpf_limit=7,
        loma_show_progress_bar=False,
    )
    return energy


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "inputs", "rows", "kib"), [(32, 64, 48, 8), (96, 16, 128, 16), (64, 64, 64, 32)])
def test_dense_layers_take_what_zigzag_says(tmp_path: Path, outputs: int, inputs: int, rows: int, kib: int) -> None:
    chip = load_accelerator()
    prices = replace(chip.energy_per_bit, noc=0.0)
    chip = replace(chip, pes=1, buffer_kib=kib, register_file_bytes=256, energy_per_bit=prices)
    ours = best_mapping(Product("mult", 1, 1, outputs, inputs, (rows, 1)), chip).total
    assert ours == pytest.approx(by_zigzag(chip, outputs, inputs, rows, tmp_path), rel=0.2)
