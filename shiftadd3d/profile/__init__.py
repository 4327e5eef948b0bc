"""Measure what models and kernels cost: operations, energy, and times on this machine."""
