"""What made-up scenes are put together from: a mesh with its material, in the renderer's form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ._meshes import Mesh


@dataclass(frozen=True)
class Thing:
    """A mesh with its material: a texture under a clear coat.

    Attributes:
        mesh: the surface, in world units.
        texture: [H, W, 3] uint8 sRGB.
        roughness: of the coat (Beckmann alpha); None for a purely diffuse surface.
    """

    mesh: Mesh
    texture: np.ndarray
    roughness: float | None = None

    def to_dict(self, mi: Any, path: Path, wrap: Literal["repeat", "mirror"]) -> dict[str, Any]:
        """In Mitsuba's dictionary form.

        Args:
            mi: the mitsuba module, its variant set.
            path: PLY file with the mesh.
            wrap: what the texture does beyond its border.
        """
        # Mitsuba puts v = 0 at the first row of a bitmap.
        bitmap = mi.Bitmap(np.ascontiguousarray(self.texture[::-1]))
        colour = {"type": "bitmap", "bitmap": bitmap, "wrap_mode": wrap}
        material: dict[str, Any] = {"type": "diffuse", "reflectance": colour}
        if self.roughness is not None:
            material = {
                "type": "roughplastic",
                "diffuse_reflectance": colour,
                "alpha": self.roughness,
                "nonlinear": True,
            }
        return {"type": "ply", "filename": str(path), "bsdf": {"type": "twosided", "bsdf": material}}
