"""The command line: one file per command; each parses its options, calls the library and prints the result."""
