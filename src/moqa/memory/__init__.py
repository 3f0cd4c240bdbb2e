"""Memory: how much is free, how much the process may use and uses, and returning it to the system."""
