"""Unknowns on several devices, against closed forms; run by `test_meshes.py` in a process of its
own, since the number of devices is fixed when JAX starts.

F(x)_i = x_i + c sum(x) - a_i over all devices: dx/da is the inverse of I + c 1 1^T.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import freevars.jax as fv

jax.config.update("jax_enable_x64", True)
DEVICES, N = 4, 8
C = 0.3 / N
A = jnp.asarray(np.random.default_rng(0).normal(size=N))
G = jnp.asarray(np.random.default_rng(1).normal(size=N))
inverse = lambda v: v - C / (1 + C * N) * jnp.sum(v)


def loop(steps, step):
    return lambda fun, x0: jax.lax.fori_loop(0, steps, lambda _, x: step(fun, x), x0)


richardson = loop(80, lambda fun, x: x - fun(x))
# With check_vma=False, the gradient of a psum is that of all devices, added up.
descent = loop(120, lambda fun, x: x - 0.2 * jax.grad(fun)(x))


def check(f, value, reverse, forward=None):
    """The value, the gradient of G.f and the direction G of one function of A."""
    np.testing.assert_allclose(jax.jit(f)(A), value, atol=1e-9)
    got = jax.jit(jax.grad(lambda a: jnp.vdot(G[: f(a).size], f(a))))(A)
    np.testing.assert_allclose(got, reverse, atol=1e-8)
    if forward is not None:
        got = jax.jit(lambda a, t: jax.jvp(f, (a,), (t,))[1])(A, G)
        np.testing.assert_allclose(got, forward, atol=1e-8)


def coupled_root(x, a):
    return x + C * jax.lax.psum(jnp.sum(x), "b") - a


def coupled_objective(x, a):
    """Its gradient is `coupled_root`; what its second derivative reads is the same everywhere."""
    whole = lambda v: jax.lax.psum(jnp.sum(v), "b")
    return whole((x - a) ** 2) / 2 + C / 2 * whole(x) ** 2


def parts(solver, fun):
    return lambda a: solver(lambda x: fun(x, a), jnp.zeros_like(a))


def shard_map(*, check_vma):
    mesh = jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Auto,))
    over = lambda f, *out: jax.shard_map(
        f, mesh=mesh, in_specs=P("b"), out_specs=P(*(out or "b")), check_vma=check_vma
    )
    for solver in (fv.root(richardson), fv.root(richardson, check=False)):
        check(over(parts(solver, coupled_root)), inverse(A), inverse(G), inverse(G))
    minimum = over(parts(fv.argmin(descent), coupled_objective))
    check(minimum, inverse(A), inverse(G), inverse(G))
    slope = jax.jit(jax.grad(lambda a: jnp.sum(minimum(a) ** 3) / 6))
    got = jax.jvp(slope, (A,), (G,))[1]
    np.testing.assert_allclose(got, inverse(inverse(A) * inverse(G)), atol=1e-8)
    # Two axes of one tree: one leaf is spread over the devices, the other shared by all of them.
    # u + w = a and 2 w + sum(u) / N = sum(a) / N, so w = 0 and u = a.
    pair = fv.root(loop(200, lambda fun, x: jax.tree.map(lambda x, r: x - 0.4 * r, x, fun(x))))

    def both(a):
        mean = lambda u: jax.lax.psum(jnp.sum(u), "b") / N
        fun = lambda x: {"u": x["u"] + x["w"] - a, "w": 2 * x["w"] + mean(x["u"]) - mean(a)}
        x = pair(fun, {"u": jnp.zeros_like(a), "w": jnp.zeros(())})
        return x["u"] + x["w"]

    check(over(both), A, G, G)

    # The data are spread, the unknown is shared: the mean of a.
    def center(a):
        slope = lambda m: m - jax.lax.psum(jnp.sum(a), "b") / N
        return fv.root(richardson)(slope, jnp.zeros(()))[None]

    spread = over(center, None) if check_vma else over(center)
    shares = jnp.mean(A) if check_vma else jnp.full(DEVICES, jnp.mean(A))
    reverse = jnp.full(N, (G[0] if check_vma else jnp.sum(G[:DEVICES])) / N)
    check(spread, shares, reverse)
    # A problem of its own on every device, above and below the limit of what is factorised.
    for options in ({}, {"dense_limit": 0}):
        own = fv.root(richardson, **options)
        check(
            over(parts(own, lambda x, a: x + 0.2 * jnp.sum(x) - a)),
            *[_blocks(v) for v in (A, G, G)],
        )


def _blocks(v):
    v = v.reshape(DEVICES, -1)
    return (v - 0.2 / (1 + 0.2 * v.shape[1]) * v.sum(axis=1, keepdims=True)).ravel()


def vmap():
    over = lambda f: jax.vmap(f, axis_name="b")
    for solver in (fv.root(richardson), fv.root(richardson, check=False)):
        check(over(parts(solver, coupled_root)), inverse(A), inverse(G), inverse(G))

    def center(a):
        return fv.root(richardson)(lambda m: m - jax.lax.psum(a, "b") / N, jnp.zeros(()))

    check(over(center), jnp.full(N, jnp.mean(A)), jnp.full(N, jnp.sum(G) / N))


def pmap():
    rows = lambda a: a.reshape(DEVICES, -1)
    over = jax.pmap(parts(fv.root(richardson), coupled_root), axis_name="b")
    check(lambda a: over(rows(a)).ravel(), inverse(A), inverse(G), inverse(G))


def explicit():
    mesh = jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Explicit,))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
    a, shared = put(A, "b"), put(jnp.zeros(N))
    for x0 in (put(jnp.zeros(N), "b"), shared):
        solve = fv.argmin(loop(300, lambda fun, x: x - 0.2 * jax.grad(fun)(x)))

        def loss(a, x0=x0, solve=solve):
            weights = a if x0 is not shared else jax.sharding.reshard(a, P())
            x = solve(lambda x: jnp.sum((2 + weights) * x**2 / 2 - x), x0)
            return jnp.sum(x)  # x = 1 / (2 + a)

        with jax.set_mesh(mesh):
            got = jax.jit(jax.grad(loss))(jnp.abs(a))
        np.testing.assert_allclose(got, -1 / (2 + jnp.abs(A)) ** 2, rtol=1e-6)


def passed_on():
    """Unknowns that go from device to device, and are summed nowhere: x + 0.3 x of the device
    before = a. In JAX 0.10 `ppermute` is no effect of a program."""
    ring = [(i, (i + 1) % DEVICES) for i in range(DEVICES)]
    matrix = np.eye(N) + 0.3 * np.roll(np.eye(N), N // DEVICES, axis=0)
    solve = lambda m, v: jnp.asarray(np.linalg.solve(m, v))
    wanted = solve(matrix, A), solve(matrix.T, G), solve(matrix, G)
    solver = fv.root(loop(80, lambda fun, x: x - 0.8 * fun(x)))
    own = parts(solver, lambda x, a: x + 0.3 * jax.lax.ppermute(x, "b", ring) - a)
    mesh = jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Auto,))
    for check_vma in (True, False):
        over = jax.shard_map(own, mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=check_vma)
        check(over, *wanted)
    for over in (jax.vmap(own, axis_name="b"), jax.pmap(own, axis_name="b")):
        check(lambda a, over=over: over(a.reshape(DEVICES, -1)).ravel(), *wanted)
    # Not what a `shard_map` within the function sums over.
    total = jax.shard_map(lambda x: jax.lax.psum(jnp.sum(x), "b"), in_specs=P("b"), out_specs=P())
    with jax.set_mesh(mesh):
        check(parts(fv.root(richardson), lambda x, a: x + C * total(x) - a), inverse(A), inverse(G))


def batch_on_explicit():
    """A batch of systems along an axis of an explicit mesh."""
    mesh = jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Explicit,))
    put = lambda v: jax.device_put(v, NamedSharding(mesh, P("b")))
    for n in (1, 3, 20):  # a division; with an inverse that is written out; with none
        matrix = np.eye(n) + np.random.default_rng(2).normal(size=(n, n)) / (3 * n)
        a = np.random.default_rng(3).normal(size=(N, n))
        for options in ({}, {"dense_limit": 0}):
            solver = fv.root(richardson, **options)
            solve = lambda a, m=matrix, s=solver: s(lambda x: m @ x - a, jnp.zeros_like(a))
            loss = lambda a, solve=solve: jnp.sum(jax.vmap(solve)(a) ** 2) / 2
            with jax.set_mesh(mesh):
                got = jax.jit(jax.grad(loss))(put(a))
            inverse = np.linalg.inv(matrix)
            np.testing.assert_allclose(got, a @ inverse.T @ inverse, atol=1e-8)


def spread_and_whole():
    """Values in parts and whole ones, joined by what wants one vector: scipy's solvers, constraints
    with their multipliers, integrators that take arrays."""
    mesh = jax.make_mesh((2, 2), ("b", "c"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
    A = np.arange(1.0, 9.0).reshape(4, 2)
    w = np.array([1.0, 2.0])
    ts = jnp.linspace(0.0, 1.0, 3)
    sp, total = fv.scipy, jnp.sum

    def root(a):  # u^3 = a sum(w)
        start = {"u": jnp.ones_like(a), "w": put(np.ones(2))}
        fun = lambda x: {"u": x["u"] ** 3 - a * total(x["w"]), "w": x["w"] - w}
        return total(sp.root(fun, start).x["u"] ** 2)

    near = lambda a: lambda x: total((x - a) ** 2)
    zero = {"type": "eq", "fun": total}
    losses = {
        root: 3 ** (2 / 3) * 2 / 3 * A ** (-1 / 3),
        lambda a: total(sp.root(lambda x: x**3 - a, np.ones((4, 2))).x ** 2): 2 / 3 * A ** (-1 / 3),
        lambda a: total(sp.minimize(near(a), jnp.ones_like(a)).x ** 2): 2 * A,
        lambda a: total(sp.minimize(near(a), jnp.ones_like(a), bounds=[(0, 4.5)] * 8).x): 1.0
        * (A < 4.5),
        lambda a: total(
            w * sp.minimize(near(a), jnp.ones_like(a), method="SLSQP", constraints=zero).x
        ): np.broadcast_to(w - 1.5, A.shape),
        lambda a: total(sp.least_squares(lambda x: x - a, jnp.ones_like(a)).x ** 2): 2 * A,
        lambda a: total(sp.fixed_point(lambda x: x / 2 + a, jnp.ones_like(a))): 2 + 0 * A,
        lambda a: sp.quad(lambda t: total(jnp.exp(-a * t)), 0.0, 1.0)[0]: (1 + A)
        * np.exp(-A)
        / A**2
        - 1 / A**2,
        **{
            lambda a, start=start, how=how: total(
                sp.solve_ivp(lambda t, y: -a * y, (0.0, 1.0), start(a), t_eval=ts, reverse=how).y
            ): -np.exp(-A / 2) / 2 - np.exp(-A)
            for start in (jnp.ones_like, lambda a: np.ones((4, 2)))
            for how in ("adjoint", "sensitivities")
        },
        lambda a: (
            sp.linprog(
                -jnp.ravel(jax.sharding.reshard(a, P())), A_ub=jnp.ones((1, 8)), b_ub=jnp.ones(1)
            ).fun
        ): -1.0 * (A == 8),
    }
    with jax.set_mesh(mesh):
        a = put(A, "b", "c")
        for loss, wanted in losses.items():
            got = jax.grad(loss)(a)
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
            assert jax.typeof(got).sharding == jax.typeof(a).sharding
        got = jax.jit(jax.grad(root))(a)
        np.testing.assert_allclose(got, losses[root], rtol=1e-6)
        x = sp.minimize(near(a), jnp.ones_like(a)).x
        assert jax.typeof(x).sharding == jax.typeof(a).sharding


def trajectories():
    """y' = c sum(y) 1 - k y over all devices, from a, until t = 1: with total s, s(1) = e^(cN - k)
    s(0), and what deviates from the mean decays as e^-k. By a, and by the k that all share."""
    ts = jnp.linspace(0.0, 1.0, 3)

    def heun(field, y0, ts):
        def step(y, span):
            h = (span[1] - span[0]) / 200

            def half(i, y):
                slope = field(span[0] + i * h, y)
                return y + h / 2 * (slope + field(span[0] + (i + 1) * h, y + h * slope))

            y = jax.lax.fori_loop(0, 200, half, y)
            return y, y

        return jnp.concatenate([y0[None], jax.lax.scan(step, y0, (ts[:-1], ts[1:]))[1]])

    solve = {
        how: fv.odeint(heun, takes="array", reverse=how) for how in ("adjoint", "sensitivities")
    }
    rate = 0.7
    grown = lambda v: np.exp(-rate) * (v - v.mean() + np.exp(C * N) * v.mean())
    alone = lambda v: np.exp(-rate) * v

    def end(a, rate, c, how="adjoint"):
        total = (lambda y: c * jax.lax.psum(jnp.sum(y), "b")) if c else (lambda y: 0.0)
        return solve[how](lambda t, y: total(y) - rate * y, a, ts)[-1]

    mesh = jax.make_mesh((DEVICES,), ("b",), axis_types=(AxisType.Auto,))
    for check_vma in (True, False):
        for c, how, wanted in (
            (C, "adjoint", grown),
            (0, "adjoint", alone),
            (0, "sensitivities", alone),
        ):
            over = jax.shard_map(
                lambda a, rate, c=c, how=how: end(a, rate, c, how),
                mesh=mesh,
                in_specs=(P("b"), P()),
                out_specs=P("b"),
                check_vma=check_vma,
            )
            loss = lambda a, rate, over=over: jnp.vdot(G, over(a, rate))
            value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(A, rate)
            np.testing.assert_allclose(value, G @ wanted(A), atol=1e-5)
            np.testing.assert_allclose(slopes[0], wanted(G), atol=1e-5)
            np.testing.assert_allclose(slopes[1], -G @ wanted(A), atol=1e-5)
            moved = jax.jit(lambda a, t, over=over: jax.jvp(over, a, t)[1])
            got = moved((A, rate), (G, 1.0))
            np.testing.assert_allclose(got, wanted(G) - wanted(A), atol=1e-5)

    # The integral of k a over (0, 2), summed over all devices; k is shared.
    middle = fv.integral(lambda f, a, b: (b - a) * f((a + b) / 2))
    over = jax.shard_map(
        lambda a, k: middle(
            lambda t: k * jax.lax.psum(jnp.sum(a), "b") * jnp.ones_like(a), 0.0, 2.0
        ),
        mesh=mesh,
        in_specs=(P("b"), P()),
        out_specs=P("b"),
    )
    slopes = jax.jit(jax.grad(lambda a, k: jnp.sum(over(a, k)), (0, 1)))(A, rate)
    np.testing.assert_allclose(slopes[0], np.full(N, 2 * rate * N), atol=1e-9)
    np.testing.assert_allclose(slopes[1], 2 * N * jnp.sum(A), atol=1e-9)

    members = lambda how: jax.vmap(lambda a: end(a, rate, C, how), axis_name="b")
    np.testing.assert_allclose(
        jax.grad(lambda a: jnp.vdot(G, members("adjoint")(a)))(A), grown(G), atol=1e-5
    )
    with pytest.raises(NotImplementedError, match="one that sends values along the named axis 'b'"):
        jax.grad(lambda a: jnp.vdot(G, members("sensitivities")(a)))(A)


def refused():
    """What sums over one device only cannot solve a coupled system."""
    import lineax

    solver = fv.root(richardson, linear_solve=lineax.GMRES(rtol=1e-9, atol=1e-9))
    f = jax.vmap(parts(solver, coupled_root), axis_name="b")
    with pytest.raises(NotImplementedError, match="sums over one device only"):
        jax.grad(lambda a: jnp.sum(f(a)))(A)

    total = lambda x: jax.lax.psum(jnp.sum(x), "b")
    constrained = fv.argmin(lambda fun, x0, *, equality: x0)
    f = lambda a: constrained(lambda x: total((x - a) ** 2), jnp.zeros_like(a), equality=total)
    with pytest.raises(NotImplementedError, match=r"equality.*sends values along the named axis"):
        jax.vmap(f, axis_name="b")(A)


CHECKS = {
    "shard_map": lambda: shard_map(check_vma=True),
    "shard_map, check_vma=False": lambda: shard_map(check_vma=False),
    "vmap": vmap,
    "pmap": pmap,
    "explicit": explicit,
    "passed on": passed_on,
    "a batch, explicit": batch_on_explicit,
    "spread and whole": spread_and_whole,
    "trajectories": trajectories,
    "refused": refused,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        sys.stdout.write(f"passed {name}, one of {', '.join(CHECKS)}\n")
