"""A `custom_vjp` that JAX cannot transpose: reverse mode by pullbacks alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

import freevars.jax as fv
from freevars.errors import NotASolutionError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def on_host(fun, *args):
    out = jax.ShapeDtypeStruct(jnp.shape(args[0]), jnp.float64)
    host = lambda *a: np.asarray(fun(*map(np.asarray, a)), np.float64)
    return jax.pure_callback(host, out, *args, vmap_method="sequential")


@jax.custom_vjp
def by_adjoint_code(x, b):
    return on_host(lambda x, b: b * x**3, x, b)


by_adjoint_code.defvjp(
    lambda x, b: (by_adjoint_code(x, b), (x, b)),
    lambda saved, g: (
        on_host(lambda g, x, b: g * 3 * x**2 * b, g, *saved),
        on_host(lambda g, x, b: np.sum(g * x**3), g, *saved),
    ),
)


@jax.custom_vjp
def by_a_loop(x, b):
    return b * x**3


def until_done(g, slope):
    add = lambda s: (s[0] + 1, s[1] + g * slope / 4)
    return lax.while_loop(lambda s: s[0] < 4, add, (0, 0 * g * slope))[1]


by_a_loop.defvjp(
    lambda x, b: (by_a_loop(x, b), (x, b)),
    lambda s, g: (until_done(g, 3 * s[0] ** 2 * s[1]), until_done(g, s[0] ** 3)),
)


def bisect(fun, x0):
    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        above = fun(middle) > 0
        return jnp.where(above, ends[0], middle), jnp.where(above, middle, ends[1])

    return lax.fori_loop(0, 60, halve, (0 * x0, 0 * x0 + 5))[0]


@pytest.mark.parametrize("cube", [by_adjoint_code, by_a_loop])
@pytest.mark.slow
def test_a_backward_pass_that_cannot_be_transposed(cube):
    solver = fv.root(bisect)
    solve = lambda b: solver(lambda x: cube(x, b) - 8.0, jnp.ones(()))  # x = 2 b^(-1/3)
    want = -2 / 3 * 1.5 ** (-4 / 3)
    for derivative in (jax.grad(solve), jax.jit(jax.grad(solve))):
        np.testing.assert_allclose(derivative(1.5), want, rtol=1e-9)
    many = jax.vmap(jax.grad(solve))(jnp.array([1.5, 1.5]))
    np.testing.assert_allclose(many, [want, want], rtol=1e-9)
    early = fv.root(lambda fun, x0: bisect(fun, x0) + 0.2)
    by_early = jax.grad(lambda b: early(lambda x: cube(x, b) - 8.0, jnp.ones(())))
    with pytest.raises(NotASolutionError, match="did not converge"):
        by_early(1.5)
    assert np.isnan(jax.jit(by_early)(1.5))


def test_options_that_need_forward_mode_are_refused():
    solve = lambda b, **how: fv.root(bisect, **how)(lambda x: by_a_loop(x, b) - 8.0, jnp.ones(()))
    for how in ({"polish": True}, {"conserved": lambda x: x}):
        with pytest.raises(NotImplementedError, match=rf"bisect: {next(iter(how))}=.*custom_vjp"):
            jax.grad(lambda b, how=how: solve(b, **how))(1.5)
    with pytest.raises(NotImplementedError, match="polish=True"):
        solve(1.5, polish=True)


@custom_vmap
def batched_cube(x, b):
    return b * x**3


@batched_cube.def_vmap
def _(size, is_batched, x, b):
    x, b = (
        a if batched else jnp.broadcast_to(a, (size, *jnp.shape(a)))
        for a, batched in zip((x, b), is_batched, strict=True)
    )
    return b * x**3, True


def test_a_custom_vmap_is_refused_by_name_and_fine_behind_a_custom_jvp():
    ruled = jax.custom_jvp(lambda x, b: batched_cube(x, b))
    slopes = lambda x, b: (3 * b * x**2, x**3)
    ruled.defjvp(
        lambda at, dots: (
            ruled(*at),
            sum(slope * dot for slope, dot in zip(slopes(*at), dots, strict=True)),
        )
    )
    solver = fv.root(bisect)
    solve = lambda b, cube: solver(lambda x: cube(x, b) - 8.0, jnp.ones(()))
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.jacrev(f))):
        with pytest.raises(NotImplementedError, match=r"bisect: expected .* custom_vmap") as error:
            derivative(lambda b: solve(b, batched_cube))(1.5)
        assert isinstance(error.value.__cause__, ValueError)
        slope = derivative(lambda b: solve(b, ruled))(1.5)
        np.testing.assert_allclose(slope, -2 / 3 * 1.5 ** (-4 / 3), rtol=1e-9)  # of (8 / b)^(1/3)


@pytest.mark.slow
def test_the_second_order_is_as_far_as_the_backward_pass_goes():
    # The backward pass holds a rule for reverse mode itself, as an ODE solver's does.
    @jax.custom_vjp
    def cube(x, b):
        return b * x**3

    inner = jax.custom_vjp(lambda g, slope: g * slope)
    inner.defvjp(lambda g, s: (inner(g, s), (g, s)), lambda r, h: (inner(h, r[1]), inner(h, r[0])))
    cube.defvjp(
        lambda x, b: (cube(x, b), (x, b)),
        lambda s, g: (inner(g, 3 * s[0] ** 2 * s[1]), inner(g, s[0] ** 3)),
    )
    solver = fv.root(bisect)
    solve = lambda a, b: solver(lambda x: cube(x, b) - a, jnp.ones(()))  # (a / b)^(1/3)
    exact = lambda a, b: (a / b) ** (1 / 3)
    for i in (0, 1):
        for k in (0, 1):
            got = jax.grad(jax.grad(solve, i), k)(8.0, 1.5)
            np.testing.assert_allclose(got, jax.grad(jax.grad(exact, i), k)(8.0, 1.5), rtol=1e-8)
