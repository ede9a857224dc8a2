"""The derivatives of a differential equation's solution, by the solver that finds it.

`freevars._solvers.integration` has the equations. Not here: the decorator (`odeint`).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from freevars._sequences import replaced
from freevars._solvers.integration import not_solved
from freevars._solvers.signature import SolverCall
from freevars.torch import _compat
from freevars.torch._compat import pytree
from freevars.torch._rules.asked import Asked
from freevars.torch._rules.forms import Flat, evaluated, is_smooth
from freevars.torch._rules.integrator import operate
from freevars.torch._rules.partition import Remainder
from freevars.torch._rules.products import jvp, paired, value_and_jacobian, value_and_vjps

__all__ = ["Trajectory"]

# The leaves of a field, from t, those of the state, and the tensors that it depends on.
Fun = Callable[[Tensor, list[Tensor], Sequence[Tensor]], list[Tensor]]
Pack = Callable[[list[Tensor]], Any]

_first = operator.itemgetter(0)


class Trajectory:
    """One solution: of the times, the options' tensors, y_0, and what f depends on."""

    first_option = 1

    def __init__(
        self,
        solver: Any,
        fun: Fun,
        pack: Pack,
        takes: str,
        options: Remainder,
        states: int,
        *,
        leg: bool = False,  # between two times, which may be equal
    ) -> None:
        self.solver, self.fun, self.pack, self.takes = solver, fun, pack, takes
        self.options, self.states, self.leg = options, states, leg
        self.start = 1 + options.count  # of the leaves of y_0
        self.end = self.start + states
        self.aux: Any = None

    def answer(self, tensors: Sequence[Tensor], point: tuple[Tensor, ...]) -> list[Tensor]:
        """What the field returns, from a time and the leaves of a state."""
        values = tensors[self.end :]
        return evaluated(lambda t, *y: self.fun(t, [*y], values), *point)

    def run(self, tensors: Sequence[Tensor], asked: Asked) -> Sequence[Tensor]:
        """Call the solver, with y_0 and the field in the form in which it takes them."""
        ts, y0 = tensors[0], list(tensors[self.start : self.end])
        if self.leg and bool(_compat.innermost(ts[0] == ts[1]).all()):
            # Few solvers take equal times. This is a value, below the rule, which gives the
            # derivative by the times as for any others.
            asked.note_if_none(lambda: ((ts[0], *y0), self.answer(tensors, (ts[0], *y0))))
            return [torch.stack([y, y]) for y in y0]
        good = torch.ones((), dtype=torch.bool, device=ts.device)
        if self.leg:
            # Nor a state that is not finite, as those are from where the solver stopped short. It
            # runs all the same: in other processes, with which the field may communicate, it does.
            for y in y0:
                good = good & torch.isfinite(y).all()
            y0 = [torch.where(good, y, 0) for y in y0]
        start = self.pack(y0)
        spec = pytree.tree_structure(start)

        def field(t: Tensor, y: Any) -> Any:
            point = (t, *self.solver.like(y, start, "argument of the field"))
            slopes = self.answer(tensors, point)
            asked.note(point, slopes)
            return self.pack(slopes)

        options = self.options.combine(tensors[1 : self.start])
        call = SolverCall(None, (start, ts), (), {}, options)  # type: ignore[arg-type]
        ys, self.aux = self.solver.solved(field, call)
        states: list[Tensor] = self.solver.states_of(ys, start, spec, len(ts))
        point = (ts[-1], *(y[-1] for y in states))
        asked.note_if_none(lambda: (point, self.answer(tensors, point)))
        return [torch.where(good, y, torch.nan) for y in states] if self.leg else states

    def _solve(
        self,
        fun: Fun,
        ts: Tensor,
        state: list[Tensor],
        options: Any,
        values: Any,
        *,
        leg: bool = False,
    ) -> list[Tensor]:
        """Solve another equation by the same solver."""
        flat = Flat(state)
        whole = self.takes == "array"

        def packed(t: Tensor, y: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
            return [flat.ravel(fun(t, flat.unravel(y[0]), values))]

        start = [flat.ravel(state)] if whole else state
        pack: Pack = _first if whole else tuple
        parts = (self.solver, packed if whole else fun, pack, self.takes, self.options, len(start))
        operation = Trajectory(*parts, leg=leg or self.leg)
        out = operate(operation, [ts, *options, *start, *values])
        return flat.unravel(out[0]) if whole else out

    def _parts(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Any, list[Tensor], list[Tensor]]:
        ts, options = tensors[0], tensors[1 : self.start]
        return ts, options, list(tensors[self.start : self.end]), list(tensors[self.end :])

    def pull(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], g: Sequence[Tensor], needed: Any
    ) -> Sequence[Tensor | None]:
        """Cotangents of the times, of y_0 and of what the field depends on."""
        ts, options, y0, values = self._parts(tensors)
        wanted = [i for i, v in enumerate(values) if needed[self.end + i] and is_smooth(v)]
        backwards = self.solver.rule.reverse == "adjoint"
        solve = self._adjoint if backwards else self._by_sensitivities
        by_p, by_y, error = solve(ts, options, values, wanted, out, g)
        factor = self.solver.judged(
            error, Flat(y0).eps, g, functools.partial(not_solved, backwards=backwards)
        )
        grads: list[Tensor | None] = [None] * len(tensors)
        grads[self.start : self.end] = [ct * factor for ct in by_y]
        for i, ct in zip(wanted, by_p, strict=True):
            grads[self.end + i] = ct * factor
        if needed[0]:
            rows = []
            for i in range(len(ts)):
                slopes = self.fun(*_at(i, ts, out), values)
                rows.append(paired([ct[i] for ct in g], slopes).to(ts.dtype))
                if i == 0:
                    rows[0] = rows[0] - paired(by_y, slopes).to(ts.dtype)
            grads[0] = torch.stack(rows) * factor
        return grads

    def _adjoint(
        self, ts: Tensor, options: Any, values: list[Tensor], wanted: list[int], out: Any, g: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        m = self.states
        of_y = Flat([y[0] for y in out])

        def field(s: Tensor, state: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
            y, costate = state[:m], state[m : 2 * m]

            def f(*inputs: Tensor) -> Tensor:
                own = replaced(values, wanted, inputs[m:])
                return of_y.ravel(self.fun(-s, list(inputs[:m]), own), copy=False)

            at = [*y, *(values[i] for i in wanted)]
            value, pulled = value_and_vjps(f, at, of_y.ravel(costate, copy=False))
            return [*(-v for v in of_y.unravel(value)), *pulled]

        costate = [ct[-1] for ct in g]
        by_p = [torch.zeros_like(values[i]) for i in wanted]
        gaps, sizes = [], self._sizes(ts, out, values)
        for i in range(len(ts) - 1, 0, -1):
            times = torch.stack([-ts[i], -ts[i - 1]])
            start = [*(y[i] for y in out), *costate, *by_p]
            ends = self._solve(field, times, start, options, values, leg=True)
            end = [leaf[-1] for leaf in ends]
            gaps.append(_difference(sizes, end[:m], [y[i - 1] for y in out]))
            costate, by_p = end[m : 2 * m], end[2 * m :]
            costate = [a + ct[i - 1] for a, ct in zip(costate, g, strict=True)]
        error = torch.stack(gaps).amax() if gaps else torch.zeros(())
        return by_p, costate, error

    def _by_sensitivities(
        self, ts: Tensor, options: Any, values: list[Tensor], wanted: list[int], out: Any, g: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        m, some = self.states, [values[i] for i in wanted]
        of_y, of_p = Flat([y[0] for y in out]), Flat(some)

        def field(t: Tensor, state: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
            y, columns = state[:m], state[m]

            def f(v: Tensor, p: Tensor) -> Tensor:
                own = replaced(values, wanted, of_p.unravel(p))
                return of_y.ravel(self.fun(t, of_y.unravel(v), own))

            p = of_p.ravel([values[i] for i in wanted])
            value, (f_y, f_p) = value_and_jacobian(f, [of_y.ravel(y), p])
            # The columns of p are unit vectors, and p does not move along those of y_0.
            forced = torch.cat([f_p.to(of_y.dtype).T, torch.zeros_like(f_y)])
            return [*of_y.unravel(value), columns @ f_y.T + forced]

        unit = torch.eye(of_p.size + of_y.size, dtype=of_y.dtype, device=ts.device)
        first = unit[:, of_p.size :]
        start = [*(y[0] for y in out), first]
        solved = self._solve(field, ts, start, options, values)
        rows = torch.stack([of_y.ravel([ct[i] for ct in g]) for i in range(len(ts))])
        found = torch.einsum("tkn,tn->k", solved[m], rows)
        error = _difference(self._sizes(ts, out, values), solved[:m], out)
        return of_p.unravel(found[: of_p.size]), of_y.unravel(found[of_p.size :]), error

    def _sizes(self, ts: Tensor, out: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """How large each component of the state is on the way."""
        with torch.no_grad():
            rows = [self.fun(*_at(i, ts, out), values) for i in range(len(ts))]
            sizes = []
            for y, slopes in zip(out, zip(*rows, strict=True), strict=True):
                f = torch.stack(slopes).abs()
                way = ts.diff().abs().reshape(-1, *[1] * (f.dim() - 1)) * torch.minimum(
                    f[1:], f[:-1]
                )
                size = torch.cat([y.abs(), way.to(f.dtype) / 10]).amax(0)
                if size.numel():
                    size = torch.maximum(size, torch.finfo(y.dtype).eps ** 0.5 * size.amax())
                sizes.append(torch.where(size > 0, size, torch.ones_like(size)))
        return sizes

    def push(
        self, tensors: Sequence[Tensor], out: Sequence[Tensor], dots: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        """The tangent of the states."""
        ts, options, y0, values = self._parts(tensors)
        m, n, dts = self.states, len(values), dots[0]
        of_y = Flat(y0)
        start = [
            torch.zeros_like(y) if d is None else d
            for y, d in zip(y0, dots[self.start : self.end], strict=True)
        ]
        if dts is not None:
            slopes = self.fun(ts[0], y0, values)
            start = [d - f * dts[0] for d, f in zip(start, slopes, strict=True)]
        moving = [i for i in range(n) if dots[self.end + i] is not None and is_smooth(values[i])]
        some = [d for i in moving if (d := dots[self.end + i]) is not None]

        def field(t: Tensor, state: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
            y, d = state[:m], state[m:]

            def f(*at: Tensor) -> Tensor:
                own = replaced(inputs[:n], moving, at[m:])
                return of_y.ravel(self.fun(t, list(at[:m]), own))

            at = [*y, *(inputs[i] for i in moving)]
            like = of_y.ravel(y)
            dot = jvp(f, at, [*d, *inputs[n:]], like=like)
            return [*self.fun(t, y, inputs[:n]), *of_y.unravel(dot)]

        solved = self._solve(field, ts, [*y0, *start], options, [*values, *some])
        error = _difference(self._sizes(ts, out, values), solved[:m], out)
        asked = [*start, *some] if dts is None else [*start, *some, dts]
        factor = self.solver.judged(
            error, of_y.eps, asked, functools.partial(not_solved, backwards=False)
        )
        total = [d * factor for d in solved[m:]]
        if dts is not None:
            for i in range(len(ts)):
                slopes = self.fun(*_at(i, ts, out), values)
                for k, f in enumerate(slopes):
                    unit = torch.zeros_like(dts)
                    unit[i] = 1
                    shape = (-1, *[1] * f.dim())
                    total[k] = total[k] + (unit * dts[i]).reshape(shape) * f
        return [d.to(y.dtype) for d, y in zip(total, out, strict=True)]


def _at(i: int, ts: Tensor, ys: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One time and the state at it, which a field may differentiate by itself."""
    if not torch.is_grad_enabled():
        # The view of a tensor with a graph would say that it has one, and have none.
        ts, ys = ts.detach(), [y.detach() for y in ys]
    return ts[i], [y[i] for y in ys]


def _difference(
    sizes: Sequence[Tensor], again: Sequence[Tensor], recorded: Sequence[Tensor]
) -> Tensor:
    """How far two solutions are apart, relative to the size of each component."""
    gaps = [
        ((a - b).detach().abs() / size).amax().double()
        for size, a, b in zip(sizes, again, recorded, strict=True)
        if a.numel()
    ]
    return torch.stack(gaps).amax() if gaps else torch.zeros(())
