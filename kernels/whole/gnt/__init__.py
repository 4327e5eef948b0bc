"""Functions of programs for a GNT's chunk of rays. Norms, residuals and look-ups are parts of the functions."""
