"""The multi-task network, its losses, its batches and its scores."""
