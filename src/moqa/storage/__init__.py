"""Storage: folders that appear whole or not at all, long work that survives a kill, JSON artifacts."""
