"""Ways to reduce experts, one per file."""
