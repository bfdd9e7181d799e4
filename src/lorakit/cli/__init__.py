"""Floor 6: verbs, one file each. No maths here."""
