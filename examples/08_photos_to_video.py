"""Make a camera flight of photos, of a video or of a scene, with the network that comes with the package.

Usage: python examples/08_photos_to_video.py [photos, video or scene] [flight.mp4] [pixels] [frames]

Without arguments: of the scene that comes with the package.
"""

import sys
from pathlib import Path

from shiftadd3d.configs.pretrained import shiftadd_gnt_tiny
from shiftadd3d.nerf.movie import MovieOptions, movie
from shiftadd3d.scenes import scene_path

arguments = dict(enumerate(sys.argv[1:]))
source = Path(arguments.get(0, scene_path()))
out = Path(arguments.get(1, "flight.mp4"))
options = MovieOptions(size=int(arguments.get(2, 160)), frames=int(arguments.get(3, 48)), outputs=("rgb", "depth"))

facts = movie(shiftadd_gnt_tiny, source, out, options)
print(f"{facts['movie']}: {out.stat().st_size:,} bytes")
