"""Other closure conversions that may be installed, by the name to print. Not here: freevars."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


# (fun, *example_args) -> something that holds the conversion
CONVERTERS: dict[str, Callable[..., Any]] = {"jax.closure_convert": jax.closure_convert}

if importlib.util.find_spec("equinox"):
    import equinox

    CONVERTERS["equinox"] = equinox.filter_closure_convert
