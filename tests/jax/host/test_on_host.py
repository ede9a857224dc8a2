"""`on_host`: NumPy solvers eagerly and inside programs, with derivatives from the rules above."""

import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize as so

import freevars.jax as fv
from freevars.jax._host import staged as _in_program

KEY = jax.random.key(0)
N = 20  # more than one block of columns


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield
    assert not _in_program._RUNNING, "a solve left its sessions behind"


def lbfgs(fun, x0):
    options = {"gtol": 1e-10, "ftol": 1e-16}
    return so.minimize(fun.value_and_grad, x0, jac=True, method="L-BFGS-B", options=options).x


def newton(fun, x0):
    options = {"gtol": 1e-10}
    jac, hess = fun.grad, fun.hessian
    return so.minimize(fun, x0, jac=jac, hess=hess, method="trust-exact", options=options).x


def newton_cg(fun, x0):
    options = {"gtol": 1e-10}
    return so.minimize(fun, x0, jac=fun.grad, hessp=fun.hvp, method="trust-ncg", options=options).x


def descent(fun, x0):
    """A solver that takes batches."""
    assert x0.ndim == 2
    x = x0
    for _ in range(400):
        x = x - 0.15 * fun.grad(x)
    assert fun(x).shape == x.shape[:1]
    np.testing.assert_allclose(np.einsum("bij,bj->bi", fun.hessian(x), x), fun.hvp(x, x))
    return x


MINIMIZERS = {
    "lbfgs": fv.argmin(fv.on_host(lbfgs)),
    "newton": fv.argmin(fv.on_host(newton)),
    "newton_cg": fv.argmin(fv.on_host(newton_cg)),
    "whole": fv.argmin(fv.on_host(vmap="whole")(descent)),
}


def data():
    design = jax.random.normal(KEY, (40, N), jnp.float64)
    return design, jnp.sin(jnp.arange(40.0))


def ridge(minimize, lam):
    design, target = data()

    def energy(w):
        return (jnp.mean((design @ w - target) ** 2) + jnp.exp(lam) * jnp.sum(w**2)) / 2

    return minimize(energy, jnp.zeros(N))


def ridge_exact(lam):
    design, target = data()
    return jnp.linalg.solve(
        design.T @ design / 40 + jnp.exp(lam) * jnp.eye(N), design.T @ target / 40
    )


LAMS = jnp.array([-0.5, 0.3, 1.0])

WAYS = {
    "value": lambda f: f(0.3),
    "grad": lambda f: jax.jacrev(f)(0.3),
    "jvp": lambda f: jax.jacfwd(f)(0.3),
    "jit": lambda f: jax.jit(f)(0.3),
    "jit(grad)": lambda f: jax.jit(jax.jacrev(f))(0.3),
    "grad(jit)": lambda f: jax.jacrev(jax.jit(f))(0.3),
    "hessian": lambda f: jax.hessian(f)(0.3),
    "vmap": lambda f: jax.vmap(f)(LAMS),
    "vmap(grad)": lambda f: jax.vmap(jax.jacrev(f))(LAMS),
    "grad(vmap)": lambda f: jax.jacrev(lambda lams: jax.vmap(f)(lams).sum(0))(LAMS),
    "jit(vmap(jvp))": lambda f: jax.jit(jax.vmap(jax.jacfwd(f)))(LAMS),
    "vmap(vmap)": lambda f: jax.vmap(jax.vmap(f))(jnp.stack([LAMS, LAMS + 0.1])),
    "scan": lambda f: jax.lax.scan(lambda c, lam: (c + f(lam), None), jnp.zeros(N), LAMS)[0],
    "remat": lambda f: jax.jacrev(jax.checkpoint(f))(0.3),
}


# Every way for one solver; for the others those in which they could differ.
TABLE = [("lbfgs", way) for way in WAYS] + [
    (name, way)
    for name in ("newton", "newton_cg", "whole")
    for way in ("grad", "jit(grad)", "jit(vmap(jvp))")
]
QUICK = [("lbfgs", way) for way in ("value", "grad", "jit(grad)", "jit(vmap(jvp))", "hessian")]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
        for row in (*TABLE, ("whole", "vmap(vmap)"))
    ],
)
def test_a_host_solver_under_every_transformation_gives_the_closed_form(name, way):
    got = WAYS[way](lambda lam: ridge(MINIMIZERS[name], lam))
    np.testing.assert_allclose(got, WAYS[way](ridge_exact), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_root_of_a_pytree_of_unknowns():
    find = fv.root(fv.on_host(lambda fun, x0: so.root(fun, x0, jac=fun.jacobian).x))

    def solve(a):
        def equations(x):
            return {"u": x["u"] ** 2 - a * x["v"], "v": x["v"] - 3.0}

        return find(equations, {"u": 1.0, "v": 1.0})["u"]

    for way in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))):
        np.testing.assert_allclose(way(solve)(2.0), 0.5 * np.sqrt(3 / 2), rtol=1e-8)


def test_fixed_point_with_least_squares():
    @fv.fixed_point
    @fv.on_host
    def settle(fun, x0):
        identity = np.eye(x0.size)
        return so.least_squares(
            lambda v: fun(v) - v, x0, lambda v: fun.jacobian(v) - identity, xtol=1e-15, gtol=1e-15
        ).x

    def solve(a):
        return settle(lambda x: jnp.cos(a * x), jnp.array([0.7]))[0]

    x = solve(1.0)
    slope = -x * jnp.sin(x) / (1 + jnp.sin(x))  # differentiate x = cos(a x)
    np.testing.assert_allclose(jax.grad(solve)(1.0), slope, rtol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.grad(solve))(1.0), slope, rtol=1e-7)


def test_complex_unknowns_are_two_real_ones():
    find = fv.root(fv.on_host(lambda fun, x0: so.root(fun, x0, jac=fun.jacobian).x))

    def solve(a):
        return find(lambda z: z**2 - a, 1.0 + 1.0j)

    for f in (solve, jax.jit(solve)):
        np.testing.assert_allclose(f(2.0j), 1.0 + 1.0j, rtol=1e-9)
        _, dot = jax.jvp(f, (2.0j,), (1.0 + 0.0j,))
        np.testing.assert_allclose(dot, 0.5 / (1.0 + 1.0j), rtol=1e-8)


@pytest.mark.slow
def test_pytrees_for_a_solver_that_wants_them():
    seen = []

    @fv.argmin
    @fv.on_host(flat=False)
    def minimize(fun, x0):
        seen.append(jax.tree.map(lambda a: (type(a), a.dtype), x0))
        x = x0
        for _ in range(200):
            slope = fun.grad(x)
            x = {k: x[k] - 0.4 * slope[k] for k in x}
        value, slope = fun.value_and_grad(x)
        assert isinstance(value, float)
        assert slope.keys() == x.keys()
        return x

    def solve(a):
        x0 = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2), jnp.float32)}
        return minimize(lambda x: jnp.sum((x["w"] - a) ** 2) + jnp.sum((x["b"] + a) ** 2), x0)

    for f in (solve, jax.jit(solve)):
        out = f(3.0)
        assert out["w"].dtype == jnp.float32
        np.testing.assert_allclose(out["w"], 3.0, rtol=1e-6)
        np.testing.assert_allclose(jax.grad(lambda a: f(a)["b"].sum())(3.0), -2.0, rtol=1e-6)
    want = {"b": (np.ndarray, np.float64), "w": (np.ndarray, np.float32)}
    assert seen
    assert all(one == want for one in seen)


@pytest.mark.parametrize("way", [lambda f: f, jax.jit, jax.grad])
def test_single_precision_programs(way):
    with jax.enable_x64(False):
        got = way(lambda a: MINIMIZERS["lbfgs"](lambda x: (x - a) ** 2, 0.5))(3.0)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, 1.0 if way is jax.grad else 3.0, rtol=1e-5)


def test_aux_of_the_solver():
    @fv.argmin(has_aux=True)
    @fv.on_host(aux=fv.scipy_status())
    def minimize(fun, x0):
        result = so.minimize(fun.value_and_grad, x0, jac=True, method="L-BFGS-B")
        return result.x, fv.scipy_status(result)

    def solve(a):
        return minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(2))

    for f in (solve, jax.jit(solve)):
        x, status = f(3.0)
        np.testing.assert_allclose(x, 3.0, rtol=1e-6)
        assert status["success"].dtype == bool
        assert bool(status["success"])
        assert int(status["iterations"]) > 0
        slope, status = jax.jacrev(f, has_aux=True)(3.0)
        np.testing.assert_allclose(slope, 1.0, rtol=1e-6)
    _, status = jax.vmap(solve)(jnp.array([0.0, 3.0]))
    assert status["iterations"].tolist()[0] == 0
    assert status["iterations"].tolist()[1] > 0


def test_options_arrive_as_given_and_arrays_as_numpy():
    seen = []

    @fv.argmin
    @fv.on_host
    def minimize(fun, x0, *, label, weights, rounds=3):
        seen.append((label, type(weights), weights.tolist(), rounds))
        return lbfgs(fun, x0)

    def solve(a):
        return minimize(lambda x: (x - a) ** 2, 0.0, label="here", weights=jnp.arange(2.0))

    assert solve(1.0) == pytest.approx(1.0)
    assert jax.jit(solve)(1.0) == pytest.approx(1.0)
    assert seen == [("here", np.ndarray, [0.0, 1.0], 3)] * 2


def test_options_that_python_calls_equal_are_told_apart():
    seen = []

    @fv.argmin
    @fv.on_host
    def minimize(fun, x0, *, mark):
        seen.append(repr(mark))
        return lbfgs(fun, x0)

    for mark in (1, 1.0, True, 0.0, -0.0):
        jax.vmap(lambda a, mark=mark: minimize(lambda x: (x - a) ** 2, 0.0, mark=mark))(LAMS[:1])
    assert seen == ["1", "1.0", "True", "0.0", "-0.0"]


class OddError(Exception):
    """Nobody else raises it."""


def test_an_error_of_the_solver_reaches_the_user():
    @fv.argmin
    @fv.on_host
    def breaks(fun, x0):
        fun.grad(x0)
        raise OddError(x0)

    def solve(a):
        return breaks(lambda x: (x - a) ** 2, 1.0)

    for call in (lambda: solve(1.0), lambda: jax.grad(solve)(1.0), lambda: jax.vmap(solve)(LAMS)):
        with pytest.raises(OddError) as caught:
            call()
        assert any("solver breaks" in note for note in caught.value.__notes__)
    with pytest.raises(jax.errors.JaxRuntimeError, match="OddError"):
        jax.block_until_ready(jax.jit(solve)(1.0))
    # Nothing is left half-done: the next solve works.
    assert ridge(MINIMIZERS["lbfgs"], 0.3).shape == (N,)


def test_wrong_returns_are_refused():
    short = fv.argmin(fv.on_host(lambda fun, x0: x0[:1]))
    with pytest.raises(TypeError, match=r"shape \(1,\), expected \(2,\)"):
        short(lambda x: jnp.sum(x**2), jnp.ones(2))
    odd = fv.argmin(has_aux=True)(fv.on_host(aux={"n": 0})(lambda fun, x0: (x0, {"m": 1})))
    with pytest.raises(TypeError, match="aux"):
        odd(lambda x: jnp.sum(x**2), jnp.ones(2))
    equations = fv.root(fv.on_host(lambda fun, x0: fun.grad(x0)))
    with pytest.raises(TypeError, match="system of equations"):
        equations(lambda x: x**2, jnp.ones(2))
    with pytest.raises(ValueError, match='"sequential" or "whole"'):
        fv.on_host(vmap="sideways")


@pytest.mark.slow
def test_a_solve_inside_a_solve():
    minimize = MINIMIZERS["lbfgs"]

    def bilevel(lam, inner):
        x = minimize(lambda x: jnp.sum((x - inner(lam)[:2]) ** 2) + jnp.sum(x**4), jnp.zeros(2))
        return x.sum()

    def ours(lam):
        return bilevel(lam, lambda lam: ridge(minimize, lam))

    want = jax.grad(lambda lam: bilevel(lam, ridge_exact))(0.3)
    np.testing.assert_allclose(jax.grad(ours)(0.3), want, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(0.3), want, rtol=1e-4)

    def inside(lam):
        # the inner solve depends on the outer unknown
        def energy(x):
            y = minimize(lambda y: (y - lam * x) ** 2 + y**4, 0.0)
            return (x - 1.0) ** 2 + y**2

        return minimize(energy, 0.5)

    eps = 1e-3  # the solutions are good to about 1e-9, and differences of them to 1e-6
    want = (inside(0.7 + eps) - inside(0.7 - eps)) / (2 * eps)
    np.testing.assert_allclose(jax.grad(inside)(0.7), want, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(jax.grad(inside))(0.7), want, rtol=1e-4)


@pytest.mark.parametrize("way", [jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd])
def test_a_derivative_without_a_rule_is_refused_by_name(way):
    bare = fv.on_host(lambda fun, x0: x0 - fun(x0))
    solve = lambda k: bare(lambda y: y - k, jnp.ones(1))[0]
    np.testing.assert_allclose(jax.jit(solve)(2.0), 2.0)
    np.testing.assert_allclose(
        jax.grad(lambda k: k * bare(lambda y: y - 2.0, jnp.ones(1))[0])(3.0), 2.0
    )
    with pytest.raises(TypeError, match=r"put fv.root .* fv.argmin .* fv.fixed_point"):
        way(solve)(2.0)


def test_without_a_rule_it_only_solves():
    solve = fv.on_host(lbfgs)
    assert solve(lambda x: (x - 2.0) ** 2, 0.0) == pytest.approx(2.0)
    assert jax.jit(lambda a: solve(lambda x: (x - a) ** 2, 0.0))(2.0) == pytest.approx(2.0)


def test_warm_start_in_scan():
    steps = []

    @fv.argmin
    @fv.on_host
    def minimize(fun, x0):
        result = so.minimize(fun.value_and_grad, x0, jac=True, method="BFGS")
        steps.append(result.nit)
        return result.x

    def outer(a):
        def body(x, lam):
            return minimize(lambda x: jnp.sum((x - a - lam) ** 4 + (x - a) ** 2), x), None

        return jax.lax.scan(body, jnp.zeros(2), jnp.array([0.5, 0.5, 0.5]))[0].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(outer))(1.0), 2.0, rtol=1e-4)
    assert steps[0] > 3
    assert steps[1:3] == [0, 0]  # it starts where the last one ended


@pytest.mark.slow
def test_stress_large_captures_nested_solves_and_threads():
    """Hundreds of solves in compiled programs, from several threads, none of which may hang."""
    big = jnp.ones((512, 512))
    minimize = MINIMIZERS["lbfgs"]

    @jax.jit
    def solve(a):
        def energy(x):
            inner = minimize(lambda y: (y - a) ** 2, 0.0)
            return jnp.sum((big @ big)[:2, 0] * (x - inner) ** 2) / 512

        return jax.grad(lambda a: minimize(energy, jnp.zeros(2)).sum() * a)(a)

    results: list[float] = []

    def work():
        with jax.enable_x64(True):  # a setting of each thread
            results.extend(float(solve(float(i))) for i in range(40))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a solve hangs"
    np.testing.assert_allclose(sorted(results), sorted([2.0 * i for i in range(40)] * 4), atol=1e-3)


def test_a_question_inside_grad_takes_no_more_of_python_than_outside():
    """JAX calls a compiled function in C++, unless a transformation is under way."""
    calls = []

    def solver(fun, x0):
        fun.grad(x0)  # compile
        n = 0

        def count(*_):
            nonlocal n
            n += 1

        sys.setprofile(count)
        fun.grad(x0)
        sys.setprofile(None)
        calls.append(n)
        return lbfgs(fun, x0)

    minimize = fv.argmin(fv.on_host(solver))

    def fit(a):
        return minimize(lambda x: ((x - a) ** 2).sum(), jnp.zeros(2)).sum()

    fit(1.0)
    jax.grad(fit)(1.0)
    jax.jvp(fit, (1.0,), (1.0,))
    outside, *inside = calls
    assert outside > 5
    assert inside == [outside, outside]
