"""Real hospitals, centres and files, small, for tests."""
