"""Calibration: what units are multiplied with on some samples, and the hidden states it comes from."""
