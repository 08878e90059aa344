"""What runs in a hospital; imports shared."""
