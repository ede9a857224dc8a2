"""What a callable is made of: its name, its code, the function under its wrappers, its parameters.

Methods, partials, wrapped and callable objects are unwrapped without running any of their code. Not
here: what the code reads.
"""

import functools
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from freevars._names.introspection import (
    class_dict,
    class_name,
    instance_dict,
    is_a,
    module_parts,
    mro,
)

__all__ = [
    "codes",
    "compiled_module",
    "function_name",
    "home_name",
    "partial_parts",
    "plain_name",
    "positional",
    "scope",
    "unwrapped",
]

_DEEPEST = 200  # wrappers around wrappers
_DEEPEST_NAME = 8  # partials around partials in a name
_COMPILED = "_orig_mod"  # under this name a compiled module of layers keeps the one it compiles


def function_name(fun: object) -> str:
    """A short name for any callable: ``Model.loss``, ``partial(loss)``, ``<Model object>``."""
    return _named(fun, _DEEPEST_NAME)


def _named(fun: object, depth: int) -> str:
    wrapped: Any = None
    if type(fun) is MethodType:
        wrapped = fun.__func__
    elif not is_a(fun, type):
        attrs = instance_dict(fun)
        wrapped = attrs.get("__wrapped__", attrs.get("__func__", compiled_module(fun)))
    if type(fun) is FunctionType:
        return fun.__qualname__.rpartition("<locals>.")[2]
    if depth and is_a(fun, functools.partial):
        return f"partial({_named(partial_parts(fun)[0], depth - 1)})"
    if depth and wrapped is not None:
        return _named(wrapped, depth - 1)
    if type(fun) is BuiltinFunctionType:
        return fun.__name__
    return class_name(fun) if is_a(fun, type) else f"<{class_name(type(fun))} object>"


def plain_name(fun: Any) -> str:
    """The ``__name__`` of a callable, seen through partials; for an object, that of its class."""
    name = getattr(fun, "__name__", None)
    if isinstance(name, str):
        return name
    inner = getattr(fun, "func", None)
    return plain_name(inner) if callable(inner) else type(fun).__name__


def home_name(fun: object) -> str:
    """How names inside a function start: a callable object calls itself ``self``."""
    plain = is_a(fun, FunctionType, MethodType, functools.partial)
    return function_name(fun) if plain else "self"


def compiled_module(obj: object) -> Any:
    """The module of layers that a compiled module wraps; `None` for anything else."""
    parts = module_parts(obj)
    return dict.get(parts[-1], _COMPILED) if parts is not None else None


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from codes(const)


def scope(fun: object) -> str:
    """The function in which a nested function was written; empty for one at module level."""
    return fun.__qualname__.rpartition("<locals>.")[0] if type(fun) is FunctionType else ""


def partial_parts(obj: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    parts = (functools.partial.__dict__[part].__get__(obj) for part in ("func", "args", "keywords"))
    func, args, keywords = parts
    return func, args, keywords


def unwrapped(fun: object) -> object:
    """The plain function under methods, partials and wrappers, or as far as they can be opened."""
    for _ in range(_DEEPEST):
        attrs = instance_dict(fun)
        if type(fun) is MethodType:
            fun = fun.__func__
        elif is_a(fun, functools.partial):
            fun = partial_parts(fun)[0]
        elif "__wrapped__" in attrs:
            fun = attrs["__wrapped__"]
        elif "__func__" in attrs:
            fun = attrs["__func__"]
        elif type(fun) is FunctionType:
            return fun
        else:
            inner = compiled_module(fun)
            if inner is None:
                called = "__call__" if module_parts(fun) is None else "forward"
                dicts = (class_dict(cls) for cls in mro(type(fun)))
                call = next((d[called] for d in dicts if called in d), None)
                return call if type(call) is FunctionType else fun
            fun = inner
    return fun


def positional(fun: object, depth: int = _DEEPEST_NAME) -> list[str]:
    """The parameters that positional arguments fill, in order, as far as they are known."""
    if depth and is_a(fun, functools.partial):
        func, args, keywords = partial_parts(fun)
        return [name for name in positional(func, depth - 1)[len(args) :] if name not in keywords]
    if depth and type(fun) is MethodType:
        return positional(fun.__func__, depth - 1)[1:]
    inner = unwrapped(fun)
    if type(inner) is not FunctionType:
        return []
    names = list(inner.__code__.co_varnames[: inner.__code__.co_argcount])
    is_call = type(fun) is not FunctionType and "__wrapped__" not in instance_dict(fun)
    return names[1:] if is_call else names
