"""The steps of a GNT, in plain torch."""
