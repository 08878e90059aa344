"""The code that runs in a hospital; imports shared."""
