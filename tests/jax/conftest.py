"""Settings of the JAX tests: speed, and what JAX keeps between them."""

import jax
import pytest

# The tests compile many tiny programs; none of them gains anything from being optimised.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What JAX keeps of a file's functions serves no other, and all of it together is gigabytes."""
    yield
    jax.clear_caches()
