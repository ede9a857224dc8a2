"""Whose a tensor is that a run of `fun` meets: captured, an argument, or made by `fun` itself.

What was not seen made, and lives in memory that was not made inside, is captured at its first read.

Not here: what is read, written and made (`discovery.py`).
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from freevars.torch import _compat, _modes
from freevars.torch._compat import storage_key
from freevars.torch._convert import contents
from freevars.torch._convert.places import Search
from freevars.torch._convert.structure import Structure
from freevars.torch._describe import Line, ReadSite, describe, line_of_caller
from freevars.torch._modes import CaptureMode

__all__ = ["Hoist", "Provenance"]

Hoist = Callable[[Tensor], bool]


class Provenance(CaptureMode):
    """After the run, `captured` holds what was read, in order of first use."""

    def __init__(self, fun: Any, arguments: Sequence[Tensor], hoist: Hoist) -> None:
        self.fun = fun
        self.hoist = hoist
        self.level = _compat.transform_level()
        self.captured: dict[int, Tensor] = {}
        self.where: dict[int, tuple[str, int] | None] = {}
        self.arguments = {id(t): t for t in arguments}
        self.argument_keys = {storage_key(u): t for t in arguments for u in contents.inner(t)}
        self.captured_keys: dict[int, Tensor] = {}
        self.made_keys: set[int] = set()
        self._made: dict[int, weakref.ref[Tensor]] = {}
        # Made by `fun` as function modes see it, and those they do not:
        self.leaves: list[Tensor] = []
        self.makes_leaves = False
        self.looking = False  # we look at a tensor ourselves, which is no read

    def read(self, t: Tensor) -> None:
        """The first read of a foreign tensor captures it."""
        key = id(t)
        if key in self.captured or key in self.arguments or self._is_made(t):
            return
        if t.is_nested and self.hoist(t):
            self.refuse_nested(t)
        bases = self._inner(t)
        if storage_key(_compat.innermost(t)) in self.made_keys:
            self._made[key] = weakref.ref(t)
            return
        self.captured[key] = t
        self.captured_keys |= {storage_key(u): t for u in bases}
        if self.hoist(t):
            self.where[key] = line_of_caller()

    def refuse_nested(self, t: Tensor) -> None:
        message = (
            "expected captured tensors with a shape, got a nested tensor: "
            f"{self._named(t)}. Capture its parts, t.unbind(), and nest "
            "them inside; or declare it constant, by hoist= or t.detach()."
        )
        self.refuse(message)

    def returned(self, outputs: Sequence[Tensor]) -> None:
        """What `fun` returns is captured too if it did not make it."""
        self.replace(outputs)

    def _named(self, t: Tensor) -> str:
        self.looking = True
        try:
            return describe(t, self.fun, line_of_caller())
        finally:
            self.looking = False

    def drop_unheld(self) -> None:
        """Forgets the constants that nobody else holds, once the run and its results are over: the
        function made them where no mode sees it (`torch.frombuffer`), and a later call makes its
        own. What may have been computed from captured tensors there is refused."""
        self.captured_keys.clear()
        refs = {key: weakref.ref(t) for key, t in self.captured.items()}
        hoisted = {
            key: Structure.shown(t)
            for key, t in self.captured.items()
            if self.hoist(t) and _compat.owns_memory(t)
        }
        self.captured.clear()
        for key, ref in refs.items():
            t = ref()
            if t is not None:
                self.captured[key] = t
            elif key in hoisted:
                self.refuse(self._unseen_message(hoisted[key], self.where[key]))

    def _unseen_message(self, shown: str, line: Line | None) -> str:
        where = "" if line is None else f" (read at {ReadSite(*line)})"
        return (
            "expected a function whose operations all run in its own thread, through PyTorch, got "
            f"a tensor {shown}{where} that was made elsewhere: in a worker thread, or by a library "
            "outside of PyTorch. What it was computed from cannot be seen. Run it in this thread, "
            "or make that tensor outside and capture it."
        )

    def name_sharded(self, search: Search) -> list[tuple[Tensor, Tensor]]:
        """Takes the parameters that a user knows for the gathered ones that a sharded module reads;
        returns both, the latter first."""
        pairs = _compat.sharded_parameters(node.obj for node in search.met.values())
        found = [pairs[key] for key in self.captured if key in pairs]
        for gathered, parameter in found:
            self.where[id(parameter)] = self.where.get(id(gathered))
        own = {id(gathered): parameter for gathered, parameter in found}
        kept = [own.get(key, t) for key, t in self.captured.items()]
        self.captured = {id(t): t for t in kept}
        return found

    def made_and_alive(self) -> dict[int, Tensor]:
        """What the run made and somebody still holds, by id."""
        found = ((key, ref()) for key, ref in self._made.items() if key not in self.captured)
        return {key: t for key, t in found if t is not None}

    def _inner(self, t: Tensor) -> list[Tensor]:
        """Every plain tensor that reading `t` may read, where converted calls stand below us
        too."""
        found = contents.inner(t)
        given = _modes.resolve(t)
        return found if given is t else found + contents.inner(given)

    def is_foreign(self, t: Tensor) -> bool:
        return not self._is_made(t) and storage_key(t) not in self.made_keys

    def has_made(self, leaf: Tensor) -> bool:
        """Whether `fun` made the tensor that its tape ends in."""
        if any(leaf is t for t in self.leaves):
            return True
        made = any(storage_key(u) in self.made_keys for u in contents.inner(leaf))
        self.makes_leaves |= made
        return made

    def _is_made(self, t: Tensor) -> bool:
        ref = self._made.get(id(t))
        return ref is not None and ref() is t

    def replace(self, value: Any) -> Any:
        for t in contents.tensors(value):
            self.read(t)
        return value

    def note(self, value: Any) -> None:
        for t in (value,) if type(value) is Tensor else contents.tensors(value):
            if id(t) not in self.captured and id(t) not in self.arguments:
                self._made[id(t)] = weakref.ref(t)
