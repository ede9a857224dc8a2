"""Try every private name that `_compat` and `_hooks.py` rely on, and report what a release of
PyTorch has broken.

`check_release` does it once, at first use, in milliseconds: it starts no compiler and no transform
of torch.func, which take PyTorch seconds to import. `broken` tries everything thoroughly: it is run
by the tests, and with a new release by `python -m freevars.torch._selftest`.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from freevars.errors import CaptureError
from freevars.torch import _compat, _hooks, _modes

__all__ = ["broken", "check_release"]

_CAPTURED = torch.ones(2, device="cpu")
_VMAP: Any = torch._functorch.vmap  # noqa: SLF001
_GIVEN = torch.full((2,), 10.0, device="cpu")


class _Tens(_modes.CaptureMode):
    """Gives tens where `_CAPTURED` is read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(self.replace, args), **(kwargs or {}))

    def replace(self, value: Any) -> Any:
        return _GIVEN if value is _CAPTURED else value

    def custom_function(self, cls: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del cls
        return tuple(map(self.replace, args))


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


def _double(x: Tensor) -> Any:
    return _Double.apply(x)  # type: ignore[no-untyped-call]


def _replaced(fun: Callable[[], Any]) -> Any:
    """`fun()` with tens where it reads `_CAPTURED`."""
    _hooks.install_hooks()
    with _Tens():
        return fun()


def _gives(number: float, fun: Callable[[], Any]) -> bool:
    return float(_replaced(fun)[0]) == number


def _called(module: Any, names: Sequence[str]) -> bool:
    """Whether code of `module` calls the function that was wrapped there, by its name."""
    name = next(name for name in names if hasattr(module, name))
    functions = [f for f in vars(module).values() if type(f) is FunctionType]
    found = (code for f in functions if f.__module__ == module.__name__ for code in _codes(f))
    return any(name in code.co_names for code in found)


def _codes(fun: FunctionType) -> Iterator[CodeType]:
    codes = [getattr(fun, "__wrapped__", fun).__code__]
    for code in codes:  # grows while it is walked
        codes += [c for c in code.co_consts if type(c) is CodeType]
        yield code


def _all_called(point: str) -> bool:
    return all(_called(module, names) for module, names, _, seen in _hooks.HOOKS if seen == point)


# --- quick ones


def _stack() -> bool:
    found: list[int] = []
    _replaced(lambda: found.append(len(_modes.active())))
    return found == [1] and not _modes.active()


def _storages() -> bool:
    x = torch.ones(4)
    return _compat.storage_key(x) == _compat.storage_key(x[1:]) != _compat.storage_key(x.clone())


def _engine() -> bool:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y: Any = 2 * x
    y.register_hook(lambda _: seen.append(_compat.in_backward()))
    torch.autograd.grad(y.sum(), x)
    return seen == [True] and not _compat.in_backward()


def _saved_tensors() -> bool:
    saved = _compat.Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved._pack, saved._unpack):  # noqa: SLF001
        found = [_compat.checkpointing()]
        with _compat.without_checkpoints():
            found.append(_compat.checkpointing())
        found.append(_compat.checkpointing())
    return found == [True, False, True] and not _compat.checkpointing()


def _custom_functions() -> bool:
    x = torch.ones(2, requires_grad=True)
    out = _replaced(lambda: _double(x))
    ours = _compat.is_custom_function_node(out.grad_fn)
    g = torch.autograd.grad(out.sum(), x)[0]
    return ours and torch.equal(g, 2 * _GIVEN) and _gives(20.0, lambda: _double(_CAPTURED))


@contextmanager
def _a_level() -> Iterator[int]:
    """A level of torch.func, without the imports of a whole transform."""
    with _VMAP.vmap_increment_nesting(2, "error") as level:
        yield level


def _wrapping() -> bool:
    def fun() -> Any:
        with _a_level() as level:
            batched = _VMAP._add_batch_dim(_CAPTURED, 0, level)  # noqa: SLF001
            is_batched = _compat.is_wrapped(batched) and _compat.transform_level() > 0
            return next(u for u in _compat.unwrap(batched) if not _compat.is_wrapped(u)), is_batched

    plain, is_batched = _replaced(fun)
    return is_batched and torch.equal(plain, _GIVEN) and _all_called("transforms of torch.func")


def _checkpointing() -> bool:
    """By its code alone: running it would import the compiler."""
    module, names, *_ = next(hook for hook in _hooks.HOOKS if hook[3] == "checkpointing")
    raw = inspect.unwrap(getattr(module, next(n for n in names if hasattr(module, n))))
    takes_function = next(iter(inspect.signature(raw).parameters)) == "fn"
    return takes_function and _all_called("checkpointing") and not _compat.checkpointing()


def _custom_operators() -> bool:
    kept = torch._library.custom_ops  # noqa: SLF001
    stored = kept.CustomOpDef.__init__.__code__.co_names
    return isinstance(kept.OPDEFS, object) and "_init_fn" in stored


def _tangents() -> bool:
    forward: Any = torch.autograd.forward_ad
    return (
        isinstance(forward._current_level, int)  # noqa: SLF001
        and not _compat.tangents(_CAPTURED)
        and callable(torch._C._functorch.is_legacy_batchedtensor)  # noqa: SLF001
        and callable(_compat.forward_mode)
    )


_ESSENTIAL: dict[str, Callable[[], bool]] = {
    "which modes are active": _stack,
    "which tensors share memory": _storages,
    "whether a backward pass runs": _engine,
    "hooks for saved tensors": _saved_tensors,
    "derivatives in forward mode": _tangents,
}
_OPTIONAL: dict[str, Callable[[], bool]] = {
    "custom Functions": _custom_functions,
    "transforms of torch.func": _wrapping,
    "checkpointing": _checkpointing,
    "custom operators": _custom_operators,
}
_lock = threading.Lock()
_state = {"checked": False}


def check_release() -> None:
    """Tries the touch points, once a process. Raises where one is broken that every conversion
    needs; what the others are needed for is refused where it is used."""
    if not _state["checked"]:
        with _lock:
            if not _state["checked"]:
                _modes.broken |= _try_apart(_ESSENTIAL | _OPTIONAL)
                _state["checked"] = True
    for point in _ESSENTIAL:
        if point in _modes.broken:
            raise CaptureError(_modes.broken_message(point))


def _try_apart(checks: dict[str, Callable[[], bool]]) -> dict[str, str]:
    """On a thread of its own: the caller may be inside a transform of torch.func or a mode."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try, checks).result()


def _try(checks: dict[str, Callable[[], bool]]) -> dict[str, str]:
    found = {}
    with torch.inference_mode(mode=False), torch.enable_grad():
        for name, check in checks.items():
            try:
                works, why = check(), "it gave a wrong result"
            except Exception as error:  # noqa: BLE001 (whatever a new release raises)
                works, why = False, f"{type(error).__name__}: {error}"
            if not works:
                found[name] = why
    return found


# --- at length


def _transforms() -> bool:
    grad = torch.func.grad(lambda z: (z * z).sum())
    squares = torch.func.vmap(lambda z: z * z)
    return _gives(20.0, lambda: grad(_CAPTURED)) and _gives(100.0, lambda: squares(_CAPTURED))


def _recomputation() -> bool:
    x = torch.ones(2, requires_grad=True)
    inside: list[bool] = []

    def body(y: Tensor) -> Any:
        inside.append(_compat.checkpointing())
        return (y * _CAPTURED).sin()

    def fun() -> Any:
        return checkpoint(body, x, use_reentrant=False, preserve_rng_state=False)

    (g,) = torch.autograd.grad(_replaced(fun).sum(), x)
    right = torch.allclose(g, 10 * torch.tensor(10.0).cos())
    return right and inside[0] and not _compat.checkpointing()


def _compiled_functions() -> bool:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x * _CAPTURED, backend=backend)
    return _gives(10.0, lambda: compiled(torch.ones(2))) and not graphs


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


def _tangents_at_every_level() -> bool:
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
    return float(_compat.innermost(t).flatten()[0])


def _operator_body() -> bool:
    def body(x: Tensor) -> Tensor:
        return x.clone()

    name = "freevars_self_test::clone"
    operator: Any = torch.library.custom_op(name, body, mutates_args=())
    found = _compat.operator_body(torch.ops.freevars_self_test.clone)
    return found is body and _compat.operator_body(operator._opoverload) is body  # noqa: SLF001


_AT_LENGTH: dict[str, Callable[[], bool]] = {
    "transforms of torch.func, run": _transforms,
    "checkpointing, run": _recomputation,
    "compiled functions": _compiled_functions,
    "what a transform of torch.func wraps": _unwrapping,
    "which transforms wrap a tensor": _layers,
    "derivatives in forward mode, at every level": _tangents_at_every_level,
    "the function of a custom operator": _operator_body,
}


def broken() -> list[str]:
    """One line for each touch point that does not work."""
    found = _try(_ESSENTIAL | _OPTIONAL | _AT_LENGTH)
    return [f"{name}: {why} (PyTorch {torch.__version__})" for name, why in found.items()]


if __name__ == "__main__":
    raise SystemExit("\n".join(broken()) or 0)
