"""Reports of what a function captures: every fact, in every transformation, and nothing kept."""

import dataclasses
import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import freevars.jax as fv
from freevars.errors import CaptureError, StructureError
from freevars.report import CapturedValue, CaptureReport

HERE = Path(__file__).name
LAM = jnp.float32(0.1)
GLOBAL = jnp.array([1.0, 2.0])


def by_name(report: CaptureReport) -> dict[str, CapturedValue]:
    return {value.name: value for value in report.values}


@pytest.fixture(params=[False, True], ids=["consts", "literals"])
def constants_as_literals(request: pytest.FixtureRequest) -> Any:
    name = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, name):
        pytest.skip("this JAX has one way to hold constants only")
    before = getattr(jax.config, name)
    jax.config.update(name, request.param)
    yield
    jax.config.update(name, before)


class Model:
    def __init__(self) -> None:
        self.scale = jnp.float32(2.0)

    def __call__(self, x: Any) -> Any:
        return self.scale * x


# Names


@pytest.mark.usefixtures("constants_as_literals")
def test_names_however_a_value_is_reached() -> None:
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
    model = Model()
    data = np.array([0.5, 1.5], np.float32)
    key = jax.random.key(0)

    def objective(x: Any, lam: Any = LAM) -> Any:
        h = x @ params["dense"]["kernel"] + params["dense"]["bias"]
        h, _ = jax.lax.scan(lambda h, _: (model(h) + data, None), h, None, length=2)
        h = jax.jit(lambda h: h * GLOBAL + jax.random.normal(key, (2,)))(h)
        return jnp.sum(h) * lam

    for hoist in ("traced", "all"):
        report = fv.captures(objective, jnp.ones(2), hoist=hoist)
        assert set(by_name(report)) == {
            "params['dense']['kernel']",
            "params['dense']['bias']",
            "model.scale",
            "data",
            "GLOBAL",
            "key",
            "objective.<default lam>",
        }
        assert all(value.hoisted == (hoist == "all") for value in report.values)
        assert all(value.kind == "leaf" and value.concrete for value in report.values)


def test_partial_bound_method_and_callable_object() -> None:
    model = Model()
    partial = functools.partial(lambda w, x: w * x, jnp.ones(2))
    assert [v.name for v in fv.captures(partial, 1.0).values] == ["w"]
    assert [v.name for v in fv.captures(model, 1.0).values] == ["self.scale"]
    assert [v.name for v in fv.captures(model.__call__, 1.0).values] == ["self.scale"]
    jitted = jax.jit(lambda x: model(x) * GLOBAL)
    assert set(by_name(fv.captures(jitted, 1.0))) == {"model.scale", "GLOBAL"}


def test_a_value_under_two_names_lists_both() -> None:
    w = jnp.ones(2)
    alias = [w]
    (value,) = fv.captures(lambda x: w * x + alias[0], 1.0).values
    assert value.names == ("w", "alias[0]")
    assert value.reads == 2


@pytest.mark.usefixtures("constants_as_literals")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_numpy_arrays_that_jax_copies_keep_their_names(dtype: Any) -> None:
    if jax.config.jax_enable_x64:
        pytest.skip("nothing is copied")
    data, other = np.arange(3, dtype=dtype), np.arange(3, 6, dtype=dtype)
    report = fv.captures(lambda x: jnp.sum(x * data) + jnp.dot(jnp.ones(3), other), 1.0)
    assert set(by_name(report)) == {"data", "other"}
    assert {value.device for value in report.values} <= {"host", "cpu:0"}


def test_equal_numpy_arrays_are_told_apart_by_memory() -> None:
    first, second = np.zeros(3, np.float32), np.zeros(3, np.float32)
    report = fv.captures(lambda x: x * second + 0 * first, 1.0)
    assert [value.name for value in report.values] == ["second", "first"]


def test_a_value_made_on_the_way_goes_by_its_line() -> None:
    def objective(x: Any) -> Any:
        made = np.ones(3, np.float32) * 3
        return x * made

    (value,) = fv.captures(objective, 1.0).values
    line = objective.__code__.co_firstlineno + 2
    assert value.name == f"value read at {HERE}:{line}"
    assert value.kind == "derived"

    def outer(w: Any) -> Any:
        hidden = iter([jnp.sin(w)])  # nobody looks into an iterator
        values.append(fv.captures(lambda x: x * next(hidden), 1.0).values[0])
        return w

    values: list[CapturedValue] = []
    jax.jit(outer)(1.0)
    assert values[0].name == f"value made at {HERE}:{outer.__code__.co_firstlineno + 1}"
    assert values[0].kind == "derived"


def test_values_of_a_captured_closure() -> None:
    w = jnp.ones(2)
    inner = fv.Closure(lambda y: y * w, 1.0)
    mapped = jax.tree.map(jnp.sin, inner)
    assert set(by_name(fv.captures(lambda x: inner(x) + mapped(x), 1.0))) == {
        "inner.values[0]",
        "mapped.values[0]",
    }


# Facts


def facts_in(transform: Any, w: Any) -> CapturedValue:
    """The one captured value of `lambda x: x * w` while `transform` traces `w`."""
    found: list[CapturedValue] = []

    def run(w: Any) -> Any:
        found.append(fv.captures(lambda x: x * w, 1.0).values[0])
        return jnp.sum(w)

    transform(run)(w)
    return found[-1]


def vmapped(f: Any) -> Any:
    return lambda ws: jnp.sum(jax.vmap(f)(ws))


@pytest.mark.parametrize(
    ("transform", "value", "traced_by", "flows"),
    [
        (jax.grad, 1.0, ("grad",), True),
        (jax.jit, 1.0, ("jit",), True),
        (jax.vmap, np.ones(3, np.float32), ("vmap",), True),
        (lambda f: lambda w: jax.jvp(f, (w,), (w,)), 1.0, ("jvp",), True),
        (lambda f: jax.jit(jax.grad(f)), 1.0, ("jit", "grad"), True),
        (lambda f: jax.grad(jax.jit(f)), 1.0, ("jit",), True),
        (lambda f: jax.grad(vmapped(f)), np.ones(3, np.float32), ("grad", "vmap"), True),
        (lambda f: jax.vmap(jax.grad(f)), np.ones(3, np.float32), ("vmap", "grad"), True),
        (jax.hessian, 1.0, ("jvp", "grad"), True),
        (lambda f: lambda w: jax.lax.map(f, w), np.ones(3, np.float32), ("scan",), True),
        (jax.jit, 3, ("jit",), False),
        (jax.vmap, np.arange(3, dtype=np.int32), ("vmap",), False),
        (jax.jit, True, ("jit",), False),
        (jax.jit, 1j, ("jit",), True),
    ],
)
def test_transformations(transform: Any, value: Any, traced_by: Any, flows: bool) -> None:  # noqa: FBT001
    found = facts_in(transform, value)
    assert found.name == "w"
    assert found.traced_by == traced_by
    assert found.differentiable is flows
    assert (found.hoisted, found.policy, found.kind) == (True, "traced", "leaf")
    assert found.shape == ()


def test_derived_values_and_their_source() -> None:
    reports = []

    def loss(w: Any) -> Any:
        twice = 2 * w
        reports.append(fv.captures(lambda x: x * twice + w, 1.0))
        return jnp.sum(twice)

    for transform in (jax.grad, jax.jit, jax.vmap):
        transform(loss)(jnp.ones(3) if transform is jax.vmap else 1.0)
        values = by_name(reports.pop())
        assert (values["twice"].kind, values["w"].kind) == ("derived", "leaf")


def test_what_a_derivative_was_stopped_at_takes_none() -> None:
    found = []

    def loss(x: Any) -> Any:
        stopped = jax.lax.stop_gradient(x)
        found.append(fv.captures(lambda y: y * stopped + x, 1.0))
        return jnp.sum(x)

    jax.grad(loss)(jnp.ones(2))
    values = by_name(found[0])
    assert (values["x"].differentiable, values["stopped"].differentiable) == (True, False)


def test_a_symbolic_zero_tangent_takes_no_derivative() -> None:
    from freevars.jax._describe import tracers as _tracers

    tracers = []
    jax.jvp(lambda x: tracers.append(x) or x, (1.0,), (1.0,))  # type: ignore[func-returns-value]
    (tracer,) = tracers
    assert _tracers.can_flow(tracer, hoisted=True)
    zero = type(tracer)(tracer._trace, 1.0, _zero(1.0))
    assert not _tracers.can_flow(zero, hoisted=True)


def _zero(x: Any) -> Any:
    from jax._src import ad_util

    return ad_util.Zero(jax.typeof(x))


def test_concrete_values_take_derivatives_where_they_are_hoisted() -> None:
    n = jnp.arange(2)

    def fun(x: Any) -> Any:
        return x * GLOBAL * n

    assert [v.differentiable for v in fv.captures(fun, 1.0).values] == [False, False]
    found = by_name(fv.captures(fun, 1.0, hoist="all"))
    assert (found["GLOBAL"].differentiable, found["n"].differentiable) == (True, False)


def test_types_sizes_and_devices() -> None:
    z = jnp.ones((2, 3), jnp.complex64)
    key = jax.random.key(0)
    host = np.ones(4, np.float32)
    found = by_name(fv.captures(lambda x: (x * z, jax.random.bits(key), x * host), jnp.float32(1)))
    assert (found["z"].type_text, found["z"].nbytes) == ("complex64[2,3]", 48)
    assert (found["key"].type_text, found["key"].nbytes) == ("key<fry>[]", 8)
    assert (found["host"].type_text, found["host"].nbytes) == ("float32[4]", 16)
    here = jax.devices()[0]
    shown = f"{here.platform}:{here.id}"
    assert (found["z"].device, found["host"].device) == (shown, "host")


def test_sharded_values_show_their_sharding() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    w = jax.device_put(jnp.ones(4), sharding)
    (value,) = fv.captures(lambda x: x * w, 1.0).values
    assert "'d'" in value.device
    assert "d=1" in value.device


def test_large_constants_give_a_warning_unless_hoisted() -> None:
    big = np.ones((512, 1024), np.float32)
    (warning,) = fv.captures(lambda x: x * big, 1.0).warnings
    assert "big (2.0 MiB)" in warning
    assert fv.Closure(lambda x: x * big, 1.0).captures.warnings == ()


# Reads


def reads_of(fun: Any, *args: Any) -> dict[str, tuple[int, list[int]]]:
    """Name to (number of reads, lines, counted from the line that defines `fun`)."""
    start = fun.__code__.co_firstlineno
    values = fv.captures(fun, *args).values
    return {v.name: (v.reads, [site.line - start for site in v.sites]) for v in values}


@pytest.mark.usefixtures("constants_as_literals")
def test_reads_through_nested_programs() -> None:
    w, c, limit = jnp.ones(2), jnp.full(2, 0.5), jnp.float32(9)

    def fun(x: Any) -> Any:
        y = x * w
        y = jax.jit(lambda y: y + w)(y)
        y, _ = jax.lax.scan(
            lambda y, _: (y * c, None),
            y,
            None,
            length=3,
        )
        y = jax.lax.while_loop(lambda y: jnp.sum(y) < limit, lambda y: y + 2 * c, y)
        return jax.lax.cond(y[0] > 0, lambda: jnp.sin(w), lambda: jnp.cos(w))

    found = reads_of(fun, 1.0)
    assert found["w"] == (4, [1, 2, 10])
    assert found["c"] == (2, [4, 9])
    assert found["limit"] == (1, [9])


def test_the_initial_carry_is_read_by_the_loop_itself() -> None:
    w = jnp.ones(2)

    def fun(n: Any) -> Any:
        return jax.lax.fori_loop(0, n, lambda _, y: y * y + y, w)

    assert reads_of(fun, 3)["w"] == (1, [1])


def test_within_jaxs_own_functions_the_callers_line_reads() -> None:
    key = jax.random.key(0)

    def fun(x: Any) -> Any:
        return x + jax.random.normal(key)

    assert reads_of(fun, 1.0)["key"][1] == [1]


def test_dead_code_reads_nothing() -> None:
    w, unused = jnp.ones(2), jnp.ones(2)

    def fun(x: Any) -> Any:
        _ = x * unused
        return x * w

    assert set(reads_of(fun, 1.0)) == {"w"}


def test_text_of_the_lines() -> None:
    (value,) = fv.captures(lambda x: x * GLOBAL, 1.0).values
    assert [site.text for site in value.sites] == [
        "(value,) = fv.captures(lambda x: x * GLOBAL, 1.0).values"
    ]


# What a conversion would refuse is listed


def ruled(scale: Any) -> Any:
    """A function whose derivative rule captures `scale`."""

    @jax.custom_vjp
    def act(x: Any) -> Any:
        return jnp.sin(x)

    act.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * scale * jnp.cos(x),))
    return lambda x: 2 * act(x)


def test_a_mutable_reference_is_listed_and_refused_by_name() -> None:
    state = {"count": jax.new_ref(jnp.zeros(2))}

    def fun(x: Any) -> Any:
        return x + state["count"][...]

    (value,) = fv.captures(fun, 1.0).values
    assert value.name == "state['count']"
    assert (value.hoisted, value.policy) == (False, "refused: mutable reference")
    assert value.type_text == "ref float32[2]"
    line = fun.__code__.co_firstlineno
    with pytest.raises(CaptureError) as caught:
        fv.Closure(fun, 1.0)
    message = str(caught.value)
    assert "state['count'] (ref float32[2] at fun.__closure__['state']['count']" in message
    assert f"captured by fun at {HERE}:{line}" in message
    assert f"first read at {HERE}:{line + 1}: 'return x + state" in message


def test_a_traced_value_in_a_rule_is_listed_and_hoisted() -> None:
    def loss(scale: Any) -> Any:
        fun = ruled(scale)
        (value,) = fv.captures(fun, 1.0).values
        assert value.name == "scale"
        assert (value.hoisted, value.policy) == (True, "traced")
        return fv.Closure(fun, 1.0)(1.0)

    jax.grad(loss)(1.0)
    jax.jit(loss)(1.0)


def test_a_constant_that_a_rule_holds_is_listed_as_such() -> None:
    """The rule of a `custom_vmap` stays a function, and reads what it reads."""
    data = jnp.ones(2)

    @jax.custom_batching.custom_vmap
    def act(x: Any) -> Any:
        return x * data

    act.def_vmap(lambda size, is_batched, x: (x * data, is_batched[0]))
    closure = fv.Closure(lambda x: act(x) * GLOBAL, jnp.ones(2))
    assert closure.constants == (data,) or closure.constants[0] is data
    found = by_name(closure.captures)
    assert set(found) == {"data", "GLOBAL"}
    assert (found["data"].hoisted, found["data"].policy) == (
        False,
        "constant: held by a custom rule",
    )
    assert not found["data"].differentiable
    assert "kept  constant: held by a custom rule" in str(closure.captures)


# Errors


def test_a_converted_function_names_the_value_that_does_not_fit() -> None:
    params = {"w": jnp.ones(3)}

    def loss(x: Any) -> Any:
        return jnp.sum(x * params["w"])

    converted, _ = fv.closure_convert(loss, jnp.ones(3), hoist="all")
    for call in (converted, jax.jit(converted)):
        with pytest.raises(StructureError) as caught:
            call(jnp.ones(3), jnp.ones(4))
        message = str(caught.value)
        assert message.startswith(
            "captured value 0 of loss, params['w'] (float32[3] at "
            "loss.__closure__['params']['w'], captured by loss at "
        )
        assert f"first read at {HERE}:{loss.__code__.co_firstlineno + 1}: 'return" in message
        assert ": expected float32[3], got float32[4]. Pass" in message


def test_a_transformed_closure_names_the_line_that_reads_the_value() -> None:
    def loss(x: Any) -> Any:
        return jnp.sum(x * GLOBAL)

    closure = jax.tree.map(lambda v: v[:1], fv.Closure(loss, jnp.ones(2)))
    line = loss.__code__.co_firstlineno + 1
    with pytest.raises(StructureError, match=rf"0 of loss \(first read at {HERE}:{line}: 'return"):
        closure(jnp.ones(2))


def test_errors_without_names_stay_as_they_are() -> None:
    converted, hoisted = fv.closure_convert(lambda x: x * GLOBAL, jnp.ones(2), hoist="all")
    with pytest.raises(StructureError, match="does not match the example"):
        converted(jnp.ones(3), *hoisted)
    broken, _ = fv.closure_convert(_fails_the_second_time(), jnp.ones(2), hoist="all")
    with pytest.raises(StructureError, match=r"captured value 0 of fun \(first read"):
        broken(jnp.ones(2), jnp.ones(5))


def _fails_the_second_time() -> Any:
    calls = iter([GLOBAL])

    def fun(x: Any) -> Any:
        return jnp.tanh(x * next(calls) - 0.125)

    return fun


# Closures


def test_a_closure_reports_its_own_values() -> None:
    # A program of its own (- 0.8125): its lines are those of the first function traced to it.
    params = {"w": jnp.ones(2)}
    closure = fv.Closure(lambda x: x * params["w"] - 0.8125, 1.0)
    params["w"] = jnp.zeros(3)  # the closure keeps what it captured
    (value,) = closure.captures.values
    assert (value.type_text, value.hoisted, value.policy) == ("float32[2]", True, "all")
    assert value.names == ()
    assert value.name.startswith(f"value read at {HERE}:")
    again = fv.Closure(lambda x: x * params["w"] - 0.8125, 1.0)
    assert by_name(again.captures) == by_name(fv.captures(again, 1.0))
    assert set(by_name(again.captures)) == {"params['w']"}


def test_a_closure_from_a_transformation_has_lines_but_no_names() -> None:
    # A program of its own: the lines are those of the first function that was traced to it.
    closure = jax.tree.map(jnp.sin, fv.Closure(lambda x: x * GLOBAL + 0.4824, 1.0))
    (value,) = closure.captures.values
    assert value.names == ()
    assert value.type_text == "float32[2]"
    assert value.reads == 1
    assert value.sites[0].text.startswith("closure = jax.tree.map")


def test_lines_are_those_of_the_function_asked_about() -> None:
    first = fv.Closure(lambda x: x * GLOBAL, 1.0)
    second = fv.Closure(lambda x: x * GLOBAL, 1.0)
    assert jax.tree.structure(first) == jax.tree.structure(second)  # one program
    lines = [closure.captures.values[0].sites[0].line for closure in (first, second)]
    assert lines[1] == lines[0] + 1


def test_a_closure_outlives_its_trace() -> None:
    kept = []

    def loss(w: Any) -> Any:
        kept.append(fv.Closure(lambda x: x * w, 1.0))
        return w

    jax.grad(loss)(1.0)
    (value,) = kept[0].captures.values  # the values are of no use any more; looking at them is
    assert value.name == "w"


# Manners


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_nothing_leaks(transform: Any) -> None:
    def loss(w: Any) -> Any:
        report = fv.captures(lambda x: x * w * GLOBAL, 1.0)
        str(report)
        report._repr_html_()
        return jnp.sum(w) * len(report.values)

    with jax.checking_leaks():
        transform(loss)(jnp.ones(3) if transform not in (jax.jit, jax.grad) else 1.0)


def test_nothing_is_kept() -> None:
    def one() -> tuple[CaptureReport, Any]:
        w = jnp.ones(1000)
        return fv.captures(lambda x: x * w, 1.0), weakref.ref(w)

    report, ref = one()
    gc.collect()
    assert ref() is None
    assert report.values[0].nbytes == 4000
    json.dumps(report.to_dict())


def test_no_value_is_forced() -> None:
    def run(w: Any) -> Any:
        (value,) = fv.captures(lambda x: jnp.where(w > 0, x, -x), 1.0).values
        assert value.name == "w"
        return w

    jax.jit(run)(1.0)  # a traced value that is forced raises


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="needs a callable"):
        fv.captures(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'some'"):
        fv.captures(lambda x: x, 1.0, hoist="some")  # type: ignore[arg-type]
    assert fv.captures(lambda x: x, 1.0).values == ()


def test_names_cost_nothing_until_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from freevars.jax._describe import describe as _named

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("named")

    monkeypatch.setattr(_named, "name_values", asked)
    closure = fv.Closure(lambda x: x * GLOBAL, 1.0)
    fv.closure_convert(lambda x: x * GLOBAL, 1.0)
    closure(1.0)
    with pytest.raises(AssertionError, match="named"):
        _ = closure.captures


def test_a_thousand_values_are_reported() -> None:
    tree = {f"layer{i}": [jnp.float32(i + j) for j in range(10)] for i in range(100)}

    def objective(x: Any) -> Any:
        for layer in tree.values():
            for w in layer:
                x = x * w
        return x

    report = fv.captures(objective, 1.0)
    assert [v.name for v in report.values[:2]] == ["tree['layer0'][0]", "tree['layer0'][1]"]
    assert report.count == 1000
    assert all(value.names for value in report.values)


def test_the_report_is_plain_data() -> None:
    (value,) = fv.captures(lambda x: x * GLOBAL, 1.0).values
    assert all(
        isinstance(part, str | int | bool | tuple | type(None))
        for part in dataclasses.asdict(value).values()
    )
