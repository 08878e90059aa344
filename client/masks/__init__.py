"""Hematoma masks: SEG, RTSTRUCT, NIfTI and PNG, each matched to its images."""
