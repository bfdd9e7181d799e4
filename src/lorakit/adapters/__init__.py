"""Floor 1: the maths of each method and how it sits on a module. Knows torch alone."""
