"""A chunk of a GNT's rays in other engines, for the table in docs/results/peers.md.

make peers
python benchmarks/peers_rays.py run
python benchmarks/peers.py report
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from peers import (
    EAGER,
    OPENVINO,
    OURS,
    RAYS_FILES,
    SAME,
    Measurement,
    Solution,
    is_held,
    openvino_forms,
    openvino_settings,
    session_options,
)
from reporting import run_command

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shiftadd3d.models.gnt import GNTModel, SourceViews

DENSE, SHIFTADD = "gnt-tiny", "shiftadd-gnt-tiny"
VIEWS, ROWS, COLUMNS, SAMPLES = 6, 16, 64, 8
HEIGHT, WIDTH, FOCAL = 188, 252, 250.0
NEAR, FAR = 2.0, 8.0


def camera_rays() -> tuple[Tensor, Tensor]:
    """Origins and directions of 1,024 rays, [R, 3] each: every tenth row and every third column of a picture."""
    import torch

    y, x = torch.meshgrid(10.0 * torch.arange(ROWS), 3.0 * torch.arange(COLUMNS), indexing="ij")
    x, y = (x.flatten() - WIDTH / 2) / FOCAL, (y.flatten() - HEIGHT / 2) / FOCAL
    directions = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    return torch.tensor([0.05, 0.02, 0.0]).expand(len(x), 3).contiguous(), directions


def source_views(network: GNTModel) -> SourceViews:
    """Six views side by side, of noise: it costs what photos do."""
    import torch

    from shiftadd3d.models.gnt import Cameras

    images = torch.rand(VIEWS, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    intrinsics = torch.tensor([[FOCAL, 0.0, WIDTH / 2], [0.0, FOCAL, HEIGHT / 2], [0.0, 0.0, 1.0]])
    poses = torch.eye(4).repeat(VIEWS, 1, 1)
    poses[:, 0, 3] = torch.linspace(-0.3, 0.3, VIEWS)
    return network.encode(images, Cameras(intrinsics.expand(VIEWS, 3, 3), poses))


def dense_chunk() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """`gnt-tiny` on a chunk of rays, as a module that ONNX can express, and its inputs.

    ONNX has no `searchsorted`, which draws the samples from the plane sweep's weights. The samples' depths are an input
    instead. Without the drawing the module does a little less than ours.
    """
    import torch
    from torch import nn

    from shiftadd3d.models.gnt import GNTModel
    from shiftadd3d.models.gnt.model import canonical_frame
    from shiftadd3d.models.gnt.presets import TINY
    from shiftadd3d.models.gnt.sampling import sample_depths
    from shiftadd3d.nerf.weights import pretrained_file, read_weights

    network = GNTModel(TINY).eval()
    weights, _ = read_weights(pretrained_file(DENSE))
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    unit = torch.tensor(2.0 / (1.0 / NEAR + 1.0 / FAR))
    sources, origins, directions = canonical_frame(source_views(network), *camera_rays(), unit)
    near, far = (torch.full((len(origins),), depth) / unit for depth in (NEAR, FAR))
    planes, depths = (sample_depths(near, far, count, inverse_depth=True) for count in (TINY.proposal_samples, SAMPLES))

    class Chunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, origins: Tensor, directions: Tensor, depths: Tensor) -> tuple[Tensor, ...]:
            network, proposal = self.network, self.network.proposal
            assert proposal is not None
            _, weights, _ = network._propose(proposal, sources, origins, directions, planes)
            rgb, _, _ = network._render(network.net_coarse, sources, origins, directions, depths, sources.features[0])
            return rgb, weights

    return Chunk(), (origins, directions, depths)


def write_onnx(chunk: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """The module as an ONNX file, for so many rays."""
    import torch

    from shiftadd3d.models.gnt import projection

    found: list[Tensor] = []
    plain = projection.projection_matrices

    def known(cameras: Any) -> Tensor:
        """Inverses of the cameras' poses, which ONNX cannot take, as constants."""
        found.append(plain(cameras)) if not found else None
        return found[0]

    with mock.patch.object(projection, "projection_matrices", known):
        chunk(*inputs)
        torch.onnx.export(chunk, inputs, path, dynamo=True, external_data=False, verbose=False)


def torch_solutions(chunk: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, Solution]]:
    """The dense network as everyone runs it."""
    yield EAGER, lambda: chunk(*inputs)


def openvino_solutions(path: Path, inputs: tuple[Tensor, ...], threads: int) -> Iterator[tuple[str, Solution]]:
    """float32, bfloat16 where the CPU multiplies in it, and 8-bit integers by NNCF."""
    import nncf
    import openvino
    from nncf import Dataset, ModelType, quantize

    nncf.set_log_level(logging.ERROR)
    core, arrays = openvino.Core(), [x.numpy() for x in inputs]
    small = quantize(core.read_model(path), Dataset([arrays] * 2), model_type=ModelType.TRANSFORMER, subset_size=2)
    models = {"f32": core.read_model(path), "NNCF int8, f32": small}
    if "bf16" in openvino_forms(core):
        models["bf16"] = core.read_model(path)
    for name, model in models.items():
        settings = openvino_settings(name.split(", ")[-1], threads)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        yield f"{OPENVINO}{name}", lambda request=request: list(request.infer(arrays).values())


def onnxruntime_solutions(path: Path, inputs: tuple[Tensor, ...], threads: int) -> Iterator[tuple[str, Solution]]:
    """float32. None if held: it takes what the CPU has."""
    if is_held():
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    yield "ONNX Runtime, float32", lambda: session.run(None, feed)


def our_solutions() -> Iterator[tuple[str, Solution]]:
    """The networks that come with the package, as executables; the dense one has no form of integers."""
    import shiftadd3d
    from shiftadd3d.nerf.weights import load_network

    origins, directions = camera_rays()
    for method, forms in ((DENSE, ("exact",)), (SHIFTADD, ("exact", "int8"))):
        network = load_network(method)
        sources = source_views(network)
        for form in forms:
            compiled = shiftadd3d.compile(network, numerics=form)
            if compiled.reason is not None:
                raise AssertionError(f"{method}: not compiled: {compiled.reason}")

            def run(compiled: Any = compiled, sources: SourceViews = sources) -> list[Tensor]:
                return [compiled(sources, origins, directions, NEAR, FAR, SAMPLES, inverse_depth=True)["rgb"]]

            yield f"{OURS}{method}, {form}", run


@dataclass
class Run(Measurement):
    """Time a chunk of 1,024 rays, all solutions in turns: the dense network in other engines, ours frozen."""

    def __call__(self) -> None:
        """Write the JSON file."""
        self.write("peers_rays.py", RAYS_FILES, {}, self.rows)

    def rows(self) -> list[dict[str, Any]]:
        """Milliseconds and errors of all solutions, for each number of threads."""
        chunk, inputs = dense_chunk()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "gnt-tiny.onnx"
            write_onnx(chunk, inputs, path)
            return [measure(chunk, inputs, path, threads, self.rounds) for threads in self.threads]


def measure(chunk: nn.Module, inputs: tuple[Tensor, ...], path: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a chunk of each solution, in turns, and how far its colours in 0..1 are off, the mean.

    Those of the other engines from torch's, and those of ours from the same network's in float32.
    """
    import numpy as np
    import torch

    from shiftadd3d.profile.timing import interleaved

    torch.set_num_threads(threads)
    with torch.inference_mode():
        theirs = dict(torch_solutions(chunk, inputs))
        expected = np.asarray(theirs[EAGER]()[0])
        theirs |= dict(openvino_solutions(path, inputs, threads))
        theirs |= dict(onnxruntime_solutions(path, inputs, threads))
        off = {name: float(np.abs(np.asarray(run()[0]) - expected).mean()) for name, run in theirs.items()}
        if any(off.get(name, 0.0) > 1e-3 for name in SAME):
            raise AssertionError(f"other engines do not compute what torch does: {off}")
        ours = dict(our_solutions())
        exact = np.asarray(ours[f"{OURS}{SHIFTADD}, exact"]()[0])
        off[f"{OURS}{SHIFTADD}, int8"] = float(np.abs(np.asarray(ours[f"{OURS}{SHIFTADD}, int8"]()[0]) - exact).mean())
        found = interleaved(theirs | ours, rounds=rounds, foreign=True)
    ms = {name: float(f"{1000 * times.median:.4g}") for name, times in found.items()}
    print(f"{threads} threads: {ms}, off by {off}", flush=True)
    return {"threads": threads, "ms": ms, "off": {name: float(f"{value:.2g}") for name, value in off.items()}}


def main() -> None:
    run_command({"run": Run}, __doc__)


if __name__ == "__main__":
    main()
