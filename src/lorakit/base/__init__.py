"""Floor 2: loading a model in a chosen precision, and running it without waste."""
