"""The hospital's daemon: joins a centre, stays connected and answers."""
