"""The steps of a GNT, as torch ops."""
