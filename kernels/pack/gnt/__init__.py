"""From a GNT's weights to what its kernels read."""
