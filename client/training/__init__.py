"""Computations of a hospital in a run: local rounds and tests of the global model."""
