"""The checkpoint format: schemes, the integer grid, planes, files and their manifest."""
