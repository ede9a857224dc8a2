"""Threads convert and call at once without seeing each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import freevars.jax as fv

X = jnp.array([0.5, -0.25, 2.0])


def run(work, threads=4):
    barrier = threading.Barrier(threads)

    def started(k):
        barrier.wait()
        return work(k)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(started, range(threads)))


def test_the_same_code_over_different_values() -> None:
    apply = jax.jit(lambda f, x: f(x))

    def work(k):
        results = []
        for i in range(20):
            w = jnp.full(3, float(100 * k + i))
            f = fv.Closure(lambda x: x * w, X)
            np.testing.assert_array_equal(f(X), X * w)
            np.testing.assert_array_equal(apply(f, X), X * w)
            results.append(jax.tree.structure(f))
        return results

    first, *others = [structure for each in run(work) for structure in each]
    assert all(s == first for s in others)
    assert apply._cache_size() == 1


def test_structures_that_are_new_to_all_threads() -> None:
    """Threads race to intern the same program; all must get one and the same."""
    for n in range(2, 12):
        closures = run(lambda _, n=n: fv.Closure(lambda x: x**n, X))
        assert len({id(f._program) for f in closures}) == 1
        for f in closures:
            np.testing.assert_allclose(f(X), X**n, rtol=1e-6)


def test_different_code_and_transformations() -> None:
    def work(k):
        def outer(w):
            f, hoisted = fv.closure_convert(lambda x: jnp.sum(w**k * x), X)
            assert len(hoisted) == 1
            return f(X, *hoisted)

        return [jax.grad(outer)(X * i) for i in range(1, 6)]

    for k, gradients in enumerate(run(work)):
        for i, g in enumerate(gradients, 1):
            np.testing.assert_allclose(g, k * (X * i) ** max(k - 1, 0) * X, rtol=1e-5)
