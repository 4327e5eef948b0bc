"""Transformer NeRFs and vision transformers whose multiplications become shifts, additions and a mixture of experts.

Importing this package is cheap: torch and the optional parts (nerfstudio, TVM, timm) load with the submodule that needs
them.
"""

from importlib.metadata import PackageNotFoundError, version

from shiftadd3d._errors import UserError
from shiftadd3d._on_import import load_with

__all__ = ["UserError", "__version__"]

try:
    __version__ = version("shiftadd3d")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# What extends timm takes effect where timm is in use, whether it was imported before or comes later.
load_with("timm", "shiftadd3d.models.vit")
