"""A GNT's chunk of rays as functions of programs: norms, residuals and look-ups are parts of what needs them."""
