"""Kernels for NVIDIA GPUs, in TIR."""
