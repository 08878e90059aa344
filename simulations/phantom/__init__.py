"""Synthetic head CT and the hospitals that it comes from."""
