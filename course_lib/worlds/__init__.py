"""The worlds that the models learn: toys, digits, scenes."""
