"""Floor 5: measuring what came out."""
