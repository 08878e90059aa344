"""The hospital's boundary: what may come in, what may leave, and the record of both. A security review starts here."""
