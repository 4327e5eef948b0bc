"""A GNT's kernels for NVIDIA GPUs."""
