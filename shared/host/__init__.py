"""The machine that a program runs on: processes, files, rights and services."""
