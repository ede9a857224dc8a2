"""What JAX keeps between the tests of its host."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _forgotten():
    """What JAX keeps of a file's functions serves no other, and all of it together is gigabytes."""
    yield
    jax.clear_caches()
