"""The JAX host."""
