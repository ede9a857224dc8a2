"""Habits of real solvers on the host: work in place, threads of their own, odd returns, errors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize as so

import freevars.jax as fv
from freevars.jax._host import staged as _in_program


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield
    assert not _in_program._RUNNING, "a solve left its sessions behind"


def vmap(f):
    return lambda a: jax.vmap(f)(a[None])[0]


WAYS = pytest.mark.parametrize("way", [lambda f: f, jax.jit, vmap], ids=["eager", "jit", "vmap"])
A = np.array([1.0, 2.0, 4.0])


def lbfgs(fun, x0):
    return so.minimize(fun.value_and_grad, x0, jac=True, method="L-BFGS-B").x


def nearest(solver, way, **options):
    """The minimiser of |x - a|^2, by a solver that is decorated here."""
    minimize = fv.argmin(fv.on_host(solver, **options))
    solve = lambda a: minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(3))
    return jax.block_until_ready(way(solve)(jnp.asarray(A)))


@WAYS
def test_a_solver_may_work_in_place(way):
    def descend(fun, x0):
        x = x0
        for _ in range(100):
            slope = fun.grad(x)
            slope *= 0.3
            x -= slope
        hessian = fun.hessian(x)
        hessian -= 2 * np.eye(3)
        np.testing.assert_allclose(hessian, 0.0)
        return x

    np.testing.assert_allclose(nearest(descend, way), A)


@WAYS
def test_a_solver_may_use_the_memory_of_its_result_again(way):
    memory = np.zeros(4096 + 16)
    start = (-memory.ctypes.data // 8) % 8  # on a boundary where JAX would take it as it is
    work = memory[start : start + 4096]
    last = np.zeros(3)

    @fv.argmin(has_aux=True)
    @fv.on_host(aux=np.zeros(3))
    def step(fun, x0):
        work[:] = x0 - fun.grad(x0) / 2
        last[:] = work[:3]
        return work, last

    solve = way(lambda a: step(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(4096)))
    first = jax.block_until_ready(solve(jnp.full(4096, 1.0)))
    jax.block_until_ready(solve(jnp.full(4096, 2.0)))
    np.testing.assert_array_equal(first[0], 1.0)
    np.testing.assert_array_equal(first[1], 1.0)


@WAYS
def test_a_solver_may_ask_from_threads_of_its_own(way):
    def search(fun, x0):
        points = [x0 + i for i in range(32)]
        with ThreadPoolExecutor(8) as pool:
            values, slopes = list(pool.map(fun, points)), list(pool.map(fun.grad, points))
        np.testing.assert_allclose(values, [np.sum((p - A) ** 2) for p in points])
        np.testing.assert_allclose(slopes, [2 * (p - A) for p in points], atol=1e-12)
        return lbfgs(fun, x0)

    np.testing.assert_allclose(nearest(search, way), A, rtol=1e-6)


@pytest.mark.parametrize("way", [jax.jit, vmap], ids=["jit", "vmap"])
def test_a_function_that_is_kept_says_that_the_program_is_gone(way):
    kept = []

    def keeps(fun, x0):
        kept.append(fun)
        return lbfgs(fun, x0)

    nearest(keeps, way)
    with pytest.raises(RuntimeError, match="the solver keeps was given is called after"):
        kept[0](np.zeros(3))


@WAYS
@pytest.mark.parametrize("point", [0.5, np.zeros(1), np.zeros((1, 3)), np.zeros((3, 1))], ids=repr)
def test_a_point_of_another_shape_is_refused(way, point):
    told = []

    def asks(fun, x0):
        for ask in (fun, fun.grad, lambda d: fun.hvp(x0, d), lambda v: fun.hvp(v, x0)):
            with pytest.raises(TypeError, match=r"a vector of shape \(3,\), got shape") as caught:
                ask(point)
            told.append(caught)
        return lbfgs(fun, x0)

    nearest(asks, way)
    assert len(told) == 4


@WAYS
def test_complex_numbers_are_refused(way):
    def complex_step(fun, x0):
        return x0 + fun(x0 + 1e-20j)

    error = TypeError if way is not jax.jit else jax.errors.JaxRuntimeError
    for solver in (complex_step, lambda fun, x0: x0 + 1j):
        with pytest.raises(error, match="complex numbers where real ones are expected"):
            nearest(solver, way)


@WAYS
def test_a_pytree_of_another_form_is_refused(way):
    x0 = {"z": jnp.zeros(1, complex), "w": jnp.zeros((2, 3))}
    value = lambda a, x: jnp.sum(jnp.abs(x["z"] - a[0]) ** 2) + jnp.sum((x["w"] - a[1]) ** 2)
    good = {"z": np.array([1.0]), "w": np.full((2, 3), 2.0)}  # a real array can stand for z
    wrong = [
        ([good["w"], good["z"]], "expected a pytree like x0"),
        ({**good, "w": good["w"].T}, r"of shape \(2, 3\), like the one in x0, got \(3, 2\)"),
        ({**good, "w": good["w"] + 0j}, "complex numbers where real"),
    ]
    error = TypeError if way is not jax.jit else jax.errors.JaxRuntimeError
    run = lambda result: way(
        lambda a: fv.argmin(fv.on_host(flat=False)(lambda fun, x0: result))(
            lambda x: value(a, x), x0
        )["z"]
    )(jnp.asarray(A))
    np.testing.assert_array_equal(run(good), [1.0 + 0j])
    for result, text in wrong:
        with pytest.raises(error, match=text):
            jax.block_until_ready(run(result))


@WAYS
@pytest.mark.parametrize(
    ("example", "aux"),
    [(0, 0.7), (np.zeros(3), 1.0), (0.0, np.ones(3)), (True, 2), (0.0, 1j), (0.0, "text")],
)
def test_an_aux_of_another_type_than_its_example_is_refused(way, example, aux):
    solver = fv.argmin(has_aux=True)(fv.on_host(aux=example)(lambda fun, x0: (x0, aux)))
    solve = way(lambda a: solver(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(3)))
    error = TypeError if way is not jax.jit else jax.errors.JaxRuntimeError
    with pytest.raises(error, match="in aux where its example"):
        jax.block_until_ready(solve(jnp.asarray(A)))


def test_aux_keeps_its_precision_where_it_is_set_for_one_thread():
    # The thread of the solver does not know of the setting.
    solver = fv.argmin(has_aux=True)(fv.on_host(aux=0.0)(lambda fun, x0: (x0, 0.1)))
    solve = lambda a: solver(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(3))[1]
    assert float(solve(A)) == float(jax.jit(solve)(A)) == 0.1


def test_an_interrupt_is_itself_where_no_jit_is_around():
    def interrupted(fun, x0):
        fun(x0)
        raise KeyboardInterrupt

    for way in (lambda f: f, vmap):
        with pytest.raises(KeyboardInterrupt):
            nearest(interrupted, way)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the solver interrupted on the host rais"):
        nearest(interrupted, jax.jit)


def test_a_member_that_fails_ends_the_batch():
    @fv.argmin
    @fv.on_host
    def fails(fun, x0):
        if x0[0] > 0:
            raise OverflowError
        return lbfgs(fun, x0)

    solve = lambda start: fails(lambda x: jnp.sum((x - A) ** 2), start)
    with pytest.raises(OverflowError):
        jax.vmap(solve)(jnp.array([[0.0] * 3, [1.0] * 3, [0.0] * 3]))
    for thread in threading.enumerate():
        if thread.name == "freevars fails":
            thread.join(timeout=5)
            assert not thread.is_alive()
