"""Checks that hemafed adds inside the SuperLink: who may call it, and with what."""
