"""Forecasts: the memory, disk, time and serving size that work will take, told before it begins."""
