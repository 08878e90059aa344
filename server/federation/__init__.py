"""A round: which hospitals take part, what their updates are worth and how they are combined."""
