"""A hospital's files to its slice cache."""
