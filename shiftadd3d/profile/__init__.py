"""Measuring: what things cost on the machine at hand."""
