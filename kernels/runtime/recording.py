"""Whether torch records operations for a runtime other than ours. Then they must not depend on values."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Whether operations become a program of TorchScript or ONNX (by either exporter), which must run without this
    package.

    Such programs know only torch's operators, except those that read the bits of a float, and no autograd functions.
    """
    return torch.jit.is_tracing() or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())


def is_exported() -> bool:
    """Whether operations become a program of any kind, also of `torch.export`. It must be valid for all inputs."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()
