"""Closure conversion: from a Python function to a program and its captured values."""
