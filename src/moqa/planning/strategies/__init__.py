"""The strategies, one file each; every file in this folder is registered by `moqa.planning.registry`."""
