"""moqa gives precision to the parts of a Mixture-of-Experts model that the data needs."""

__version__ = "0.1.0"
