"""A model at work on a folder of the hospital's own scans: hematomas as masks. Nothing leaves."""
