"""What travels between hospitals and centre, and how it is checked on arrival."""
