"""Closure conversion: the tensors that a function reads become explicit arguments."""
