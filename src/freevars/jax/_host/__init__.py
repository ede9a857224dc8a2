"""Solvers that run on the host, on NumPy arrays."""
