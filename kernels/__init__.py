"""Kernels attach here: each as a torch op of this project with a plain-torch twin of the same signature.

None is there yet: the layers of `shiftadd3d.nn` run through their torch twins. This package is the only one that
imports TVM, and does so lazily.
"""
