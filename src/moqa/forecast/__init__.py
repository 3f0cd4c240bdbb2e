"""Forecasts: the memory, disk space, time and serving size of work, estimated before it begins."""
