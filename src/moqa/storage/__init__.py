"""Storage: folders that appear complete or not at all, long work that survives a kill, and JSON artifacts."""
