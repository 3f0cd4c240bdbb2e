"""Memory: what is free, what a process may take and has taken, and giving it back."""
