"""The strategies, one file each: a file that is here is found, see `moqa.planning.registry`."""
