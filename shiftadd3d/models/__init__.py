"""Models composed of the layers of `shiftadd3d.nn`; a model knows nothing of how it is trained."""
