"""Weights in the form that kernels read."""
