"""Floor 4: generating text."""
