"""The contract between hospitals and server; imports no other folder of the project."""
