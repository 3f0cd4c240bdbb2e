"""One file for each export."""
