"""How kernels are compiled, kept, loaded and run."""
