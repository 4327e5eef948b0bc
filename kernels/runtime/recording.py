"""Whether torch records what runs now, for a runtime that is not ours: then it must not depend on what values are."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether operations become a program of TorchScript or ONNX (by either exporter), which are to run without us.

    They know torch's operators only, of these none that reads the bits of a float, and no autograd functions.
    """
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def is_exported() -> bool:
    """Whether operations become a program of any kind, that of `torch.export` included: it holds for all inputs."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
