"""Members of the registry of optimizers: one file each, named as users type it."""
