"""Tries every private touch point of `_compat.py`, and says which one a release of PyTorch has
broken.

Run by the tests, and by a user with a new release: `python -m freevars.torch._selftest`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freevars.torch import _compat, _hooks
from freevars.torch._convert.substitution import SubstitutionMode

__all__ = ["broken"]


class _Double(torch.autograd.Function):
    """2 x, whose backward reads a global that is replaced in the test."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        del ctx
        return 2 * g * _CAPTURED


_CAPTURED = torch.ones(2)
_DOUBLE: Any = _Double.apply


def _substituted(fun: Callable[[Tensor], Any]) -> Any:
    """`fun(ones)` with tens where it reads `_CAPTURED`."""
    _hooks.install_hooks()
    watch = SubstitutionMode(fun, {id(_CAPTURED): torch.full((2,), 10.0)})
    with watch:
        return fun(torch.ones(2))


def _gives(number: float, fun: Callable[[Tensor], Any]) -> bool:
    return float(_substituted(fun)[0]) == number


def _apply() -> bool:
    return _gives(20.0, lambda _: _DOUBLE(_CAPTURED))


def _backward_class() -> bool:
    x = torch.ones(2, requires_grad=True)
    out = _substituted(lambda _: _DOUBLE(x))
    return bool(torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((2,), 20.0)))


def _wrapping() -> bool:
    grad = torch.func.grad(lambda z: (z * z).sum())
    squares = torch.func.vmap(lambda z: z * z)
    return _gives(20.0, lambda _: grad(_CAPTURED)) and _gives(100.0, lambda _: squares(_CAPTURED))


def _recomputation() -> bool:
    x = torch.ones(2, requires_grad=True)

    def fun(_: Tensor) -> Any:
        return checkpoint(lambda y: (y * _CAPTURED).sin(), x, use_reentrant=False)

    (g,) = torch.autograd.grad(_substituted(fun).sum(), x)
    return bool(torch.allclose(g, 10 * torch.tensor(10.0).cos()))


def _compiled_callee() -> bool:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x * _CAPTURED, backend=backend)
    return _gives(10.0, compiled) and not graphs


def _stack() -> bool:
    found: list[int] = []
    _substituted(lambda _: found.append(len(_hooks.active())))
    return found == [1] and not _hooks.active()


def _unwrapping() -> bool:
    found: list[Tensor] = []
    x = torch.ones(2)

    def fun(z: Tensor) -> Tensor:
        found.extend(_compat.unwrap(z))
        return z.sum()

    torch.func.grad(fun)(x)
    return len(found) == 2 and found[1] is x  # noqa: PLR2004 (the wrapper and what it wraps)


def _layers() -> bool:
    found: list[list[tuple[str, bool | None]]] = []

    def fun(z: Tensor) -> Tensor:
        found.append(_compat.layers(z))
        return z.sum()

    x = torch.ones(2, requires_grad=True)
    torch.func.vmap(torch.func.grad(fun))(x)
    torch.func.jvp(fun, (x.detach(),), (x.detach(),))
    return found == [[("autograd", True), ("vmap", None), ("grad", True)], [("jvp", True)]]


def _tangents() -> bool:
    x = torch.ones(2)
    with torch.autograd.forward_ad.dual_level():
        dual: Any = torch.autograd.forward_ad.make_dual(x, 3 * x)  # type: ignore[no-untyped-call]
        (tangent,) = _compat.tangents(dual)
        plain = torch.equal(tangent, 3 * x) and not _compat.tangents(x)
    found: list[float] = []

    def fun(z: Tensor) -> Tensor:  # at both levels, under a third that has no tangents
        def inner(y: Tensor) -> Tensor:
            found.extend(map(_number, _compat.tangents(z)))
            return y

        torch.func.grad(inner)(torch.ones(()))
        return z

    torch.func.jvp(lambda y: torch.func.jvp(fun, (y,), (3 * x,))[1], (x,), (5 * x,))
    return plain and found == [3.0, 5.0]


def _number(t: Tensor) -> float:
    return float(list(_compat.unwrap(t))[-1].flatten()[0])


def _storages() -> bool:
    x = torch.ones(4)
    return _compat.storage_key(x) == _compat.storage_key(x[1:]) != _compat.storage_key(x.clone())


def _engine() -> bool:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y: Any = 2 * x
    y.register_hook(lambda _: seen.append(_compat.in_backward()))
    y.sum().backward()
    return seen == [True] and not _compat.in_backward()


def _operator_body() -> bool:
    def body(x: Tensor) -> Tensor:
        return x.clone()

    name = "freevars_self_test::clone"
    operator: Any = torch.library.custom_op(name, body, mutates_args=())
    found = _compat.operator_body(torch.ops.freevars_self_test.clone)
    return found is body and _compat.operator_body(operator._opoverload) is body  # noqa: SLF001


_CHECKS: dict[str, Callable[[], bool]] = {
    "the stack of function modes": _stack,
    "the hook in _SingleLevelFunction.apply": _apply,
    "the class that a custom Function's node looks up": _backward_class,
    "the hooks where torch.func wraps tensors": _wrapping,
    "the hook in checkpoint's recomputation": _recomputation,
    "the hook that runs compiled callees eagerly": _compiled_callee,
    "unwrapping torch.func's tensors": _unwrapping,
    "telling which transforms wrap a tensor": _layers,
    "reading forward-mode tangents": _tangents,
    "telling storages apart": _storages,
    "knowing that the autograd engine runs": _engine,
    "finding the function of a custom operator": _operator_body,
}


def broken() -> list[str]:
    """One line for each touch point that does not work."""
    lines = []
    for name, check in _CHECKS.items():
        try:
            works, why = check(), "gave a wrong result"
        except Exception as error:  # noqa: BLE001 (whatever a new release raises)
            works, why = False, f"{type(error).__name__}: {error}"
        if not works:
            lines.append(f"{name}: {why} (PyTorch {torch.__version__})")
    return lines


if __name__ == "__main__":
    raise SystemExit("\n".join(broken()) or 0)
