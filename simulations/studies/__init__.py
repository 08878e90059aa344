"""Experiments: many trainings, resumable, and the tables made of them."""
