"""On a release of JAX newer than any that was tested, check that it still does what is relied on.

Private parts of JAX may change in any release. Each check compares one entry of `_compat` with its
expected result; they run once, at the first conversion, and only on an unknown release. A warning
names what fails, so that no wrong result comes without one. Not here: the entries themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from freevars.jax import _compat

__all__ = ["check_release", "failures"]

NEWEST_TESTED = (0, 12)

_X = np.array([0.5, -0.25, 2.0], np.float32)


def check_release() -> None:
    """Warn of what a release that was never tested does in another way."""
    global _checked  # noqa: PLW0603 (once for each process)
    if _checked:
        return
    _checked = True
    failed = list(failures())
    if failed:
        warnings.warn(
            f"freevars was tested with JAX up to {'.'.join(map(str, NEWEST_TESTED))}, and this is"
            f" JAX {jax.__version__}, in which these work in another way: {', '.join(failed)}."
            " Results may be wrong. Use a JAX that was tested, or a newer freevars.",
            stacklevel=3,
        )


_checked = jax.__version_info__[:2] <= NEWEST_TESTED


def failures() -> Iterator[str]:
    """The names of the entries that fail their check."""
    for name, check in _CHECKS.items():
        try:
            works = check()
        except Exception:  # noqa: BLE001 (whatever a change may lead to)
            works = False
        if not works:
            yield name


def _opened(fun: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
    return _compat.separate_constants(jax.make_jaxpr(fun)(*args))


def _constants_come_first() -> bool:
    w = jnp.asarray(_X)
    jaxpr, constants = _opened(lambda x: x * w, _X)
    (result,) = _compat.evaluate(jaxpr, [w + 1, _X])
    return constants[0] is w and np.array_equal(result, _X * (w + 1))


def _dead_code_goes() -> bool:
    def fun(x: Any, y: Any) -> Any:
        return jax.jit(lambda x, y: (y * 2, jnp.cos(x)))(x, y)[0]

    smaller, used = _compat.drop_dead_code(_opened(fun, _X, _X)[0], [False, True])
    (result,) = _compat.evaluate(smaller, [_X])
    return used == [False, True] and np.array_equal(result, 2 * _X)


def _inputs_are_reordered() -> bool:
    jaxpr, _ = _opened(lambda x, y: x - y, _X, _X)
    swapped = _compat.replace(jaxpr, invars=jaxpr.invars[::-1])
    return bool(np.all(_compat.evaluate(swapped, [_X + 1, _X])[0] == -1))


def _nested_programs_are_found() -> bool:
    jaxpr, _ = _opened(lambda x: lax.cond(x[0] < 1, jnp.sin, jnp.cos, x), _X)
    eqns = jaxpr.eqns
    return any(len(_compat.nested_programs(e)) == 2 for e in eqns if e.params)  # noqa: PLR2004


def _operands_are_added() -> bool:
    jaxpr, _ = _opened(jax.jit(jnp.sin), _X)
    (eqn,) = jaxpr.eqns
    more = _compat.prepend_operands(eqn, eqn.invars, {})
    return len(more.params["in_shardings"]) == len(more.invars) == 2  # noqa: PLR2004


def _scans_take_constants() -> bool:
    jaxpr, _ = _opened(lambda x: lax.scan(lambda c, _: (c * x, None), x, length=2)[0], _X)
    eqn = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    count, _ = _compat.scan_counts(eqn.params)
    changed = {**eqn.params, **_compat.scan_with_constants(eqn.params, 2)}
    return bool(_compat.scan_counts(changed)[0] == count + 2)


def _weak_types_are_cast() -> bool:
    weak = _compat.cast(jnp.float32(1), jax.typeof(1.0))
    return bool(weak.weak_type) and not _compat.cast(1.0, jax.typeof(jnp.float32(1))).weak_type


def _settings_are_seen() -> bool:
    before = _compat.trace_context()
    with jax.default_matmul_precision("float32"):
        changed = _compat.trace_context() != before
    return changed and _compat.trace_context() == before


def _named_axes_are_no_setting() -> bool:
    seen: list[Any] = []

    def look(x: Any) -> Any:
        seen.append(_compat.trace_context())
        return x

    jax.vmap(look, axis_name="i")(jnp.asarray(_X))
    return bool(seen[0] == _compat.trace_context())


def _tracers_tell_what_they_are() -> bool:
    seen: dict[str, object] = {}

    def note(name: str) -> Callable[[Any], Any]:
        def fun(x: Any) -> Any:
            seen[name] = _compat.layer(x)[0] == name and _compat.is_live(x)
            return jnp.sum(x)

        return fun

    x = jnp.asarray(_X)
    jax.grad(note("grad"))(x)
    jax.jvp(note("jvp"), (x,), (x,))
    jax.vmap(note("vmap"))(x)
    jax.jit(note("jit"))(x)
    return all(seen.values())


def _jitted_functions_are_kept() -> bool:
    f = jax.jit(lambda x: x + 1)
    program = _compat.traced_program(f.trace(_X))
    return isinstance(f, _compat.JITTED) and program is _compat.traced_program(f.trace(_X))


def _captured_tracers_are_told() -> bool:
    found: list[Any] = []

    def fun(w: Any) -> Any:
        found.extend(_compat.captured_tracers(jax.jit(lambda x: x * w), _X))
        return jnp.sum(w)

    jax.grad(fun)(jnp.asarray(_X))
    return len(found) == 1


def _types_are_remade() -> bool:
    (eqn,) = jax.make_jaxpr(jnp.sin)(_X).eqns
    for x in (eqn.invars[0].aval, eqn.ctx):
        parts = _compat.parts_of(x)
        if parts is None or _compat.remake(type(x), parts) != x:
            return False
    return True


def _nothing_is_traced() -> bool:
    inside: list[bool] = []

    def look(x: Any) -> Any:
        inside.append(_compat.nothing_traced())
        return x

    jax.jit(look)(_X)
    return inside == [False]


def _known_values_are_computed_at_once() -> bool:
    seen: list[Any] = []

    def look(x: Any) -> Any:
        with _compat.at_once():
            seen.append(_compat.nothing_traced())
        return jnp.sum(x)

    jax.grad(look)(jnp.asarray(_X))
    return seen == [True]


# By the entry of `_compat` that each one is about.
_CHECKS: dict[str, Callable[[], bool]] = {
    "separate_constants": _constants_come_first,
    "drop_dead_code": _dead_code_goes,
    "replace": _inputs_are_reordered,
    "nested_programs": _nested_programs_are_found,
    "prepend_operands": _operands_are_added,
    "scan_with_constants": _scans_take_constants,
    "cast": _weak_types_are_cast,
    "trace_context": _settings_are_seen,
    "trace_context, of named axes": _named_axes_are_no_setting,
    "layer": _tracers_tell_what_they_are,
    "traced_program": _jitted_functions_are_kept,
    "captured_tracers": _captured_tracers_are_told,
    "remake": _types_are_remade,
    "nothing_traced": _nothing_is_traced,
    "at_once": _known_values_are_computed_at_once,
}
