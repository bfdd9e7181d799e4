"""Floor 3: the recipe schema, and the defaults computed from data."""
