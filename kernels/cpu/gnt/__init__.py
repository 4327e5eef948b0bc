"""A GNT's kernels for CPUs."""
