"""Whole networks as one executable of TVM's Relax virtual machine: fused functions, and the order of their calls."""
