"""Settings of the JAX tests: speed, and what JAX keeps between them."""

import jax

# The tests compile many tiny programs; none of them gains anything from being optimised.
jax.config.update("jax_disable_most_optimizations", True)
