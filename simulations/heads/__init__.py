"""Synthetic heads with real anatomy: a brain template warped at random, skull, scalp, bleedings and what resembles them."""
