"""Floor 2: adapters on disk."""
