"""Running a checkpoint: packed modules, and `moqa.load`."""
