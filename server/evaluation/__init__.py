"""How good the global model is, and the pages that show it."""
