"""Problems of this folder are in float64, if a test does not say otherwise."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield
