"""The specification of each op in plain torch. Kernels are compared with it."""
