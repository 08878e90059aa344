"""What a security reviewer reads: what may come in, what may leave, and the record of both."""
