"""Checks of a hospital's data before a training run."""
