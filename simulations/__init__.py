"""Synthetic hospitals and the whole story in one command; may import all."""
