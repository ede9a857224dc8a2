"""One call of a solver: its function, its unknown, its arguments."""
