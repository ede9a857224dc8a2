"""The self-test on a release of JAX that was never tested."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import pytest

import freevars.jax as fv
from freevars.jax import _compat, _selftest


def test_nothing_fails_on_this_release() -> None:
    assert list(_selftest.failures()) == []


def test_this_release_was_tested() -> None:
    assert jax.__version_info__[:2] <= _selftest.NEWEST_TESTED


CHANGES = {
    "separate_constants": lambda closed: (closed.jaxpr, []),
    "drop_dead_code": lambda jaxpr, keep: (jaxpr, [True] * len(keep)),
    "prepend_operands": lambda eqn, operands, params: eqn,
    "cast": lambda x, expected: jnp.asarray(x, expected.dtype),
    "trace_context": lambda: 0,
    "layer": lambda tracer: ("jit", None, None),
    "nothing_traced": lambda: True,
    "remake": lambda kind, parts: object(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_once(name, monkeypatch) -> None:
    monkeypatch.setattr(_compat, name, CHANGES[name])
    monkeypatch.setattr(_selftest, "_checked", False)
    with pytest.warns(UserWarning, match=rf"up to .*work in another way: .*{name}"):
        _selftest.check_release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _selftest.check_release()


def test_the_first_conversion_looks(monkeypatch) -> None:
    monkeypatch.setattr(_selftest, "_checked", False)
    monkeypatch.setitem(_selftest._CHECKS, "an entry", lambda: 1 / 0)
    with pytest.warns(UserWarning, match="an entry"):
        fv.Closure(lambda x: x, 1.0)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fv.Closure(lambda x: x, 1.0)
