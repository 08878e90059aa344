"""What a hospital computes in a run: its local rounds and its tests of the global model."""
