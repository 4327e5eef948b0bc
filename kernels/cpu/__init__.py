"""Kernels for CPUs, in TIR."""
