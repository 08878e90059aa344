"""Evaluation of the global model, and the pages that show it."""
