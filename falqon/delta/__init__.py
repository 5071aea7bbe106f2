"""Deltas: what a training changed against the melded model it started from."""
