"""A closure as one value: callable, and a pytree whose leaves are the tensors it captured.

    f = Closure(objective, x0)
    torch.func.grad(lambda f: f(x0))(f)       # a Closure of derivatives

Not here: finding the captured tensors (`convert.py`).
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from freevars._contract import Hoist, by_position
from freevars.report import CaptureReport
from freevars.torch._compat import pytree
from freevars.torch._convert.convert import closure_convert
from freevars.torch._convert.converted import Converted, Rng, Run
from freevars.torch._convert.copies import as_leaf
from freevars.torch._convert.places import Search
from freevars.torch._describe import function_name
from freevars.torch._hooks import install_hooks
from freevars.torch._report import report_of_converted
from freevars.torch._selftest import check_release

__all__ = ["Closure"]

P = ParamSpec("P")
R = TypeVar("R")


class Closure(Generic[P, R]):
    """`fun` with the tensors that it captures as leaves: callable, and a differentiable argument.

    `Closure(fun, *example_args)(*args)` equals `fun(*args)`, in value and in every derivative, and
    every torch.func transform takes a closure as an argument: a derivative by a closure is a
    closure of derivatives. Closures that came from one another (`tree_map`, a transform) have the
    same structure; two conversions never do.

    Args:
        fun: any callable. It runs once here, on the example, and again at every call.
        *example_args: any pytree of tensors, numbers and other values.
        hoist: which captured tensors become leaves. By default every one of floating or complex
            type, so that a plain tensor can be differentiated too; else as for `closure_convert`.
        rng: as for `closure_convert`.

    Attributes:
        values: the captured tensors that are leaves, in order of first use.
        constants: those that are not, because `hoist` leaves them out.
        captures: a report of what is captured, by name (`freevars.report.CaptureReport`).
        in_struct: the example arguments with a shape and dtype in place of each tensor.
        out_struct: the same for the result.

    Raises:
        TypeError: `fun` is not callable.
        freevars.errors.CaptureError: as for `closure_convert`.
        freevars.errors.StructureError: as for `closure_convert`.

    Example:
        >>> import torch, freevars.torch as fv
        >>> w = torch.tensor([1.0, 2.0])
        >>> f = fv.Closure(lambda x: (w * x).sum(), torch.ones(2))
        >>> torch.func.grad(lambda f, x: f(x))(f, torch.tensor([3.0, 4.0])).values
        (tensor([3., 4.]),)
    """

    def __init__(
        self,
        fun: Callable[P, R],
        *example_args: Any,
        hoist: Hoist = "floating",
        rng: Rng = "allow",
    ) -> None:
        self._converted, values = closure_convert(fun, *example_args, hoist=hoist, rng=rng)
        self._values = tuple(values)
        self._converted.origin = (example_args, hoist, rng)
        self._is_mapped = False

    @classmethod
    def from_module(cls, module: torch.nn.Module) -> Self:
        """The closure of `module`, with its parameters as leaves in `module.parameters()` order.

        Nothing runs, so calls may bring any arguments. `Closure(module, x)` finds what is read
        instead.
        """
        install_hooks()
        check_release()
        converted = Converted(
            module,
            None,
            Search(module),
            tuple(module.parameters()),
            Run(normalises=next(module.buffers(), None) is not None),  # it may
        )
        new = cls._of(converted, converted.hoisted)
        new._is_mapped = False  # noqa: SLF001 (of this class)
        return new

    @classmethod
    def _of(cls, converted: Any, values: Iterable[Any]) -> Self:
        new = object.__new__(cls)
        new._converted = converted
        new._values = tuple(values)
        new._is_mapped = True  # its values may be any, not those that were captured
        return new

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The captured tensors, in order of first use: what the leaves of this pytree are."""
        return self._values

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The captured tensors that are no leaves, because `hoist` leaves them out."""
        return self._converted.constants

    @property
    def captures(self) -> CaptureReport:
        """What is captured, with names; made anew each time, by running the function once more on
        its example.

        A closure that came out of a transformation shows the types of its own values, under the
        names of the captured tensors that they replace. One made by `from_module` runs nothing, so
        it knows no lines.
        """
        return report_of_converted(self._converted, self._values if self._is_mapped else None)

    @property
    def in_struct(self) -> Any:
        """The example arguments with a shape and dtype in place of each tensor, or None if any
        will do."""
        return self._converted.in_struct

    @property
    def out_struct(self) -> Any:
        """What the example run returned, with a shape and dtype in place of each tensor."""
        return self._converted.out_struct

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            raise by_position(repr(self), kwargs)
        return self._converted(*args, *self._values)

    def __copy__(self) -> Self:
        new = self._of(self._converted, self._values)
        vars(new).update(vars(self))
        return new

    def __reduce__(self) -> Any:
        # The value of a captured leaf is sent as that leaf: it is the same object where the copy of
        # the function keeps it, and derivatives flow into it.
        of = {id(h): t for t, h in self._standing_for() if t.is_leaf}
        kept = (of.get(id(v), v) for v in self._values)
        values = tuple(as_leaf(v) if isinstance(v, Tensor) else v for v in kept)
        return _restore, (type(self), self._converted, values, {"_is_mapped": self._is_mapped})

    def _standing_for(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The captured tensors, each with the value that stands for it."""
        return zip(self._converted.captured, self._converted.hoisted, strict=True)

    def __repr__(self) -> str:
        return f"Closure({function_name(self._converted)}, {len(self._values)} captured values)"


def _restore(
    cls: type[Closure[..., Any]],
    converted: Converted[..., Any],
    values: tuple[Any, ...],
    state: dict[str, Any],
) -> Closure[..., Any]:
    new = cls._of(converted, values)
    stand = {id(t): h for t, h in new._standing_for()}  # noqa: SLF001 (of this file)
    new._values = tuple(stand.get(id(v), v) for v in values)  # noqa: SLF001
    vars(new).update(state)
    return new


def _flatten(f: Closure[..., Any]) -> tuple[list[Any], Converted[..., Any]]:
    return list(f.values), f._converted  # noqa: SLF001 (of this file)


def _unflatten(values: Iterable[Any], converted: Converted[..., Any]) -> Closure[..., Any]:
    return Closure._of(converted, values)  # noqa: SLF001


def _flatten_with_keys(f: Closure[..., Any]) -> tuple[list[tuple[Any, Any]], Converted[..., Any]]:
    values, converted = _flatten(f)
    return [(pytree.SequenceKey(i), v) for i, v in enumerate(values)], converted


_register: Any = pytree.register_pytree_node  # its types ask for a collection
_register(
    Closure,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="freevars.Closure",
)


def _optree_unflatten(converted: Converted[..., Any], values: Iterable[Any]) -> Closure[..., Any]:
    return _unflatten(values, converted)


if importlib.util.find_spec("optree") is not None:
    import optree

    register: Any = optree.register_pytree_node  # its types ask for a collection
    register(
        Closure,
        _flatten,
        _optree_unflatten,
        namespace=optree.registry.__dict__["__GLOBAL_NAMESPACE"],
    )
