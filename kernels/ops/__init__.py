"""Torch ops: schema, gradients, and which backend serves a call."""
