"""JAX's errors about traced values, explained: which value, who captures it, what to do.

The table below holds the programs that users published when such an error met them, each cut down
to what matters and written anew. A solver with a rule of its own stands in for the libraries.
"""

import functools
import gc
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import freevars.jax as fv
from freevars.errors import LeakError

HERE = Path(__file__).name


def _step(fun: Any, x: Any) -> Any:
    return x - 0.1 * jax.grad(fun)(x)


def _argmin(fun: Any, x: Any) -> Any:
    return jax.lax.fori_loop(0, 3, lambda _, x: _step(fun, x), x)


def _argmin_backward(fun: Any, x: Any, x_bar: Any) -> Any:
    _, pull_back = jax.vjp(lambda x: _step(fun, x), x)
    return pull_back(x_bar)


# Reverse mode: the function is not differentiated, and so its captured values are lost.
argmin = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(_argmin)
argmin.defvjp(lambda fun, x: (_argmin(fun, x),) * 2, _argmin_backward)

# The same in forward mode.
root = functools.partial(jax.custom_jvp, nondiff_argnums=(0,))(_argmin)
root.defjvp(lambda fun, primals, tangents: (_argmin(fun, *primals), *tangents))


class Case(NamedTuple):
    run: Callable[[], Any]
    name: str  # of the value
    by: str  # the function that captures it; empty where nothing of it is left


CASES: dict[str, Case] = {}


def case(label: str, name: str, by: str = "") -> Callable[[Callable[[], Any]], Any]:
    def add(run: Callable[[], Any]) -> Callable[[], Any]:
        CASES[label] = Case(run, name, by)
        return run

    return add


def _fit(w: Any) -> Any:
    return argmin(lambda x: (x - 1.0) ** 2 + w * x**2, 0.0)


@case("a solver, grad", "w", "<lambda>")
def _() -> Any:
    return jax.grad(_fit)(1.0)


@case("a solver, vmap of grad", "w", "<lambda>")
def _() -> Any:
    return jax.vmap(jax.grad(_fit))(jnp.ones(3))


@case("a solver, grad of jit", "w", "<lambda>")
def _() -> Any:
    return jax.grad(jax.jit(_fit))(1.0)


@case("a solver, jit of grad", "argument w of _fit")
def _() -> Any:
    return jax.jit(jax.grad(_fit))(1.0)


@case("jax 5666: a rule for forward mode over a function with a key", "weight", "sample")
def _() -> Any:
    def loss(weight: Any, key: Any) -> Any:
        def sample(x: Any) -> Any:
            return weight * (x - jax.random.normal(key)) ** 2

        return root(sample, 0.5)

    return jax.grad(loss)(1.0, jax.random.key(0))


@case("jax 8783: an integrator in vmap in grad", "amplitude", "field")
def _() -> Any:
    def error(amplitude: Any, rates: Any) -> Any:
        def one(rate: Any) -> Any:
            def field(y: Any) -> Any:
                return rate * y**2 + amplitude * y

            return argmin(field, 1.0)

        return jnp.sum(jax.vmap(one)(rates))

    return jax.grad(error)(1.0, jnp.ones(3))


@case("jax 14760: jax.closure_convert leaves an integer behind", "argument n of power")
def _() -> Any:
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(fun: Any, x: Any, *hoisted: Any) -> Any:
        return fun(x, *hoisted)

    def backward(fun: Any, saved: Any, y_bar: Any) -> Any:
        x, *hoisted = saved
        return (y_bar * fun(x, *hoisted), *map(jnp.zeros_like, hoisted))

    run.defvjp(lambda fun, *args: (fun(*args), args), backward)

    def power(x: Any, n: Any) -> Any:
        converted, hoisted = jax.closure_convert(lambda y: y * n, x)
        return run(converted, x, *hoisted)

    return jax.grad(jax.jit(power))(1.0, 3)


@case("diffrax 135: the parameters of a model that is `self`", "self.rate", "<lambda>")
def _() -> Any:
    class Decay:
        def __init__(self, rate: Any) -> None:
            self.rate = rate

        def solve(self) -> Any:
            return root(lambda y: self.rate * y**2 + y, 1.0)

    return jax.grad(lambda rate: Decay(rate).solve())(1.0)


@case("diffrax 135, in jit", "argument rate of solve")
def _() -> Any:
    def solve(rate: Any) -> Any:
        return root(lambda y: rate * y**2 + y, 1.0)

    return jax.jacrev(jax.jit(solve))(1.0)


@case("jaxopt 31: an objective in a solver object", "scale", "to_minimize")
def _() -> Any:
    class Solver:
        def __init__(self, fun: Any) -> None:
            self.fun = fun

        def run(self, x: Any) -> Any:
            return argmin(lambda x: self.fun(x), x)

    def pipeline(scale: Any, data: Any) -> Any:
        def to_minimize(latent: Any) -> Any:
            return (data - scale * latent) ** 2

        return Solver(to_minimize).run(5.0)

    return jax.value_and_grad(pipeline)(2.0, data=6.0)


@case("jaxopt 285: gradient through a closure", "y", "closure")
def _() -> Any:
    def layer(y: Any) -> Any:
        def closure(x: Any) -> Any:
            return jnp.sum(x**2) - jnp.sum(x * y)

        return jnp.sum(argmin(closure, jnp.zeros(2)))

    return jax.grad(layer)(jnp.ones(2))


@case("jaxopt 606: the method of an object that holds traced arrays", "self.mean", "Family.loss")
def _() -> Any:
    class Family:
        def __init__(self, mean: Any) -> None:
            self.mean = mean

        def loss(self, x: Any) -> Any:
            return jnp.sum((x - self.mean) ** 2)

    return jax.grad(lambda mean: jnp.sum(argmin(Family(mean).loss, jnp.zeros(2))))(jnp.ones(2))


@case("a custom_jvp function that captures", "w", "f")
def _() -> Any:
    def loss(w: Any) -> Any:
        @jax.custom_jvp
        def f(x: Any) -> Any:
            return x * w

        f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * w))
        return f(2.0)

    return jax.grad(loss)(1.0)


@case("a backward rule that captures, in jit", "argument w of loss")
def _() -> Any:
    def loss(w: Any) -> Any:
        @jax.custom_vjp
        def f(x: Any) -> Any:
            return jnp.sin(x)

        f.defvjp(lambda x: (jnp.sin(x), x), lambda _, g: (g * w,))
        return f(w)

    return jax.grad(jax.jit(loss))(1.0)


@case("a side effect", "box[0]", "use")
def _() -> Any:
    box: list[Any] = []

    @jax.jit
    def keep(x: Any) -> Any:
        box.append(2 * x)
        return x

    keep(1.0)

    def use(y: Any) -> Any:
        return y + box[0]

    return use(1.0)


@pytest.mark.parametrize("label", CASES)
def test_a_published_failure_is_named(label: str) -> None:
    run, name, by = CASES[label]
    with pytest.raises(LeakError) as caught, fv.explain_leaks():
        run()
    message = str(caught.value)
    if by:
        assert message.startswith(f"{name} (float32[")
        assert f"captured by {by} at {HERE}:" in message
        assert f"freevars.jax.Closure({by}, *example_args) in place of {by}" in message
    else:
        assert message.startswith(f"{name} at {HERE}:")
        assert "freevars.jax.Closure(fun, *example_args)" in message
    assert f"first read at {HERE}:" in message
    assert caught.value.__cause__ is not None
    assert not isinstance(caught.value.__cause__, LeakError)


@pytest.mark.parametrize("label", CASES)
def test_the_failures_fail_without_it_too(label: str) -> None:
    with pytest.raises(Exception, match=r"tracer|Tracer|closed-over|closed over") as caught:
        CASES[label].run()
    assert not isinstance(caught.value, LeakError)


def test_the_advice_works() -> None:
    @jax.custom_vjp
    def minimum(fun: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 200, lambda _, x: _step(fun, x), x)

    def forward(fun: Any, x: Any) -> Any:
        x = minimum(fun, x)
        return x, (fun, x)

    def backward(saved: Any, x_bar: Any) -> Any:
        fun, x = saved
        _, pull_back = jax.vjp(lambda fun: jax.grad(fun)(x), fun)
        return *pull_back(-x_bar / jax.grad(jax.grad(fun))(x)), jnp.zeros_like(x)

    minimum.defvjp(forward, backward)

    def fit(w: Any) -> Any:
        return minimum(fv.Closure(lambda x: (x - 1.0) ** 2 + w * x**2, 0.0), 0.0)

    with fv.explain_leaks():
        assert jax.grad(fit)(1.0) == pytest.approx(-0.25, abs=1e-5)
        assert jax.jit(jax.grad(fit))(1.0) == pytest.approx(-0.25, abs=1e-5)


@pytest.mark.parametrize("solver", ["GradientDescent", "LBFGS"])
@pytest.mark.filterwarnings("ignore")
def test_jaxopt_itself(solver: str) -> None:
    jaxopt = pytest.importorskip("jaxopt")

    def layer(y: Any) -> Any:
        def closure(x: Any) -> Any:
            return jnp.sum(x**2) - jnp.sum(x * y)

        return jnp.sum(getattr(jaxopt, solver)(fun=closure, maxiter=3).run(jnp.zeros(2)).params)

    with pytest.raises(LeakError, match=r"^y \(float32\[2\] .* captured by closure"):
        fv.explain_leaks()(jax.grad(layer))(jnp.ones(2))


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), fv.explain_leaks():
        _ = 1 / 0
    with pytest.raises(TypeError, match="add got incompatible shapes"), fv.explain_leaks():
        jnp.ones(2) + jnp.ones(3)
    with pytest.raises(TypeError, match="No constant handler for bread"), fv.explain_leaks():
        raise TypeError("No constant handler for bread")
    with fv.explain_leaks():
        pass


def test_an_error_with_nothing_to_go_by_still_says_what_to_do() -> None:
    with pytest.raises(LeakError, match="captures") as caught, fv.explain_leaks():
        raise jax.errors.UnexpectedTracerError("no frames, no values")
    assert isinstance(caught.value.__cause__, jax.errors.UnexpectedTracerError)


def test_the_traceback_shows_the_users_frames_only() -> None:
    mode = jax.config.jax_traceback_filtering
    with pytest.raises(LeakError) as caught, fv.explain_leaks():
        jax.grad(_fit)(1.0)
    assert jax.config.jax_traceback_filtering == mode
    cause = caught.value.__cause__
    assert cause is not None
    files = [frame.filename for frame in traceback.extract_tb(cause.__traceback__)]
    assert HERE in {Path(file).name for file in files}
    assert not [file for file in files if Path(file).name in ("core.py", "api.py", "pjit.py")]
    with pytest.raises(TypeError) as other, fv.explain_leaks():
        jax.jit(lambda x: jnp.ones(2) + jnp.ones(3))(1.0)
    files = [frame.filename for frame in traceback.extract_tb(other.value.__traceback__)]
    assert not [file for file in files if Path(file).name in ("core.py", "api.py", "pjit.py")]


def test_it_decorates_and_nests() -> None:
    @fv.explain_leaks()
    def train() -> Any:
        with fv.explain_leaks():
            return jax.grad(_fit)(1.0)

    for _ in range(2):
        with pytest.raises(LeakError, match=r"^w \(float32") as caught:
            train()
        assert not isinstance(caught.value.__cause__, LeakError)


def test_nothing_is_kept() -> None:
    class Data:
        pass

    def run() -> Any:
        data = Data()
        big = jnp.ones(1000)
        refs = weakref.ref(data), weakref.ref(big)

        def loss(w: Any) -> Any:
            def fun(x: Any, data: Any = data) -> Any:
                del data
                return jnp.sum(w * x * big)

            return argmin(fun, 0.0)

        try:
            with fv.explain_leaks():
                jax.grad(loss)(1.0)
        except LeakError as error:
            assert str(error).startswith("w (float32[]")  # noqa: PT017
        else:
            pytest.fail("nothing was raised")
        return refs

    jax.clear_caches()
    gc.collect()
    gc.disable()
    try:
        refs = run()
    finally:
        gc.enable()
    gc.collect()
    assert refs[0]() is None
    jax.clear_caches()
    assert refs[1]() is None


def test_jax_23588_a_pullback_is_converted_and_a_wrong_unpacking_is_told() -> None:
    @jax.jit
    def unpacked_right(x, z):
        y, pull = jax.vjp(lambda x, z: z * x, x, z)
        converted, hoisted = fv.closure_convert(pull, y)
        return converted(x, *hoisted)

    @jax.jit
    def unpacked_wrong(x, z):
        y, pull = jax.vjp(lambda x, z: z * x, x, z)
        converted, *hoisted = fv.closure_convert(pull, y)  # a list of a list
        return converted(x, *hoisted)

    x, z = jnp.array(2.0), jnp.array(3.0)
    assert [float(ct) for ct in unpacked_right(x, z)] == [6.0, 4.0]
    with pytest.raises(TypeError, match=r"takes 1 arguments and 2 hoisted values, 3 in all, got 2"):
        unpacked_wrong(x, z)
