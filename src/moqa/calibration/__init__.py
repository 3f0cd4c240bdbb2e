"""Calibration: statistics of the inputs of units on some samples, and the hidden states that they come from."""
