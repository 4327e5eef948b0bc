"""From weights to what a kernel reads."""
