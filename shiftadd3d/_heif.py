"""HEIC pictures, which phones take: Pillow reads them where a package is installed that teaches it to."""

from __future__ import annotations

import importlib

#: In small letters.
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
#: What makes them readable. This package reads only; pillow-heif, which also writes, does as well.
HEIF_REMEDY = "pip install pi-heif"


def heif_is_readable() -> bool:
    """Teach Pillow to open HEIC files, if a package that can is installed."""
    for name in ("pi_heif", "pillow_heif"):
        try:
            importlib.import_module(name).register_heif_opener()
        except ImportError:
            continue
        return True
    return False
