"""Floor 3: from a user's file to token rows with a loss mask."""
