"""What solvers of integrals and differential equations have in common in both hosts.

Their derivatives are integrals and differential equations again, and the same solver solves them.

*Integrals.* Let I = int_a^b f(t, p) dt with everything that f captures in p. Leibniz' rule:

    dI = int_a^b (df/dp dp) dt + f(b) db - f(a) da

The integral in it is linear in dp. Its transpose takes a cotangent g of I to

    int_a^b (df/dp)^T g dt

a list of values like p, integrated at once where the solver takes pytrees or arrays, otherwise
number by number. An infinite limit does not move, and its derivative is zero.

*Differential equations.* Let y' = f(t, y, p), y(t_0) = y_0, and y_i = y(t_i). A change of p and of
y_0 moves the solution by

    d' = f_y d + f_p dp,    d(t_0) = dy_0                      forward sensitivities

For cotangents g_i of the y_i, <l, d> with l' = -f_y^T l has the derivative <l, f_p dp>. So let l
start as g_N at the last time, be solved for backwards, and jump by g_i at each t_i; then

    sum_i <g_i, d_i> = <l(t_0), dy_0> + int_{t_0}^{t_N} <f_p^T l, dp> dt         adjoint equation

Both are solved together with y: backwards from each recorded y_i, in s = -t, so that the solver is
always given increasing times. Between equal times the solver does not run. Where an equation is
unstable backwards, the transpose can instead be computed from the sensitivities with respect to
every number of p and y_0, solved for forwards, all at once. A time moves its own y_i by
f(t_i, y_i) dt_i; the first one starts another solution, as a change of y_0 by -f(t_0, y_0) dt_0
does.

*Forms.* The integrands and states of a derivative have other structures than those of the original
call, so a solver declares which structures it takes, or the call shows it.

*Trusted.* The derivative of a differential equation comes with a check: the state is solved for
again together with it, and compared with what the solver returned. A solver whose result is y_i at
the times t_i gives other states z_i when it solves for y and a derivative at once, or for y
backwards, from each t_i to the one before. Its own tolerance, and how the equation lets an error
grow, both show in

    error = max over i and components k of |z_ik - y_ik| / u_k
    u_k   = max over j of |y_jk| and a tenth of |t_j+1 - t_j| min(|f_k(t_j)|, |f_k(t_j+1)|)

which is a relative size: up to 1% is accepted, or 1.9% in float32, the same as for the Newton step
of an implicit rule. A component may happen to be zero at all requested times, as an oscillation is
after whole periods; its slope at both ends of an interval then shows how large it was in between. A
dissipative equation is unstable backwards: its error grows between two times.

The derivative of an integral does not contain the integral itself, and df/dp may be harder to
integrate than f. So the derivative is integrated over both halves as well,

    error = |I(a, b) - I(a, m) - I(m, b)| / u,    m = (a + b) / 2
    u     = max of |I(a, b)|, |I(a, m)| + |I(m, b)|, and |b - a| times the mean of |df/dp dp| at
            a few points

which a rule that is exact for polynomials passes, as does one with evenly spaced points: the halves
have twice as many. In reverse mode this is asked of one combination of all components, each
relative to what is differentiated by, so that it costs two integrals however many there are. No set
of points sees what lies between them, so passing this check is not a proof. Where a limit is
infinite there are no halves, and nothing is checked.

Sources: Leibniz 1697; Courant 1936, "Differential and Integral Calculus" II, chapter IV; Pontryagin
et al. 1962, "The Mathematical Theory of Optimal Processes"; Chen et al. 2018, "Neural Ordinary
Differential Equations", appendix B; Cao, Li, Petzold and Serban 2003, "Adjoint sensitivity analysis
for differential-algebraic equations". Not here: the functions that a host gives its solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypeAlias, TypedDict

from freevars._solvers.signature import split_aux
from freevars._solvers.verdict import Limits
from freevars.errors import CaptureError, NotASolutionError

__all__ = [
    "INTEGRAL",
    "ODE",
    "SAMPLES",
    "IntegralOptions",
    "IntegralRule",
    "OdeOptions",
    "OdeRule",
    "OnDoubt",
    "Reverse",
    "State",
    "Takes",
    "no_derivative",
    "not_resolved",
    "not_solved",
]

INTEGRAL = ("integrand", "a", "b")
ODE = ("field", "y0", "ts")

SAMPLES = 8  # points at which the size of an integrand is looked at

# What a solver can integrate: any pytree of arrays (it is given a tuple), one array (it is given a
# vector of real numbers), one real number. None: what the call shows.
Takes: TypeAlias = Literal[None, "pytree", "array", "scalar"]  # noqa: PYI061 (its values are listed)
State: TypeAlias = Literal[None, "pytree", "array"]  # noqa: PYI061 (as above)

# How the backward pass of a differential equation is solved, and what happens where it fails.
Reverse: TypeAlias = Literal["adjoint", "sensitivities"]
OnDoubt: TypeAlias = Literal["raise", "warn", "nan"]


class IntegralOptions(TypedDict, total=False):
    """The keyword arguments of `integral`."""

    has_aux: bool
    takes: Takes
    on_failure: OnDoubt
    check: bool
    tol: float | None


class OdeOptions(TypedDict, total=False):
    """The keyword arguments of `odeint`."""

    tfirst: bool
    has_aux: bool
    takes: State
    reverse: Reverse
    on_failure: OnDoubt
    check: bool
    tol: float | None


@dataclass(frozen=True)
class IntegralRule:
    """What `integral` was told about a solver."""

    has_aux: bool = False
    takes: Takes = None
    on_failure: OnDoubt = "raise"
    check: bool = True
    tol: float | None = None

    def limit(self, eps: float) -> float:
        """The largest difference that is accepted, for values with this spacing."""
        return Limits.of(eps, tol=self.tol).step

    def split_aux(self, out: Any, name: str, what: str) -> tuple[Any, Any]:
        """The result `what` of a solver and its aux, None where it returns none."""
        return split_aux(out, name, what) if self.has_aux else (out, None)

    def form(self, shapes: Sequence[tuple[int, ...]], *, is_leaf: bool) -> Takes:
        """What the solver takes where a call gave it values of these shapes; `is_leaf`: one."""
        shown: Takes = "pytree" if not is_leaf else "scalar" if shapes[0] == () else "array"
        return self.takes or shown


@dataclass(frozen=True)
class OdeRule(IntegralRule):
    """What `odeint` was told about a solver."""

    tfirst: bool = True
    reverse: Reverse = "adjoint"

    def form(self, shapes: Sequence[tuple[int, ...]], *, is_leaf: bool) -> Takes:
        """The same for the states of a differential equation, of which there are several."""
        shown = super().form(shapes, is_leaf=is_leaf)
        return "array" if shown == "scalar" else shown

    def t_and_y(self, first: Any, second: Any) -> tuple[Any, Any]:
        """The arguments of a field as the solver calls it, or as it is called from (t, y)."""
        return (first, second) if self.tfirst else (second, first)

    @property
    def order(self) -> str:
        """How the solver calls its field, and who would call it the other way round."""
        first, other = ("(t, y)", "(y, t)") if self.tfirst else ("(y, t)", "(t, y)")
        return (
            f"The solver calls it as field{first}; one by odeint(..., tfirst={not self.tfirst}) as"
            f" field{other}."
        )


def not_resolved(name: str, error: float, limit: float) -> NotASolutionError:
    """The error for a derivative that the solver does not integrate well."""
    return NotASolutionError(
        f"{name}: the derivative cannot be trusted: integrated over both halves, it differs from"
        f" the whole by {error:.1e}, relative to its size; up to {limit:.1e} is accepted. The"
        " derivative of an integrand may be harder to integrate than the integrand. Give the"
        " solver more points or a tighter tolerance; cut the integral where its derivative is"
        " steep; or accept more by the rule's tol=, as for points drawn at random."
    )


def not_solved(name: str, error: float, limit: float, *, backwards: bool) -> NotASolutionError:
    """The error for a derivative whose solve does not meet the recorded states."""
    if not isfinite(error):
        return NotASolutionError(
            f"{name}: there is no derivative: a state, or one of those that its derivative is"
            " solved for with, is not finite. Look at what the solver reports; there may be no"
            " solution up to the last of ts."
        )
    how = (
        "from each time back to the one before, as the adjoint equation is"
        if backwards
        else "along with its derivative"
    )
    if backwards:
        advice = (
            "Give the solver a tighter tolerance or more steps; or more times in ts, between which"
            ' less is lost; or reverse="sensitivities", which only solves forwards, for an equation'
            " that is unstable backwards (a stiff or dissipative one) and few numbers to"
            " differentiate by"
        )
    else:
        advice = "Give the solver a tighter tolerance, or more steps"
    return NotASolutionError(
        f"{name}: the derivative cannot be trusted: solved once more, {how}, the state differs from"
        f" what the solver returned by {error:.1e}, relative to the component's largest size; up to"
        f" {limit:.1e} is accepted. {advice}; or accept more by the rule's tol=."
    )


def no_derivative(name: str, by: str, leads: Sequence[str], constant: str) -> CaptureError:
    """The error for a derivative with respect to a value that only the solver reads."""
    function, *points = leads
    return CaptureError(
        f"{name}: expected a derivative by what the {function} reads or by {' or '.join(points)},"
        f" got one by {by}, which the solver reads itself. Let the {function} read it; or, if the"
        f" result does not depend on it (a tolerance, a number of steps), pass {constant}."
    )
